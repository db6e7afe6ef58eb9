"""The machine, and the model that the parts of `gpu_check.py` train on it; not a bench by itself.

The part `versions` is here. Shapes: B rows, T time.
"""

import gc
import importlib.metadata
import inspect
import os
import platform
import statistics
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np
import torch
from gpu_check import Setting
from gpu_report import Recorder

from gpt2.config import memory, options, presets
from gpt2.config.memory import Computation
from gpt2.config.run import RunConfig
from gpt2.data import tokenizer
from gpt2.data.loader import MicroBatch
from gpt2.distributed import device, precision, rendezvous
from gpt2.distributed.device import DeviceTimestamp
from gpt2.distributed.world import World
from gpt2.inspection import machine
from gpt2.train import compile_cache
from train import fastest_dtype

TINY: dict[str, object] = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 192}
TRAIN_TOKENS = 3_000_000
MOST_S = 20
"""seconds that a command may take"""
GB = 1e9


def own_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def own_dtype() -> torch.dtype:
    return fastest_dtype(own_device())


def run_config(setting: Setting, rows: int, **changes: object) -> RunConfig:
    """GPT-2 124M with one micro-batch of `rows` rows in a step; tiny for --smoke."""
    preset = presets.preset("gpt2-124m")
    shape = TINY if setting.is_smoke else {}
    length = int(str(shape.get("block_size", preset.model.block_size)))
    given = {
        **shape,
        "mini_batch_size": rows,
        "total_batch_size": rows * length,
        "device": own_device().type,
        "dtype": str(own_dtype()).removeprefix("torch."),
        "compile": "on" if compiles(setting) else "off",
    }
    return options.overlay(preset, {**given, **changes})


def compiles(setting: Setting) -> bool:
    """Whether the parts compile: not for --smoke, nor where Triton cannot work."""
    return not setting.is_smoke and compile_cache.missing() is None


def how(run: RunConfig) -> Computation:
    is_compiled = run.machine.compile == "on"
    return Computation(own_dtype() is not torch.float32, is_compiled, optimizer=run.optim.optimizer)


def largest_rows(setting: Setting) -> int:
    """Rows of a micro-batch: 64, or what fits into the memory; 2 for --smoke."""
    if setting.is_smoke or not torch.cuda.is_available():
        return 2
    run = run_config(setting, 64)
    free_bytes, _ = torch.cuda.mem_get_info()
    return max(1, memory.automatic_rows(run, free_bytes, how(run)))


def joined(run: RunConfig) -> AbstractContextManager[World]:
    return rendezvous.join(run.machine)


def batch_of(run: RunConfig, rows: int | None = None) -> MicroBatch:
    """Random tokens and targets, (B, T) each, on the host, pinned for a GPU."""
    shape = (rows or run.rows_per_step, run.model.block_size + 1)
    drawn = torch.randint(tokenizer.VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0))
    pair = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    return (pair[0].pin_memory(), pair[1].pin_memory()) if own_device().type == "cuda" else pair


def made_up_data(setting: Setting) -> Path:
    """A folder of shards, in nanoGPT's format. The tokens are skewed, so that the loss falls."""
    folder = setting.folder / "data"
    if not folder.exists():  # parts may come here at the same time: the first one's folder stays
        own = setting.folder / f"data_{uuid.uuid4().hex}"
        own.mkdir()
        draw = np.random.default_rng(0)
        for name, count in (("train", TRAIN_TOKENS), ("val", TRAIN_TOKENS // 10)):
            tokens = (draw.random(count) ** 4 * tokenizer.VOCAB_SIZE).astype(np.uint16)
            tokens.tofile(own / f"{name}.bin")
        with suppress(OSError):
            own.rename(folder)
    return folder


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Frees the memory that is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_ms(work: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call by events of the device, after one call that is not counted."""
    work()
    moments = []
    for _ in range(repeats):
        before = DeviceTimestamp(own_device())
        work()
        moments.append((before, DeviceTimestamp(own_device())))
    wait()
    return [1000 * after.since(before) for before, after in moments]


def peak_gb(work: Callable[[], object]) -> float | None:
    """The most memory that `work` takes beside what is allocated; None without CUDA."""
    if not torch.cuda.is_available():
        work()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    wait()
    return (torch.cuda.max_memory_allocated() - before) / GB


def shown_gb(value: float | None) -> str:
    return "needs CUDA" if value is None else f"{value:.2f} GB"


def matrix_flops() -> float:
    """FLOP/s of matrix products now; the function measures once in a process."""
    measure = inspect.unwrap(device.measured_flops)
    return float(measure(own_device(), own_dtype()))


def versions(record: Recorder, setting: Setting) -> None:
    """Raises SystemExit where nothing else can run."""
    if not torch.cuda.is_available() and not setting.is_smoke:
        record.add("GPU", f"torch {torch.__version__} sees no CUDA device", "one", is_ok=False)
        raise SystemExit("torch sees no CUDA device; --smoke tries what runs without one")
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    record.add("software", f"{software}, {len(os.sched_getaffinity(0))} cores")
    record.add("libraries", libraries())
    lacking = compile_cache.missing()
    can_compile = f"needs {lacking}" if lacking else "has what it needs"
    if not torch.cuda.is_available():
        record.add("torch.compile", can_compile)
    else:
        record.add("torch.compile", can_compile, "has what it needs", not lacking)
        with record.attempt("GPU"):
            record_gpu(record)
    name = str(own_dtype()).removeprefix("torch.")
    with record.attempt(f"matrix rate, {name}"):
        rates = [matrix_flops() for _ in range(1 if setting.is_smoke else 5)]
        found = f"{statistics.median(rates) / 1e12:,.3g} TFLOP/s"
        record.add(f"matrix rate, {name}", found, rates=rates)
    with record.attempt("gpt2 doctor", "exit code 0"):
        options = ["doctor", "--data_root", str(made_up_data(setting))]
        command = [sys.executable, "-m", "gpt2", *options]
        doctor = output_of(command, setting.folder)
        found, is_ok = f"exit code {doctor.returncode}", doctor.returncode == 0
        lines = [] if is_ok else doctor.stdout.splitlines()
        record.add("gpt2 doctor", found, "exit code 0", is_ok, details=lines)


def output_of(
    command: Sequence[str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What a command prints. Raises TimeoutExpired: a driver may hang."""
    return subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=MOST_S,
    )


def libraries() -> str:
    """CUDA, cuDNN, NCCL and Triton, as far as there are any."""
    found = {
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": machine.installed_torch().nccl,
        "Triton": None,
    }
    for name in ("triton", "pytorch-triton"):
        try:
            found["Triton"] = found["Triton"] or importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version or 'none'}" for name, version in found.items())


def record_gpu(record: Recorder) -> None:
    """The GPU, whether this torch has kernels for it, and whether it is free."""
    properties = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    found = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
    record.add("GPU", f"{found}, {torch.cuda.device_count()} of them in this machine")
    used_gb = (total_bytes - free_bytes) / GB
    record.add(
        "memory in use before",
        f"{used_gb:.1f} of {total_bytes / GB:.1f} GB",
        "less than 2 GB",
        used_gb < 2,
        memory_gb=total_bytes / GB,
    )
    capability, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    predicted = "for sm_{}{}".format(*capability)
    fits = precision.kernels_missing(capability, built) is None
    record.add("kernels in the wheel", " ".join(built), predicted, fits)
    query = "driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    try:
        smi = output_of(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
        record.add("driver, clocks, power, heat", smi.stdout.strip())
    except (OSError, subprocess.TimeoutExpired) as error:
        record.add("driver, clocks, power, heat", f"unknown: {error}")
