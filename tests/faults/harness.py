"""Real runs under torchrun that can be killed, and the table of what that cost."""

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gpt2.checkpoint import store
from gpt2.inspection import runs
from support import ROOT, loss_lines, losses, small_flags, train_command


@dataclass
class Trials:
    """What one kind of fault cost, over all its trials."""

    fault: str
    trials: int = 0
    survived: int = 0
    steps_lost: list[int] = field(default_factory=list)


TABLE: dict[str, Trials] = {}


@contextlib.contextmanager
def trial(fault: str) -> Iterator[list[int]]:
    """A trial in the table that is printed at the end: survived if the block does not fail.

    The steps that it cost go into the list.
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
    """Living processes with `word` in their command line, torchrun's own first."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has just ended
            continue
        if word in command and state != "Z":
            found.append(("torch.distributed.run" not in command, int(entry.name)))
    return [pid for _, pid in sorted(found)]


class Run:
    """A training under torchrun in processes of its own."""

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
        """`terminal` is the descriptor of a pseudo-terminal that becomes the run's own."""
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
        """torchrun and its ranks, as far as they live."""
        return processes_of(f"\0{self.out}\0")

    def kept(self) -> int:
        """The step from which a start now would continue."""
        newest = store.find(self.out / "checkpoints", "latest")
        return int(newest.stem.removeprefix("step_")) if newest else 0

    def state(self) -> str:
        """What `gpt2 status` says of it."""
        found = runs.newest_run(self.out / "checkpoints")
        return found.state if found else "none"

    def ranks(self) -> list[int]:
        return [pid for pid in self.processes() if pid != self.agent.pid]

    def wait_for(self, text: str, count: int = 1, within_s: float = 60) -> None:
        """Until the output holds `text` so often."""
        deadline = time.monotonic() + within_s
        while self.text().count(text) < count:
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.text()}"
            assert self.agent.poll() is None or self.text().count(text) >= count, self.text()
            time.sleep(0.01)

    def wait_for_step(self, step: int, within_s: float = 60) -> None:
        deadline = time.monotonic() + within_s
        while last_step(self.log) < step:
            assert time.monotonic() < deadline, self.text()
            assert self.agent.poll() is None, self.text()
            time.sleep(0.01)

    def kill(self, victim: str, chance: random.Random) -> None:
        """kill -9 of any one `rank`, of `torchrun` or of `all`."""
        assert self.agent.poll() is None, self.text()
        for pid in {
            "rank": [chance.choice(self.ranks())],
            "torchrun": [self.agent.pid],
            "all": self.processes(),
        }[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self, within_s: float = 60) -> int:
        """The exit code of torchrun; fails if a process of the run outlives it by long."""
        code = self.agent.wait(within_s)
        deadline = time.monotonic() + 40  # a rank that has only begun waits 30 s for torchrun
        while (left := self.processes()) or self.state() == "running":
            assert time.monotonic() < deadline, f"orphans {left}:\n{self.text()}"
            time.sleep(0.02)
        return code


def take_terminal() -> None:
    """Makes standard input the terminal that sends its Ctrl+C and its end to this process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


SLOW = f"""
import importlib, sys, time
sys.path.insert(0, {str(ROOT / "src")!r})
from gpt2 import cli_train
room = importlib.import_module({{room!r}})
function, calls = room.{{name}}, []
def slow(*arguments, **options):
    calls.append(1)
    if len(calls) == {{call}}:
        print("now in {{name}}", flush=True)
        time.sleep({{pause_s}})
    return function(*arguments, **options)
room.{{name}} = slow
sys.exit(cli_train.train_main())
"""


def slow_script(folder: Path, room: str, name: str, call: int = 1, pause_s: float = 3) -> Path:
    """A train_improved.py in which one call of `room.name` says so and takes long."""
    script = folder / f"slow_{name}.py"
    script.write_text(SLOW.format(room=room, name=name, call=call, pause_s=pause_s))
    return script


def last_step(log: Path) -> int:
    """The last step of a log, 0 for none."""
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
    """Whether weights and moments after the last step are bit for bit the same."""
    states = [store.load(out / "checkpoints/latest.pt") for out in (run, reference)]
    left, right = (tree_leaves([state["model"], state["optimizer"]]) for state in states)
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )


def is_part_of(lines: list[str], reference: Path) -> bool:
    """Whether every line is one of the run that was never stopped."""
    return set(lines) <= set(loss_lines(reference / "logs" / "log.txt"))


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `script`."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
