"""The dtype is what a device multiplies fast: told by a GPU's architecture, measured elsewhere."""

from types import SimpleNamespace

import pytest
import torch

from nanogpt.errors import UserError
from nanogpt.machine import device, precision
from nanogpt.machine.device import autocast
from nanogpt.machine.precision import is_bfloat16_faster, is_slow, matmul_rates, pick_dtype, pick_muon_dtype

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda:0"), torch.device("mps")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def card(monkeypatch):
    """A GPU: card(compute capability, what ROCm calls it)."""

    def build(capability, gfx=None):
        monkeypatch.setattr(torch.version, "hip", "6.4" if gfx is not None else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        properties = SimpleNamespace(gcnArchName=gfx) if gfx else SimpleNamespace()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    return build


@pytest.fixture
def rates(monkeypatch):
    """Measured speeds: rates(float32, bfloat16, float16)."""

    def build(*speeds):
        measured = dict(zip((F32, BF16, F16), speeds, strict=True))
        monkeypatch.setattr(precision, "matmul_rates", lambda _: measured)

    return build


# By architecture


@pytest.mark.parametrize(
    ("capability", "gfx", "expected"),
    [
        ((9, 0), None, BF16),  # H100
        ((8, 9), None, BF16),  # RTX 40
        ((8, 0), None, BF16),  # A100
        ((7, 5), None, F16),  # T4, RTX 20
        ((7, 0), None, F16),  # V100
        ((6, 0), None, F16),  # P100
        ((6, 1), None, F32),  # GTX 10: float16 at a sixty-fourth of float32's speed
        ((5, 2), None, F32),
        ((11, 0), "gfx1100:xnack-", BF16),  # RX 7900
        ((12, 0), "gfx1201", BF16),
        ((9, 4), "gfx942:sramecc+:xnack-", BF16),  # MI300
        ((9, 0), "gfx90a", BF16),
        ((10, 3), "gfx1030", F16),  # RX 6000
        ((9, 0), "gfx900", F16),  # Vega
        ((11, 0), "", BF16),  # a build that does not tell
    ],
)
def test_a_gpu_computes_in_what_it_has_units_for(card, capability, gfx, expected):
    card(capability, gfx)
    assert pick_dtype("auto", CUDA, 64).dtype == expected
    assert pick_muon_dtype("auto", CUDA).dtype == expected
    assert not is_slow(expected, CUDA)
    assert is_slow(BF16, CUDA) == (expected != BF16)


# By measurement


@pytest.mark.parametrize(
    ("speeds", "pays", "training", "muon"),
    [
        ((90, 1462, 3), True, BF16, BF16),  # native bfloat16
        ((90, 400, 3), False, F32, BF16),  # whose conversions cost more than the products save
        ((90, 1, 3), None, F32, F32),  # emulated: not even tried in layers
        ((90, 95, 3), None, F32, F32),  # no gain
        ((90, 0, 0), None, F32, F32),  # missing
        ((90, 1, 300), None, F32, F16),  # float16 alone
    ],
)
def test_a_cpu_computes_in_what_is_fast(  # noqa: PLR0917
    rates, monkeypatch, speeds, pays, training, muon
):
    def trial(width):
        assert pays is not None, "a trial of what is hopeless"
        assert width == 96
        return pays

    rates(*speeds)
    monkeypatch.setattr(precision, "is_bfloat16_faster", trial)
    assert pick_dtype("auto", CPU, 96).dtype == training
    assert pick_muon_dtype("auto", CPU).dtype == muon


def test_an_apple_gpu_trains_in_float32_and_orthogonalises_in_what_is_fast(rates):
    rates(10, 0, 20)
    assert pick_dtype("auto", MPS, 96).dtype == F32
    assert pick_muon_dtype("auto", MPS).dtype == F16


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("place", [CPU, CUDA, MPS], ids=str)
def test_a_dtype_by_name_is_taken_at_its_word(name, place):
    assert pick_muon_dtype(name, place).dtype == getattr(torch, name)
    if (place, name) == (MPS, "float16"):
        with pytest.raises(UserError, match="does not train on Apple GPUs"):
            pick_dtype(name, place, 64)
    else:
        assert pick_dtype(name, place, 64).dtype == getattr(torch, name)


def test_why_is_said_in_words(rates):
    rates(90, 1, 45)
    assert pick_dtype("auto", CPU, 64).reason == "products in bfloat16 are 90 x slower here"
    assert pick_muon_dtype("auto", CPU).reason == "products in float16 are 2.0 x slower here"
    rates(90, 270, 0)
    assert pick_muon_dtype("auto", CPU).reason == "products in bfloat16 are 3.0 x faster here"
    rates(90, 0, 0)
    assert pick_muon_dtype("auto", CPU).reason == "products in bfloat16 do not run here"


@pytest.fixture
def clock(monkeypatch):
    """Products that take cost(dtype, size) seconds: clock(cost) returns what ran."""
    ran = []

    def build(cost):
        now = [0.0]

        def bmm(x, _):
            ran.append((x.dtype, x.shape[-1]))
            now[0] += cost(x.dtype, x.shape[-1])

        monkeypatch.setattr(torch, "bmm", bmm)
        monkeypatch.setattr(precision.time, "thread_time", lambda: now[0])
        matmul_rates.cache_clear()
        return ran

    yield build
    matmul_rates.cache_clear()


def test_what_is_hopeless_in_small_products_is_not_tried_in_large_ones(clock):
    ran = clock(lambda dtype, size: size**3 * (25.0 if dtype == BF16 else 1.0))
    rates = matmul_rates(CPU)
    assert rates[F32] == pytest.approx(25 * rates[BF16])
    assert {size for dtype, size in ran if dtype == BF16} == {128}
    assert {size for dtype, size in ran if dtype == F32} == {128, 512}


def test_a_dtype_without_products_has_no_speed(clock):
    def cost(dtype, size):
        if dtype == F16:
            raise RuntimeError('"bmm" not implemented for Half')
        return size**3

    clock(cost)
    assert matmul_rates(CPU)[F16] == 0
    assert matmul_rates(CPU)[F32] > 0


def test_the_speeds_are_measured_once(clock):
    ran = clock(lambda *_: 1.0)
    matmul_rates(CPU)
    count = len(ran)
    matmul_rates(CPU)
    assert len(ran) == count


def test_a_trial_runs_in_one_thread_and_gives_the_others_back():
    torch.set_num_threads(2)
    with precision.trial_clock(CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("slow", "expected"), [(F32, True), (BF16, False)])
def test_the_trial_tells_the_faster_dtype(monkeypatch, slow, expected):
    now = [0.0]

    def clocked(place, dtype):
        now[0] += 2.0 if dtype == slow else 1.0
        return autocast(place, dtype)

    monkeypatch.setattr(precision, "MLP_ROWS", 4)
    monkeypatch.setattr(precision, "autocast", clocked)
    monkeypatch.setattr(precision.time, "thread_time", lambda: now[0])
    assert is_bfloat16_faster(8) is expected


def test_one_slow_round_does_not_decide_the_trial(monkeypatch):
    ticks = iter([0, 1, 0, 2, 0, 3, 0, 2, 0, 3, 0, 2, 0, 3, 0, 2])  # float32 and bfloat16 in turn
    monkeypatch.setattr(precision, "MLP_ROWS", 4)
    monkeypatch.setattr(precision.time, "thread_time", lambda: next(ticks))
    assert is_bfloat16_faster(8) is False  # best of float32: 1; best of bfloat16: 2


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_autocast_is_the_dtype_of_matrix_products(dtype):
    a = torch.ones(2, 2)
    with device.autocast(CPU, dtype):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == F32
