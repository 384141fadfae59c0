"""The processor's cores: how many this process may use, and whether other programs hold them.

Use:    threads = usable_cores(); watch = CoreWatch(); ...; watch.held_by_others()
Counts physical cores (two threads on one core are slower at matrix products than one), those of the process's
affinity, within the quota of its container. Knows nothing of PyTorch.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
"""Where Linux says what a container or a cluster's job may take."""

CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
"""Where it says which control groups a process is in."""

CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
"""Where Linux says which processors are threads of one core."""


def usable_cores(*, physical: bool = True) -> int:
    """Cores that this process may use, at least 1. physical: count the threads of one core once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        count = psutil.cpu_count(logical=not physical) or os.cpu_count() or 1
    else:
        count = len({core_siblings(number) for number in allowed}) if physical else len(allowed)
    quota = cgroup_quota()
    return max(1, count if math.isinf(quota) else min(count, math.ceil(quota)))


def core_siblings(number: int) -> str:
    """The processors that are threads of the core that this one belongs to, as Linux lists them."""
    with suppress(OSError):
        return (CPU_TOPOLOGY / f"cpu{number}" / "topology" / "thread_siblings_list").read_text().strip()
    return str(number)


def cgroup_quota() -> float:
    """Cores' worth of time that the control groups of this process allow; infinity without a limit."""
    quotas = [float("inf")]
    for folder in cgroup_folders("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()  # version 2; "max" is no number
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
            quotas += [int(quota) / int(period)] * (int(quota) > 0)
    return min(quotas)


def cgroup_folders(controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, innermost first, of versions 2 and 1."""
    with suppress(OSError, ValueError):
        for line in CGROUP_MEMBERSHIP.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = CGROUP_ROOT / controllers
            inside = root / name.lstrip("/")
            for folder in (inside, *inside.parents):
                yield folder
                if folder == root:
                    break


class CoreWatch:
    """Looks at the cores from now on, to tell what others take of them."""

    def __init__(self) -> None:
        self.started, self.busy, self.own = self.read_times()

    def read_times(self) -> tuple[float, float, float]:
        """The clock, the seconds that all allowed cores were busy, and those that this process computed."""
        times = psutil.cpu_times(percpu=True)
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
        busy = sum(sum(times[i]) - idle_seconds(times[i]) for i in allowed if i < len(times))
        return time.perf_counter(), busy, time.process_time()

    def held_by_others(self) -> float:
        """Cores that other programs kept busy, on average, since the watch began."""
        now, busy, own = self.read_times()
        return max(0.0, (busy - self.busy - (own - self.own)) / max(1e-9, now - self.started))


def idle_seconds(times: object) -> float:
    """Seconds in which a core did nothing; guests' time is counted in the user's already."""
    names = ("idle", "iowait", "guest", "guest_nice")
    return sum(getattr(times, name, 0.0) for name in names)
