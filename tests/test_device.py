"""The device is found, named and used as promised, on hardware that this machine need not have.

What PyTorch would answer on such hardware is put in its mouth.
"""

from types import SimpleNamespace

import pytest
import torch

from nanogpt import device as devices
from nanogpt.config import UserError
from nanogpt.device import (
    autocast,
    bfloat16_pays,
    describe,
    pick_compile,
    pick_device,
    pick_dtype,
    synchronize,
)

GIB = 1024**3
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """Make PyTorch answer for a machine: machine(cuda=[(name, GiB, capability), ...], hip=..., mps=...)."""

    def build(cuda=(), hip=None, mps=False, cpu=()):
        def card(which=None):
            index = which if isinstance(which, int) else torch.device(which or "cuda").index
            return cuda[index or 0]

        def properties(which=None):
            name, memory, (major, minor) = card(which)
            return SimpleNamespace(name=name, total_memory=int(memory * GIB), major=major, minor=minor)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cuda))
        # Asked without arguments, PyTorch counts slow emulation in: true of every card.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bool(cuda))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda which=None: card(which)[0])
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which=None: card(which)[2])
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GIB)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(cpu), raising=False)

    build()
    return build


RADEON = ("AMD Radeon RX 7900 XTX", 24, (11, 0))
A100 = ("NVIDIA A100-SXM4-40GB", 39.39, (8, 0))
H100 = ("NVIDIA H100", 79.1, (9, 0))
T4 = ("Tesla T4", 14.58, (7, 5))


# What it is called


def test_an_amd_card(machine):
    machine(cuda=[RADEON], hip="6.0.32830")
    assert describe(pick_device("auto")) == [
        "ROCm available: Using AMD GPU (AMD Radeon RX 7900 XTX)",
        "GPU Memory: 24.00 GB",
    ]


def test_an_nvidia_card(machine):
    machine(cuda=[A100])
    assert describe(pick_device("cuda")) == [
        "CUDA available: Using NVIDIA GPU (NVIDIA A100-SXM4-40GB)",
        "GPU Memory: 39.39 GB",
    ]


def test_the_card_that_was_asked_for(machine):
    machine(cuda=[A100, T4])
    assert describe(pick_device("cuda:1"))[0] == "CUDA available: Using NVIDIA GPU (Tesla T4)"
    assert describe(pick_device("cuda:1"))[1] == "GPU Memory: 14.58 GB"


def test_apple_silicon(machine):
    machine(mps=True)
    assert describe(pick_device("auto")) == ["MPS available: Using Apple Silicon GPU", "GPU Memory: 12.00 GB"]


@pytest.mark.parametrize(
    ("cpu", "name"), [({"cpu_name": "Some CPU @ 2 GHz "}, "Some CPU @ 2 GHz"), ({}, "unnamed")]
)
def test_a_cpu(machine, cpu, name):
    machine(cpu=cpu)
    assert describe(pick_device("auto")) == [f"Using CPU ({name}, 1 thread)"]


def test_a_pytorch_that_does_not_know_the_cpu(machine, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert describe(CPU) == ["Using CPU (unnamed, 1 thread)"]
    assert pick_dtype("auto", CPU, 64) == torch.float32


def test_the_real_cpu_is_described_in_one_line():
    (line,) = describe(CPU)
    assert line.startswith("Using CPU (")


# Which one


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [([A100], True, "cuda"), ([A100], False, "cuda"), ([], True, "mps"), ([], False, "cpu")],
)
def test_auto_takes_the_fastest_there_is(machine, cuda, mps, expected):
    machine(cuda=cuda, mps=mps)
    assert pick_device("auto").type == expected


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1", "mps"])
def test_a_device_that_is_there(machine, name):
    machine(cuda=[A100, T4], mps=True)
    assert pick_device(name) == torch.device("cuda:0" if name == "cuda" else name)


@pytest.mark.parametrize(("name", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_the_device_is_one_that_pytorch_can_be_set_to(machine, monkeypatch, name, number):
    """torch.cuda.set_device, with its own checks: a device without a number is refused."""
    machine(cuda=[A100, T4])
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    torch.cuda.set_device(pick_device(name))
    assert chosen == [number]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda", "sees 0 CUDA or ROCm devices"),
        ("cuda:0", "sees 0 CUDA or ROCm devices"),
        ("mps", "no Apple GPU"),
        ("gpu", "unknown"),
        ("", "unknown"),
        ("CPU", "unknown"),
        ("cuda:x", "unknown"),
        ("cuda:-1", "unknown"),
        ("cuda 0", "unknown"),
        ("meta", "unknown"),
        ("xla", "unknown"),
    ],
)
def test_a_device_that_is_not_there(machine, name, said):
    with pytest.raises(UserError, match=said) as raised:
        pick_device(name)
    message = str(raised.value)
    assert message.startswith(f"--device {name}")
    assert "\n" not in message
    assert ": use " in message


def test_more_cards_than_there_are(machine):
    machine(cuda=[A100, A100])
    assert pick_device("cuda:1").index == 1
    with pytest.raises(UserError, match="--device cuda:2: PyTorch sees 2"):
        pick_device("cuda:2")


def test_a_driver_that_counts_cards_it_cannot_use(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="sees 0"):
        pick_device("cuda")


# Which arithmetic


@pytest.mark.parametrize(
    ("card", "hip", "expected"),
    [
        (A100, None, torch.bfloat16),
        (H100, None, torch.bfloat16),
        (("Ada", 24, (8, 9)), None, torch.bfloat16),
        (T4, None, torch.float16),
        (("V100", 16, (7, 0)), None, torch.float16),
        (RADEON, "6.0", torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_card_has_it(machine, card, hip, expected):
    machine(cuda=[card], hip=hip)
    assert pick_dtype("auto", CUDA, 64) == expected


def test_auto_asks_the_card_that_is_used(machine):
    machine(cuda=[T4, A100])
    assert pick_dtype("auto", torch.device("cuda:1"), 64) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda:0"), 64) == torch.float16


def test_auto_on_mps(machine):
    machine(mps=True)
    assert pick_dtype("auto", MPS, 64) == torch.float32


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize("pays", [True, False])
def test_auto_on_a_cpu_with_bfloat16_is_what_the_trial_says(machine, monkeypatch, instructions, pays):
    machine(cpu={instructions: True})
    widths = []
    monkeypatch.setattr(devices, "bfloat16_pays", lambda width: (widths.append(width), pays)[1])
    assert pick_dtype("auto", CPU, 96) == (torch.bfloat16 if pays else torch.float32)
    assert widths == [96]


@pytest.mark.parametrize("cpu", [{}, {"avx512_bf16": False, "amx_bf16": False, "avx2": True}])
def test_auto_on_a_cpu_without_bfloat16_tries_nothing(machine, monkeypatch, cpu):
    machine(cpu=cpu)
    monkeypatch.setattr(devices, "bfloat16_pays", lambda _width: pytest.fail("a trial of what is not there"))
    assert pick_dtype("auto", CPU, 96) == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", [CPU, CUDA, MPS], ids=str)
def test_a_dtype_by_name_is_taken_at_its_word(machine, name, device):
    if (device, name) == (MPS, "float16"):
        with pytest.raises(UserError, match="does not train on Apple GPUs"):
            pick_dtype(name, device, 64)
    else:
        assert pick_dtype(name, device, 64) == getattr(torch, name)


@pytest.mark.parametrize(("slow", "expected"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_trial_tells_the_faster_dtype(monkeypatch, slow, expected):
    now = [0.0]
    real = devices.autocast

    def clocked(device, dtype):
        now[0] += 2.0 if dtype == slow else 1.0
        return real(device, dtype)

    monkeypatch.setattr(devices, "TRIAL_ROWS", 4)
    monkeypatch.setattr(devices, "autocast", clocked)
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])
    assert bfloat16_pays(8) is expected


def test_one_slow_round_does_not_decide_the_trial(monkeypatch):
    ticks = iter([0, 1, 0, 2, 0, 3, 0, 2, 0, 3, 0, 2, 0, 3, 0, 2])  # float32 and bfloat16 in turn
    monkeypatch.setattr(devices, "TRIAL_ROWS", 4)
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(ticks))
    assert bfloat16_pays(8) is False  # best of float32: 1; best of bfloat16: 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_is_the_dtype_of_matrix_products(dtype):
    a = torch.ones(2, 2)
    with autocast(CPU, dtype):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


# Compiled or not


@pytest.mark.parametrize(
    ("platform", "device", "expected"),
    [
        ("linux", CUDA, True),
        ("linux", torch.device("cuda:1"), True),
        ("linux", CPU, False),
        ("win32", CUDA, False),
        ("darwin", MPS, False),
        ("darwin", CPU, False),
    ],
)
def test_compile_by_itself_on_linux_with_cuda(monkeypatch, platform, device, expected):
    monkeypatch.setattr(devices.sys, "platform", platform)
    assert pick_compile("auto", device) is expected


@pytest.mark.parametrize("platform", ["linux", "win32", "darwin"])
@pytest.mark.parametrize("device", [CPU, CUDA, MPS], ids=str)
def test_compile_as_told(monkeypatch, platform, device):
    monkeypatch.setattr(devices.sys, "platform", platform)
    assert pick_compile("on", device) is True
    assert pick_compile("off", device) is False


def test_synchronize_waits_for_the_device_that_is_used(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    synchronize(CPU)
    assert waited == []
    synchronize(torch.device("cuda:1"))
    synchronize(MPS)
    assert waited == [torch.device("cuda:1"), "mps"]
