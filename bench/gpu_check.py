"""Checks and measures this project on a GPU in five minutes: python bench/gpu_check.py

On a bare machine with CUDA and torch 2.9 or later; no network: `--wheels FOLDER` installs, for this
check alone, packages that are missing. Parts run in the order of their importance, each in its own
process with a time limit; their findings are kept if a later part fails. At the end, and
after Ctrl+C, stdout has a table `item: predicted / found`; the JSON file has every number, and is
written after each part. `--parts a,b` runs some parts again. `--smoke` runs everything that runs
without CUDA, in tiny sizes.
"""

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gpu_report
from gpu_report import Outcome, Recorder

ROOT = Path(__file__).resolve().parents[1]
OWNER = "GPU_CHECK_PART"
"""environment variable of all processes of a part"""
INTERRUPTS = {signal.SIGINT, signal.SIGTERM}
NEEDED = (
    *("torch", "numpy", "tyro", "rich", "tiktoken", "tokenizers", "safetensors", "zstandard"),
    *("filelock", "fsspec", "packaging", "tenacity"),
)
"""packages that the parts import"""
STUCK_S = 10
"""seconds to wait for a killed process to end"""
POLL_S = 0.1
ROOMY_GB = 100
"""memory of a GPU on which parts of a stage run at the same time"""


@dataclass(frozen=True)
class Part:
    """Something to find out, in a process of its own."""

    name: str
    work: str
    """`module:function`, called with a Recorder, a Setting and `arguments`"""
    about: str
    limit_s: float
    arguments: tuple[int, ...] = ()
    is_required: bool = False
    """whether nothing else can run if this fails"""


Stage = tuple[Part, ...]
"""parts that may run at the same time, as none of them measures time"""


def speed(rows: int) -> Part:
    about = f"GPT-2 124M, {rows} rows: tokens/s beside a plain compiled loop, MFU, memory"
    return Part(f"speed-{rows}", "gpu_speed:speed", about, limit_s=120, arguments=(rows,))


STAGES: tuple[Stage, ...] = (
    (Part("versions", "gpu_machine:versions", "versions, kernels, matrix rate", 60, (), True),),
    (speed(64),),
    (Part("step", "gpu_step:step", "host time, waits, graphs, kernels of a step", 90),),
    (
        Part("ranks", "gpu_runs:ranks", "two ranks: stop, kill -9, out of memory, resume", 100),
        Part("determinism", "gpu_runs:determinism", "--deterministic resumes bit for bit", 120),
        Part("memory", "gpu_runs:fits", "24 and 16 GB: what fits is found", 120, (24, 16)),
        Part("tests", "gpu_runs:tests", "pytest tests/cuda", 120),
        Part("compile", "gpu_speed:compile_ahead", "ahead for speed-16", 110, (16,)),
    ),
    (Part("evaluation", "gpu_pieces:evaluation", "HellaSwag twice, share of a run", 60),),
    (Part("head", "gpu_pieces:heads", "ways to the loss of the head", 60),),
    (Part("optimizers", "gpu_pieces:optimizers", "updates of AdamW and Muon", 45),),
    (Part("checkpoint", "gpu_pieces:checkpoint", "saving and loading", 45),),
    (speed(32),),
    (speed(16),),
    (Part("windows", "gpu_pieces:windows", "attention within a window, two ways", 45),),
)


@dataclass(frozen=True)
class Setting:
    """What parts have in common."""

    is_smoke: bool
    folder: Path
    """for files; made-up data and compiled kernels in it serve all parts"""


def chosen(stages: Sequence[Stage], names: str | None) -> list[Stage]:
    """The stages with the parts in `names`, separated by commas; all of them without it.

    Raises SystemExit for an unknown name."""
    known = [part.name for stage in stages for part in stage]
    wanted = known if names is None else names.split(",")
    for name in wanted:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            message = f"--parts {name} is unknown{hint}; expected some of {', '.join(known)}"
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(2)
    kept = [tuple(part for part in stage if part.name in wanted) for stage in stages]
    return [stage for stage in kept if stage]


@dataclass
class PartProcess:
    """A part that runs."""

    outcome: Outcome
    process: subprocess.Popen[bytes]
    deadline: float
    limit: str
    """the limit in words"""
    owner: str
    """the value of OWNER in its processes"""
    findings: Path
    log: Path
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, part: Part, outcome: Outcome, setting: Setting, left_s: float) -> "PartProcess":
        """`left_s` is the rest of the budget."""
        findings, log = (setting.folder / f"{part.name}.{kind}" for kind in ("jsonl", "log"))
        owner = f"{setting.folder}/{part.name}"
        arguments = [*("--serve", part.work), *("--folder", str(setting.folder))]
        arguments += ["--findings", str(findings), *map(str, part.arguments)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, __file__, *arguments, *["--smoke"][: setting.is_smoke]],
                cwd=ROOT,
                env=os.environ | environment(setting) | {OWNER: owner},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl+C in the terminal is for this process alone
            )
        own_limit_s = math.inf if setting.is_smoke else part.limit_s  # a CPU takes its time
        limit_s = min(own_limit_s, left_s)
        limit = (
            "the end of the budget" if limit_s < own_limit_s else f"its limit of {limit_s:.0f} s"
        )
        outcome.state = gpu_report.RUNNING
        deadline = time.monotonic() + limit_s
        return cls(outcome, process, deadline, limit, owner, findings, log)

    def end(self) -> None:
        """To be called when it has ended, or at its deadline."""
        code = self.process.poll()
        if code is None:
            self.settle(gpu_report.TOO_LONG, f"stopped at {self.limit}")
        elif code:
            self.settle(gpu_report.FAILED, f"ended with code {code}")
        else:
            self.settle(gpu_report.DONE, "")

    def settle(self, state: str, reason: str) -> None:
        """Ends what is left of it and takes what it has found."""
        end_all_of(self.owner)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold it
            self.process.wait(STUCK_S)
        outcome = self.outcome
        outcome.state, outcome.reason = state, reason
        outcome.elapsed_s = time.monotonic() - self.started
        outcome.findings = gpu_report.read_findings(self.findings)
        if state != gpu_report.DONE:
            lines = self.log.read_text(errors="replace").splitlines()
            outcome.log = lines[-gpu_report.LOG_LINES :]


def first_to_end(running: Sequence[PartProcess]) -> PartProcess:
    """Waits until one of them ends or is at its deadline."""
    while True:
        for each in running:
            if each.process.poll() is not None or time.monotonic() >= each.deadline:
                return each
        time.sleep(POLL_S)


def environment(setting: Setting) -> dict[str, str]:
    """The environment variables of all parts: no network, their own caches and keys, and the code
    of this folder."""
    folders = [ROOT / "src", setting.folder / "site"]
    return {
        "PYTHONPATH": os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(setting.folder / "kernels"),
        "XDG_CONFIG_HOME": str(setting.folder / "config"),
        "HF_HUB_OFFLINE": "1",
    }


def end_all_of(owner: str) -> None:
    """Kills every process whose environment has this OWNER, in whatever session.

    Twice, because one of them may have been about to start another.
    """
    variable = f"{OWNER}={owner}".encode()
    for _ in range(2):
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if variable in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)


def run_stages(
    stages: Sequence[Stage], outcomes: dict[str, Outcome], setting: Setting, budget_s: float
) -> Iterator[Outcome]:
    """Runs the parts; yields the outcome of each when it ends. Closing the iterator ends the parts
    that still run."""
    end_at = time.monotonic() + budget_s
    running: list[PartProcess] = []
    is_roomy = False
    waves = list(stages)
    try:
        while waves:
            stage, *waves = waves
            if len(stage) > 1 and not (is_roomy or setting.is_smoke):
                waves[:0] = [(part,) for part in stage]
                continue
            for part in stage:
                left_s = end_at - time.monotonic()
                if left_s > 0:
                    outcome = outcomes[part.name]
                    with interrupts_deferred():  # else the process may be in no list yet
                        running.append(PartProcess.start(part, outcome, setting, left_s))
                else:
                    outcomes[part.name].reason = "the budget was used up"
            while running:
                process = first_to_end(running)
                with interrupts_deferred():
                    process.end()
                    running.remove(process)
                yield process.outcome
            numbers = [finding.numbers for each in outcomes.values() for finding in each.findings]
            is_roomy = any(each.get("memory_gb", 0) >= ROOMY_GB for each in numbers)
            if any(
                part.is_required and outcomes[part.name].state != gpu_report.DONE for part in stage
            ):
                return
    finally:
        with interrupts_deferred():
            for process in running:
                process.settle(gpu_report.FAILED, "interrupted")


def check(options: argparse.Namespace, stages: Sequence[Stage]) -> int:
    """Returns the exit code: 0 if all parts are done and everything is as predicted."""
    parts = [part for stage in stages for part in stage]
    outcomes = {part.name: Outcome(part.name) for part in parts}
    started, code = time.monotonic(), 0
    about = {"command": shlex.join(["python", *sys.argv])}
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        setting = Setting(options.smoke, Path(folder))
        if options.wheels is not None:
            install(options.wheels, setting.folder / "site")
        try:
            for outcome in run_stages(stages, outcomes, setting, options.budget_s):
                elapsed_s = time.monotonic() - started
                print(f"{elapsed_s:4.0f} s  {outcome.line}", file=sys.stderr, flush=True)
                options.json.write_text(gpu_report.as_json(list(outcomes.values()), **about))
        except KeyboardInterrupt:
            code = 130
    found = list(outcomes.values())
    options.json.write_text(gpu_report.as_json(found, **about))
    print(gpu_report.details(found))
    print(gpu_report.table(found))  # at the end, where one looks first
    print(f"\n{time.monotonic() - started:.0f} s; {gpu_report.summary(found)}")
    print(f"every number: {options.json}", flush=True)
    is_good = all(
        outcome.state == gpu_report.DONE
        and all(finding.is_ok is not False for finding in outcome.findings)
        for outcome in found
    )
    return code or int(not is_good)


def install(wheels: Path, folder: Path) -> None:
    """Installs the wheels for this check alone."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    options = ["--quiet", "--no-index", "--no-deps", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)


def serve(options: argparse.Namespace) -> None:
    """The process of a part."""
    record = Recorder(options.findings)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        predicted = f"with {', '.join(NEEDED)}"
        record.add("packages", f"missing: {', '.join(missing)}", predicted, is_ok=False)
        raise SystemExit("missing packages; --wheels FOLDER installs them from files")
    module, _, name = options.serve.partition(":")
    work = getattr(importlib.import_module(module), name)
    work(record, Setting(options.smoke, options.folder), *options.arguments)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM take effect after the block."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in INTERRUPTS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt


def parsed(arguments: Sequence[str], stages: Sequence[Stage]) -> argparse.Namespace:
    listed = [f"{part.name} ({part.about})" for stage in stages for part in stage]
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=f"parts: {'; '.join(listed)}"
    )
    parser.add_argument("--parts", help="some of them, separated by commas")
    parser.add_argument("--budget_s", type=float, default=300, help="seconds for all parts")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="for all numbers")
    parser.add_argument("--wheels", type=Path, help="a folder of packages that are missing here")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also without CUDA")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = parsed(sys.argv[1:], STAGES)
    if options.serve:
        serve(options)
        return 0
    signal.signal(signal.SIGTERM, interrupt)
    return check(options, chosen(STAGES, options.parts))


if __name__ == "__main__":
    sys.exit(main())
