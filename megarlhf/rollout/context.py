"""The KV cache of a rollout: prompts are prefilled once and forked into their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarlhf.rollout.megatron_engine import BlockAllocator, EngineContext


class Sample(NamedTuple):
    """A row that begins with what a request prefills."""

    length: int
    """Tokens of its own prompt: all that is prefilled, or at least two of them."""
    limit: int
    """Tokens that it may have in the end."""


class RolloutContext(EngineContext):
    """Megatron's paged cache. A request is a prompt until it is prefilled, then as many rows as it has samples.

    Row ids are batch rows: the samples of request i are the rows i, i + 1, ..., one each. The cache is sized so that
    `max_requests` rows of the greatest length fit: a row that was admitted is never paused or evicted.

    The prompt of a sample may be shorter than what was prefilled. Its row is then made as of before its prompt's last
    token, which the next step reads once more: what was computed of a prefill are the logits at its end alone.
    """

    def __init__(
        self, config: TransformerConfig, *, layers: int, pg_collection: ProcessGroupCollection, **options: Any
    ) -> None:
        super().__init__(config, layers=layers, pg_collection=pg_collection, **options)
        self._tensor_ranks = pg_collection.tp.size()
        self.samples: Mapping[int, Sequence[Sample]] = {}
        """Of each request."""
        self.unforked: list[Sequence[Sample]] = []
        """Those of each request prefilled in this step, until they are rows."""

    def round_up_tokens(self, value: int, tp_size: int | None = None) -> int:
        """The tokens of a step, padded. Megatron would ask the layout of training for the number of tensor ranks."""
        return super().round_up_tokens(value, self._tensor_ranks)

    def round_up_requests(self, value: int, tp_size: int | None = None) -> int:
        """The rows of a step, padded, likewise."""
        return super().round_up_requests(value, self._tensor_ranks)

    def reset(self, *arguments: Any, **options: Any) -> None:
        """Forget every row; the memory stays."""
        super().reset(*arguments, **options)
        self.unforked = []

    @property
    def free_rows(self) -> int:
        """Rows that no sample has, or will have once this step's prompts are forked."""
        return self.max_requests - self.total_request_count - sum(len(samples) - 1 for samples in self.unforked)

    def check_availability(self, req: Any) -> tuple[bool, bool, bool]:
        """Whether all samples of `req` have rows, and its prompt room in this step; rows bring their memory along."""
        tokens = self.active_token_count + req.remaining_prompt_length
        return len(self.samples[req.request_id]) <= self.free_rows, tokens <= self.max_tokens, True

    def add_request(self, req: Any, chunk_length: int | None = None) -> None:
        """Enter the prompt of `req` into this step."""
        super().add_request(req, chunk_length)
        self.unforked.append(self.samples[req.request_id])

    def fork(self) -> Tensor:
        """Give every prompt prefilled in this step the rows of its samples, each with its own copy of its cache.

        Shapes:   returns [active rows] int64: for each row, the row as of before that it continues.
        """
        samples, self.unforked = self.unforked, []
        others = [each for of_request in samples for each in of_request[1:]]
        old, new = self.total_request_count, self.total_request_count + len(others)
        device = self.request_ids.device
        copies = torch.tensor([len(of_request) - 1 for of_request in samples], device=device)
        source = torch.arange(old - len(copies), old, device=device).repeat_interleave(copies)
        if new > old:
            # 1, 2, ... within each request.
            sample = torch.arange(1, new - old + 1, device=device) - (copies.cumsum(0) - copies).repeat_interleave(
                copies
            )
            self.request_ids[old:new] = self.request_ids[source] + sample
            for column in self.inherited:
                column[old:new] = column[source]
        made = torch.tensor([*(of_request[0] for of_request in samples), *others], device=device)
        self._shorten(slice(old - len(copies), new), made[:, 0], made[:, 1])
        if new > old:
            self._copy_cache(source, slice(old, new))
            self.total_request_count = new
        self._give_back(slice(old - len(copies), old))
        return torch.cat([torch.arange(old, device=device), source])

    def _shorten(self, rows: slice, lengths: Tensor, limits: Tensor) -> None:
        """Take rows back to before the last token of their own prompts, where those are shorter than the prefilled."""
        prefilled = self.request_query_lengths[rows]
        kept = torch.where(lengths < prefilled, lengths - 1, prefilled)
        self.request_query_lengths[rows] = kept
        self.request_output_lengths[rows] = limits
        self.request_kv_block_counts[rows] = (kept - 1) // self.block_size_tokens + 1
        self.request_last_kv_block_offset[rows] = (kept - 1) % self.block_size_tokens

    def _give_back(self, rows: slice) -> None:
        """Release the blocks of rows that they have no tokens in any more."""
        owned = self.request_to_kv_block_ids[rows]
        counts = self.request_kv_block_counts[rows]
        spare = (torch.arange(owned.shape[1], device=owned.device) >= counts[:, None]) & (owned >= 0)
        if spare.any():
            self.blocks.release_memory_blocks(owned[spare])
            owned[spare] = -1
            self.request_last_kv_block_id[rows] = owned.gather(1, counts.long()[:, None] - 1)[:, 0]

    def _copy_cache(self, source: Tensor, rows: slice) -> None:
        """Allocate blocks for `rows` and fill them from those of the rows `source`."""
        owned = self.request_to_kv_block_ids[source]
        used = torch.arange(owned.shape[1], device=owned.device) < self.request_kv_block_counts[rows][:, None]
        blocks = self.blocks.allocate_memory_blocks(int(used.sum()))
        if blocks is None:
            raise RuntimeError(f"KV cache: no blocks for {len(source)} admitted rows; this is a bug in admission.")
        table = torch.full_like(owned, -1)
        table[used] = blocks
        self.request_to_kv_block_ids[rows] = table
        last = self.request_kv_block_counts[rows].long()[:, None] - 1
        self.request_last_kv_block_id[rows] = table.gather(1, last)[:, 0]
        # A block may be longer than the prompts: copy no more than the longest of them.
        filled = min(int(self.request_query_lengths[rows].max()), self.block_size_tokens)
        cache = self.memory_buffer[:, :, :, :filled]
        filling, full = blocks.to(cache.device).long(), owned[used].to(cache.device).long()
        cache.index_copy_(2, filling, cache.index_select(2, full))


class HostContext(RolloutContext):
    """The cache on a CPU: one block holds a whole sequence, and block i belongs to row i.

    The reference of `megarlhf_kernels.paged_attention` then reads the cache in place, and a step costs fewer small
    operations.
    """

    TOKEN_ROUNDER = 1
    REQUEST_ROUNDER = 1

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, **options, block_size_tokens=options["max_sequence_length"])
        self.blocks = RowBlocks(self, self.blocks.total_count, self.blocks.paused_count)
        self._rotation: tuple[Tensor, Tensor] | None = None

    def clear_cache(self) -> None:
        """Fill the cache with finite content."""
        # Heads outside, tokens inside: a head's keys then lie in one piece, which halves the time of attention.
        *outer, tokens, heads, width = self.memory_buffer.shape
        self.memory_buffer = self.memory_buffer.new_zeros((*outer, heads, tokens, width)).transpose(3, 4)

    def _move_book_keeping_tensors(
        self, src_idxs: Tensor, dst_idxs: Tensor, next_tokens: Tensor, **options: Any
    ) -> None:
        # Rows move left into those that finished. Their cache moves along: few rows finish in a step, while a table
        # out of order would make attention gather every row's cache in every layer of every step.
        super()._move_book_keeping_tensors(src_idxs, dst_idxs, next_tokens, **options)
        self.request_to_kv_block_ids[dst_idxs, 0] = dst_idxs.int()
        self.request_last_kv_block_id[dst_idxs] = dst_idxs.int()
        if len(src_idxs):
            self.memory_buffer.index_copy_(2, dst_idxs, self.memory_buffer.index_select(2, src_idxs))

    def initialize_attention_state(self, **options: Any) -> None:
        """Prepare a step."""
        super().initialize_attention_state(**options)
        self._rotation = None

    def apply_rotary_emb_query(self, query: Tensor, query_emb: Tensor, *_rest: Any, **_options: Any) -> Tensor:
        """Rotate the step's queries [N, 1, heads, d]."""
        return self._rotate(query, query_emb)

    def apply_rotary_emb_key(self, key: Tensor, key_emb: Tensor, *_rest: Any, **_options: Any) -> Tensor:
        """Rotate the step's keys [N, 1, kv_heads, d]."""
        return self._rotate(key, key_emb)

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        if self._rotation is None:
            # Once a step, for all layers.
            at = angles[self.token_to_pos_ids[: self.padded_active_token_count]]
            sin = at.sin()
            sin[..., :half] *= -1
            self._rotation = at.cos().to(x.dtype), sin.to(x.dtype)
        cos, sin = self._rotation
        return (x * cos).addcmul_(torch.cat((x[..., half:], x[..., :half]), -1), sin)


class RowBlocks(BlockAllocator):
    """Hands out block i for row i: rows are kept without gaps, so the next free block is the number in use."""

    def allocate_memory_blocks(self, num_blocks: int) -> Tensor | None:
        """The next `num_blocks` blocks, or None when there are not so many."""
        if not self.is_memory_available(num_blocks):
            return None
        used = self.get_total_used()
        self.total_avail -= num_blocks
        return torch.arange(used, used + num_blocks, dtype=torch.int32, device=self.block_bag.device)

    def release_memory_blocks(self, blocks: Tensor) -> None:
        """Take back as many blocks; which ones they are follows from the rows that are left."""
        self.total_avail += len(blocks)
