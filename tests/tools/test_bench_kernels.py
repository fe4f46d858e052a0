"""The kernel benchmark at tiny sizes: what it writes is complete and adds up, and what is wrong is said to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from tools.bench_kernels import KERNELS, parse, report, table
from tools.kernel_bench.base import PRESETS, Case, Inputs, Maker, Outputs, Provider
from tools.kernel_bench.measure import Measured, in_fp64, measure, with_leaves
from tools.kernel_bench.peers import PEERS, with_peers

ROOT = Path(__file__).resolve().parents[2]
BOTH = ("token_logprob", "linear_logprob", "full_kl")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> tuple[dict, str]:
    """What the command writes, and prints."""
    path = tmp_path_factory.mktemp("bench") / "kernels.json"
    command = [sys.executable, "tools/bench_kernels.py", "--preset", "tiny", "--threads", "1", "--json", str(path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=True)
    return json.loads(path.read_text()), done.stdout


def test_json_is_complete(bench) -> None:
    written, _ = bench
    assert written["command"].startswith("python tools/bench_kernels.py --preset tiny")
    assert {"python", "commit", "torch", "triton", "liger-kernel", "quack-kernels"} <= written["versions"].keys()
    assert written["machine"]["threads"] == 1
    assert written["workload"]["linear"] == [[48, 16]]
    assert written["ceilings"].keys() == {"matmul", "copy"}
    assert [case["kernel"] for case in written["cases"] if case["passes"] == "forward+backward"] == [
        *("token_logprob", "linear_logprob", "linear_ppo", "full_kl", "policy_value_loss")
    ]
    assert {case["kernel"] for case in written["cases"]} == KERNELS.keys()
    assert len(written["cases"]) == len(KERNELS) + len(BOTH)


def test_every_provider_is_right_and_its_numbers_add_up(bench) -> None:
    written, _ = bench
    for case in written["cases"]:
        rows = {row["provider"]: row for row in case["providers"]}
        assert {"ours", "torch"} <= rows.keys()
        best = rows[case["best_peer"]]
        assert best["seconds"] == min(row["seconds"] for row in rows.values() if row["is_peer"])
        assert rows["ours"]["implementation"] == "reference"
        assert not rows["ours"]["is_peer"]
        for row in rows.values():
            assert row["status"] == "right", (case["kernel"], row)
            assert 0 < row["max_error"] < 1e-5
            assert row["max_error"] == max(error["relative"] for error in row["errors"].values())
            assert len(row["all_seconds"]) == 5
            assert row["seconds"] == median(row["all_seconds"]) > 0
            assert row["ratio"] == pytest.approx(row["seconds"] / best["seconds"])
            assert row["per_s"] == pytest.approx(case["work"] / row["seconds"])
            assert row["share_of_ceiling"] == pytest.approx(row["per_s"] / written["ceilings"][case["bound"]])
            assert row["peak_bytes"] >= 0


def test_work_is_what_nobody_can_save(bench) -> None:
    work = {(case["kernel"], case["passes"]): case["work"] for case in bench[0]["cases"]}
    product = 2 * 48 * 97 * 16
    assert work["linear_logprob", "forward"] == product
    assert work["linear_logprob", "forward+backward"] == work["linear_ppo", "forward+backward"] == 3 * product
    logits = 24 * 97 * 4
    assert work["token_logprob", "forward+backward"] == 3 * work["token_logprob", "forward"] == 3 * logits
    assert work["full_kl", "forward"] == 2 * logits
    assert work["rewards_gae", "forward"] == 6 * 40 * (6 * 4 + 1)


def test_the_table_says_what_was_measured_and_who_is_missing(bench) -> None:
    written, printed = bench
    assert printed.startswith("ceilings: matmul")
    assert "linear_ppo forward+backward, N 48 V 97 H 16" in printed
    assert "best peer" in printed
    for name, reason in written["missing"].items():
        assert any(name in line and reason in line for line in printed.splitlines())
    served = {name for case in written["cases"] for name in (row["provider"] for row in case["providers"])}
    assert {peer.name for peer in PEERS} <= served | written["missing"].keys()


def a_case(kernel: str, passes: str = "forward+backward") -> tuple[Case, Maker]:
    maker = Maker(PRESETS["tiny"], torch.device("cpu"))
    return next(case for case in KERNELS[kernel](maker) if case.passes == passes), maker


def provider(case: Case, name: str) -> Provider:
    return next(one for one in case.providers if one.name == name)


def test_a_wrong_provider_is_said_to_be_wrong_and_not_timed() -> None:
    case, maker = a_case("linear_logprob")
    torch_run = provider(case, "torch").run

    def one_gradient_for_all(x: Inputs) -> Outputs:
        outputs = torch_run(x)
        # The values are right; every token gets the mean of the gradients.
        mean = outputs["logprobs"].mean()
        return {**outputs, "logprobs": outputs["logprobs"].detach() + (mean - mean.detach())}

    def fails(_: Inputs) -> Outputs:
        raise RuntimeError("no such device\nand more")

    planted = [Provider("wrong", one_gradient_for_all), Provider("fails", fails)]
    found = report(case, measure(case, [*case.providers, *planted], maker, 5), 1e9)
    rows = {row["provider"]: row for row in found["providers"]}
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["errors"]["logprobs"]["relative"] < 1e-5
    assert rows["wrong"]["errors"]["d_hidden"]["relative"] > 0.1
    assert rows["fails"]["status"] == "failed"
    assert rows["fails"]["failure"] == "RuntimeError: no such device"
    for name in ("wrong", "fails"):
        assert rows[name]["all_seconds"] == []
        assert rows[name]["seconds"] is rows[name]["ratio"] is rows[name]["peak_bytes"] is None
    assert rows["ours"]["status"] == "right"
    lines = "\n".join(table(found))
    assert "WRONG: error" in lines
    assert "FAILED: RuntimeError: no such device" in lines


@pytest.mark.parametrize("scale", [-1.0, 1.01, float("nan")])
@pytest.mark.parametrize("kernel", ["token_logprob", "full_kl", "policy_value_loss"])
def test_signs_and_scales_are_judged(kernel: str, scale: float) -> None:
    case, maker = a_case(kernel)
    run = provider(case, "torch").run
    scaled = Provider("scaled", lambda x: {name: scale * output for name, output in run(x).items()})
    (found,) = measure(case, [scaled], maker, 5)
    assert found.wrong
    assert not found.seconds


def test_ratios_are_those_of_medians_to_the_fastest_peer_with_gradients_of_tokens() -> None:
    case, _ = a_case("linear_ppo")
    run = provider(case, "torch").run
    measured = [
        Measured(Provider("ours", run, is_peer=False), seconds=[1.0, 2.0, 90.0], peak_bytes=10),
        Measured(Provider("torch", run), seconds=[4.0, 5.0, 1.0], peak_bytes=40),
        Measured(Provider("slow", run), seconds=[9.0, 9.0, 9.0], peak_bytes=5),
        Measured(Provider("one sum", run, is_peer=False), seconds=[0.5, 0.5, 0.5], peak_bytes=None),
        Measured(Provider("wrong", run), wrong=True),
    ]
    found = report(case, measured, case.work)
    assert found["best_peer"] == "torch"
    assert [row["ratio"] for row in found["providers"]] == [0.5, 1.0, 2.25, 0.125, None]
    assert [row["peak_ratio"] for row in found["providers"]] == [0.25, 1.0, 0.125, None, None]
    assert [row["share_of_ceiling"] for row in found["providers"]][:2] == [0.5, 0.25]


def test_fp64_in_blocks_is_fp64_at_once(monkeypatch) -> None:
    case, _ = a_case("linear_ppo")
    names = ("loss_without_entropy", "d_hidden", "d_weight")
    whole = in_fp64(case, with_leaves(case, case.inputs), names)
    monkeypatch.setattr("tools.kernel_bench.measure.BLOCK", 7)
    blocks = in_fp64(case, with_leaves(case, case.inputs), names)
    assert all(x.dtype == torch.float64 for x in whole.values())
    torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-12)


def test_a_peer_that_cannot_be_imported_says_why() -> None:
    case, maker = a_case("linear_ppo")
    missing: dict[str, str] = {}
    names = {one.name for one in with_peers(case, maker.device, missing)}
    serving = {peer.name for peer in PEERS if ("linear_ppo", "forward+backward") in peer.serves}
    assert serving == (names | missing.keys()) & serving
    assert all(reason for reason in missing.values())


def test_fewer_than_five_repeats_are_no_median(capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--repeats", "4"])
    assert "--repeats 4: must be at least 5." in capsys.readouterr().err
