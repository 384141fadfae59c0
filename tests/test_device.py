"""The device is found, named and used as promised, on hardware that this machine need not have.

What PyTorch would answer on such hardware is put in its mouth.
"""

import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanogpt.errors import UserError
from nanogpt.machine import device as devices
from nanogpt.machine.device import (
    describe,
    is_out_of_memory,
    kind_of,
    pick_device,
)
from nanogpt.training.compilation import MIN_COMPILE_OPERATIONS, pick_compile
from nanogpt.units import GIB

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """Make PyTorch answer for a machine: machine(cuda=[(name, GiB, capability), ...], hip=..., mps=...)."""

    def build(cuda=(), hip=None, mps=False, cpu=(), archs=""):
        def card(which=None):
            index = which if isinstance(which, int) else torch.device(which or "cuda").index
            return cuda[index or 0]

        def properties(which=None):
            name, memory, (major, minor) = card(which)
            gfx = {"gcnArchName": f"gfx{major}{minor}0:xnack-"} if hip else {}
            return SimpleNamespace(name=name, total_memory=int(memory * GIB), major=major, minor=minor, **gfx)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cuda))
        # Asked without arguments, PyTorch counts slow emulation in: true of every card.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bool(cuda))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda which=None: card(which)[0])
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which=None: card(which)[2])
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
        monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: archs, raising=False)
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


# Compiled or not


@pytest.mark.parametrize(
    ("kind", "device", "expected"),
    [
        (True, CUDA, True),
        (True, torch.device("cuda:1"), True),
        (False, CUDA, False),
        (True, MPS, False),
        (True, CPU, False),
    ],
)
def test_compile_by_itself_where_it_pays(monkeypatch, kind, device, expected):
    """On Linux with CUDA, in trainings that are longer than compiling."""
    monkeypatch.setattr(devices.CUDA, "compiles_by_default", kind)
    assert pick_compile("auto", device, MIN_COMPILE_OPERATIONS) is expected
    assert pick_compile("auto", device, MIN_COMPILE_OPERATIONS / 2) is False


@pytest.mark.parametrize("device", [CPU, CUDA, MPS], ids=str)
def test_compile_as_told(device):
    assert pick_compile("on", device, 1.0) is True
    assert pick_compile("off", device, 1e30) is False


def test_synchronize_waits_for_the_device_that_is_used(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for place in (CPU, torch.device("cuda:1"), MPS):
        kind_of(place).synchronize(place)
    assert waited == [torch.device("cuda:1"), "mps"]


# What it cannot serve


GTX = ("NVIDIA GeForce GTX 1080", 8, (6, 1))
WHEEL = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"


@pytest.mark.parametrize(
    ("card", "archs", "served"),
    [
        (GTX, WHEEL, False),
        (("V100", 16, (7, 0)), WHEEL, False),
        (T4, WHEEL, True),
        (("RTX 4090", 24, (8, 9)), WHEEL, True),  # the code for 8.6 runs on 8.9
        (("Thor", 24, (11, 0)), WHEEL, False),  # no code for 11.x, and PTX for later ones alone
        (("Rubin", 24, (13, 0)), WHEEL, True),  # from PTX
        (GTX, "sm_50 sm_60 sm_70 compute_70", True),
        (H100, "sm_80 sm_90a", True),
    ],
)
def test_a_card_that_this_build_has_no_code_for(machine, card, archs, served):
    """auto goes on with the CPU and says why; asked for, it is an error with the fix."""
    machine(cuda=[card], archs=archs)
    if served:
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:0")
        return
    assert pick_device("auto").type == "cpu"
    first, second = describe(pick_device("auto"))
    assert first.startswith(f"No GPU: this build of PyTorch has no code for {card[0]} (compute capability ")
    assert second.startswith("Using CPU")
    with pytest.raises(UserError, match=f"--device cuda: this build of PyTorch has no code for {card[0]}"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("archs", "served"), [("gfx90a gfx1100", True), ("gfx90a gfx942", False), ("", True)]
)
def test_an_amd_card_that_this_build_has_no_code_for(machine, archs, served):
    machine(cuda=[RADEON], hip="6.4", archs=archs)
    assert pick_device("auto").type == ("cuda" if served else "cpu")


def test_a_driver_that_is_too_old(machine, monkeypatch):
    """PyTorch warns, once, in a paragraph; of that the cause is said, in a line."""

    def is_available():
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please "
            "update your GPU driver by downloading and installing a new version from the URL: ...",
            stacklevel=1,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setitem(devices.KINDS, "cuda", devices.CUDA())
    reason = "The NVIDIA driver on your system is too old (found version 11040)"
    assert describe(pick_device("auto"))[0] == f"No GPU: {reason}"
    with pytest.raises(UserError, match=re.escape(reason)):
        pick_device("cuda")


# Float32 products, memory


def test_tf32_is_for_trainings_in_a_narrower_dtype_alone(machine, monkeypatch):
    """One in float32 is exact, whatever another in the same process has had."""
    machine(cuda=[A100])
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda _: None, raising=False)
    place, said = torch.device("cuda:0"), []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    for dtype in (torch.bfloat16, torch.float32):
        kind_of(place).set_up(place, dtype)
    assert said == ["high", "highest"]


def test_windows_is_kept_from_spilling_to_main_memory(machine, monkeypatch):
    machine(cuda=[A100])
    fractions = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda _: None, raising=False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *told: fractions.append(told))
    place = torch.device("cuda:0")
    kind_of(place).set_up(place, torch.bfloat16)
    monkeypatch.setattr(devices.sys, "platform", "win32")
    kind_of(place).set_up(place, torch.bfloat16)
    assert fractions == [(0.95, place)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("HIP out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**9,), np.dtype("float32")),
    ],
    ids=lambda error: str(error)[:30],
)
def test_running_out_of_memory_is_recognized(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), OSError()]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
