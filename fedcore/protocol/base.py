"""The base of all messages, and what a message may carry beside its own fields."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from .fields import SetId

__all__ = ["EXTENSIONS", "Extension", "Message", "OfRun", "Part", "is_of_run"]

EXTENSIONS: Final[frozenset[str]] = frozenset()
"""The members of ``ext`` that this version understands."""

_Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]


class Part(BaseModel):
    """Base of all that messages are made of: unknown fields and wrong types are refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants"
    )


class Extension(BaseModel):
    """Members that a later version adds to a message.

    A receiver ignores what it does not know, unless ``must`` names it: then it refuses the message.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    must: Annotated[list[_Name], Field(max_length=16, fail_fast=True)] = []

    @property
    def unknown(self) -> list[str]:
        """The members that the sender wants understood and that this version does not know."""
        return [name for name in self.must if name not in EXTENSIONS]


class Message(Part):
    """Base of all control messages."""

    type: str
    ext: Extension | None = None

    def left_out(self) -> set[str]:
        """Return the fields that are not written where they say nothing."""
        return {"ext"} if self.ext is None else set()


class OfRun(Message):
    """Base of what is said within a run: ``run_id`` names it. A message of another run is not acted on."""

    run_id: SetId | None = None

    def left_out(self) -> set[str]:
        """Return the fields that are not written where they say nothing."""
        return super().left_out() | ({"run_id"} if self.run_id is None else set())


def is_of_run(message: Message, run_id: str) -> bool:
    """Whether a message may be acted on in a run: it names that one, or none."""
    return not isinstance(message, OfRun) or message.run_id in (None, run_id)
