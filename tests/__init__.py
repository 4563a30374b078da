"""The tests, what the benchmarks share with them, and what sets a machine up for both.

Where no bytecode is wanted in the checkout it is kept elsewhere: with none at all, each worker of
pytest and each program that a test starts compiles everything anew.
"""

import os
import sys
import tempfile
from pathlib import Path

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    kept = os.environ.setdefault(
        "PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir()) / "mic-test-bytecode")
    )
    sys.dont_write_bytecode, sys.pycache_prefix = False, kept
