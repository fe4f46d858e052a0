"""Rollouts from the actor's own weights, by Megatron-Core's dynamic inference engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.models.memory_plan import CUDA_BLOCK_TOKENS, cache_bytes_per_token, cache_row_bytes, rows_that_fit
from megarlhf.models.role import Role
from megarlhf.models.transformer import LlamaModel
from megarlhf.observe.metrics import Metrics
from megarlhf.parallel.collectives import all_reduce, gather_rows, own_part
from megarlhf.parallel.layout import fp8_multiple
from megarlhf.parallel.mesh import own_scratch
from megarlhf.rollout.context import HostContext, RolloutContext, Sample
from megarlhf.rollout.controller import Ledger, RolloutController
from megarlhf.rollout.graphs import DecodeGraphs
from megarlhf.rollout.megatron_engine import Engine, drawing, padded_tokens
from megarlhf.rollout.refit import RolloutCopy
from megarlhf.rollout.requests import Request, check_room, none, requests_of
from megarlhf.rollout.sampling import (
    USUAL,
    RolloutConfig,
    SamplingConfig,
    check_rolls_out,
    elsewhere,
    occurrence,
    stream_ids,
    uniforms,
)


class RolloutEngine:
    """Draws responses from the weights of `role`, a language model.

    eos_ids: each ends a response. pad_id: fills rows to the right. max_sequence_length: prompt plus response never get
    longer, in tokens.
    Memory:   nothing between rollouts; with `keep`, cache and CUDA graphs until `release` or a larger rollout.
    """

    def __init__(
        self,
        role: Role,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        max_sequence_length: int,
        settings: RolloutConfig = USUAL,
    ) -> None:
        of = role.settings
        check_rolls_out(role.mesh.layout, settings, offload=of.offload, fp8=of.compute.fp8 is not None)
        other = elsewhere(role.mesh.layout, settings)
        self._copy = None if other is None else RolloutCopy(role, other, keep=settings.keep)
        self.role = self._copy or role
        """That responses are drawn from: `role` itself, or its copy in another layout."""
        self.mesh = self.role.mesh.drawing
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.max_sequence_length = max_sequence_length
        self.settings = settings
        self._live: _Live | None = None
        self._scratch: dict[Any, Tensor] = {}

    @classmethod
    def of(cls, role: Role, tokenizer: Tokenizer, max_sequence_length: int, settings: RolloutConfig) -> Self:
        """The engine over a role's own weights, which ends responses as the tokenizer does."""
        return cls(
            role,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            max_sequence_length=max_sequence_length,
            settings=settings,
        )

    @property
    def copies(self) -> tuple[Role, ...]:
        """Models that there are for rollouts alone."""
        return () if self._copy is None else (self._copy,)

    def refits(self) -> Metrics:
        """What weights in another layout have cost since the last call; nothing where none were moved."""
        return {} if self._copy is None else self._copy.refits.metrics()

    @property
    def model(self) -> LlamaModel:
        """That responses are drawn from."""
        return self.role.model

    def generate(
        self, prompts: Prompts, sampling: SamplingConfig, *, seed: int, group_size: int = 1, first_sample: int = 0
    ) -> Rollout:
        """`group_size` responses to each prompt, adjacent. Each prompt is prefilled once, however many samples it has,
        and neighbours of which the shorter begin the longest are prefilled together, as that one.

        A response depends on (seed, prompt id, index of the sample among the batch's rows of that prompt, weights) and
        on nothing else: not on the batch, not on the layout. `first_sample` is the index of the first of them.

        The role is resident meanwhile, and nobody else need be: the cache may have the rest of the memory.

        Ranks:    collective over the mesh; every rank passes the same prompts and gets the same Rollout, of all of
                  them. Each data rank draws the responses to its part of the prompts.
        Raises:   DataError when a prompt leaves no room for a response.
        """
        check_room(prompts, self.max_sequence_length)
        every = prompts.repeat(group_size)
        part = own_part(len(prompts), self.mesh)
        own = slice(part.start * group_size, part.stop * group_size)
        rows = every.rows(own).to(self.mesh.device)
        streams = stream_ids(every.ids, first_sample + occurrence(every.ids))[own].to(self.mesh.device)
        with self.role.resident("weights"):
            try:
                drawn = self._drawn(rows, streams, sampling, seed) if len(rows) else none(rows)
            finally:
                if not self.settings.keep:
                    self._release_cache()
        rollout = gather_rows(drawn, self.mesh)
        self._count(prompts, rollout)
        return rollout

    def _count(self, prompts: Prompts, rollout: Rollout) -> None:
        """Book the work: what is prefilled passes once, however many samples it has; of a response all but its last
        token. The last token of a prompt that begins another one passes twice, and is counted once.
        """
        given = torch.tensor([len(request.tokens) for request in requests_of(prompts, len(prompts))], dtype=torch.int64)
        starts, whole = rollout.prompt_lengths, rollout.lengths
        drawn = int((whole - starts).sum())
        fed = int(given.sum()) + drawn - len(rollout)
        keys = _triangle(given) + _triangle(whole - 1) - _triangle(starts)
        self.mesh.work.spend(tokens=drawn, flops=self.role.spec.forward_flops(fed, keys, projected=drawn))

    def _drawn(self, rows: Prompts, streams: Tensor, sampling: SamplingConfig, seed: int) -> Rollout:
        """The responses to `rows`, each from its own stream of random numbers."""
        ledger = self._ledger(rows, streams, sampling, seed)
        # Transformer Engine keeps FP8 copies of weights: they are of the weights before the last step, unless told so.
        self.model.set_is_first_microbatch()
        with torch.inference_mode(), own_scratch(self._scratch), _evaluating(self.model), drawing():
            live = self._engine_for(len(rows))
            with live.captured():
                live.engine.draw(requests_of(rows, live.rows), ledger, sampling)
        return self._rollout(rows, ledger)

    def release(self) -> None:
        """Give cache and graphs back, and weights in another layout; the next rollout makes them anew."""
        self._release_cache()
        for copy in self.copies:
            copy.leave()

    def _release_cache(self) -> None:
        if self._live is not None:
            self._live.release()
            self._live = None
        self._scratch.clear()

    def _ledger(self, rows: Prompts, streams: Tensor, sampling: SamplingConfig, seed: int) -> Ledger:
        width = min(int(rows.lengths.max()) + sampling.max_new_tokens, self.max_sequence_length)
        tokens = torch.full((len(rows), width), self.pad_id, device=rows.tokens.device)
        longest = int(rows.lengths.max())
        step = torch.arange(width, device=tokens.device)
        in_prompt = step[:longest] < rows.lengths[:, None]
        tokens[:, :longest][in_prompt] = rows.tokens[:, :longest][in_prompt]
        draws = uniforms(seed, streams[:, None], step)
        return Ledger(tokens, torch.zeros_like(draws), draws, rows.lengths, rows.lengths.clone())

    def _engine_for(self, rows: int) -> _Live:
        """An engine that decodes as many of `rows` rows at once as it may: the last one, if it is large enough."""
        wanted = min(self.settings.rows, rows)
        if self._live is not None and self._live.wanted >= wanted:
            # Attention weighs what is unused by 0: what broken weights left there, no numbers, would spread.
            self._live.engine.context.memory_buffer.zero_()
            return self._live
        self._release_cache()
        multiple = self._row_multiple
        most = -(-min(wanted, self._rows_that_fit(wanted)) // multiple) * multiple
        graphs = DecodeGraphs(self.model) if self.role.settings.compute.cuda_graphs else None
        try:
            with graphs.attached() if graphs else nullcontext():
                self._live = _Live(self._engine(most), graphs, wanted, most)
        except BaseException:
            if graphs:
                graphs.delete()
            raise
        return self._live

    def _engine(self, most: int) -> _Engine:
        """An engine for `most` rows at once, and nothing to do yet."""
        context = self._context(most)
        controller = RolloutController(
            self.model, context, self.mesh.groups, vocab_size=self.role.spec.vocab_size, eos_ids=self.eos_ids
        )
        return _Engine(controller, context, self.mesh.groups)

    @property
    def _row_multiple(self) -> int:
        """Of what the rows of a step are a multiple: sequence parallelism splits them evenly over the tensor ranks."""
        config = self.model.config
        return self.mesh.layout.tensor * fp8_multiple(config.fp8, config.fp8_recipe)

    @property
    def _block_tokens(self) -> int | None:
        """Tokens in a block of the cache; None where a block holds a whole sequence."""
        return None if self.mesh.device.type == "cpu" else CUDA_BLOCK_TOKENS

    @property
    def _bytes_per_token(self) -> int:
        """Keys and values of one token in this rank's layers and heads."""
        layers, itemsize = len(self.model.decoder.layers), self.model.config.params_dtype.itemsize
        return cache_bytes_per_token(self.role.spec, layers, self.mesh.layout.tensor, itemsize)

    def _rows_that_fit(self, wanted: int) -> int:
        """For how many rows of the greatest length every rank of this model copy has memory."""
        block, width = self._block_tokens, self.max_sequence_length
        if block is None:
            return wanted
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        bytes_per_row = cache_row_bytes(width, block, self._bytes_per_token)
        share = self.settings.memory_share
        fit = torch.tensor(rows_that_fit(free, share, bytes_per_row), device=self.mesh.device)
        rows = int(all_reduce(fit, self.mesh, "model", "min")) // self._row_multiple * self._row_multiple
        if rows < 1:
            raise ConfigError(
                f"KV cache: two rows of {width} tokens need {2 * bytes_per_row / 2**30:.1f} GiB, more than "
                f"rollout.memory_share={share:g} of the {free / 2**30:.1f} GiB that are free; raise it, shorten "
                f"responses, offload the other roles or raise {'rollout.' if self.copies else ''}layout.tensor."
            )
        return rows

    def _context(self, max_requests: int) -> RolloutContext:
        width = self.max_sequence_length
        block = self._block_tokens or width
        # One block more, which padding writes to; and half of one, against rounding in GiB.
        blocks = max_requests * -(-width // block) + 1.5
        options: dict[str, Any] = {
            "layers": len(self.model.decoder.layers),
            "max_sequence_length": width,
            "max_requests": max_requests,
            # The tokens of a step are padded to round numbers, for which there must be room too.
            "max_tokens": padded_tokens(
                max(self.settings.prefill_tokens, width, max_requests), self.mesh.size("tensor")
            ),
            "buffer_size_gb": blocks * block * self._bytes_per_token / 2**30,
            "pg_collection": self.mesh.groups,
        }
        if self._block_tokens is None:
            return HostContext(self.model.config, **options)
        context = RolloutContext(
            self.model.config,
            **options,
            block_size_tokens=block,
            num_cuda_graphs=self.settings.graphs if self.role.settings.compute.cuda_graphs else None,
            use_cuda_graphs_for_non_decode_steps=False,
        )
        # The largest, `max_requests`, is among those that stay.
        sizes = [
            size for size in context.cuda_graph_batch_dimensions_list if size.token_count % self._row_multiple == 0
        ]
        context.cuda_graph_batch_dimensions_list = sizes
        return context

    def _rollout(self, rows: Prompts, ledger: Ledger) -> Rollout:
        width = int(ledger.lengths.max())
        last = ledger.tokens.gather(1, ledger.lengths[:, None] - 1)[:, 0]
        return Rollout(
            tokens=ledger.tokens[:, :width],
            prompt_lengths=rows.lengths,
            lengths=ledger.lengths,
            terminated=torch.isin(last, last.new_tensor(self.eos_ids)),
            sampler_logprobs=ledger.logprobs[:, 1:width],
            prompt_ids=rows.ids,
            answers=rows.answers,
        )


class _Engine(Engine):
    """Megatron's scheduling and stepping; results are in the ledger, so no request object is kept up to date."""

    def schedule_waiting_requests(self) -> None:
        """Let prompts in when a quarter of the rows are free: a step with prefills costs several without."""
        if self.context.free_rows * 4 >= self.context.max_requests:
            super().schedule_waiting_requests()

    def create_cuda_graphs(self, reset_context: bool = True) -> None:
        """Capture every size by running it; as Megatron's own, without a progress bar of each rank at each rollout."""
        if self.cuda_graph_impl == "local":
            for size in self.context.cuda_graph_batch_dimensions_list:
                tokens, positions = self.controller.step(construct_graph_dimensions=size)
                self.controller._dynamic_step_forward_logits(tokens, positions)
                self.context.reset()

    async def async_bookkeep(self, *_step: Any) -> dict[str, Any]:
        """The controller has recorded the step."""
        return {}

    def draw(self, requests: Sequence[Request], ledger: Ledger, sampling: SamplingConfig) -> None:
        """Draw the rows of all requests into the ledger."""
        self.reset()
        longest, width = sampling.max_new_tokens, ledger.tokens.shape[1]
        self.context.samples = {
            request.row: [Sample(length, min(length + longest, width)) for length in request.lengths]
            for request in requests
        }
        self.controller.ledger, self.controller.sampling = ledger, sampling
        for row, tokens, _ in requests:
            room = min(longest, width - len(tokens))
            # No id of termination: the controller knows them all.
            self.add_request(row, tokens, SamplingParams(num_tokens_to_generate=room, termination_id=-1))
        self._drain()
        del self.controller.ledger  # it is the caller's

    def _drain(self) -> None:
        """Step until no request is waiting or active."""

        async def drain() -> None:
            while self.has_unfinished_requests():
                await self.async_step()
            # Scheduling left notifications in the event loop: unless they are made and run, they keep the engine alive.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        self._run_coroutine_sync(drain())

    def release(self) -> None:
        """Give the KV cache's memory back."""
        self.context.deallocate()
        self.controller.set_stop_word_finished_ids_callback(None)  # a method of the engine, which holds the controller


@dataclass(frozen=True)
class _Live:
    """An engine, and what it was made for."""

    engine: _Engine
    graphs: DecodeGraphs | None
    wanted: int
    """Rows that were asked for."""
    rows: int
    """Rows that it decodes at once."""

    def captured(self) -> AbstractContextManager[None]:
        """Inside, decode steps are replayed where there are graphs of them."""
        return nullcontext() if self.graphs is None else self.graphs.attached()

    def release(self) -> None:
        """Give cache and graphs back."""
        self.engine.release()
        if self.graphs is not None:
            self.graphs.delete()


@contextmanager
def _evaluating(model: GPTModel) -> Iterator[None]:
    """Dropout off and Megatron's inference paths on; the mode before is restored."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _triangle(lengths: Tensor) -> int:
    """Keys that the tokens of texts so long see together."""
    return int((lengths * (lengths + 1) // 2).sum())
