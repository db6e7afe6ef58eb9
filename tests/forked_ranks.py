"""Ranks as torchrun starts them, but in tenths of a second: forked from a process that has torch.

For tests of what ranks do together. What torchrun does (signals, restarts, its report) needs it.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

from support import TRAIN

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["gpt2.train.trainer"])


def run(
    arguments: Sequence[str], ranks: int, folder: Path, script: Path = TRAIN, **environment: str
) -> str:
    """Runs `script` on each rank and returns what they print, which `folder` keeps. Fails with it
    if a rank fails."""
    output = folder / "ranks.txt"
    output.write_text("")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(ranks):
        given = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        variables = os.environ | {name: str(value) for name, value in given.items()} | environment
        processes.append(
            FORKS.Process(target=_rank, args=(script, arguments, variables, output), daemon=True)
        )
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running:
        for ended in wait(list(running)):
            if running.pop(ended).exitcode != 0:
                for other in running.values():
                    other.kill()
    text = output.read_text()
    assert not any(process.exitcode for process in processes), text
    return text


def _rank(script: Path, arguments: Sequence[str], variables: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(variables)
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
