"""What the tests let the ranks of a hosted training do."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.experiments.pool.job import Job, Stopped
from gpt2.experiments.pool.worker import Reporter

if os.environ.get("RANK_WITHOUT_IMPORT", "none") == os.environ.get("RANK"):
    signal.pause()


def own_rank() -> int:
    return int(os.environ["RANK"])


def marked(folder: str, name: str) -> None:
    Path(folder, f"{name}{own_rank()}").write_text(str(os.getpid()))


def wait_for_pid(path: Path) -> int:
    while not path.exists() or not path.read_text():
        time.sleep(0.01)
    return int(path.read_text())


def wait_for_end(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


def host(report: Any, play: str, count: int, **kwargs: Any) -> Any:
    """The job of a worker that hosts ranks, each of which plays."""
    from gpt2.experiments.training import ddp  # imports torch, which the ranks do not need

    return ddp.run_on_ranks(report, Job("ranks", f"{__name__}:{play}", kwargs), count)


def reports(report: Reporter) -> dict[str, Any]:
    if own_rank() > 0:
        return {}
    answers = [report(step=step) for step in range(3)]
    return {"answers": answers, "threads": os.environ.get("OMP_NUM_THREADS")}


def ends(folder: str, first: int, how: list[str]) -> dict[str, Any]:
    """Ends as `how` says for this rank; rank `first` before the others."""
    marked(folder, "begun")
    first_pid = Path(folder, f"begun{first}")
    if own_rank() != first:
        wait_for_end(wait_for_pid(first_pid))
    return ENDINGS[how[own_rank()]]()


def leaves_a_child(folder: str) -> dict[str, Any]:
    """The child of rank 1 holds every handle of it."""
    if own_rank() == 1:
        if (child := os.fork()) == 0:
            signal.pause()
        Path(folder, "child").write_text(str(child))
        os._exit(1)
    return {"rank": 0}


def waits(report: Reporter, folder: str) -> dict[str, Any]:
    """Until it is stopped."""
    marked(folder, "waits")
    report(rank=own_rank())
    while not report.stop_requested:
        time.sleep(0.01)
    marked(folder, "stopped")
    raise Stopped


def hangs(report: Reporter, folder: str) -> dict[str, Any]:
    marked(folder, "waits")
    if own_rank() == 0:
        report(step=1)
    while True:
        signal.pause()


def _raises(error: BaseException) -> Callable[[], dict[str, Any]]:
    def act() -> dict[str, Any]:
        raise error

    return act


ENDINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "returns": lambda: {"rank": own_rank()},
    "nothing": dict,
    "refuses": _raises(ConfigError("no")),
    "bug": _raises(RuntimeError("CUDA error: the bug")),
    "full": _raises(MemoryError()),
    "stopped": _raises(Stopped()),
    "exits": lambda: os._exit(7),
}
