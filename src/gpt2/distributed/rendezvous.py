"""How the ranks of a run find each other under torchrun, and how they leave.

The only file that knows the variables that torchrun sets.
"""

import functools
import gc
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gpt2.base.errors import ConfigError, ReportedByOtherRank, TrainingError, UserError
from gpt2.base.validation import require
from gpt2.config.run import MachineConfig
from gpt2.distributed import device, gpu_usage, last_line, precision
from gpt2.distributed.watchdog import Watchdog
from gpt2.distributed.world import World

CONNECT_S = 30
LONG_TIMEOUT = timedelta(hours=1)
"""for what rank 0 does alone, such as saving: longer than a step may take"""
JOIN_POLL_S = 0.02
FOR_SEVERAL_RANKS = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def env_rank() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun sets them.

    Raises ConfigError if something else has set them, or some of them.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank, local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    port = _number("MASTER_PORT", 0)
    require(port < 1 << 16, f"expected a port of at most 65535 in MASTER_PORT, got {port}")
    missing = [name for name in FOR_SEVERAL_RANKS if size > 1 and name not in os.environ]
    if missing or not (rank < size and local_rank < local_size <= size):
        reason = (
            f"{missing[0]} is not set" if missing else f"RANK is {rank}, LOCAL_RANK {local_rank}"
        )
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {reason}; start several ranks with torchrun, or unset "
            "these variables"
        )
    return rank, size, local_rank, local_size


def _number(name: str, default: int) -> int:
    """A variable of torchrun; raises ConfigError if it is not a number."""
    text = os.environ.get(name, "") or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"expected a number in the environment variable {name}, got {text!r:.40}")
    return int(text)


def rank_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for a rank, if all ranks are on this machine and their
    store listens on `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def is_restart() -> bool:
    """Whether torchrun has restarted the ranks because one of them failed (--max-restarts)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def launch() -> str:
    """Identifies the torchrun command that started this process; a restart does not change it."""
    return f"{socket.gethostname()} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def report_to_torchrun(message: str, is_printed: bool = False) -> None:
    """Puts `message` into the report that torchrun prints when it ends, below its own traceback;
    and below that report, if this rank prints it.

    Without torchrun it does nothing. The format is that of torch's elastic ErrorHandler.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": details}))
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS")
    if path and is_printed and restarts == os.environ.get("TORCHELASTIC_RESTART_COUNT"):
        last_line.start(os.getppid(), message)


@contextmanager
def reported_by_local_rank0() -> Iterator[None]:
    """For a UserError that every rank raises before it joins: other ranks of a machine than its
    first raise ReportedByOtherRank instead."""
    try:
        yield
    except UserError as error:
        if env_rank()[2] > 0:
            raise ReportedByOtherRank(str(error)) from error
        raise


@contextmanager
def join(
    config: MachineConfig,
    gpu: str | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> Iterator[World]:
    """Joins the process group that torchrun started, for as long as the block runs.

    A single process computes on the GPU with the id `gpu`. `on_failure` is as in `Watchdog`.
    Raises ConfigError if the device does not exist, torch has no kernels for it, or there are more
    ranks than GPUs. A UserError that several ranks raise is raised as ReportedByOtherRank on all of
    them but one.
    """
    rank, size, local_rank, local_size = env_rank()
    with reported_by_local_rank0():
        own_device = device.choose(config.device, local_rank, local_size, gpu)
        _set_up(own_device, local_size, config)
    measure_gpu = functools.partial(gpu_usage.measure, own_device)
    if size == 1:
        with Watchdog(rank, None, config.collective_timeout):
            yield World(rank, size, own_device, measure_gpu=measure_gpu)
        return
    store, long_timeout_group = _connect(own_device, config.collective_timeout)
    with Watchdog(
        rank, store, config.collective_timeout, on_failure, size, report_to_torchrun
    ) as watchdog:
        world = World(rank, size, own_device, local_rank, long_timeout_group, watchdog, measure_gpu)
        try:
            yield world
        except UserError as error:
            first = watchdog.first_to_fail(str(error))
            if own_device.type == "cuda":
                _abort()
            else:
                _leave()
            if first is not None and first.rank != rank:
                raise ReportedByOtherRank(str(error)) from error
            raise
        _leave()  # not after another error: it would wait for ranks that no longer run


def _set_up(own_device: torch.device, local_size: int, config: MachineConfig) -> None:
    """Sets torch's device, threads and determinism for this process."""
    if own_device.type == "cuda":
        device.use_expandable_segments()
        torch.cuda.set_device(own_device)
        precision.require_kernels(own_device)
    else:
        if local_size > 1:
            torch.set_num_threads(device.threads_per_rank(local_size))
        if config.keep_freed_memory:
            device.keep_freed_memory()
    if config.deterministic:
        device.make_deterministic()


def _connect(own_device: torch.device, timeout_s: float) -> tuple[Store, dist.ProcessGroup]:
    """torchrun's store, and a gloo group with LONG_TIMEOUT; starts the default group."""
    timeout = timedelta(seconds=timeout_s)
    shared_store, rank, size = _shared_store()
    shared_store.set_timeout(timeout)
    store = _store_of_this_start(shared_store, rank, size, timeout_s)
    on_cuda = own_device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        # With it, NCCL connects now, not in the first collective, and never guesses the device.
        device_id=own_device if on_cuda else None,
    )
    return store, dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)


def _shared_store() -> tuple[Store, int, int]:
    """torchrun's store, or that of rank 0 without torchrun; this rank and the number of ranks.

    Raises TrainingError if it cannot be reached, or cannot be started because its port is taken.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        if int(os.environ["RANK"]) > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _require_listener(address, int(port))
        return _connected()
    # UnicodeError: a name that no machine can have; DistError: a listener that hangs up
    except (OSError, UnicodeError, dist.DistError) as error:
        if "EADDRINUSE" in str(error):
            reason = f"another process uses port {port} (MASTER_PORT) of this machine"
            way_out = "choose a free port; torchrun --standalone does"
        else:
            reason = f"no connection to {address}:{port} (MASTER_ADDR, MASTER_PORT)"
            way_out = "start torchrun, or rank 0, there"
        raise TrainingError(f"the ranks cannot find each other: {reason}; {way_out}") from error


def _require_listener(address: str, port: int) -> None:
    """Waits until a process listens there; raises OSError if none does. torch would wait as well,
    and print its C++ frames."""
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            socket.create_connection((address, port), timeout=CONNECT_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(JOIN_POLL_S)


def _connected() -> tuple[Store, int, int]:
    """What torch finds by torchrun's variables. Raises OSError if that takes too long, as where
    another program than a store listens, whose answer torch awaits for ever."""
    found: queue.Queue[tuple[Store, int, int] | Exception] = queue.Queue()

    def connect() -> None:
        try:
            found.put(next(rendezvous("env://", timeout=timedelta(seconds=CONNECT_S))))
        except Exception as error:  # raised below
            found.put(error)

    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    try:
        result = found.get(timeout=2 * CONNECT_S)
    except queue.Empty:
        raise TimeoutError("no store answers") from None
    if isinstance(result, Exception):
        raise result
    return result


def _store_of_this_start(store: Store, rank: int, size: int, timeout_s: float) -> Store:
    """The part of torchrun's store that belongs to this start of the ranks.

    After a restart the store still holds the addresses of the former ranks, and gloo would try to
    connect to those. Rank 0 names a new part, and sends the name to each rank under a token that
    only this start of the rank knows. Restart counts cannot serve as names: they differ between
    nodes.
    """
    token = secrets.token_hex(8)
    if rank > 0:
        store.set(f"gpt2/hello/{rank}", token)
        name = store.get(f"gpt2/answer/{token}").decode()
        store.set(f"gpt2/seen/{name}/{rank}", "")
        return PrefixStore(name, store)
    deadline = time.monotonic() + timeout_s
    while not store.check([f"gpt2/seen/{token}/{other}" for other in range(1, size)]):
        if time.monotonic() > deadline:
            raise TrainingError(
                f"expected {size} ranks, but not all of them joined in {timeout_s:g} s; start "
                "them all, as torchrun does"
            )
        for other in range(1, size):
            if store.check([hello := f"gpt2/hello/{other}"]):
                store.set(f"gpt2/answer/{store.get(hello).decode()}", token)
        time.sleep(JOIN_POLL_S)
    return PrefixStore(token, store)


def _leave() -> None:
    """Destroys the process group. gloo's threads abort a process that exits before its group is
    destroyed, and reference cycles of DDP keep the group alive."""
    gc.collect()
    dist.destroy_process_group()


def _abort() -> None:
    """Destroys the process group without waiting for the other ranks, which is necessary in the
    middle of a step: `destroy_process_group` waits for collectives of NCCL that the others may
    never reach."""
    gc.collect()
    dist.distributed_c10d._abort_process_group()
