"""docs/reliability.md: what runs of `make soak` and `make chaos` gave, as they wrote it down.

docs/benchmarks.md is written in the same way.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.setup.steps import CHECKOUT

PAGE = CHECKOUT / "docs" / "reliability.md"


def where() -> list[str]:
    """Lines with date, machine and commit of a run."""
    processor = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return [
        f"{datetime.now(UTC):%Y-%m-%d}, commit {_commit()}, Python {platform.python_version()},",
        f"{os.cpu_count()} x {processor}, {memory:.0f} GiB, Linux {platform.release()}.",
    ]


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", CHECKOUT, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "mic_supervisor")
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")


def write(section: str, lines: Sequence[str], page: Path = PAGE) -> None:
    """Replaces what stands between the marks of a section. Raises ValueError where there is none.

    The page has `<!-- SECTION: a run writes this -->` and `<!-- SECTION: end -->`.
    """
    text = page.read_text()
    start, end = f"<!-- {section}: a run writes this -->\n", f"<!-- {section}: end -->"
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"cannot write down the run: {page} has no section {section}")
    page.write_text("\n".join([f"{head}{start}", *lines, "", f"{end}{tail}"]))
