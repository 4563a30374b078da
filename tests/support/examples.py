"""How many examples a property is tried with: `make check` takes a share of what `make test` does.

The profiles are registered in tests/conftest.py.
"""

from hypothesis import settings


def examples(number: int) -> int:
    """`number`, or the same share of it that the profile takes of hypothesis's hundred."""
    return number * settings().max_examples // 100
