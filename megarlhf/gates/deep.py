"""Gates that need a second model, another layout or the disk: for `megarlhf doctor`, too dear for every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.checkpoint.hf_names import source_of
from megarlhf.checkpoint.hf_verify import ROWS, TOKENS, hf_logits
from megarlhf.checkpoint.model_directory import MODEL, Card, load_model, save_model
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.gates.cheap import Lesson, fingerprint, gradients, probe_rows
from megarlhf.gates.gate import Gate, bounds_of, skip, worst
from megarlhf.models.role import Role, TrainableRole
from megarlhf.models.spec import PRESETS
from megarlhf.models.transformer import named_parameters
from megarlhf.parallel.collectives import all_reduce, broadcast
from megarlhf.parallel.gradients import main_grad
from megarlhf.parallel.micro_batches import InRows, InTokens, States
from megarlhf.parallel.pipeline import forward_only
from megarlhf.parallel.rng import generator
from megarlhf.rollout.shards import cut_of


def hugging_face_gate(actor: Role, init: str) -> Gate:
    """The model in this run's layout and number format says what transformers says in fp32 of the same files.

    Memory:   rank 0 holds the transformers model, whole, in fp32 host memory.
    """
    name = "Hugging Face"
    if init in PRESETS or (Path(init) / MODEL).is_file():
        return skip(name, f"actor.init={init} is not a Hugging Face directory, so there is nothing to compare with")
    spec, mesh = actor.spec, actor.mesh
    width = min(TOKENS, spec.max_positions - 1)
    if isinstance(cut := actor.settings.cut, InTokens):
        width = min(width, cut.tokens)
    # Token 0 is left out: it often pads, and transformers looks for the end of a row by its padding.
    tokens = torch.randint(1, spec.vocab_size, (ROWS, width + 1), generator=generator(0, "gates"))
    logits = torch.zeros(ROWS, width, spec.vocab_size)
    if mesh.is_main:
        logits = hf_logits(Path(init), tokens[:, :-1])
    logits = broadcast(logits.to(mesh.device), mesh, "world")
    return Gate(
        name,
        logit_gap(actor, tokens, logits) / float(logits.abs().max()),
        bounds_of(actor).logits,
        "largest difference of a logit to transformers in fp32, over the largest logit",
        "the model is not the one in the files: check rope and norm settings in its config.json, then try "
        "compute.dtype=float32 and compute.layers=local to tell kernels from weights",
    )


def logit_gap(role: Role, tokens: Tensor, logits: Tensor) -> float:
    """The largest difference between the role's logits and `logits` anywhere.

    Shapes:   tokens [B, T+1] int64; logits [B, T, V], of every token but the last.
    """
    count, width = logits.shape[:2]
    full = torch.full((count,), width + 1)
    rows = torch.arange(count)
    batch = Rollout(tokens, torch.ones_like(full), full, rows > 0, torch.zeros(count, width), rows, ("",) * count)

    def gap(states: States, part: Rollout) -> Tensor:
        """[n]: over the vocabulary, of which each tensor rank has its columns."""
        theirs = states.of(logits[part.prompt_ids])
        weight = role.model.vocab_weight
        first = role.mesh.tensor_rank * weight.shape[0]
        theirs = theirs[:, first : first + weight.shape[0]]
        ours = (states.hidden @ weight.t()).float()[:, : theirs.shape[-1]]
        largest = (ours - theirs).abs().amax(-1).nan_to_num(nan=torch.inf)
        return all_reduce(largest, role.mesh, "tensor", "max")

    with role.resident("weights"):
        gaps = forward_only(
            role.chunks,
            batch,
            torch.arange(width + 1).expand(count, -1) < width,
            gap,
            mesh=role.mesh,
            cut=role.settings.cut,
        )
    return worst(gaps, role.mesh)


def micro_batch_gate(actor: TrainableRole, rollout: Rollout, lesson: Lesson, *, seed: int) -> Gate:
    """The gradient does not depend on how rows are cut into micro-batches, or on whether they are packed.

    The weights are left as they were.
    """
    batch = probe_rows(actor, rollout, lesson, seed=seed)
    usual, other = actor.settings.cut, InRows(1)
    if isinstance(usual, InRows):
        usual = InRows(min(usual.rows, len(batch)))
        other = InRows(usual.rows // 2 if usual.rows > 1 else 2)
    with gradients(actor, batch, lesson.loss, usual):
        before = [gradient.to("cpu", copy=True) for _, gradient in _gradient_tensors(actor)]  # it may be large
    with gradients(actor, batch, lesson.loss, other):
        gaps = [
            relative(float((gradient.cpu() - old).norm()), float(old.norm()))
            for (_, gradient), old in zip(_gradient_tensors(actor), before, strict=True)
        ]
    return Gate(
        "micro-batches",
        worst(torch.tensor(gaps, dtype=torch.float64), actor.mesh),
        bounds_of(actor).gradient,
        f"largest relative difference of a tensor's gradient between {usual} and {other}",
        "a loss is divided where it should be summed, or padding leaks into real rows: try compute.layers=local and "
        "policy_loss=composed",
    )


def save_load_gate(role: Role, tokenizer: Tokenizer, directory: Path) -> Gate:
    """Weights saved to `directory` and loaded over lost ones are the same to the bit.

    Ranks:    collective; they share `directory`, a new one. Where the gate fails the role keeps what was loaded.
    """
    save_model(role, directory, Card(tokenizer))
    with role.resident("weights"):
        saved = [fingerprint(tensor) for tensor in role.tensors("weights")]
        for tensor in role.tensors("weights"):
            tensor.fill_(torch.nan)  # what is not loaded shows
        load_model(role, str(directory), seed=0)
        loaded = [fingerprint(tensor) for tensor in role.tensors("weights")]
    changed = sum(then != now for then, now in zip(saved, loaded, strict=True))
    return Gate(
        "save and load",
        worst(torch.tensor([changed]), role.mesh),
        0.0,
        "tensors of one rank that a saved model does not give back to the bit",
        "checkpoints would be worthless: check the file system of run_dir, which all ranks must share",
    )


@dataclass(frozen=True)
class Measured:
    """What a layout makes of a fixed batch.

    Shapes:   logprobs [B, T] fp32 on the host, of every row of the batch.
    """

    logprobs: Tensor
    gradient_norms: dict[str, float]
    """L2 norm of each whole gradient, by the Hugging Face names of what the tensor is made of; adapters by our own."""


def measure(role: TrainableRole, rollout: Rollout, lesson: Lesson, *, seed: int) -> Measured:
    """Score and differentiate `rollout`, which every rank holds whole. The weights are left as they were."""
    batch = probe_rows(role, rollout, lesson, seed=seed)
    with gradients(role, batch, lesson.loss, role.settings.cut):
        norms = _gradient_norms(role)
    return Measured(batch.logprobs.cpu(), norms)


def layout_gates(role: TrainableRole, here: Measured, one_rank: Measured) -> list[Gate]:
    """This layout gives the log-probs and gradients that one rank gives. role: what `here` was measured on."""
    bounds, mesh = bounds_of(role), role.mesh
    gaps = [
        relative(abs(norm - one_rank.gradient_norms[name]), one_rank.gradient_norms[name])
        for name, norm in here.gradient_norms.items()
    ]
    remedy = "splitting changes the result: try layout.sequence_parallel=false, then one axis at a time, to find which"
    return [
        Gate(
            "layout, log-probs",
            worst((here.logprobs - one_rank.logprobs).abs(), mesh),
            bounds.layout,
            "largest difference of a token's log-prob between this layout and one rank, in nats",
            remedy,
        ),
        Gate(
            "layout, gradient",
            worst(torch.tensor(gaps, dtype=torch.float64), mesh),
            bounds.gradient,
            "largest relative difference of the norm of a tensor's gradient between this layout and one rank",
            remedy,
        ),
    ]


def fixed_rollout(prompts: Prompts, vocab_size: int, tokens: int, seed: int) -> Rollout:
    """Each prompt with 1 to `tokens` random response tokens: the same in every layout, as sampled ones need not be."""
    count = len(prompts)
    random = generator(seed, "gates", "responses")
    lengths = prompts.lengths + torch.randint(1, tokens + 1, (count,), generator=random)
    text = torch.nn.functional.pad(prompts.tokens, (0, tokens))
    places = torch.arange(text.shape[1])
    responses = torch.randint(1, vocab_size, text.shape, generator=random)
    text = torch.where(places >= prompts.lengths[:, None], responses, text)
    text = text.masked_fill(places >= lengths[:, None], 0)
    unsampled = torch.zeros(count, text.shape[1] - 1)
    return Rollout(text, prompts.lengths, lengths, lengths < 0, unsampled, prompts.ids, prompts.answers)


def relative(difference: float, size: float) -> float:
    """`difference` over `size`; 0 where both are 0, infinite where only the size is."""
    if difference == 0.0:
        return 0.0
    return difference / size if size else torch.inf


def _gradient_tensors(role: TrainableRole) -> Iterator[tuple[str, Tensor]]:
    """This rank's fp32 gradient of every parameter that learns, in Megatron's buffers, inside `gradients`."""
    for name, parameter in named_parameters(role.chunks):
        if not parameter.requires_grad:
            continue  # beside adapters, which learn in its place
        gradient = main_grad(parameter)
        if gradient is None:
            raise ValueError(f"{name} of the {role.name} has no gradient; prepare the role first.")
        yield name, gradient


def _gradient_norms(role: TrainableRole) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, gradient in _gradient_tensors(role):
        square = gradient.double().square().sum()
        if ".lora." in name:
            known, whole = name, cut_of(name) is None
        else:
            origin = source_of(name, role.spec, role.head)
            # Tied embeddings are on the first stage and on the last, with one gradient.
            known, whole = ", ".join(origin.names), origin.cut == "whole"
        squares[known] = float(square if whole else all_reduce(square, role.mesh, "tensor"))
    return {name: square**0.5 for name, square in squares.items()}
