"""The gates hold on a correct run in every layout, each planted fault is named by its gate, and no trace is left."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megarlhf.batch.rollouts import PolicyRows
from megarlhf.checkpoint import model_directory as sharded
from megarlhf.commands import doctor
from megarlhf.errors import TrainingError
from megarlhf.gates.cheap import Lesson, cheap_gates, fingerprint, gate_prompts, state_of
from megarlhf.gates.gate import Gate, bounds_of, check_gates, skip
from megarlhf.models import transformer
from megarlhf.models.attention import CausalAttention, rope_frequencies
from megarlhf.models.role import Role
from megarlhf.parallel import offload
from megarlhf.parallel.alone import is_first
from megarlhf.parallel.collectives import broadcast_object
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import Documents
from megarlhf.parallel.offload import Offloader
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.runtime import roles as runtime_roles
from megarlhf.trainers import ppo
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig
from tests.helpers.models import language_model, name_of, score_model
from tests.helpers.ranks import run_ranks
from tests.trainers.worlds import iterate

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = [ParallelLayout(), ParallelLayout(tensor=2), ParallelLayout(pipeline=2), ParallelLayout(data=2)]
VOCAB = 161
"""Odd, so that two tensor ranks pad it; the built-in tokenizer has 160 tokens or fewer."""
ONE_RANK = {
    "offload, trained",
    "offload",
    "Hugging Face",
    "sampler",
    "first pass",
    "reference",
    "micro-batches",
    "save and load",
}
SEVERAL = ONE_RANK | {"layout, log-probs", "layout, gradient"}


def config(folder: str, layout: ParallelLayout, **changes: Any) -> PPOConfig:
    """A small run on the directories of `models`."""
    settings = {
        "run_dir": f"{folder}/run",
        "layout": layout,
        "actor": {"init": f"{folder}/actor", "optim": {"lr": 1e-3}},
        "reward": {"init": f"{folder}/judge"},
        "tokenizer": "arithmetic",
        "prompts": {"source": "arithmetic", "template": "plain", "arithmetic": {"rows": 32}},
        "sampling": {"temperature": 0.7, "max_new_tokens": 12},
        "rollout_batch": 16,
        "global_batch": 16,
        "micro_batch": 4,
    }
    settings_class: Any = doctor.settings_of("ppo")
    return settings_class.model_validate({**settings, **changes})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy and a judge whose weights are large enough to make every part of the model matter."""
    folder: Path = tmp_path_factory.mktemp("doctor")
    language_model(folder / "actor", seed=4, vocab_size=VOCAB)
    score_model(folder / "judge", seed=5, vocab_size=VOCAB)
    return str(folder)


Patch = pytest.MonkeyPatch


def no_fault(patch: Patch) -> None:
    """Everything as it should be."""


def transpose_a_projection(patch: Patch) -> None:
    """The actor's first output projection is loaded the wrong way round."""
    load = runtime_roles.load_model

    def transposed(role: Role, init: str, *, seed: int) -> None:
        load(role, init, seed=seed)
        if role.name == "actor":
            layer: Any = role.model.decoder.layers[0]
            weight = layer.self_attention.linear_proj.weight.data
            weight.copy_(weight.t().clone())

    patch.setattr(runtime_roles, "load_model", transposed)


def wrong_rope_base(patch: Patch) -> None:
    """Every model turns its queries and keys by the angles of another base."""
    patch.setattr(
        transformer, "rope_frequencies", lambda spec: rope_frequencies(spec.model_copy(update={"rope_theta": 5e5}))
    )


def mask_off_by_one(patch: Patch) -> None:
    """Training and scoring see one token of the future."""

    def peeking(self: CausalAttention, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(1)
        out = scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    patch.setattr(CausalAttention, "forward", peeking)


def stale_sampler(patch: Patch) -> None:
    """The weights move between sampling and scoring."""
    generate = RolloutEngine.generate

    def then_move(self: RolloutEngine, *args: Any, **options: Any) -> Any:
        rollout = generate(self, *args, **options)
        with self.role.resident("weights"), torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.01)
        return rollout

    patch.setattr(RolloutEngine, "generate", then_move)


def divide_by_rows(patch: Patch) -> None:
    """The loss is a mean over the micro-batch's rows, where it should be a sum."""

    def wrong(role: Any, cfg: Any) -> Any:
        loss = policy_loss(role, cfg)

        def divided(states: Any, rows: Any) -> Any:
            sums = loss(states, rows)
            return replace(sums, total=sums.total / len(rows))

        return divided

    patch.setitem(cast(Any, ppo.TRAINER.learners), "actor", replace(ppo.TRAINER.learners["actor"], loss=wrong))


def lose_a_tensor(patch: Patch) -> None:
    """One storage is not brought back from the host."""
    to_device = Offloader.to_device

    def forgetful(self: Offloader) -> None:
        self._away[-1:] = []
        to_device(self)

    patch.setattr(Offloader, "to_device", forgetful)


def round_on_the_host(patch: Patch) -> None:
    """The host keeps bfloat16: the second trip changes nothing that the first has not."""
    host_copy = offload._host_copy
    patch.setattr(
        offload,
        "_host_copy",
        lambda storage: host_copy(storage).view(torch.float32).bfloat16().float().view(torch.uint8),
    )


def save_in_bfloat16(patch: Patch) -> None:
    """Checkpoints are written in half the bytes."""
    planned = sharded.planned

    def rounded(state: Any, *args: Any) -> Any:
        for chunk in state.values():
            for shard in chunk.values():
                shard.data = shard.data.bfloat16().float()
        return planned(state, *args)

    patch.setattr(sharded, "planned", rounded)


def let_documents_meet(patch: Patch) -> None:
    """What lies end to end in a pack is attended to as one text."""
    made = Documents.of
    patch.setattr(Documents, "of", lambda rows, *rest: replace(made(rows, *rest), lengths=(int(rows.sum()),)))


def examined(layout: ParallelLayout, folder: str, fault: Callable[[Patch], None], changes: Any) -> list[Gate]:
    """What the doctor finds on a machine with the fault."""
    cfg = config(folder, layout, **changes)
    inputs = doctor.inputs_of(ppo.TRAINER, cfg)
    with pytest.MonkeyPatch.context() as patch:
        alternative = doctor.one_rank(ppo.TRAINER, cfg, inputs) if is_first() else ""
        mesh = start(layout, seed=1)
        fault(patch)
        return list(doctor.examine(ppo.TRAINER, cfg, inputs, broadcast_object(alternative, mesh, "world"), mesh))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_every_gate_holds_on_a_correct_run(layout: ParallelLayout, models: str) -> None:
    ranks = run_ranks(examined, layout.world_size, layout, models, no_fault, {})
    for gates in ranks:
        assert {gate.name for gate in gates if gate.holds} == (ONE_RANK if layout.world_size == 1 else SEVERAL)
        assert {gate.name for gate in gates if gate.skipped} == ({"layout"} if layout.world_size == 1 else set())
        # Ranks that disagreed would not all stop.
        assert [(gate.name, gate.value) for gate in gates if gate.holds] == [
            (gate.name, gate.value) for gate in ranks[0] if gate.holds
        ]
        # They measure something: float32 sums in another order are never all equal. Stages keep the order.
        rounding = {gate.name: gate.value for gate in gates if gate.bound > 0 and gate.holds}
        assert rounding.pop("reference") == 0  # the same sums here; others where weights are aligned otherwise
        split = {name: rounding.pop(name) for name in SEVERAL - ONE_RANK if name in rounding}
        assert all(0 < value < 1e-5 for value in rounding.values()), rounding
        assert all((0 < value < 1e-5) == (layout.pipeline == 1) for value in split.values()), split
    assert not Path(models, "run").exists()
    assert not list(Path(models).glob("megarlhf-doctor-*"))


PACKED = {"micro_batch_tokens": 96}


@pytest.mark.parametrize("layout", [ParallelLayout(data=2), ParallelLayout(context=2)], ids=name_of)
def test_every_gate_holds_on_a_packed_run(layout: ParallelLayout, models: str) -> None:
    for gates in run_ranks(examined, 2, layout, models, no_fault, PACKED):
        assert {gate.name for gate in gates if gate.holds} == SEVERAL, list(map(str, gates))
        (packs,) = [gate for gate in gates if gate.name == "micro-batches"]
        assert "between micro_batch_tokens=96 and micro_batch=1" in packs.measure
        assert 0 < packs.value < 1e-5


FAULTS = [
    (transpose_a_projection, {"Hugging Face", "reference"}, {}),
    (wrong_rope_base, {"Hugging Face"}, {}),
    (mask_off_by_one, {"Hugging Face", "sampler"}, {}),
    (stale_sampler, {"sampler", "reference"}, {}),
    (divide_by_rows, {"micro-batches"}, {"policy_loss": "composed"}),
    (lose_a_tensor, {"offload, trained"}, {}),
    (round_on_the_host, {"offload, trained"}, {}),
    (save_in_bfloat16, {"save and load"}, {}),
    (let_documents_meet, {"Hugging Face", "sampler", "micro-batches"}, PACKED),
]


@pytest.mark.parametrize(("fault", "names", "changes"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_fails_its_gates_and_no_other(
    fault: Callable[[Patch], None], names: set[str], changes: dict[str, str], models: str
) -> None:
    (gates,) = run_ranks(examined, 1, ParallelLayout(), models, fault, changes)
    failing = {gate.name: gate for gate in gates if gate.fails}
    assert failing.keys() == names, [str(gate) for gate in gates]
    for gate in failing.values():
        # Far beyond rounding, or a count of tensors.
        assert gate.value > 10 * gate.bound
        assert gate.remedy


def test_a_fault_of_one_layout_fails_the_gates_of_layouts(models: str) -> None:
    for gates in run_ranks(examined, 2, ParallelLayout(data=2), models, divide_by_rows, {"policy_loss": "composed"}):
        assert {gate.name for gate in gates if gate.fails} == {"micro-batches", "layout, gradient"}


def first_iteration(layout: ParallelLayout, folder: str, gated: bool) -> dict[str, Any]:
    """The metrics of an iteration, after the cheap gates or without, and whether the gates changed anything."""
    cfg = config(folder, layout, global_batch=4, micro_batch=2)
    inputs = doctor.inputs_of(ppo.TRAINER, cfg)
    mesh = start(layout, seed=1)
    troupe = ppo.TRAINER.models(cfg, inputs, mesh)
    prompts = gate_prompts(inputs.prompts, mesh)
    iterate(troupe, prompts, cfg, 0)  # so that there are moments to disturb

    def state() -> list[Any]:
        prints = []
        for role in troupe.every:
            with role.resident(*role.parts):
                prints.append(state_of(role))
        return [*prints, torch.get_rng_state().tolist(), troupe.resident_bytes()]

    before, gates, late = state(), [], []
    lesson = Lesson(PolicyRows, policy_loss(troupe.actor, cfg))
    if gated:
        gates = cheap_gates(troupe, prompts, lesson, cfg.sampling, seed=cfg.seed, reference_is_actor=False)
    unchanged = state() == before
    metrics = iterate(troupe, prompts, cfg, 1).metrics
    counted = {name: value for name, value in metrics.items() if name.split("/")[0] not in MACHINE}
    if gated:
        with pytest.MonkeyPatch.context() as patch:
            lose_a_tensor(patch)
            late = cheap_gates(troupe, prompts, lesson, cfg.sampling, seed=cfg.seed, reference_is_actor=False)
    return {"gates": gates, "unchanged": unchanged, "metrics": counted, "late": late}


MACHINE = ("time", "throughput", "memory", "mfu")
"""Families of metrics that no two runs share."""


@pytest.mark.parametrize(
    "layout", [ParallelLayout(tensor=2), pytest.param(ParallelLayout(data=2), marks=pytest.mark.slow)], ids=name_of
)
def test_cheap_gates_leave_no_trace(layout: ParallelLayout, models: str) -> None:
    with_gates = run_ranks(first_iteration, 2, layout, models, True)
    without = run_ranks(first_iteration, 2, layout, models, False)
    for gated, plain in zip(with_gates, without, strict=True):
        assert [gate.name for gate in gated["gates"] if gate.holds] == ["offload", "sampler", "first pass"]
        assert gated["unchanged"]
        assert gated["metrics"] == plain["metrics"]
        assert gated["metrics"]["policy/grad_norm"] > 0
        # And the gate of the four roles can fail: each of them has lost its last storage.
        (offloaded,) = gated["late"]
        assert (offloaded.name, offloaded.fails) == ("offload", True)
        assert offloaded.value >= 1


def test_a_failing_gate_stops_a_run_with_its_number_bound_and_remedy() -> None:
    good = Gate("good", 1.0, 1.0, "a number", "nothing")
    check_gates([good, skip("other", "no reason to")])
    for value, said in ((0.5, "0.5"), (math.nan, "nan"), (math.inf, "inf")):
        with pytest.raises(TrainingError, match=f"^gate bad: a number is {said}, allowed 0.25; mend it.$"):
            check_gates([good, Gate("bad", value, 0.25, "a number", "mend it")])
    assert not skip("other", "no reason to").holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str)
def test_a_fingerprint_sees_every_single_change(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).to(dtype).view(3, 4)
    prints = {fingerprint(tensor)}
    for index in range(12):
        changed = tensor.clone()
        changed.view(-1)[index] += 1
        prints.add(fingerprint(changed))
    assert len(prints) == 13
    assert fingerprint(tensor.flip(0)) not in prints
    assert fingerprint(tensor.clone()) in prints
    # sum (2 i + 1) i over i < 3
    assert fingerprint(torch.arange(3)) == 0 + 3 + 10
    tensor.untyped_storage().resize_(0)
    assert fingerprint(tensor) is None


def run_command(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "megarlhf.cli", "doctor", *arguments],
        cwd=directory,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_the_command_needs_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_command(tmp_path, "layout.data=2")
    assert done.returncode == 0, done.stderr
    assert "megatron-core" in done.stdout
    assert "torch SDPA" in done.stdout
    verdicts = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("holds", "skipped", "FAILS"))]
    assert sorted(verdicts) == ["holds"] * 9 + ["skipped"]  # a preset has no Hugging Face twin
    assert done.stdout.splitlines()[-1] == "10 of 10 gates hold, 1 skipped"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("device", "first_pass"), [("cpu", 0.0), ("cuda", 1e-4)])
def test_the_first_pass_is_exact_where_kernels_do_not_depend_on_gradients(device: str, first_pass: float) -> None:
    settings = SimpleNamespace(compute=SimpleNamespace(fp8=None, dtype=torch.float32))
    role: Any = SimpleNamespace(settings=settings, mesh=SimpleNamespace(device=torch.device(device)))
    assert bounds_of(role).first_pass == first_pass


@pytest.mark.slow
def test_a_model_file_with_a_nan_is_refused(tmp_path: Path) -> None:
    """What a broken disk or a diverged run leaves: every file is there and of the right shape."""
    model: Any = language_model(tmp_path / "actor", seed=4, vocab_size=VOCAB)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "actor")
    done = run_command(
        tmp_path,
        *("actor.init=actor", "reward.init=tiny-xs", "tokenizer=arithmetic", "prompts.template=plain"),
        *(
            "prompts.source=arithmetic",
            "prompts.arithmetic.rows=32",
            "rollout_batch=16",
            "global_batch=16",
            "sampling.max_new_tokens=12",
        ),
    )
    assert done.returncode == 2, done.stderr
    assert "model.layers.1.mlp.up_proj.weight holds numbers that are not finite" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["actor"]
