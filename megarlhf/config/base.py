"""The base of every settings class."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pydantic
from pydantic_core import PydanticCustomError

from megarlhf.config import yaml12

LEAST, MOST = 1e-20, 1e12
"""Sizes that a number may have beside 0: what fp32 keeps with room for squares, seconds that a clock can add, and far
beyond any learning rate, weight or score."""
MOST_WHOLE = 10**18
"""Largest whole number, a seed for example: what 64 bits keep with room for sums."""
LONGEST_PATH, LONGEST_NAME = 4096, 255
"""Bytes that Linux's file systems take, of a path and of each name in it."""
PLACES = ("init", "model", "reference", "reward", "source", "tokenizer")
"""Settings that are a path or a name of another kind: as paths, they must be ones that can be looked for."""


@dataclass(frozen=True)
class FreeToChange:
    """Marks a setting, or a group of them, that may differ when a run goes on: `Annotated[int, FreeToChange()]`.

    It changes no result, or only its rounding; unless it is `said`.
    """

    said: bool = False
    """It changes what comes: a stop may ask for that, and the run then says from what to what."""
    ends: bool = False
    """It says when a run ends: one that is done goes on where it is changed."""


class Config(pydantic.BaseModel):
    """Frozen settings; unknown names are errors, and the docstring under a field is its documentation.

    That docstring states meaning, unit and the source of the default, because `megarlhf <command> --help` prints it.
    Numbers of no sensible size, and text that no file system, tokenizer or log could take, are refused in every class.
    """

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    first: ClassVar[tuple[str, ...]] = ()
    """Settings that one needs first, by dotted name: what `--help` shows."""
    needed: ClassVar[tuple[str, ...]] = ()
    """Settings, by dotted name, whose default stands for nothing: they are required all the same."""

    @pydantic.field_validator("*", mode="after")
    @classmethod
    def _makes_sense(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        for item in value if isinstance(value, tuple | list) else (value,):
            _check(Path(item) if isinstance(item, str) and info.field_name in PLACES else item)
        return value

    @classmethod
    def free_to_change(cls) -> dict[str, FreeToChange]:
        """The marked settings, by dotted name; of a marked group the group alone."""
        found: dict[str, FreeToChange] = {}
        for name, field in cls.model_fields.items():
            mark = next((mark for mark in field.metadata if isinstance(mark, FreeToChange)), None)
            if mark is not None:
                found[name] = mark
            elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
                found |= {f"{name}.{inner}": mark for inner, mark in field.annotation.free_to_change().items()}
            for kind in kinds_of(field.annotation).values():
                found |= {f"{name}.*.{inner}": mark for inner, mark in kind.free_to_change().items()}
        return found

    def to_yaml(self) -> str:
        """Return every setting with its resolved value; reading it back gives an equal object."""
        return yaml12.render(self.model_dump(mode="json"))


def kinds_of(annotation: Any) -> dict[str, type[Config]]:
    """The settings classes that a mapping such as `dict[str, Annotated[A | B, Field(discriminator="kind")]]` takes, by
    their kind; none for any other annotation."""
    if typing.get_origin(annotation) is not dict:
        return {}
    _, value = typing.get_args(annotation)
    union = typing.get_args(value)[0] if typing.get_origin(value) is typing.Annotated else value
    classes = [each for each in typing.get_args(union) if isinstance(each, type) and issubclass(each, Config)]
    return {typing.get_args(each.model_fields["kind"].annotation)[0]: each for each in classes}


def named_config(annotation: Any) -> type[Config] | None:
    """The settings class that a mapping from names of the user's takes, such as `dict[str, A]`; None for any other."""
    if typing.get_origin(annotation) is not dict:
        return None
    _, value = typing.get_args(annotation)
    return value if isinstance(value, type) and issubclass(value, Config) else None


def _check(value: Any) -> None:
    match value:
        case int() if abs(value) > MOST_WHOLE:
            raise PydanticCustomError("size", "should be of a size up to 1e18")
        case float() if value and not LEAST <= abs(value) <= MOST:
            raise PydanticCustomError("size", "should be 0 or of a size from 1e-20 to 1e12")
        case str() | Path() if "\0" in str(value):
            raise PydanticCustomError("text", "should not contain a NUL character")
        case Path() if len(bytes(value)) >= LONGEST_PATH or any(
            len(os.fsencode(name)) > LONGEST_NAME for name in value.parts
        ):
            raise PydanticCustomError(
                "path", "should be a path that a file system takes, of names of at most 255 bytes"
            )
