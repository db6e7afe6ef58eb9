"""Facts about this machine and what is installed on it, for `gpt2 doctor`."""

import contextlib
import importlib.metadata
import platform
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2.distributed import visible_gpus

DISTRIBUTION = "gpt2-from-scratch"
SHARED_MEMORY = Path("/dev/shm")
DRIVER = Path("/proc/driver/nvidia/version")
CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees."""

    id: str
    """as CUDA_VISIBLE_DEVICES names it"""
    name: str
    memory_bytes: int
    free_bytes: int
    """used by no process"""
    capability: tuple[int, int]


@dataclass(frozen=True)
class Torch:
    """What torch was built with."""

    version: str
    cuda: str | None
    nccl: str | None
    architectures: tuple[str, ...] = ()
    """those of GPUs that it has kernels for, as `sm_90`; empty without a GPU"""


def gpus() -> list[Gpu]:
    """The GPUs that torch sees; raises RuntimeError if one does not respond, and ConfigError if
    CUDA_VISIBLE_DEVICES is invalid."""
    visible_gpus.ids()  # in CUDA's own spelling, before CUDA reads them
    count = torch.cuda.device_count()
    return [_gpu(index, visible_gpus.ids_of(count)[index]) for index in range(count)]


def _gpu(index: int, gpu_id: str) -> Gpu:
    free, total = torch.cuda.mem_get_info(index)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return Gpu(gpu_id, name, total, free, capability)


def installed_torch() -> Torch:
    """The version of torch in this process, and of what it was built with."""
    nccl = None
    if torch.distributed.is_nccl_available():
        with contextlib.suppress(Exception):  # a broken library raises errors of many kinds
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    architectures = tuple(torch.cuda.get_arch_list())
    return Torch(torch.__version__, torch.version.cuda, nccl, architectures)


def driver() -> str | None:
    """Version of NVIDIA's kernel driver; None without one, or under WSL."""
    with contextlib.suppress(OSError):
        if found := re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()):
            return found.group(0)
    return None


def python_version() -> str:
    return platform.python_version()


@dataclass(frozen=True)
class Requirements:
    """What this package requires."""

    python: str
    """supported versions, as `>=3.11`"""
    tested_pythons: list[str]
    packages: list[str]


def requirements() -> Requirements | None:
    """What the metadata of this package say that it requires; None if it is not installed."""
    try:
        about = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    language = "Programming Language :: Python :: "
    classifiers = about.get_all("Classifier") or []
    return Requirements(
        python=about["Requires-Python"],
        tested_pythons=[
            item.removeprefix(language) for item in classifiers if item.startswith(language)
        ],
        packages=about.get_all("Requires-Dist") or [],
    )


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def disk(folder: Path) -> tuple[int, int]:
    """The device number of the disk that `folder` is or will be on, and the bytes free on it."""
    nearest = existing(folder)
    return nearest.stat().st_dev, shutil.disk_usage(nearest).free


def unwritable(folder: Path) -> str | None:
    """Why `folder` cannot be written to, or None if it can; tried with an unnamed file."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return None
    except OSError as error:
        return error.strerror or str(error)


def open_files_limit() -> int | None:
    """The hard limit of open files of a process; None is no limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else hard


def shared_memory_bytes() -> int:
    """Free shared memory; 0 without any."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return 0


def memory_bytes() -> int | None:
    """Memory that this process can still use, within its container's limits; None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(1024 * _field(Path("/proc/meminfo"), "MemAvailable:"))
    for group in _memory_groups():
        one = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
        other = "memory.current" if one == "memory.max" else "memory.usage_in_bytes"
        with contextlib.suppress(OSError, ValueError):  # no limit is the word "max"
            limit, used = (int((group / name).read_text()) for name in (one, other))
            cached = _field(group / "memory.stat", "inactive_file")  # the kernel frees it on demand
            found.append(limit - used + cached)
    return min(found, default=None)


def _memory_groups() -> Iterator[Path]:
    """The control groups that limit the memory of this process, its own first: of version 2, or of
    the memory controller of version 1 (cgroups(7), /proc/[pid]/cgroup)."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUP / controllers
            here = root / path.lstrip("/")
            yield from (group for group in (here, *here.parents) if group.is_relative_to(root))
    yield CGROUP  # in a container, which does not see its own path


def _field(path: Path, name: str) -> int:
    """The number after `name` in a file of names and numbers; 0 without one."""
    rows = (line.split() for line in path.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)


def own_address() -> str | None:
    """The address of this machine's host name, or None if it does not resolve."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return None
