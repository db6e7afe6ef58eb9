"""What the `gpt2` command tells of runs: `estimate`, `status`, `plot`, `doctor`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt2 import cli_train, config
from gpt2.cli_parse import guarded, parse
from gpt2.config import RunConfig
from gpt2.errors import CheckpointError, ConfigError
from gpt2.tables import console

STATUS_CODES = {"running": 0, "finished": 0, "stopped": 3, "failed": 4, "dead": 4}


@dataclass(frozen=True)
class EstimateCommand:
    """How long training takes: of the newest run, or from these flags where there is none."""

    checkpoint_dir: Path = Path("checkpoints")
    """where to look for runs"""
    preset: config.PresetName | None = None
    """estimate this preset instead of the newest run"""
    tokens_per_sec: float | None = None
    """estimate at this speed instead of the newest run"""
    gpus: int | None = None
    """GPUs that give this speed, or that are assumed"""

    def __post_init__(self) -> None:
        config.require_at_least(self, 1, "gpus")
        if self.tokens_per_sec is not None and self.tokens_per_sec <= 0:
            raise ConfigError(f"tokens_per_sec={self.tokens_per_sec} must be more than 0")


def estimate_main() -> int:
    """`estimate_training_time.py` and `gpt2 estimate`."""

    def body() -> int:
        command = parse(EstimateCommand, sys.argv[1:])
        from gpt2 import monitor

        out = console()
        flags = (command.preset, command.tokens_per_sec, command.gpus)
        asked = any(flag is not None for flag in flags)
        run = None if asked else monitor.newest_run(command.checkpoint_dir)
        if run is not None:
            monitor.print_run_forecast(run, out)
        else:
            if not asked:
                out.print(f"No run found in {command.checkpoint_dir}")
            run_config = config.preset(command.preset or "gpt2-124m")
            monitor.print_assumed_forecast(
                run_config, command.tokens_per_sec, command.gpus or 1, out
            )
        return 0

    return guarded(body)


@dataclass(frozen=True)
class StatusCommand:
    """What a run does. Exit code: 0 running or finished, 3 stopped, 4 failed or dead."""

    checkpoint_dir: Path = Path("checkpoints")
    """folder of the run, or one above several: the newest is shown"""


def status_main() -> int:
    """`gpt2 status`."""

    def body() -> int:
        command = parse(StatusCommand, sys.argv[1:])
        from gpt2 import monitor

        run = monitor.newest_run(command.checkpoint_dir)
        if run is None:
            raise CheckpointError(
                f"no run in {command.checkpoint_dir}; --checkpoint_dir names another folder"
            )
        monitor.print_state(run, console())
        return STATUS_CODES[run.state]

    return guarded(body)


@dataclass(frozen=True)
class PlotCommand:
    """Draw losses, HellaSwag, learning rate and tokens/s of runs, from their logs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN …]")] = (
        Path("logs/log.txt"),
    )
    """logs, or folders with logs/log.txt, such as the --out_dir of a run, or experiments"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("curves.png")
    """the picture: .png, .svg or .pdf"""
    last: int | None = None
    """only the last so many runs of each log; default is all"""

    def __post_init__(self) -> None:
        config.require_at_least(self, 1, "last")


def plot_main() -> int:
    """`gpt2 plot`."""

    def body() -> int:
        command = parse(PlotCommand, sys.argv[1:])
        from gpt2 import plot

        runs = plot.read(command.runs, command.last)
        plot.save(runs, command.out)
        out = console()
        for run in runs:
            out.print(plot.summary(run), soft_wrap=True)
        out.print(f"Drawn: {command.out}", soft_wrap=True)
        return 0

    return guarded(body)


@dataclass(frozen=True)
class DoctorCommand:
    """Check this machine, and all that a run with these options needs. Exit code: 1 if something
    keeps the run from its end."""

    run: RunConfig
    nproc_per_node: int | None = None
    """ranks, as torchrun is told; default is one per GPU"""
    config: Path | None = None
    """TOML file with options, by name or in a table per part"""
    out_dir: Path | None = None
    """keep checkpoints, runs and logs under this folder"""

    def __post_init__(self) -> None:
        config.require_at_least(self, 1, "nproc_per_node")


def doctor_main() -> int:
    """`gpt2 doctor`."""

    def body() -> int:
        arguments = sys.argv[1:]
        default = DoctorCommand(run=cli_train.before_flags(arguments))
        command = parse(DoctorCommand, arguments, default=default)
        from gpt2 import doctor, named

        findings = doctor.examine(named.resolve(command.run), command.nproc_per_node)
        return 1 if doctor.print_findings(findings, console()) else 0

    return guarded(body)
