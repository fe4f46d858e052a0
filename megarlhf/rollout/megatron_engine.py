"""Megatron-Core's inference engine by the same names in every release.

Up to 0.16 a context takes its settings one by one and keeps its books on the device. From 0.18 they are an
`InferenceConfig` that engine, controller and wrapper read as well, and the books are kept on the host and copied to the
device before each step.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Each release lacks the modules of the others.

from __future__ import annotations

import copy
import faulthandler
import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.inference.contexts import dynamic_context
from megatron.core.inference.engines import dynamic_engine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarlhf.models.fp8 import without_fp8
from megarlhf.models.transformer import LlamaModel
from megarlhf.parallel.releases import NEW_ENGINE, STEPS_SAY_WHAT_RAN

# Importing the engine has a stack of this process printed at each of these, in front of what the run itself has to say.
for _number in (signal.SIGTERM, signal.SIGINT):
    faulthandler.unregister(_number)

# Megatron's decorators hide from type checkers that these are classes.
DynamicInferenceContext: Any = dynamic_context.DynamicInferenceContext
DynamicInferenceEngine: Any = dynamic_engine.DynamicInferenceEngine

if NEW_ENGINE:
    from megatron.core.inference.config import InferenceConfig, KVCacheManagementMode
    from megatron.core.inference.contexts.kv_block_allocator import KVBlockAllocator as BlockAllocator
    from megatron.core.inference.utils import InferenceMode
else:
    from megatron.core.inference.contexts.dynamic_block_allocator import BlockAllocator
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

if STEPS_SAY_WHAT_RAN:
    from megatron.core.inference.text_generation_controllers import text_generation_controller as controllers

__all__ = ["BlockAllocator", "Engine", "EngineContext", "EngineController", "drawing", "padded_tokens"]


class _CountsAsMegatrons(type(DynamicInferenceContext)):
    """Megatron captures calls whose arguments are of the types in a set of its own, none of them a subclass."""

    def __eq__(self, other: object) -> bool:
        return other is self or other is DynamicInferenceContext

    def __hash__(self) -> int:
        return hash(DynamicInferenceContext)


class EngineContext(DynamicInferenceContext, metaclass=_CountsAsMegatrons):
    """Megatron's paged cache, by the same names in every release.

    config: of the model; layers: of this rank, which is all that a cache holds; options: as `InferenceConfig` names
    them, `pg_collection`, `max_requests`, `buffer_size_gb` (GiB) and so on.
    """

    def __init__(
        self, config: TransformerConfig, *, layers: int, pg_collection: ProcessGroupCollection, **options: Any
    ) -> None:
        if NEW_ENGINE:
            # RECOMPUTE: what is given back is not kept anywhere.
            settings = InferenceConfig(
                pg_collection=pg_collection, kv_cache_management_mode=KVCacheManagementMode.RECOMPUTE, **options
            )
            super().__init__(_of_one_rank(config, layers), settings)
        else:
            super().__init__(
                params_dtype=config.params_dtype,
                num_layers=layers,
                kv_channels=config.kv_channels,
                num_attention_heads=config.num_query_groups,
                pg_collection=pg_collection,
                **options,
            )

    @property
    def blocks(self) -> Any:
        """The allocator of the cache's blocks."""
        return self.kv_block_allocator if NEW_ENGINE else self.block_allocator

    @blocks.setter
    def blocks(self, allocator: Any) -> None:
        if NEW_ENGINE:
            self.kv_block_allocator = allocator
        else:
            self.block_allocator = allocator

    @property
    def inherited(self) -> Sequence[Tensor]:
        """What a row has from the prompt that it continues, [max_requests] each; ids and blocks are its own."""
        columns = (
            self.request_query_lengths,
            self.request_output_lengths,
            self.request_kv_length_offsets,
            self.request_kv_block_counts,
            self.request_last_kv_block_offset,
            *self.request_metadata.values(),
        )
        return (*columns, self.request_in_prefill_status_tensor) if NEW_ENGINE else columns

    def clear_cache(self) -> None:
        """Fill the cache with finite content: attention weighs unused tokens by 0, and 0 times NaN is NaN."""
        self.memory_buffer.zero_()

    def allocate_all_tensors(self, *, is_init: bool) -> None:
        """Allocate, up to 0.16."""
        super().allocate_all_tensors(is_init=is_init)
        self.clear_cache()

    def _allocate_memory_buffer(self) -> None:
        # From 0.18.
        super()._allocate_memory_buffer()
        self.clear_cache()

    def deallocate(self) -> None:
        """Give the memory back; nothing can be drawn with it any more."""
        if NEW_ENGINE:
            self.deallocate_inference_state_buffers()
            self.__dict__.clear()  # it and its parts hold each other, and with them the books' copies on the device
        else:
            self.deallocate_all_tensors()


def padded_tokens(tokens: int, tensor_ranks: int) -> int:
    """To how many tokens a step of so many is padded at most."""
    return DynamicInferenceContext.round_up_tokens(tokens, tensor_ranks)


def _of_one_rank(config: TransformerConfig, layers: int) -> TransformerConfig:
    """`config` of a model that is no more than these layers: Megatron would count those of a rank by its own rules,
    which do not know the chunks of an interleaved schedule."""
    own = copy.copy(config)
    own.num_layers = layers
    own.pipeline_model_parallel_size = 1
    own.virtual_pipeline_model_parallel_size = None
    own.num_layers_in_first_pipeline_stage = own.num_layers_in_last_pipeline_stage = None
    own.account_for_embedding_in_pipeline_split = own.account_for_loss_in_pipeline_split = False
    own.pipeline_model_parallel_layout = None
    return own


class EngineController(TextGenerationController):
    """Megatron's controller without a tokenizer, over a model and its cache."""

    def __init__(self, model: LlamaModel, context: EngineContext, groups: ProcessGroupCollection) -> None:
        if NEW_ENGINE:
            # Of a model in FP8 Megatron would have every linear layer fill up its input, from then on and in training
            # too: the steps of a rollout have sizes that FP8 takes.
            with without_fp8([model]):
                wrapped = GPTInferenceWrapper(model, context)
            super().__init__(wrapped, tokenizer=None)
            return
        config = InferenceWrapperConfig(
            hidden_size=model.config.hidden_size,
            params_dtype=model.config.params_dtype,
            inference_batch_times_seqlen_threshold=-1,
            padded_vocab_size=model.vocab_size,
            inference_max_requests=context.max_requests,
            inference_max_seq_length=context.max_sequence_length,
        )
        super().__init__(GPTInferenceWrapper(model, config, context, groups), tokenizer=None, pp_group=groups.pp)

    def step(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Prepare a step. Shapes: returns tokens and positions, [1, tokens of the step] int64 each."""
        tokens, positions, *_ = self._dynamic_step_context_init(**options)
        return tokens, positions

    def ran(self, decode_only: bool) -> Any:
        """What a step returns: that it ran, and whether it only decoded."""
        if not STEPS_SAY_WHAT_RAN:
            return {}
        state = controllers.DecodeOnly(consumed=decode_only, launched=decode_only)
        return controllers.DynamicBatchControllerStepResult(decode_only=state, output={})


class Engine(DynamicInferenceEngine):
    """Megatron's engine, of whole prompts."""

    def __init__(self, controller: EngineController, context: EngineContext, groups: ProcessGroupCollection) -> None:
        if NEW_ENGINE:
            super().__init__(controller, context)
        else:
            super().__init__(controller, context, random_seed=0, enable_chunked_prefill=False, pg_collection=groups)


def drawing() -> AbstractContextManager[None]:
    """Inside, models run as engines want them to; outside, as scores and losses do."""
    return InferenceMode.active() if NEW_ENGINE else nullcontext()
