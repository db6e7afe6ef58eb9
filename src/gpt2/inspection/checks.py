"""The checks of `gpt2 doctor` on facts that it has gathered: each returns what it found.

They read no file and change nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gpt2.base.errors import UserError
from gpt2.base.text import counted
from gpt2.config import memory
from gpt2.config.run import RunConfig
from gpt2.data.shard_file import open_files_needed
from gpt2.distributed import precision
from gpt2.distributed.world import World
from gpt2.inspection import machine
from gpt2.inspection.machine import Gpu, Torch
from gpt2.train import compile_cache, micro_batch, setup

Severity = Literal["ok", "note", "PROBLEM"]
NCCL_SHARED_MEMORY = 1_000_000_000
"""what NVIDIA's manual gives a container (docker run --shm-size=1g)"""
BUSY = 0.1
"""share of a GPU's memory above which another process, not a desktop, uses it"""


@dataclass(frozen=True)
class Finding:
    """What a check found. A problem would end the run early, a note would not."""

    level: Severity
    what: str
    fact: str
    remedy: str = ""


@dataclass(frozen=True)
class Need:
    """Disk space that the run will take."""

    what: str
    folder: Path
    bytes: int
    remedy: str


def check_python(version: str, supported: str, tested: Sequence[str]) -> Finding:
    """Whether the package supports this Python, and was tested with it (`tested` has 3.11, …)."""
    if not SpecifierSet(supported).contains(version, prereleases=True):
        fact = f"expected {supported}, got {version}"
        return Finding("PROBLEM", "Python", fact, "make .venv with another Python")
    if tested and version.rpartition(".")[0] not in tested:  # an old installation has no list
        return Finding("note", "Python", f"{version} is not tested; {', '.join(tested)} are")
    return Finding("ok", "Python", version)


def check_packages(
    expected: Iterable[Requirement], installed: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Whether each package has an expected version; `installed` has None for a missing package."""
    good = []
    for item in expected:
        version = installed[item.name]
        if version is not None and item.specifier.contains(version, prereleases=True):
            good.append(f"{item.name} {version}")
        else:
            fact = f"expected {item}, got {version or 'no such package'}"
            yield Finding("PROBLEM", "packages", fact, f"pip install '{item}'")
    yield Finding("ok", "packages", ", ".join(good))


def check_device(option: str, gpus: int, build: Torch, driver: str | None) -> Finding:
    """What the run computes on. No GPU is not a problem; a GPU that torch cannot use is one."""
    target = f"CUDA {build.cuda}" if build.cuda else "CPUs alone"
    software = f"torch {build.version} for {target}, "
    software += f"driver {driver}" if driver else "no NVIDIA driver"
    if gpus:
        return Finding("ok", "device", f"{counted(gpus, 'GPU')}: {software}")
    if option == "cpu":
        return Finding("ok", "device", f"CPU: {software}")
    if driver:
        remedy = "check the driver with nvidia-smi, and whether CUDA_VISIBLE_DEVICES hides GPUs"
        if not build.cuda:
            remedy = "install torch for CUDA, as on pytorch.org"
        fact = f"torch sees no GPU ({software})"
        return Finding("PROBLEM", "device", fact, f"{remedy}; or --device cpu")
    if option == "cuda":
        fact = f"--device cuda, but torch sees no GPU ({software})"
        return Finding("PROBLEM", "device", fact, "use --device cpu")
    return Finding("note", "device", f"CPU, because there is no GPU: {software}")


def check_gpus(gpus: list[Gpu], training_bytes: int) -> Iterator[Finding]:
    """Whether each GPU has room for weights, gradients and moments; activations of a batch are not
    counted."""
    for gpu in gpus:
        yield _check_gpu(f"GPU {gpu.id}", gpu, training_bytes)
    if len({gpu.name for gpu in gpus}) > 1:
        yield Finding("note", "GPUs", "are of several kinds: every step waits for the slowest")


def _check_gpu(what: str, gpu: Gpu, needed: int) -> Finding:
    taken = gpu.memory_bytes - gpu.free_bytes
    fact = f"{gpu.name}, {gigabytes(gpu.memory_bytes)}, {gigabytes(gpu.free_bytes)} free"
    if needed > gpu.memory_bytes:
        fact += f"; weights, gradient and moments alone take {gigabytes(needed)}"
        return Finding("PROBLEM", what, fact, "use a smaller --preset")
    if needed > gpu.free_bytes or taken > BUSY * gpu.memory_bytes:
        level: Severity = "PROBLEM" if needed > gpu.free_bytes else "note"
        fact += f": another process has {gigabytes(taken)}"
        return Finding(level, what, fact, "nvidia-smi shows it; CUDA_VISIBLE_DEVICES chooses GPUs")
    return Finding("ok", what, fact)


def check_kernels(gpus: list[Gpu], build: Torch) -> Iterator[Finding]:
    """The GPUs for which torch has no kernels."""
    for gpu in gpus if build.cuda else ():  # torch for AMD has other names for GPUs
        remedy = precision.kernels_missing(gpu.capability, build.architectures)
        if remedy is not None:
            fact = f"torch {build.version} has none for {gpu.name}"
            yield Finding("PROBLEM", "kernels", fact, remedy)


def check_compiler(gpus: list[Gpu], option: str) -> Iterator[Finding]:
    """What torch.compile lacks on a machine with GPUs; `option` is the value of --compile."""
    if gpus and option != "off" and (lacking := compile_cache.missing()):
        what, _, remedy = lacking.partition(": ")
        level: Severity = "PROBLEM" if option == "on" else "note"
        yield Finding(level, "torch.compile", f"needs {what}; without it, a run is slower", remedy)


def check_nccl(build: Torch) -> Finding:
    """Whether torch has NCCL, which exchanges gradients between GPUs."""
    if build.nccl is None:
        return Finding("PROBLEM", "NCCL", "torch has none", "install torch from pytorch.org")
    return Finding("ok", "NCCL", build.nccl)


def check_precision(option: str, fast: torch.dtype, device: torch.device) -> Finding:
    """The number type of the matrix products, by --dtype and by what the hardware multiplies."""
    dtype = fast if option == "auto" else precision.DTYPES[option]
    name, best = (str(item).removeprefix("torch.") for item in (dtype, fast))
    kind = "GPU" if device.type == "cuda" else "CPU"
    if precision.is_emulated(dtype, fast, device):
        fact = f"{name}, which this {kind} only emulates"
        return Finding("note", "precision", fact, "--dtype auto is faster here")
    if dtype is not fast:
        return Finding("note", "precision", name, f"--dtype {best} is better here")
    if dtype is not torch.float32:
        return Finding("ok", "precision", name)
    fact = f"float32: this {kind} has no fast bfloat16"
    return Finding("note" if device.type == "cuda" else "ok", "precision", fact)


def check_batch(
    run_config: RunConfig, ranks: int, gpus: int, free_bytes: int | None = None
) -> Finding:
    """How the rows of a step are divided among the ranks. `free_bytes` is the memory of the GPU
    with the least, which `--mini_batch_size auto` depends on."""
    rows = run_config.rows_per_step
    if gpus and ranks > gpus:
        fact = f"{ranks} ranks on {counted(gpus, 'GPU')}"
        return Finding("PROBLEM", "batch", fact, f"use --nproc_per_node={gpus}")
    try:
        setup.require_enough_rows(run_config, World(0, ranks, torch.device("cpu")))
    except UserError as error:
        return problem("batch", error)
    mini = micro_batch.given(run_config)
    if free_bytes is not None and run_config.data.mini_batch_size == "auto":
        mini = memory.rows_on_card(run_config, free_bytes / 1e9, ranks)
        if mini == 0:
            fact = f"{gigabytes(free_bytes)} of memory are too little for a single row"
            return Finding("PROBLEM", "batch", fact, "use a smaller --block_size or --preset")
    steps = run_config.grad_accum_steps(ranks, mini)
    share = (
        counted(rows // ranks, "row") if rows % ranks == 0 else f"{rows // ranks} or one row more"
    )
    fact = (
        f"{counted(ranks, 'rank')} of {share} per step, {min(mini, -(-rows // ranks))} at once, "
        f"gradient accumulation {steps}"
    )
    if rows % ranks:
        return Finding("note", "batch", fact + ": every step waits for the ranks with more")
    return Finding("ok", "batch", fact)


def check_cards(run_config: RunConfig, ranks: int) -> Finding:
    """How many rows GPUs of several sizes compute at once, as far as it is known beforehand."""
    parts = []
    for size in memory.CARDS_GB:
        rows = memory.rows_on_card(run_config, size, ranks)
        parts.append(f"{size} GB: {rows}" if rows else f"{size} GB: does not fit")
    length = run_config.model.block_size
    fact = f"estimated rows of {length} tokens at once on a GPU of {', '.join(parts)}"
    return Finding("ok", "GPU memory", fact)


def check_folders(
    folders: Mapping[str, Path], refused: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Whether each folder can be written; `refused` has the reason, by flag, where it cannot."""
    for flag, reason in refused.items():
        if reason is not None:
            fact = f"{folders[flag]} cannot be written: {reason}"
            yield Finding("PROBLEM", "folders", fact, f"choose another with --{flag}")
    good = [str(folder) for flag, folder in folders.items() if refused[flag] is None]
    if good:
        yield Finding("ok", "folders", f"can be written: {', '.join(good)}")


def check_disk(free: int, needs: list[Need]) -> Finding:
    """Whether a disk has room for everything that the run writes to it."""
    listed = " and ".join(f"{need.what} take {gigabytes(need.bytes)} more" for need in needs)
    fact = f"{gigabytes(free)} free for {needs[0].folder}; {listed}"
    if sum(need.bytes for need in needs) > free:
        return Finding("PROBLEM", "disk", fact, "; ".join(need.remedy for need in needs))
    return Finding("ok", "disk", fact)


def check_open_files(limit: int | None, shards: int) -> Finding:
    """Whether the hard limit suffices: a run raises its soft limit to what its shards need."""
    needed = open_files_needed(shards)
    if limit is not None and limit < needed:
        fact = f"{needed:,} needed for {counted(shards, 'shard')}, {limit:,} allowed"
        remedy = "raise it: LimitNOFILE= of systemd, or nofile in /etc/security/limits.conf"
        return Finding("PROBLEM", "open files", fact, remedy)
    allowed = "no limit" if limit is None else f"{limit:,} allowed"
    return Finding("ok", "open files", f"{allowed}, {needed:,} needed")


def check_memory(available: int | None, state_bytes: int, training_bytes: int) -> Finding:
    """Whether the host has memory for the copy that a checkpoint is written from, and without a GPU
    for weights, gradients and moments of all ranks."""
    needed = state_bytes + training_bytes
    parts = f"{gigabytes(state_bytes)} for a checkpoint that is being written"
    if training_bytes:
        parts += f", {gigabytes(training_bytes)} for weights, gradients and moments"
    if available is None:
        return Finding("note", "memory", f"unknown; needed: {parts}")
    fact = f"{gigabytes(available)} available; needed beside activations: {parts}"
    if needed > available:
        return Finding("PROBLEM", "memory", fact, "free some, or use a smaller --preset")
    return Finding("ok", "memory", fact)


def check_shared_memory(free: int, ranks_on_gpu: int) -> Finding:
    """Whether there is enough for NCCL, which moves gradients through it between GPUs without a
    direct link. Nothing else uses it: threads read the batches, and gloo uses sockets."""
    fact = f"{gigabytes(free)} free in {machine.SHARED_MEMORY}"
    if ranks_on_gpu > 1 and free < NCCL_SHARED_MEMORY:
        fact += f", NCCL wants {gigabytes(NCCL_SHARED_MEMORY)}"
        return Finding("PROBLEM", "shared memory", fact, "docker run --shm-size=1g")
    return Finding("ok", "shared memory", fact)


def check_host_name(address: str | None, ranks: int) -> Finding:
    """Whether the machine's own name has an address: ranks connect to it."""
    if address is not None:
        return Finding("ok", "host name", f"has the address {address}")
    level: Severity = "PROBLEM" if ranks > 1 else "note"
    remedy = 'echo "127.0.0.1 $(hostname)" | sudo tee -a /etc/hosts'
    return Finding(level, "host name", "has no address: ranks cannot connect to each other", remedy)


def check_clock(now: float, newest: float) -> Finding:
    """Whether the clock is behind the newest file. Forecasts use it; no result of training does."""
    shown = f"{datetime.fromtimestamp(now):%Y-%m-%d %H:%M}"
    if now < newest:
        fact = f"{shown}, but a file was written {datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}"
        return Finding("note", "clock", fact, "sudo timedatectl set-ntp true")
    return Finding("ok", "clock", shown)


def problem(what: str, error: UserError) -> Finding:
    """An error as the run would print it, on one line."""
    return Finding("PROBLEM", what, " ".join(str(error).split()))


def gigabytes(size_bytes: int) -> str:
    """`1.5 GB`, or `12.0 MB` below a gigabyte."""
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"
