"""What a response is worth, said by something other than the policy."""

from typing import Annotated

from pydantic import Field

from megarlhf.judges.code_tests import CodeTestsConfig
from megarlhf.judges.function import FunctionConfig
from megarlhf.judges.process_model import ProcessJudgeConfig
from megarlhf.judges.remote import RemoteConfig
from megarlhf.judges.reward_model import ModelJudgeConfig
from megarlhf.judges.rules import RuleConfig

JudgeSettings = Annotated[
    ModelJudgeConfig | RuleConfig | FunctionConfig | RemoteConfig | CodeTestsConfig | ProcessJudgeConfig,
    Field(discriminator="kind"),
]
"""Of any kind of judge."""
