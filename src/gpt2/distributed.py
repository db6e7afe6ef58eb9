"""Processes of one run: who they are, where they compute and how they agree.

The only reader of the variables that torchrun sets. A run without torchrun is a world of one, in
which every collective is the identity.
"""

import contextlib
import ctypes
import gc
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gpt2 import estimate, naming
from gpt2.config import MachineConfig
from gpt2.errors import ConfigError, UserError
from gpt2.failures import TORCHRUN_IS_GONE, Watch, is_under_torchrun

T = TypeVar("T")
CONNECT_S = 30
THREADS = "GPT2_THREADS_OF_A_RANK"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, TORCHRUN_IS_GONE)
PATIENCE = timedelta(hours=1)
"""for what rank 0 does alone, such as saving: longer than a step may take"""


@dataclass(frozen=True)
class World:
    """This process among all that train together.

    Control messages (objects, flags) go over gloo on the CPU and never wait for the GPU; gradients
    and losses go over NCCL where there is CUDA.
    """

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """for waiting until rank 0 has done something alone"""
    watch: Watch | None = None
    """who knows of the other ranks' failures"""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def queues_work(self) -> bool:
        """Whether the host is ahead of the device, and waits for what it reads."""
        return self.device.type == "cuda"

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on this rank's device; the host does not wait where they are pinned."""
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def to_host(self, tensor: Tensor) -> Tensor:
        """The tensor on the host, where it is as soon as a `Moment` after this has passed."""
        if not tensor.is_cuda:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def highest(self, value: int) -> int:
        """The largest `value` of any rank, known to all."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def gather(self, value: float) -> list[float]:
        """Each rank's `value`, in rank order, known to all."""
        if self.size == 1:
            return [value]
        boxes = [torch.zeros((), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(boxes, torch.tensor(value, dtype=torch.float64))
        return [float(box) for box in boxes]

    def gather_objects(self, value: T) -> list[T]:
        """Each rank's object on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        boxes: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, boxes)
        return boxes or []

    def reason(self, error: BaseException) -> str:
        """Why this rank ends with `error`; another rank's failure, where that is behind it."""
        return self.watch.reason(error) if self.watch else f"{type(error).__name__}: {error}"

    def on_main(self, function: Callable[[], T]) -> T:
        """The result of `function`, called on rank 0 alone; its exception is raised everywhere."""
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, group=self.patient)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result


def env_rank() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun gives them."""
    read = os.environ.get
    return (
        int(read("RANK", "0")),
        int(read("WORLD_SIZE", "1")),
        int(read("LOCAL_RANK", "0")),
        int(read("LOCAL_WORLD_SIZE", "1")),
    )


def is_restart() -> bool:
    """Whether torchrun has started this command before, and some rank of it failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch() -> str:
    """The command that started this process, the same after torchrun has restarted it."""
    return f"{socket.gethostname()} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def tell_torchrun(message: str) -> None:
    """Puts `message` into the report with which torchrun ends, below its own traceback.

    Without torchrun it does nothing. The format is that of torch's elastic ErrorHandler.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": details}))


def visible_gpus() -> str | None:
    """The GPUs that whoever started this process lets it see; None if nothing was said."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def gpu_id(wanted: str) -> str:
    """The id of the GPU that this process computes on if it is told no other; `cpu` without one."""
    visible = visible_gpus()
    if visible is not None:
        return naming.first_visible(visible)
    if wanted == "cpu" or not torch.cuda.is_available():
        return naming.CPU
    return str(torch.cuda.current_device())


@contextmanager
def join(config: MachineConfig, gpu: str | None = None) -> Iterator[World]:
    """Joins the process group that torchrun started, for as long as the block runs.

    A single process computes on the GPU with the id `gpu`. Raises ConfigError if the device is not
    there or there are more ranks than GPUs.
    """
    rank, size, local_rank, local_size = env_rank()
    device = _device(config.device, local_rank, local_size, gpu)
    world = World(rank, size, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        if local_size > 1:
            torch.set_num_threads(_threads(local_size))
        if config.keep_freed_memory:
            _keep_freed_memory()
    if config.deterministic:
        _make_deterministic()
    if size == 1:
        with Watch(rank, None, config.collective_timeout):
            yield world
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.collective_timeout)
    # torchrun's store is there before its ranks; if it is not, torchrun is dead.
    everyones, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=CONNECT_S)))
    everyones.set_timeout(timeout)
    store = _own_part(everyones, rank, size, config.collective_timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    with Watch(rank, store, config.collective_timeout) as watch:
        try:
            yield replace(world, patient=patient, watch=watch)
        except UserError as error:
            first = watch.first_to_fail(str(error))
            error.aloud = first is None or first.rank == rank
            if device.type == "cpu":  # NCCL would wait for ranks that know nothing of the error
                _leave()
            raise
        _leave()  # not after another error: it would wait for ranks that are gone


def _own_part(store: Store, rank: int, size: int, timeout_s: float) -> Store:
    """The part of torchrun's store that belongs to this start of the ranks.

    After a restart the store still holds the addresses of the ranks before, and gloo would try to
    reach those. Rank 0 names a new part, and answers each rank by a word that only this start of it
    knows; restart counts do not help, because they differ between nodes.
    """
    word = secrets.token_hex(8)
    if rank > 0:
        store.set(f"gpt2/hello/{rank}", word)
        name = store.get(f"gpt2/answer/{word}").decode()
        store.set(f"gpt2/seen/{name}/{rank}", "")
        return PrefixStore(name, store)
    deadline = time.monotonic() + timeout_s
    while not store.check([f"gpt2/seen/{word}/{other}" for other in range(1, size)]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all {size} ranks have come within {timeout_s:g} s")
        for other in range(1, size):
            if store.check([hello := f"gpt2/hello/{other}"]):
                store.set(f"gpt2/answer/{store.get(hello).decode()}", word)
        time.sleep(0.02)
    return PrefixStore(word, store)


def _leave() -> None:
    """Ends the process group for good: gloo's threads abort a process that ends before its group
    is gone, and reference cycles of DDP keep it alive."""
    gc.collect()
    dist.destroy_process_group()


class StopRequest:
    """Remembers the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 (SLURM's warning), so that the loop
    can end at a step's boundary.

    Ctrl+C twice leaves at once; torchrun hands the second one on as SIGTERM. Other signals may come
    several times: from torchrun, and from whoever sends to all processes. What was ignored when the
    process began stays so (SIGHUP under nohup; torchrun itself does not keep to that).
    """

    def __init__(self) -> None:
        self.number = 0
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        wanted = [item for item in STOP_SIGNALS if signal.getsignal(item) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def request(self, number: int) -> None:
        """A stop for this reason, a signal or another number, unless there was one; 0 is none."""
        self.number = self.number or number

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        second = (signal.SIGINT, signal.SIGTERM if is_under_torchrun() else signal.SIGINT)
        if self._interrupted and number in second:
            self._restore()
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.request(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Moment:
    """When the device gets to this point of its work; the host goes on meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        self._time_s = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: "Moment") -> float:
        """Seconds between them; both must have passed."""
        if self._event is not None:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._time_s - earlier._time_s


def gpu_usage(device: torch.device) -> dict[str, float]:
    """Memory (GB) and, where NVIDIA's library is installed, utilisation (%) of a CUDA device."""
    if device.type != "cuda":
        return {}
    usage = {
        "memory_gb": torch.cuda.memory_allocated(device) / 1e9,
        "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
    }
    with contextlib.suppress(Exception):  # the library is missing, or refuses (MIG, WSL)
        usage["utilisation_percent"] = float(torch.cuda.utilization(device))
    return usage


def peak_flops(world: World, dtype: torch.dtype) -> float:
    """FLOP/s of all devices together: the makers' figure, or a short measurement of `dtype` matrix
    products where the device is not in the table."""
    known = None
    if world.device.type == "cuda":
        known = estimate.known_peak_flops(torch.cuda.get_device_name(world.device))
    return sum(world.gather(known or measured_flops(world.device, dtype)))


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products, by a measurement of a moment."""
    side, repeats = (8192, 8) if device.type == "cuda" else (1024, 3)
    # Random numbers: of equal ones a GPU needs less power, so that its clock is higher.
    own = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, generator=own, device=device).to(dtype)
    float((matrix @ matrix)[0, 0])  # warm-up, and reading an element waits for the device
    started = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    float(product[0, 0])
    return repeats * 2 * side**3 / (time.perf_counter() - started)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices; elsewhere that is emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _device(wanted: str, local_rank: int, local_size: int, gpu: str | None) -> torch.device:
    if gpu == naming.CPU:
        if wanted == "cuda":
            raise ConfigError("device=cuda and gpu_id=cpu contradict each other; give one of them")
        wanted = "cpu"
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; use --device cpu")
    gpus = torch.cuda.device_count()
    if local_size > gpus:
        raise ConfigError(
            f"{local_size} ranks on a machine with {gpus} GPU{'s'[: gpus > 1]}; "
            f"use --nproc_per_node={gpus}, or --device cpu"
        )
    if gpu is not None and local_size == 1:
        return torch.device("cuda", naming.gpu_index(gpu, visible_gpus(), gpus))
    return torch.device("cuda", local_rank)


def _threads(local_size: int) -> int:
    """Threads of a rank on the CPU: its share of the cores, unless THREADS says it, or
    OMP_NUM_THREADS something else than 1, which torchrun sets by itself."""
    given = os.environ.get(THREADS) or os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and (THREADS in os.environ or int(given) > 1):
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def _keep_freed_memory() -> None:
    """Stops glibc from giving freed buffers back to the kernel, which would have to clear and map
    them again for every large tensor. Elsewhere (musl, macOS) there is nothing to set."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(option, value)


def _make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
