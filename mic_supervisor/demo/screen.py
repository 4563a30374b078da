"""Says what happens: headings, a few words, commands as they would be typed, their output."""

from __future__ import annotations

import os
import sys

import click


class Screen:
    """Writes to standard output at once, since commands that follow write to the same place."""

    def __init__(self) -> None:
        self._number = 0
        self._plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))

    def heading(self, text: str) -> None:
        self._number += 1
        self._put("")
        self._put(f"{self._number}. {text}", bold=True)

    def say(self, text: str) -> None:
        self._put(text)

    def command(self, line: str) -> None:
        self._put("")
        self._put(f"$ {line}", fg="cyan")

    def output(self, text: str) -> None:
        self._put(text.rstrip("\n"))

    def note(self, text: str) -> None:
        """What a check found out."""
        self._put(f"=> {text}", fg="green")

    def _put(self, text: str, *, bold: bool = False, fg: str | None = None) -> None:
        click.echo(text if self._plain else click.style(text, bold=bold or None, fg=fg))
        sys.stdout.flush()
