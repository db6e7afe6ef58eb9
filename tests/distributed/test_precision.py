import warnings
from collections.abc import Sequence

import pytest
import torch

from gpt2.base.errors import ConfigError
from gpt2.distributed import precision
from gpt2.distributed.world import World

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Gives `CUDA` this capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "compiles"),
    [
        ((6, 1), torch.float32, False),
        ((7, 0), torch.float16, True),
        ((7, 5), torch.float16, True),
        ((8, 0), torch.bfloat16, True),
        ((9, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, True),
    ],
)
def test_what_is_fast_follows_from_the_capability(
    capability, dtype: torch.dtype, compiles: bool, monkeypatch
):
    gpu(monkeypatch, capability)
    assert precision.fast_dtype(CUDA) is dtype
    assert precision.can_compile(CUDA) is compiles


def test_the_cpu_never_chooses_float16_and_compiles_nothing():
    assert precision.fast_dtype(CPU) in (torch.bfloat16, torch.float32)
    assert not precision.can_compile(CPU)


class MixedRanks(World):
    """Four ranks, of which the last two are GPUs without bfloat16."""

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        assert values == [2]
        return [[2.0], [2.0], [1.0], [1.0]]


def test_ranks_with_different_hardware_agree_on_a_dtype(monkeypatch, caplog):
    gpu(monkeypatch, (8, 0))
    mixed, alike = MixedRanks(0, 4, CUDA), World(0, 1, CUDA)
    assert precision.autocast_dtype("auto", alike) is torch.bfloat16
    assert not caplog.text
    assert precision.autocast_dtype("auto", mixed) is torch.float16
    assert "all ranks compute in float16, because the hardware of ranks 2, 3" in caplog.text
    caplog.clear()
    assert precision.autocast_dtype("bfloat16", mixed) is torch.bfloat16
    assert precision.autocast_dtype("float32", mixed) is torch.float32
    gpu(monkeypatch, (6, 0))
    assert precision.autocast_dtype("auto", alike) is torch.float32
    assert not caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_has_the_type_of_matrix_products(dtype: torch.dtype):
    x = torch.ones(2, 2)
    with precision.autocast(dtype, CPU):
        assert (x @ x).dtype is dtype
        with precision.autocast(torch.float32, CPU):
            assert (x @ x).dtype is torch.float32


@pytest.mark.parametrize(
    ("capability", "architectures", "has_kernels"),
    [
        ((7, 0), CUDA_12_6, True),
        ((7, 0), CUDA_13, False),
        ((6, 1), CUDA_12_6, True),
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # sm_86 runs on a later minor version
        ((8, 0), ["sm_86"], False),
        ((12, 0), CUDA_12_6, False),
        ((12, 0), [*CUDA_12_6, "compute_90"], True),  # PTX is translated
        ((13, 0), CUDA_13, True),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100f"], True),
        ((10, 3), ["sm_100a"], False),
        ((12, 0), ["compute_100f"], False),
        ((7, 0), [], True),  # unknown
    ],
)
def test_kernels_for_a_gpu(capability, architectures: list[str], has_kernels: bool):
    assert (precision.kernels_missing(capability, architectures) is None) is has_kernels


@pytest.mark.parametrize(
    ("capability", "architectures", "wheel"),
    [
        ((7, 0), CUDA_13, "https://download.pytorch.org/whl/cu126"),
        ((12, 0), CUDA_12_6, "CUDA 12.8 or newer"),
        ((8, 0), ["sm_90"], "torch from pytorch.org"),
    ],
)
def test_a_run_without_kernels_ends_with_the_wheel_that_has_them(
    capability, architectures, wheel: str, monkeypatch: pytest.MonkeyPatch
):
    gpu(monkeypatch, capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card 9000")
    monkeypatch.setattr(torch.version, "cuda", None)
    precision.require_kernels(CPU)
    precision.require_kernels(CUDA)  # torch for the CPU, or for AMD: nothing is known
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match="has no kernels for Card 9000; install torch") as caught:
        precision.require_kernels(CUDA)
    assert wheel in str(caught.value) and str(caught.value).endswith(", or use --device cpu")
    assert "\n" not in str(caught.value)


@pytest.fixture
def setting():
    """Resets how torch multiplies float32 matrices."""
    yield
    torch.set_float32_matmul_precision("highest")


def is_tf32() -> bool:
    """By the new name of the setting and by the former ones, which must agree."""
    new = torch.backends.cuda.matmul.fp32_precision == "tf32"
    with warnings.catch_warnings(action="ignore"):  # torch 2.9 warns of reading it
        assert torch.backends.cuda.matmul.allow_tf32 is new
    assert (torch.get_float32_matmul_precision() == "high") is new
    return new


@pytest.mark.usefixtures("setting")
@pytest.mark.parametrize(("capability", "rounds"), [((7, 5), False), ((8, 0), True)])
def test_tf32_is_on_from_ampere_on_and_off_within_a_context(capability, rounds: bool, monkeypatch):
    gpu(monkeypatch, capability)
    with warnings.catch_warnings(action="error"):
        precision.set_tf32(True, CUDA)
        assert is_tf32() is rounds
        with pytest.raises(ZeroDivisionError), precision.without_tf32(CUDA):
            assert not is_tf32()
            raise ZeroDivisionError
        assert is_tf32() is rounds
        precision.set_tf32(False, CUDA)
        assert not is_tf32()


@pytest.mark.usefixtures("setting")
def test_the_cpu_keeps_its_setting():
    torch.set_float32_matmul_precision("medium")
    precision.set_tf32(False, CPU)
    with precision.without_tf32(CPU):
        assert torch.get_float32_matmul_precision() == "medium"
