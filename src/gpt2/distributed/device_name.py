"""Which devices train, as the banner of a run names them."""

import contextlib
import platform
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2.base.text import counted
from gpt2.distributed import visible_gpus

CPU_INFO = Path("/proc/cpuinfo")
UUID = re.compile(r"([0-9a-f]{8})(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
LISTED_HOSTS = 4
"""more hosts with the same devices are counted"""


@dataclass(frozen=True)
class DeviceName:
    """The device of one rank."""

    host: str
    model: str
    """such as `NVIDIA H100 80GB HBM3`"""
    gpu_id: str | None = None
    """as in CUDA_VISIBLE_DEVICES; None for a CPU"""
    threads: int = 0
    """of a rank on a CPU"""


def of(own: torch.device) -> DeviceName:
    """The name of this process's device."""
    host = socket.gethostname()
    if own.type == "cuda":
        return DeviceName(host, torch.cuda.get_device_name(own), gpu_id=_gpu_id(own.index))
    return DeviceName(host, _cpu_model(), threads=torch.get_num_threads())


def line(names: Sequence[DeviceName]) -> str:
    """The devices of all ranks, given in rank order, in one line.

    `GPU: 0, 1, 2, 3 (4 × NVIDIA A100)`; with several hosts,
    `GPU: 0, 1 (2 × NVIDIA A100) on each of alpha, beta; 3 (NVIDIA H100) on gamma`.
    """
    on_hosts: dict[str, list[str]] = {}
    for host, on_host in _grouped(names, lambda name: name.host).items():
        on_hosts.setdefault(_of_host(on_host), []).append(host)
    is_several = sum(map(len, on_hosts.values())) > 1
    parts = [
        devices + (f" on {_listed(hosts)}" if is_several else "")
        for devices, hosts in on_hosts.items()
    ]
    kind = "CPU" if names[0].gpu_id is None else "GPU"
    return f"{kind}: {'; '.join(parts)}"


def _of_host(names: Sequence[DeviceName]) -> str:
    """`0, 1 (2 × NVIDIA A100), 2 (NVIDIA H100)`, or `2 ranks of 1 thread (Intel Xeon)`."""
    parts = []
    for model, same in _grouped(names, lambda name: name.model).items():
        if same[0].gpu_id is None:
            ranks, threads = counted(len(same), "rank"), counted(same[0].threads, "thread")
            parts.append(f"{ranks} of {threads} ({model})")
        else:
            count = f"{len(same)} × " if len(same) > 1 else ""
            parts.append(f"{', '.join(str(name.gpu_id) for name in same)} ({count}{model})")
    return ", ".join(parts)


def _grouped(
    names: Sequence[DeviceName], key: Callable[[DeviceName], str]
) -> dict[str, list[DeviceName]]:
    """The names by `key`, in the order in which they come."""
    found: dict[str, list[DeviceName]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


def _listed(hosts: Sequence[str]) -> str:
    if len(hosts) > LISTED_HOSTS:
        return f"each of {len(hosts)} hosts, {hosts[0]} to {hosts[-1]}"
    return ("each of " if len(hosts) > 1 else "") + ", ".join(hosts)


def _gpu_id(index: int) -> str:
    """The id of the GPU that CUDA shows this process as `index`; of a UUID, the first digits, which
    are enough in CUDA_VISIBLE_DEVICES."""
    shown = visible_gpus.ids()
    return str(index) if shown is None else UUID.sub(r"\1", shown[index])


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)", CPU_INFO.read_text(), re.MULTILINE):
            return found.group(1)
    return platform.machine()
