"""Ranks as torchrun starts them, but in tenths of a second: forked from a process that has torch.

For tests of what ranks do together. What torchrun does (signals, restarts, its report) needs it.
"""

import functools
import multiprocessing
import os
import re
import runpy
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from support import TRAIN

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["rank_template"])


@functools.cache
def start_template() -> None:
    """Starts the process that is forked for each rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # it finds what this process does
        forkserver.ensure_running()


class Ranks(AbstractContextManager["Ranks"]):
    """Ranks that run; none outlives this context. `folder` keeps what they print."""

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: int,
        folder: Path,
        script: Path = TRAIN,
        **environment: str,
    ) -> None:
        start_template()
        self._output = folder / "ranks.txt"
        self._output.write_text("")
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        for rank in range(ranks):
            given = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self.store.port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
            }
            variables = {name: str(value) for name, value in given.items()}
            work = (script, arguments, os.environ | variables | environment, self._output)
            self.processes.append(FORKS.Process(target=_rank, args=work, daemon=True))
        for process in self.processes:
            process.start()

    def text(self) -> str:
        """What they have printed, without what torch 2.9 prints of each connection."""
        return re.sub(r"^\[Gloo\] .*\n", "", self._output.read_text(), flags=re.MULTILINE)

    def end(self, expect: int = 0) -> str:
        """What they have printed by their end. Fails with it if a rank ends with another exit code
        than `expect`; then the others are killed."""
        running = {process.sentinel: process for process in self.processes}
        while running:
            for ended in wait(list(running)):
                if running.pop(ended).exitcode != expect:
                    self._kill()
        assert all(process.exitcode == expect for process in self.processes), self.text()
        return self.text()

    def __exit__(self, *_: object) -> None:
        self._kill()
        for process in self.processes:
            process.join()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()


def run(
    arguments: Sequence[str],
    ranks: int,
    folder: Path,
    script: Path = TRAIN,
    expect: int = 0,
    **environment: str,
) -> str:
    """Runs `script` on each rank to its end; see `Ranks`."""
    with Ranks(arguments, ranks, folder, script, **environment) as started:
        return started.end(expect)


def _rank(script: Path, arguments: Sequence[str], variables: dict[str, str], output: Path) -> None:
    assert "rank_template" in sys.modules, "multiprocessing ignores errors of what it preloads"
    os.environ.clear()
    os.environ.update(variables)
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
