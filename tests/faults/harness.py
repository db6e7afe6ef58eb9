"""Real runs under torchrun that can be killed, and the table of what that cost."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    yield row.steps_lost
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
        **flags: object,
    ) -> None:
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
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text()

    def processes(self) -> list[int]:
        """torchrun and its ranks, as far as they live."""
        return processes_of(f"\0{self.out}\0")

    def ranks(self) -> list[int]:
        return [pid for pid in self.processes() if pid != self.agent.pid]

    def wait_for(self, text: str, count: int = 1, within_s: float = 60) -> None:
        """Until the output holds `text` so often."""
        deadline = time.monotonic() + within_s
        while self.text().count(text) < count:
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.text()}"
            assert self.agent.poll() is None or self.text().count(text) >= count, self.text()
            time.sleep(0.01)

    def kill(self, victim: str, chance: random.Random) -> None:
        """kill -9 of any one `rank`, of `torchrun` or of `all`."""
        ranks = self.ranks()
        for pid in {
            "rank": [chance.choice(ranks)] if ranks else [],
            "torchrun": [self.agent.pid],
            "all": self.processes(),
        }[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self, within_s: float = 60) -> int:
        """The exit code of torchrun; fails if a process of the run outlives it by long."""
        code = self.agent.wait(within_s)
        deadline = time.monotonic() + 40  # a rank that has only begun waits 30 s for torchrun
        while left := self.processes():
            assert time.monotonic() < deadline, f"orphans {left}:\n{self.text()}"
            time.sleep(0.02)
        return code


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


def is_part_of(lines: list[str], reference: Path) -> bool:
    """Whether every line is one of the run that was never stopped."""
    return set(lines) <= set(loss_lines(reference / "logs" / "log.txt"))


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `script`."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
