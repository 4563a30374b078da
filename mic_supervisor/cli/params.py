"""What options of several commands take."""

from __future__ import annotations

import click

targets_option = click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="GPU|MODEL",
    help="This one only; may be said several times. Removes nothing that the file merely lacks.",
)


class Duration(click.ParamType[float]):
    """Seconds, from "500ms", "30s", "5m" or "1h"."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        from mic_supervisor.config.types import parse_duration

        if isinstance(value, float):
            return value
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
