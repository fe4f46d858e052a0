"""The report: complete, self-contained, and safe against whatever a model wrote."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megarlhf import cli
from megarlhf.errors import DataError
from megarlhf.observe.metrics import OF_STEPS
from megarlhf.observe.report import JudgedResponse, Report, SampleRow, SummaryRow, read_report, write_page, write_report
from megarlhf.observe.writers import RunWriter, read_metrics

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=http://example.com/a.png>"


def demo_run(run_dir: Path) -> Report:
    """Write a made-up PPO run of 25 iterations, with earlier stages, and return what its report says."""
    with RunWriter(run_dir) as writer:
        for step in range(1, 26):
            rise = 1 - math.exp(-step / 8)
            wave = math.sin(step * 1.7)
            writer.log(
                {
                    "rollout/score_mean": -0.6 + 2.3 * rise + 0.08 * wave,
                    "rollout/reward_mean": -0.6 + 2.2 * rise + 0.08 * wave,
                    "rollout/accuracy": 0.45 + 0.45 * rise + 0.01 * wave,
                    "rollout/response_length_mean": 24 + 9 * rise + 0.3 * wave,
                    "rollout/sampler_gap_max": 4e-6 + 1e-6 * wave,
                    "kl/reference_mean": 1.5 * rise**2 + 0.03 * wave,
                    "policy/entropy_mean": 0.42 - 0.22 * rise,
                    "policy/clip_fraction": 0.02 + 0.05 * rise,
                    "value/clip_fraction": 0.01 + 0.02 * rise,
                    "policy/loss": -0.02 + 0.004 * wave,
                    "value/loss": 0.09 * math.exp(-step / 6) + 0.02,
                    "policy/grad_norm": 0.8 + 0.1 * wave,
                    "value/grad_norm": 1.1 - 0.3 * rise,
                    "time/rollout_s": 2.0,
                    "time/score_s": 1.0,
                    "time/estimate_s": 0.01,
                    "time/optimise_s": 3.0,
                    "throughput/rollout_tokens_per_s": 3000.0 if step % 2 else 4000.0,
                },
                step=step,
            )
    with RunWriter(run_dir / "sft") as writer:
        for step in range(1, 201):
            writer.log({"sft/loss": 0.4 + 3 * math.exp(-step / 30)}, step=step)
    (run_dir / "config.yaml").write_text(f"note: {HOSTILE}\nkl_coef: 0.05\n", encoding="utf-8")
    (run_dir / "command.txt").write_text("megarlhf demo seed=1\n", encoding="utf-8")
    question = "Ann has 3 boxes of 4 pens. She gives 5 pens away. How many are left?"
    short = JudgedResponse("3 * 4 = 12\nThe answer is 12.", score=-1.31, correct=False)
    whole = JudgedResponse("3 * 4 = 12\n12 - 5 = 7\nThe answer is 7.", score=2.04, correct=True)
    return Report(
        title="PPO on arithmetic word problems",
        subtitle="Llama 3, 1.2 M parameters, actor, critic, reference and reward model on 2 ranks, seed 1",
        summary=(
            SummaryRow("Accuracy, sampled", 0.4612, 0.9023, 0.4411, 0.4020, 0.4702),
            SummaryRow("Accuracy, greedy", 0.73, 0.95, 0.22, 0.19, 0.25),
            SummaryRow("Proxy reward", -0.61, 1.74, 2.35, 2.2, 2.5, unit="reward"),
            SummaryRow("Truncated", 0.012, 0.010, -0.002, -0.009, 0.005),
        ),
        samples=(
            SampleRow(question, "7", short, whole),
            SampleRow(HOSTILE, HOSTILE, JudgedResponse(HOSTILE, 0, False), whole),
        ),
        stages=(("Supervised fine-tuning", "sft"),),
    )


class Page(HTMLParser):
    """Collects what a browser would see: tags, ids, outside references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.references += [values[name] for name in ("src", "href", "xlink:href") if name in values]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    tmp_path = tmp_path_factory.mktemp("run")
    return Page(write_report(tmp_path, demo_run(tmp_path)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A whole report.json."""
    return json.dumps(asdict(demo_run(tmp_path_factory.mktemp("reported"))), indent=1)


def test_it_shows_every_curve_that_was_logged(page: Page) -> None:
    # Score, accuracy, KL, length, entropy, clip fraction, losses (2), gradient norm, gap, speed, time; SFT loss.
    assert page.tags.count("svg") == 13
    titles = " ".join(page.text)
    for title in (
        "Score",
        "KL to the reference",
        "Response length",
        "Entropy",
        "Clip fraction",
        "Policy loss",
        "SFT loss",
    ):
        assert title in titles
    assert "Reward-model loss" not in titles


def test_nothing_comes_from_outside_and_ids_are_unique(page: Page) -> None:
    assert all(reference.startswith("#") for reference in page.references)
    assert not {"img", "link", "iframe"} & set(page.tags)
    assert page.tags.count("script") == 1  # the page's own
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_what_a_model_writes_is_shown_and_not_run(page: Page) -> None:
    assert sum(HOSTILE in text for text in page.text) == 4  # prompt, answer, response, config


def test_summary_numbers(tmp_path: Path) -> None:
    text = write_report(tmp_path, demo_run(tmp_path)).read_text(encoding="utf-8")
    rows = re.findall(r"<tr>(<td>.*?)</tr>", text)
    assert rows[0].split("<td>")[1:] == [
        *("Accuracy, sampled", "46.1 %", "90.2 %", "+44.1 points", "+40.2 to +47.0 points", "yes"),
    ]
    assert rows[2].split("<td>")[1:] == ["Proxy reward", "−0.61", "1.74", "+2.35", "+2.2 to +2.5", "yes"]
    assert rows[3].endswith("<td>no")
    # 150.25 s in all; rollouts 50 s; rates weighted by time: (13 * 3000 + 12 * 4000) * 2 s / 50 s = 3480.
    assert any(re.search(r"rollout<td>50\.0 s<td>33\.3 %<td>3,480<", row) for row in rows)


def test_it_can_be_made_again_from_the_run_directory(tmp_path: Path) -> None:
    report = demo_run(tmp_path)
    first = write_report(tmp_path, report).read_text(encoding="utf-8")
    assert read_report(tmp_path) == report
    assert write_report(tmp_path, read_report(tmp_path)).read_text(encoding="utf-8") == first


def test_a_run_without_anything_still_has_a_page(tmp_path: Path) -> None:
    page = Page(write_page(tmp_path).read_text(encoding="utf-8"))
    assert tmp_path.name in " ".join(page.text)
    assert "No step was logged." in page.text
    assert "svg" not in page.tags


def test_judges_are_shown_with_their_weights_and_what_they_add_up_to(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        for step, (taste, right) in enumerate([(-2.0, 0.25), (1.0, 0.75)], 1):
            judges = {"judge/taste_mean": taste, "judge/taste_weight": 0.5, "judge/answer_mean": right}
            total = {"rollout/score_mean": 0.5 * taste + 2 * right, "rollout/reward_mean": -0.125 * step}
            writer.log({**judges, "judge/answer_weight": 2.0, **total}, step=step)
    page = write_page(tmp_path).read_text(encoding="utf-8").partition('<h2 id="judges">')[2].partition("</div>")[0]
    rows = [re.split(r"<td>", row.removesuffix("</tr>"))[1:] for row in page.split("<tr>")[2:]]
    rows[-1][-1] = rows[-1][-1].partition("</tr>")[0]
    assert rows == [
        ["taste", "0.5", "−2", "1", "−1", "0.5"],
        ["answer", "2", "0.25", "0.75", "0.5", "1.5"],
        ["sum", "", "", "", "−0.5", "2"],
        ["after shaping, and a KL in the reward", "", "", "", "−0.125", "−0.25"],
    ]


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((4.0, 5.0, 3.0, 2.1), ""),
        (
            (4.0, 5.0, 3.0, 9.0, 2.0),
            "<b>Responses have far fewer steps than at first, by judge prm</b> 4 in the first 3 iterations, 2 in the",
        ),
        ((1.0, 1.0, 1.0, 2.5), "far more steps than at first, by judge prm</b> 1 in the first 3 iterations, 2.5 in"),
    ],
)
def test_steps_are_drawn_and_a_policy_that_makes_others_is_told_of(
    counts: tuple[float, ...], says: str, tmp_path: Path
) -> None:
    shares = {f"steps/prm_{name}": 0.2 for name in OF_STEPS if name.startswith("share")}
    with RunWriter(tmp_path) as writer:
        for step, count in enumerate(counts, 1):
            writer.log({**shares, "steps/prm_per_response": count, "steps/prm_tokens": 12 / count}, step=step)
    text = write_page(tmp_path).read_text(encoding="utf-8")
    for title in ("Steps of a response", "Tokens of a step", "Where the scores of prm stand"):
        assert title in text
    assert Page(text).tags.count("svg") == 3
    said = re.findall(r"<p class=warning>(.*?)</p>", text)
    assert len(said) == bool(says)
    assert says in "".join(said)


def test_a_warning_of_the_run_is_the_pages_first_line(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        for step, flag in enumerate((0.0, 0.0, 1.0, 1.0, 0.0), start=1):
            curves = {"rollout/score_mean": step - 2.5, "rollout/accuracy": 0.4 / step, "kl/reference_mean": 9.0 * step}
            writer.log({**curves, "warning/over_optimised": flag, "warning/kl_over_bound": float(step == 5)}, step=step)
    main = write_page(tmp_path).read_text(encoding="utf-8").split("<main>")[1]
    said = re.findall(r"<p class=warning>(.*?)</p>", main)
    over, far = said
    assert over.startswith(
        "<b>The score rises while accuracy falls: the reward model is over-optimised</b> (steps 3 to 4)"
    )
    assert over.endswith("rollout/score_mean −1.5 → 1.5; rollout/accuracy 0.4 → 0.1")
    assert far.endswith("farther from the reference than kl_bound</b> (steps 5 to 5). kl/reference_mean 9 → 45")
    assert main.strip().startswith("<p class=warning>")


def judged(step: int, index: int) -> dict[str, object]:
    """A line of samples.jsonl."""
    verdict = {"score": 1.5 * index, "correct": index % 2 == 0}
    return {"step": step, "prompt": f"prompt {index}", "answer": "7", "response": f"said {index} at {step}", **verdict}


def test_a_users_run_says_that_it_is_finished_and_shows_its_numbers_and_rollouts(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.log({"rollout/score_mean": step / 4, "rollout/accuracy": step / 10}, step=step)
            writer.samples([judged(step, index) for index in range(10)], step)
    text = " ".join(Page(write_page(tmp_path).read_text(encoding="utf-8")).text)
    assert "Stopped after 3 steps; no state is saved to go on from." in text
    (tmp_path / "model").mkdir()
    page = write_page(tmp_path).read_text(encoding="utf-8")
    text = " ".join(Page(page).text)
    assert "Finished after 3 steps." in text
    assert "<tr><td>rollout/score_mean<td>0.25<td>0.75<td>0.25<td>0.75<td>reward</tr>" in page
    # Eight rollouts of each step, the last one's shown.
    assert [text.count(f" at {step}") for step in (1, 2, 3)] == [8, 8, 8]
    assert re.findall(r"id='samples-(\d)'( checked|)><label for='samples-\d'>(.*?)</label>", page) == [
        ("0", "", "step 1"),
        ("1", "", "step 2"),
        ("2", " checked", "step 3"),
    ]
    assert "score −" not in text
    assert "score +1.50" in text


def test_a_rollout_shows_what_each_of_its_steps_is_worth(tmp_path: Path) -> None:
    few, many = {"prm": [0.5, -0.25]}, {"prm": [1.0] * 14}
    odd = ([1.0], {"prm": ["x"], "rm": None})
    lines = [{**judged(1, at), "steps": steps} for at, steps in enumerate((few, many, *odd))]
    (tmp_path / "samples.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = " ".join(Page(write_page(tmp_path).read_text(encoding="utf-8")).text)
    assert text.count("by step") == 2
    assert "prm by step +0.50 −0.25" in text
    assert f"prm by step {'+1.00 ' * 12}… 2 more" in text


DAMAGED = (
    *(
        "5",
        "[]",
        "{}",
        '"step"',
        "null",
        "not JSON",
        '{"step": null, "policy/loss": 1}',
        '{"step": 1.5}',
        '{"step": true}',
    ),
    *('{"step": -1}', '{"step": 1' + "0" * 400 + "}", "[" * 5000, '{"step": ' + "9" * 5000 + "}"),
    *('{"step": 2, "policy/loss": "1"}', '{"step": 2, "policy/loss": [1]}', '{"step": 2, "policy/loss": true}'),
    *('{"step": 2, "policy/loss": 1e308}', '{"step": 2, "policy/loss": -1e308}', '{"step": 2, "policy/loss": NaN}'),
    *('{"step": 2, "policy/loss": -Infinity}', '{"step": 2, "policy/loss": 1' + "0" * 400 + "}"),
)
"""Lines that no run writes."""


def test_lines_that_no_run_writes_are_left_out_and_counted(tmp_path: Path) -> None:
    good = ['{"step": 1, "policy/loss": 0.25, "value/loss": null}', '{"step": 3, "policy/loss": 0.75}']
    lines = [good[0], *DAMAGED, good[1]]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b'{"step": 4')
    assert read_metrics(tmp_path).unread == len(DAMAGED) + 1
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert f"{len(DAMAGED) + 1} lines of metrics.jsonl that no run writes are left out." in page
    assert "<tr><td>policy/loss<td>0.25<td>0.75<td>0.25<td>0.75<td>1</tr>" in page


def test_odd_rollouts_are_left_out_and_counted_or_shown_as_far_as_they_go(tmp_path: Path) -> None:
    odd = [
        {"step": 1},
        {**judged(1, 0), "response": 5},
        {**judged(1, 0), "prompt": [1]},
        {**judged(1, 0), "step": None},
    ]
    shown = [
        {**judged(1, 1), "score": None, "correct": None, "answer": None},
        {**judged(1, 2), "score": "high", "correct": "yes", "answer": 7},
        {**judged(1, 3), "score": math.nan, "response": HOSTILE},
        {**judged(1, 4), "prompt": [{"role": "user", "content": "Why?"}], "response": "half a pair: \ud83d"},
    ]
    lines = [json.dumps(row) for row in (*odd, *shown)] + ["5", "[]", "{"]
    (tmp_path / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines))
    page = Page(write_page(tmp_path).read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert f"{len(odd) + 3} lines of samples.jsonl that no run writes are left out." in text
    assert "said 1 at 1" in text
    assert "said 2 at 1" in text
    assert HOSTILE in page.text
    assert re.search(r"user\s+Why\?", text)
    assert "half a pair: \\ud83d" in text
    assert page.tags.count("script") == 1  # the page's own


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text[: len(text) // 2], "the file: Invalid JSON"),
        (lambda _: "5", "the file: Input should be"),
        (lambda _: "[]", "the file: Input should be"),
        (lambda _: "{}", "title: Field required"),
        (lambda text: text.replace('"score": -1.31', '"score": "low"'), "samples.0.before.score: Input should be"),
        (lambda text: text.replace('"before": 0.4612', '"before": null'), "summary.0.before: Input should be"),
        (lambda text: text.replace('"title": "PPO', '"title": 5, "_": "PPO'), "title: Input should be a valid string"),
        (lambda text: text.replace('"sft"', '"../.."'), "'../..' is outside of the run"),
        (lambda text: text.replace('"sft"', '"/"'), "'/' is outside of the run"),
        (lambda text: text.replace('"main": "."', '"main": ".."'), "'..' is outside of the run"),
    ],
)
def test_a_damaged_report_is_refused_by_name(
    change: Callable[[str], str], problem: str, reported: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    path.write_text(change(reported), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != reported
    remedy = "; remove it for a page of the curves alone"
    with pytest.raises(DataError, match=rf"^{re.escape(f'{path}: {problem}')}.*{remedy}"):
        write_page(tmp_path)
    path.unlink()
    assert "No step was logged." in write_page(tmp_path).read_text(encoding="utf-8")  # the remedy works


@pytest.mark.parametrize(
    "name",
    [
        *("command.txt", "config.yaml", "versions.json", "metrics.jsonl", "samples.jsonl", "report.json"),
        *("about.json", "trainer.txt"),
    ],
)
def test_links_out_of_a_run_are_refused(name: str, tmp_path: Path) -> None:
    secret, run = tmp_path / "secret", tmp_path / "run"
    secret.write_text('{"step": 1}\n')
    run.mkdir()
    (run / name).symlink_to("../secret")
    with pytest.raises(
        DataError, match=rf"^{re.escape(str(run / name))}: leads to {re.escape(str(secret))}, which is outside"
    ):
        write_page(run)
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(DataError, match=r": is no file that can be read; remove it\.$"):
        write_page(run)


def test_a_stage_that_is_a_link_out_of_the_run_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "sft").symlink_to(tmp_path)
    (run / "report.json").write_text(json.dumps(asdict(Report("title", "", stages=(("SFT", "sft"),)))))
    with pytest.raises(DataError, match="'sft' is outside of the run"):
        write_page(run)


@pytest.mark.parametrize("name", ["report.html", "report.html.partial"])
def test_a_link_in_the_pages_place_is_replaced_and_what_it_names_is_left_alone(name: str, tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    run.mkdir()
    (run / name).symlink_to(precious)
    assert write_page(run).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert precious.read_text() == "mine"
    assert sorted(path.name for path in run.iterdir()) == ["report.html"]


def test_the_command_names_the_runs_below(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunWriter(tmp_path / "sft") as writer:
        writer.log({"sft/loss": 0.5}, step=1)
    assert cli.main(["report", f"run_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"run_dir {tmp_path}: no metrics.jsonl there; did you mean {tmp_path / 'sft'}?\n"
    (tmp_path / "sft" / "command.txt").symlink_to("/etc/passwd")
    assert cli.main(["report", f"run_dir={tmp_path / 'sft'}"]) == 2
    assert "leads to /etc/passwd, which is outside of the run" in capsys.readouterr().err
