"""The base of every settings class."""

from __future__ import annotations

import pydantic

from megarlhf.config import yaml12


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

    def to_yaml(self) -> str:
        """Return every setting with its resolved value; reading it back gives an equal object."""
        return yaml12.render(self.model_dump(mode="json"))
