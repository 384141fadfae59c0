"""CPU cores: how many this process may use, and how many other programs keep busy.

Example: threads = usable_cores(); watch = CoreWatch(); ...; watch.held_by_others()
Usable are the physical cores in the process's affinity (two threads on one core multiply matrices slower than
one), up to the CPU quota of its container. Knows nothing of PyTorch.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
"""Where Linux keeps the limits of containers and cluster jobs."""

CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
"""Where Linux lists the control groups (cgroups) of this process."""

CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
"""Where Linux lists which logical CPUs share a core."""


def usable_cores(*, physical: bool = True) -> int:
    """Number of cores that this process may use, at least 1. physical: hyper-threads do not count."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        count = psutil.cpu_count(logical=not physical) or os.cpu_count() or 1
    else:
        count = len({core_siblings(number) for number in allowed}) if physical else len(allowed)
    quota = cgroup_quota()
    return max(1, count if math.isinf(quota) else min(count, math.ceil(quota)))


def core_siblings(number: int) -> str:
    """The logical CPUs on the same core as this one, as Linux lists them."""
    with suppress(OSError):
        return (CPU_TOPOLOGY / f"cpu{number}" / "topology" / "thread_siblings_list").read_text().strip()
    return str(number)


def cgroup_quota() -> float:
    """CPU quota of this process's control groups, in cores; infinity without a limit."""
    quotas = [float("inf")]
    for folder in cgroup_folders("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()  # v2; "max" is not a number
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
            quotas += [int(quota) / int(period)] * (int(quota) > 0)
    return min(quotas)


def cgroup_folders(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups (v2 and v1), innermost first."""
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
    """Measures how many cores other programs use, from its creation on."""

    def __init__(self) -> None:
        self.started, self.busy, self.own = self.read_times()

    def read_times(self) -> tuple[float, float, float]:
        """Seconds: the clock, busy time of all usable cores, CPU time of this process."""
        times = psutil.cpu_times(percpu=True)
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
        busy = sum(sum(times[i]) - idle_seconds(times[i]) for i in allowed if i < len(times))
        return time.perf_counter(), busy, time.process_time()

    def held_by_others(self) -> float:
        """Average number of cores that other programs kept busy since the creation."""
        now, busy, own = self.read_times()
        return max(0.0, (busy - self.busy - (own - self.own)) / max(1e-9, now - self.started))


def idle_seconds(times: object) -> float:
    """Idle seconds of a core; guest time is subtracted too, since user time includes it."""
    names = ("idle", "iowait", "guest", "guest_nice")
    return sum(getattr(times, name, 0.0) for name in names)
