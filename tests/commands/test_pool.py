"""`megarlhf generate pool=DIR`: bit for bit the same however often it is killed; it grows; two ranks draw it alike."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.commands import generate
from megarlhf.commands.generate import GenerateConfig
from megarlhf.data.arithmetic import prompt_rows
from megarlhf.errors import ConfigError, DataError
from megarlhf.eval.pool import SHARD, Order, Place, open_pool, shards, written
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.pools import DATA, said, write_pool
from tests.helpers.ranks import forking, run_ranks

CLOSE = 2e-5
"""fp32, where another number of rows is decoded at once."""
ALONE = ParallelLayout()


def config(pool: Path, layout: ParallelLayout = ALONE, **changes: Any) -> GenerateConfig:
    """Six prompts, in parts of four responses."""
    given: dict[str, Any] = {
        "model": "tiny-xs",
        "tokenizer": "arithmetic",
        "prompts": DATA,
        "sampling": {"temperature": 1.0, "max_new_tokens": 8},
        "rollout": {"rows": 4 // layout.data},
        "n": 3,
        "layout": layout,
        "pool": pool,
        **changes,
    }
    return GenerateConfig.model_validate(given)


def draw(cfg: GenerateConfig) -> None:
    generate.run(cfg, generate.prepare(cfg), start(cfg.layout, seed=cfg.seed))


def drawn(pool: Path, layout: ParallelLayout = ALONE, **changes: Any) -> dict[str, bytes]:
    """Every file of the pool, by name, once the command has run."""
    run_ranks(draw, layout.world_size, config(pool, layout, **changes))
    return files(pool)


def files(pool: Path) -> dict[str, bytes]:
    return {str(path.relative_to(pool)): path.read_bytes() for path in sorted(pool.rglob("*")) if path.is_file()}


def lines(pool: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in shards(pool) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool that nothing has stopped."""
    pool = tmp_path_factory.mktemp("pools") / "whole"
    drawn(pool)
    return pool


def test_it_holds_all_that_a_judge_or_a_reader_needs(whole: Path) -> None:
    rows = lines(whole)
    assert [(row["row"], row["sample"]) for row in rows] == [(row, at) for row in range(6) for at in range(3)]
    for row in rows:
        assert len(row["ids"]) == len(row["logprobs"]) == row["tokens"] <= 8
        assert row["logprob"] == pytest.approx(sum(row["logprobs"]), abs=1e-12)
        assert row["terminated"] == (row["ids"][-1] == open_pool(whole).tokenizer.eos_id)
    pool = open_pool(whole)
    texts = [pool.tokenizer.decode(row["ids"]) for row in rows]
    assert texts == [row["response"] for row in rows]
    assert [*pool.prompts.columns] == prompt_rows(DATA.arithmetic, "train")
    assert pool.about["settings"]["model"] == "tiny-xs"
    assert pool.about["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("kept", "torn"), [(0, 1), (4, 0), (7, 20), (18, 0)])
def test_an_interrupted_pool_becomes_the_whole_one(kept: int, torn: int, whole: Path, tmp_path: Path) -> None:
    """Cut inside the first line, between parts, inside one; and when nothing is left to do."""
    there = files(whole)
    begun = {name: there[name] for name in ("pool.json", "prompts.jsonl")}
    (shard,) = (name for name in there if "shard" in name)
    rows = there[shard].splitlines(keepends=True)
    begun[shard] = b"".join(rows[:kept]) + (rows[kept][:torn] if torn else b"")
    for name, content in begun.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = drawn(tmp_path)
    assert {name: found[name] for name in begun} == {name: there[name] for name in begun}


def rank(port: int, cfg: GenerateConfig) -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    draw(cfg)


def test_kills_change_nothing(tmp_path: Path) -> None:
    """A process that draws is killed, wherever it is, until one of them comes to the end."""
    changes = {"n": 24, "rollout": {"rows": 2}}
    there, pool, kills = drawn(tmp_path / "whole", **changes), tmp_path / "killed", 0
    while written(pool) < 6 * 24:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = forking().Process(target=rank, args=(port, config(pool, **changes)))
        process.start()
        before = written(pool)
        while process.is_alive() and written(pool) <= before + 50:
            time.sleep(0.002)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 2
    assert drawn(pool, **changes) == there


def test_two_ranks_draw_the_same(whole: Path, tmp_path: Path) -> None:
    there, found = files(whole), drawn(tmp_path, ParallelLayout(data=2))
    assert found["pool.json"] == there["pool.json"]
    for one, two in zip(lines(whole), lines(tmp_path), strict=True):
        assert two.pop("logprobs") == pytest.approx(one["logprobs"], abs=CLOSE)
        assert two.pop("logprob") == pytest.approx(one["logprob"], abs=8 * CLOSE)
        assert two.items() <= one.items()


def test_it_grows_and_keeps_what_is_there(whole: Path, tmp_path: Path) -> None:
    """The further responses are those that a pool of as many would have had from the first."""
    drawn(tmp_path / "one", n=1)
    before = lines(tmp_path / "one")
    drawn(tmp_path / "one", n=3)
    after = lines(tmp_path / "one")
    assert after[:6] == before
    assert open_pool(tmp_path / "one").about["rounds"] == [1, 3]
    by_place = {(row["row"], row["sample"]): row["ids"] for row in after}
    assert by_place == {(row["row"], row["sample"]): row["ids"] for row in lines(whole)}
    assert [each.place for each in open_pool(tmp_path / "one").responses()][6:8] == [Place(0, 1), Place(0, 2)]
    with pytest.raises(ConfigError, match=r"n=2: pool=.* is one of 3 responses a prompt; set n=3 to go on with it, or"):
        generate.prepare(config(tmp_path / "one", n=2))


def test_places_and_windows_are_those_of_a_list() -> None:
    order = Order(prompts=3000, rounds=(2, 5))
    every = [Place(prompt, sample) for prompt in range(3000) for sample in range(2)]
    every += [Place(prompt, sample) for prompt in range(3000) for sample in range(2, 5)]
    assert order.total == len(every) == 15000
    assert [*order] == every
    assert all(order.at(index) == every[index] for index in (0, 1, 2, 5999, 6000, 6002, 6003, 14999))
    assert [index for window in order.windows() for index in window] == list(range(15000))
    assert order.windows()[:2] == Order(3000, (2,)).windows(), "that no growth changes"


def test_a_file_has_so_many_responses_and_no_more(tmp_path: Path) -> None:
    samples = SHARD // 6 + 2
    pool = write_pool(tmp_path, samples)
    assert [len(file.read_text().splitlines()) for file in shards(tmp_path)] == [SHARD, 6 * samples - SHARD]
    assert pool.done() == 6 * samples
    assert [each.response for each in open_pool(tmp_path).responses()] == [text for of in said(samples) for text in of]
    last = shards(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:-3])
    assert pool.done() == 6 * samples - 1
    with pytest.raises(ConfigError, match=r"has 4,103 of 4,104 responses; run the megarlhf generate that began it"):
        open_pool(tmp_path)
    pool.begin()
    assert last.read_bytes().endswith(b"}\n")


def test_what_was_tampered_with_is_no_pool(tmp_path: Path) -> None:
    write_pool(tmp_path, 8)
    (shard,) = shards(tmp_path)
    rows = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join([rows[1], rows[0], *rows[2:]]))
    with pytest.raises(DataError, match=r"shard-00000.jsonl, row 1: not sample 0 of the prompt in row 1; draw"):
        list(open_pool(tmp_path).responses())


def test_only_what_was_begun_alike_is_gone_on_with(tmp_path: Path) -> None:
    pool, other = tmp_path / "pool", tmp_path / "other"
    drawn(pool)
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": 2}, r"was begun with other settings \(seed 1 -> 2\); put them back to go on with it, or choose"),
        ({"sampling": {"max_new_tokens": 9}}, r"\(sampling.temperature 1.0 -> 0.7, sampling.max_new_tokens 8 -> 9\)"),
        ({"prompts": DATA.model_copy(update={"split": "heldout"})}, "was begun with other prompts; put them back"),
        ({"pool": other}, r"has mine.txt and no pool.json: this command has not begun it; choose another directory"),
        ({"output": tmp_path / "out.jsonl"}, "responses go to one place; give one of the two"),
        ({"pool": other / "mine.txt"}, "mine.txt is a file; choose another pool, or mend that"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            generate.prepare(config(changes.pop("pool", pool), **changes))
