"""Processes that take turns, so that a noisy machine is noisy for all; not a bench by itself."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

Timed = Callable[[int], list[float]]
"""seconds of each of so many steps"""


@dataclass
class Contender:
    """A process that waits for its turn, and its answers."""

    name: str
    process: subprocess.Popen[str]
    rounds: list[float] = field(default_factory=list)
    """median seconds of a step in each round"""
    peak_gb: float = 0.0

    @classmethod
    def start(
        cls, name: str, command: Sequence[str], quiet: bool = True, **environment: str
    ) -> "Contender":
        """`command` ends in `serve`. Unless it is `quiet`, its stderr is that of this process."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env=os.environ | environment,
        )
        return cls(name, process)

    def run(self, steps: int) -> float:
        """Median seconds of so many steps."""
        self.begin(steps)
        return self.finish()

    def begin(self, steps: int) -> None:
        """Requests so many steps, without waiting for them."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def finish(self) -> float:
        """Median seconds of the steps that were requested last. Raises SystemExit if the process
        has failed."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.name} has failed: {self.process.args!r}")
        answer = json.loads(line)
        self.peak_gb = answer["peak_gb"]
        return float(statistics.median(answer["times"]))

    def end(self) -> None:
        self.process.communicate()


def take_turns(contenders: Sequence[Contender], rounds: int, steps: int) -> Iterator[int]:
    """Every contender runs so many steps in every round; yields after each round."""
    for number in range(rounds):
        for contender in contenders:
            contender.rounds.append(contender.run(steps))
        yield number


def spread(numbers: Sequence[float]) -> str:
    """The median, and the extremes."""
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """How many times as fast ours is, by the seconds of each round."""
    return spread([other / mine for mine, other in zip(ours, theirs, strict=True)])


def serve(prepare: Callable[[], Timed]) -> None:
    """The process of a contender: numbers of steps come in, seconds and peak memory go out."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print is no answer
    timed = prepare()
    for line in sys.stdin:
        answers.write(json.dumps({"times": timed(int(line)), "peak_gb": peak_gb()}) + "\n")


def peak_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
