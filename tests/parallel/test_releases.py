"""What is known of Megatron-Core's releases is true of the installed one."""

from __future__ import annotations

import inspect
import logging
from importlib.util import find_spec

import megatron.core.inference.text_generation_controllers.text_generation_controller as controllers
import megatron.core.inference.utils as inference
import pytest
from megatron.core import dist_checkpointing

from megarlhf.parallel import releases
from megarlhf.parallel.cpu import install


def test_each_difference_is_where_it_is_said_to_be() -> None:
    assert (find_spec("megatron.core.inference.config") is not None) == releases.NEW_ENGINE
    assert ("InferenceMode" in dir(inference)) == releases.NEW_ENGINE
    assert ("DynamicBatchControllerStepResult" in dir(controllers)) == releases.STEPS_SAY_WHAT_RAN
    assert ("async_strategy" in inspect.signature(dist_checkpointing.save).parameters) == bool(releases.SAVE_OPTIONS)


def test_the_known_warnings_are_left_out_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    install()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logger.warning("GPTModel is built twice")
    assert caplog.messages == ["GPTModel is built twice"]
