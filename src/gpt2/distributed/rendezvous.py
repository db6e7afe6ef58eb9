"""How the processes of a run find each other under torchrun, and leave.

The only reader of the variables that torchrun sets.
"""

import gc
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gpt2.base.errors import UserError
from gpt2.config.run import MachineConfig
from gpt2.distributed import device as devices
from gpt2.distributed.watchdog import Watchdog
from gpt2.distributed.world import World

CONNECT_S = 30
PATIENCE = timedelta(hours=1)
"""for what rank 0 does alone, such as saving: longer than a step may take"""


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


@contextmanager
def join(config: MachineConfig, gpu: str | None = None) -> Iterator[World]:
    """Joins the process group that torchrun started, for as long as the block runs.

    A single process computes on the GPU with the id `gpu`. Raises ConfigError if the device is not
    there or there are more ranks than GPUs.
    """
    rank, size, local_rank, local_size = env_rank()
    device = devices.choose(config.device, local_rank, local_size, gpu)
    world = World(rank, size, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        if local_size > 1:
            torch.set_num_threads(devices.threads(local_size))
        if config.keep_freed_memory:
            devices.keep_freed_memory()
    if config.deterministic:
        devices.make_deterministic()
    if size == 1:
        with Watchdog(rank, None, config.collective_timeout):
            yield world
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.collective_timeout)
    # torchrun's store is there before its ranks; if it is not, torchrun is dead.
    everyones, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=CONNECT_S)))
    everyones.set_timeout(timeout)
    store = _own_part(everyones, rank, size, config.collective_timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    long_timeout_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    with Watchdog(rank, store, config.collective_timeout) as watchdog:
        try:
            yield replace(world, long_timeout_group=long_timeout_group, watchdog=watchdog)
        except UserError as error:
            first = watchdog.first_to_fail(str(error))
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
