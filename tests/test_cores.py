"""The cores that a process may use are counted: its affinity's, its container's, each once."""

import pytest

from nanogpt.machine import cores
from nanogpt.machine.cores import CoreWatch, cgroup_quota, usable_cores


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A Linux machine: machine(allowed processors, lists of siblings, cgroup files)."""

    def build(allowed, siblings=(), groups=(), membership="0::/job/step\n"):
        monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(allowed), raising=False)
        monkeypatch.setattr(cores, "CPU_TOPOLOGY", tmp_path / "cpu")
        monkeypatch.setattr(cores, "CGROUP_ROOT", tmp_path / "cgroup")
        monkeypatch.setattr(cores, "CGROUP_MEMBERSHIP", tmp_path / "membership")
        (tmp_path / "membership").write_text(membership)
        for number, listed in dict(siblings).items():
            folder = tmp_path / "cpu" / f"cpu{number}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{listed}\n")
        for name, content in dict(groups).items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return build


def test_two_threads_of_a_core_count_once(machine):
    machine(range(8), {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2,6", 6: "2,6", 3: "3,7", 7: "3,7"})
    assert usable_cores() == 4
    assert usable_cores(physical=False) == 8


def test_the_cores_of_the_affinity_count_alone(machine):
    machine({0, 4, 1}, {0: "0,4", 4: "0,4", 1: "1,5"})
    assert usable_cores() == 2


def test_a_kernel_that_does_not_tell_its_topology(machine):
    machine({3, 5})
    assert usable_cores() == 2


@pytest.mark.parametrize(
    ("groups", "membership", "quota"),
    [
        ({"job/step/cpu.max": "150000 100000\n"}, "0::/job/step\n", 1.5),
        ({"job/step/cpu.max": "max 100000\n"}, "0::/job/step\n", float("inf")),
        ({"job/step/cpu.max": "800000 100000", "job/cpu.max": "200000 100000"}, "0::/job/step\n", 2.0),
        ({"cpu,cpuacct/job/cpu.cfs_quota_us": "300000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
         "4:cpu,cpuacct:/job\n", 3.0),
        ({"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"},
         "4:cpu:/job\n", float("inf")),
        ({}, "nonsense", float("inf")),
    ],
)  # fmt: skip
def test_the_quota_of_the_container(machine, groups, membership, quota):
    machine(range(8), groups=groups, membership=membership)
    assert cgroup_quota() == quota
    assert usable_cores() == min(8, {1.5: 2}.get(quota, quota))


def test_elsewhere_than_on_linux(monkeypatch):
    monkeypatch.delattr(cores.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: 12 if logical else 6)
    assert usable_cores() == 6
    assert usable_cores(physical=False) == 12


def test_what_others_hold_is_told_from_what_this_process_computes(monkeypatch):
    looks = iter([(0.0, 100.0, 50.0), (10.0, 117.0, 59.0)])  # the clock, all busy seconds, own ones
    monkeypatch.setattr(CoreWatch, "read_times", lambda self: next(looks))
    assert CoreWatch().held_by_others() == pytest.approx(0.8)


def test_the_real_machine_is_looked_at():
    assert usable_cores() >= 1
    assert CoreWatch().held_by_others() >= 0
