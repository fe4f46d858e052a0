"""How a page says it stands with a run, what it warns of first, and what a run says of itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megarlhf.errors import DataError
from megarlhf.observe import lock
from megarlhf.observe.about import read_about, write_about
from megarlhf.observe.report import write_page
from megarlhf.observe.starts import note_start, read_starts
from megarlhf.observe.status import status_of
from megarlhf.observe.writers import RunWriter, read_metrics
from tests.helpers.pages import ABOUT, policy_run


def capsule(run_dir: Path, step: int, rank: int, reason: object, attempt: str = "") -> None:
    directory = run_dir / "capsules" / f"step_{step:08d}"
    directory.mkdir(parents=True, exist_ok=True)
    note = {"reason": reason, "where": f"step {step}, optimise, actor", "attempt": attempt}
    (directory / f"rank_{rank}.json").write_text(json.dumps(note))


def said(run_dir: Path) -> tuple[str, str]:
    status = status_of(run_dir, read_metrics(run_dir).rows, read_about(run_dir))
    return status.word, status.text


def test_a_run_is_stopped_running_failed_or_finished(tmp_path: Path) -> None:
    policy_run(tmp_path, iterations=7)
    assert said(tmp_path) == ("stopped", "Stopped after 7 of 20 iterations; no state is saved to go on from.")
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert said(tmp_path) == ("stopped", "Stopped after 7 of 20 iterations; the same command goes on after step 5.")
    capsule(tmp_path, 3, 0, "of the past")
    assert said(tmp_path)[0] == "stopped"
    for rank, reason in enumerate(("the loss is nan", "the loss is nan", "gone")):
        capsule(tmp_path, 7, rank, reason)
    capsule(tmp_path, 7, 3, ["no text"])
    (tmp_path / "capsules" / "step_00000007" / "rank_4.json").write_text("{")
    assert said(tmp_path) == (
        "failed",
        "Failed in the step after 7 of 20 iterations; what the ranks left is in capsules/step_00000007.",
    )
    with lock.held(tmp_path / "lock", "it", "run_dir"):
        assert said(tmp_path)[0] == "failed"  # the run itself makes its page, at its end
    hold = "import sys; from pathlib import Path; from megarlhf.observe.lock import held\n"
    hold += f"with held(Path({str(tmp_path / 'lock')!r}), 'it', 'run_dir'): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert said(tmp_path) == ("running", "Running: after 7 of 20 iterations, when this page was made.")
        other.communicate("")
    main = write_page(tmp_path).read_text(encoding="utf-8").split("<main>")[1]
    warning = re.findall(r"<p class=warning>(.*?)</p>", main)[0]
    assert main.strip().startswith("<p class=warning>")
    assert warning.endswith("</b> the loss is nan (step 7, optimise, actor); gone (step 7, optimise, actor)"), warning
    (tmp_path / "model").mkdir()
    assert said(tmp_path) == ("finished", "Finished early, after 7 of 20 iterations.")
    write_about(tmp_path, replace(ABOUT, steps=7))
    assert said(tmp_path) == ("finished", "Finished after 7 of 7 iterations.")


def test_a_run_that_failed_before_its_first_step_says_so(tmp_path: Path) -> None:
    capsule(tmp_path, 0, 0, "gate")
    assert said(tmp_path)[1] == "Failed before its first step; what the ranks left is in capsules/step_00000000."


def test_a_capsule_that_leads_out_of_the_run_is_refused(tmp_path: Path) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret"
    secret.write_text('{"reason": "secret"}')
    capsule(run, 0, 0, "gate")
    (run / "capsules" / "step_00000000" / "rank_1.json").symlink_to(secret)
    with pytest.raises(DataError, match="which is outside of the run"):
        write_page(run)


def test_what_looks_wrong_is_said_first(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            of_judge = {"judge/web_failures": float(step), "judge/web_mean": 0.0}
            writer.log({"rollout/accuracy": 0.0, "train/skipped_steps": step - 1.0, **of_judge}, step=step)
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"<p class=warning><b>(.*?)</b>", page) == [
        "2 optimiser steps were skipped",
        "Judge web did not judge 6 rollouts as meant",
        "No response was ever right",
    ]
    assert "<p class=warning>" not in page_of_a_good_run(tmp_path / "good")


def page_of_a_good_run(run_dir: Path) -> str:
    policy_run(run_dir)
    return write_page(run_dir).read_text(encoding="utf-8")


def test_a_page_says_what_a_run_was_made_of(tmp_path: Path) -> None:
    page = page_of_a_good_run(tmp_path).replace("<wbr>", "")
    assert "<tr><td>actor<td>runs/sft/model<td>0.218 M parameters, language</tr>" in page
    assert "<tr><td>taste<td>tiny-s<td>8.03 B parameters, scalar</tr>" in page
    row = "<td>problems.jsonl (train)<td>3,000<td>9<td>63,000<td>chat<td>question, answer<td>1.7</tr>"
    assert f"<tr><td>prompts{row}" in page
    assert "<tr><td>actor.optim.lr<td>0.0002<td>3e-06</tr>" in page
    assert "kl_coef<td>" not in page


def test_a_damaged_file_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text('{"unit": 5}')
    with pytest.raises(DataError, match=r"about\.json: .*; remove it, and the page does without\."):
        write_page(tmp_path)
    write_about(tmp_path, ABOUT)
    assert read_about(tmp_path) == ABOUT
    assert write_page(tmp_path).exists()
    (tmp_path / "about.json").unlink()
    assert write_page(tmp_path).exists()


def test_a_failure_before_the_last_start_is_of_the_past(tmp_path: Path) -> None:
    policy_run(tmp_path, iterations=7)
    note_start(tmp_path, ["grpo"], 0, {})
    capsule(tmp_path, 7, 0, "the loss is nan", attempt="20990101T000000")
    assert said(tmp_path)[0] == "failed"
    capsule(tmp_path, 7, 0, "the loss is nan", attempt="20010101T000000")
    assert said(tmp_path)[0] == "stopped"


def test_a_page_says_when_a_run_was_started_and_what_was_changed(tmp_path: Path) -> None:
    """Lines that no run writes are left out, and what they say is escaped."""
    policy_run(tmp_path)
    note_start(tmp_path, ["grpo"], 0, {})
    assert "Changed on the way" not in write_page(tmp_path).read_text(encoding="utf-8")
    note_start(tmp_path, ["grpo", "iterations=40"], 20, {"iterations": (20, 40), "judges.<b>.url": ("<i>", None)})
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"at": 3}\n[]\n{"at": "x", "after_step": 1, "changes": {"a": 1}}\n{"at": "torn')
    starts = read_starts(tmp_path)
    assert [(start.after_step, dict(start.changes)) for start in starts] == [
        (0, {}),
        (20, {"iterations": (20, 40), "judges.<b>.url": ("<i>", None)}),
        (1, {}),
    ]
    page = write_page(tmp_path).read_text(encoding="utf-8").replace("<wbr>", "")
    assert f"{starts[0].at}, started 3 times, last x" in page
    assert f"<td>{starts[1].at}, after step 20<td>iterations<td>20<td>40</tr>" in page
    assert "judges.&lt;b&gt;.url<td>&lt;i&gt;<td>None</tr>" in page


def test_a_run_of_ten_thousand_steps_has_a_page_of_less_than_a_megabyte(tmp_path: Path) -> None:
    policy_run(tmp_path, iterations=10_000)
    page = write_page(tmp_path).read_bytes()
    assert len(page) < 1_000_000
    assert page.count(b"class=panel>") == 12
    for step in (5, 10_000):
        assert f"said 0 at {step}<".encode() in page
    assert write_page(tmp_path).read_bytes() == page


def test_long_texts_and_conversations_are_shown_from_both_ends_and_the_page_stays_small(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": f"turn {at} " + 9000 * "x" + f" end {at}"} for at in range(40)]
    with RunWriter(tmp_path) as writer:
        for step in range(1, 40):
            text = f"begins {step} " + 90_000 * "y" + f" ends {step}"
            rows = [{"prompt": [*talk[:-1], {"role": "user", "content": f"{at}"}], "response": text} for at in range(9)]
            writer.samples(rows, step)
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    for shown in ("begins 39 ", " ends 39<", "turn 0 ", " end 0<", "turn 38 ", "[… 30 turns …]", "[… 87,0"):
        assert shown in page
    assert "turn 20 " not in page
