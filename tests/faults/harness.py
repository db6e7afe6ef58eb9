"""Real runs under torchrun that tests can kill, and the table of what each fault cost."""

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gpt2.checkpoint import store
from gpt2.inspection import run_status
from support import HANG_S, ROOT, loss_lines, losses, small_flags, train_command, wait_until

FLAGS = {
    **{"max_steps": 48, "checkpoint_interval": 4, "decay_steps": 48, "eval_interval": 12},
    "mini_batch_size": 1,  # two micro-batches on each of two ranks
}


@dataclass
class Trials:
    """The cost of one kind of fault, over all its trials."""

    fault: str
    trials: int = 0
    survived: int = 0
    steps_lost: list[int] = field(default_factory=list)


TABLE: dict[str, Trials] = {}


@contextlib.contextmanager
def trial(fault: str) -> Iterator[list[int]]:
    """Counts a trial in the table that pytest prints at the end; it survives if the block does.

    The block appends the number of lost steps to the list.
    """
    row = TABLE.setdefault(fault, Trials(fault))
    row.trials += 1
    try:
        yield row.steps_lost
    except pytest.skip.Exception:
        row.trials -= 1
        raise
    row.survived += 1


def processes_of(word: str) -> list[int]:
    """Ids of the processes with `word` in their command line, torchrun first."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # the process has just ended
            continue
        if word in command and state != "Z":
            found.append(("torch.distributed.run" not in command, int(entry.name)))
    return [pid for _, pid in sorted(found)]


class Run:
    """A training under torchrun, in its own processes."""

    def __init__(
        self,
        data_root: Path,
        out: Path,
        launcher: Sequence[str] = (),
        ranks: int = 2,
        environment: dict[str, str] | None = None,
        script: Path = ROOT / "src" / "train_improved.py",
        terminal: int | None = None,
        **flags: object,
    ) -> None:
        """`terminal` is the descriptor of a pseudo-terminal, which becomes the controlling one."""
        self.out = out
        out.mkdir(exist_ok=True)
        self.log = out / "logs" / "log.txt"
        flags = {"resume": "latest", **flags}
        command = train_command(small_flags(data_root, out, **flags), ranks=ranks, script=script)
        if any(option.startswith("--nnodes") for option in launcher):
            command.remove("--standalone")
        command[3:3] = launcher
        self.output = out / "output.txt"
        with self.output.open("a") as output:
            self.agent = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=None if terminal is None else take_terminal,
            )

    def text(self) -> str:
        return self.output.read_text()

    def processes(self) -> list[int]:
        """Ids of torchrun and its ranks that still run."""
        return processes_of(f"\0{self.out}\0")

    def kept(self) -> int:
        """The step from which a start would resume now; 0 for none."""
        newest = store.find(self.out / "checkpoints", "latest")
        return int(newest.stem.removeprefix("step_")) if newest else 0

    def state(self) -> str:
        """The state that `gpt2 status` shows."""
        found = run_status.newest_run(self.out / "checkpoints")
        return found.state if found else "none"

    def ranks(self) -> list[int]:
        return [pid for pid in self.processes() if pid != self.agent.pid]

    def wait_for(self, text: str, count: int = 1) -> None:
        """Waits until the output contains `text` at least `count` times."""
        self._wait_until(lambda: self.text().count(text) >= count)

    def wait_for_step(self, step: int) -> None:
        self._wait_until(lambda: last_step(self.log) >= step)

    def _wait_until(self, happens: Callable[[], bool]) -> None:
        """Fails if the run ends before."""
        wait_until(lambda: self.agent.poll() is not None or happens(), self.text)
        assert happens(), self.text()

    def kill(self, victim: str, chance: random.Random) -> None:
        """kill -9 of a random `rank`, of `torchrun`, or of `all` processes."""
        assert self.agent.poll() is None, self.text()
        for pid in {
            "rank": [chance.choice(self.ranks())],
            "torchrun": [self.agent.pid],
            "all": self.processes(),
        }[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> int:
        """The exit code of torchrun. Fails if a process of the run outlives it for long."""
        code = self.agent.wait(HANG_S)
        wait_until(  # a rank that has just started waits 30 s for torchrun
            lambda: not self.processes() and self.state() != "running",
            lambda: f"orphans {self.processes()}:\n{self.text()}",
        )
        return code


def take_terminal() -> None:
    """Makes standard input the controlling terminal: its Ctrl+C and its end reach this process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


PATCHED = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "src")!r})
{{patch}}
runpy.run_path({str(ROOT / "src" / "train_improved.py")!r}, run_name="__main__")
"""


def patched_script(path: Path, patch: str) -> Path:
    """A train_improved.py that runs the statements of `patch` first."""
    path.write_text(PATCHED.format(patch=patch))
    return path


SLOW = """
import importlib, time
module = importlib.import_module({module!r})
function, calls = module.{name}, []
def slow(*arguments, **options):
    calls.append(1)
    if {call} in (len(calls), None):
        print("now in {name}", flush=True)
        time.sleep({pause_s})
    return function(*arguments, **options)
module.{name} = slow
"""


def slow_script(
    folder: Path, module: str, name: str, call: int | None = 1, pause_s: float = 3
) -> Path:
    """A train_improved.py in which one call of `module.name`, or each, prints that and takes
    `pause_s`."""
    patch = SLOW.format(module=module, name=name, call=call, pause_s=pause_s)
    return patched_script(folder / f"slow_{name}.py", patch)


def last_step(log: Path) -> int:
    """The last step in a log; 0 if there is none."""
    return max(losses(log), default=0) if log.exists() else 0


def starts_of(run: Path) -> list[list[str]]:
    """The loss lines of each start of a run."""
    parts = (run / "logs" / "log.txt").read_text().split("# run ")[1:]
    found = []
    for text in parts:
        (run / "part.txt").write_text(text)
        found.append(loss_lines(run / "part.txt"))
    return found


def has_weights_of(run: Path, reference: Path) -> bool:
    """Whether the final weights and optimiser states of both runs are bit-identical."""
    states = [store.load(out / "checkpoints/latest.pt") for out in (run, reference)]
    left, right = (tree_leaves([state["model"], state["optimizer"]]) for state in states)
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )


def is_part_of(lines: list[str], reference: Path) -> bool:
    """Whether every line also stands in the log of the uninterrupted run."""
    return set(lines) <= set(loss_lines(reference / "logs" / "log.txt"))
