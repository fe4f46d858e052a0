"""The report: complete, self-contained, and safe against whatever a model wrote."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megarlhf.observe.report import JudgedResponse, Report, SampleRow, SummaryRow, read_report, write_report
from megarlhf.observe.writers import RunWriter

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


def test_it_shows_every_curve_that_was_logged(page: Page) -> None:
    # Score, accuracy, KL, length, entropy, clip fraction, two losses, gradient norm, sampler gap; SFT loss.
    assert page.tags.count("svg") == 11
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
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
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
    page = Page(write_report(tmp_path, read_report(tmp_path)).read_text(encoding="utf-8"))
    assert tmp_path.name in " ".join(page.text)
    assert "svg" not in page.tags
