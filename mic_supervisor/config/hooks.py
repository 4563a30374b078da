"""The keys of `hooks:`: programs that are told of what happens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from mic_supervisor.config.options import Strict, Text
from mic_supervisor.config.types import Duration, PositiveDuration


class Hooks(Strict):
    """Run without a shell, one at a time, as the supervisor's user."""

    on_endpoints_change: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="A program's absolute path and its arguments: run when the instances that "
        "serve a model change, before one of them is stopped and after one has become ready.",
    )
    timeout: PositiveDuration = Field(
        default=30.0, description="After which it is killed, with all that it started."
    )
    settle: Duration = Field(
        default=1.0,
        description="From its end until an instance is stopped that it took out, for proxies that "
        "go on with what they had for a moment.",
    )

    @field_validator("on_endpoints_change")
    @classmethod
    def _absolute(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and any("${" in item for item in value):
            raise ValueError("nothing is replaced in a hook's arguments; leave the ${…} out")
        if value is not None and not value[0].startswith("/"):
            raise ValueError(
                f"the program {value[0]!r} is not an absolute path; write where it is, as in "
                "/etc/mic/endpoints-changed"
            )
        return value
