"""When to try again."""

from __future__ import annotations

FIRST = 5.0  # seconds
LONGEST = 300.0  # seconds
JITTER = 0.1  # share of the delay that `jitter` = 1 adds
# seconds, where nothing speaks against a specification
FIRST_COOLDOWN, LONGEST_COOLDOWN = 1.0, 60.0
STABLE = 600.0  # seconds of being ready after which earlier failures are forgotten


def delay(failures: int, jitter: float = 0.0) -> float:
    """Seconds from the `failures`-th failure to the next try.

    The first failure since the last reset restarts at once. `jitter` is drawn by the caller from
    0 to 1, so that equal inputs give equal plans.
    """
    if failures <= 1:
        return 0.0
    # The exponent is capped: the delay is, too, and a float would overflow after a thousand.
    base = min(FIRST * 2.0 ** min(failures - 2, 16), LONGEST)
    return base * (1.0 + JITTER * jitter)


def cooldown(failures: int) -> float:
    """Seconds that nothing is tried for, after so many failures in a row of no specification."""
    return min(FIRST_COOLDOWN * 2.0 ** min(failures - 1, 16), LONGEST_COOLDOWN)


def is_stable(ready_since: float | None, now: float, startup_budget: float) -> bool:
    """Whether an instance was ready for so long that its failures are history."""
    return ready_since is not None and now - ready_since >= max(STABLE, startup_budget)
