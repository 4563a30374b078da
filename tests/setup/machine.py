"""Sets this machine up for the integration tests: packages, engine, images, a model server.

`python -m tests.setup.machine` does it all and may be called at any time; with `stop` it ends the
engine that it started. In CI the first component that cannot be had ends it. Elsewhere the rest
goes on, and the tests that need the component are skipped with the reason.
"""

from __future__ import annotations

import sys
import time

from tests.setup import debs, engine, images, mlserver, packages
from tests.setup.steps import IN_CI, Missing, cache_dir, die, locked, say


def main() -> None:
    begun = time.monotonic()
    say(f"cache: {cache_dir()}")
    with locked("machine"):
        steps = (packages.ensure, engine.ensure, images.ensure, mlserver.ensure, debs.ensure)
        for step in steps:
            try:
                step()
            except Missing as error:
                if IN_CI:
                    die(str(error), hint=error.hint)
                say(f"NOT SET UP: {error}")
                say(f"  way out: {error.hint}")
    say(f"done in {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    if sys.argv[1:] == ["stop"]:
        try:
            engine.stop()
        except Missing as error:
            die(str(error), hint=error.hint)
    else:
        main()
