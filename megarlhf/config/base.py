"""The base of every settings class."""

from __future__ import annotations

import pydantic


class Config(pydantic.BaseModel):
    """Frozen settings; unknown names are errors, and the docstring under a field is its documentation.

    That docstring states meaning, unit and the source of the default, because `megarlhf <command> --help` prints it.
    """

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
        protected_namespaces=(),
    )
