"""What differs between the releases of Megatron-Core that this package runs on, 0.16.1 to 0.19.2.

The names of its inference engine differ most: `rollout/megatron_engine.py` gives them one form.
0.17 is left out: with its engine's step sizes attention over a paged cache gets more rows than the step has.
Source: the packages 0.16.1, 0.17.1, 0.18.2 and 0.19.2.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

from packaging.version import Version

_RELEASE = Version(version("megatron-core")).release  # nothing is imported before `cpu.install`

NEW_ENGINE = _RELEASE >= (0, 18)
"""Engine, context, controller and wrapper read one `InferenceConfig`, books are kept on the host, and models ask
`InferenceMode` whether they draw; before, each takes its own settings, and models draw where they have a cache."""
STEPS_SAY_WHAT_RAN = _RELEASE >= (0, 19)
"""A controller's step says whether it only decoded; before, the engine asks the context."""
SAVE_OPTIONS: dict[str, Any] = {"async_strategy": "mcore"} if NEW_ENGINE else {}
"""Of a save of shards, which would ask for nvidia-resiliency-ext from 0.18 on."""
KNOWN = (
    "GPTModel IS DEPRECATED",
    "Rewrapping ModuleSpec",
    "MCore's async save is deprecated",
    "load_common is deprecated",
    "DistributedDataParallel: full_param_layout not provided",
)
"""How warnings of 0.19 begin: of what this package means to do, and does by the same code in every release."""


def quiet() -> None:
    """Leave `KNOWN` out of what Megatron logs."""
    for name in (
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.transformer.transformer_layer",
        "megatron.core.dist_checkpointing.strategies.torch",
        "megatron.core.dist_checkpointing.strategies.common",
        "megatron.core.distributed.distributed_data_parallel",
    ):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(KNOWN))
