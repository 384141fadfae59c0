"""How many threads compute a step: all, or fewer while other programs hold some of the cores.

Threads of a step wait for each other many times. When one has lost its core to another program, the others
wait for milliseconds, so that fewer threads are faster, by several times on two cores. Steps with long waits
are the sign to try fewer; now and then more are tried again.
"""

from collections.abc import Generator
from statistics import median

TRIAL = 8
"""Steps whose median time is compared with that of as many others."""

LONG_WAITS = 2
"""Long waits of a usual step: at its beginning, when threads wake up. More say that a thread has no core."""

REST = 256
"""Fewest steps between two trials."""

Plan = Generator[int, tuple[float, int], None]
"""Yields the number of threads for the next step, and is sent its seconds and the long waits in it."""


class Threads:
    """The number of threads for steps of one size, learnt from their times."""

    def __init__(self, most: int) -> None:
        self._plan = plan(most)
        self.count = next(self._plan)
        """For the next step: 1 to most."""

    def note(self, seconds: float, long_waits: int) -> None:
        """Note a step that `count` threads have computed."""
        self.count = self._plan.send((seconds, long_waits))


def plan(most: int) -> Plan:
    """Begin with `most` threads; halve or double them when that is faster in a trial."""
    count, steps = most, REST
    while True:
        seconds, waits = yield from observe(count)
        steps += TRIAL
        other = max(1, count // 2) if waits > LONG_WAITS else min(most, 2 * count)
        if steps < REST or other == count:
            continue
        steps = 0
        there, _ = yield from observe(other)
        if there < seconds:
            count = other


def observe(count: int) -> Generator[int, tuple[float, int], tuple[float, float]]:
    """Compute TRIAL steps with so many threads. Returns the medians of their seconds and long waits."""
    times: list[float] = []
    waits: list[int] = []
    while len(times) < TRIAL:
        seconds, long_waits = yield count
        times.append(seconds)
        waits.append(long_waits)
    return median(times), median(waits)
