"""`gpt2 doctor`: checks this machine and everything that a run needs."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2.base import log, validation
from gpt2.base.text import console
from gpt2.cli import train
from gpt2.cli.parse import CommandOptions, guarded
from gpt2.config.run import RunConfig
from gpt2.metrics import notify


@dataclass(frozen=True)
class DoctorCommand(CommandOptions):
    """Check this machine and everything that a run with these options needs. Exit code: 1 if the
    run cannot work."""

    run: RunConfig
    nproc_per_node: int | None = None
    """ranks, as for torchrun; default is one per GPU, or without GPUs as many as the resumed
    run had on the CPU"""
    config: Path | None = None
    """TOML file with options, by name or in a table per part"""
    out_dir: Path | None = None
    """keep checkpoints, runs and logs under this folder; --checkpoint_dir, --runs_dir and --log_dir
    win for their part"""
    notify: str | None = field(default=None, repr=False)
    """address for messages of the run; only its form is checked"""

    def __post_init__(self) -> None:
        validation.require_within(self, 1, validation.MOST_PROCESSES, "nproc_per_node")


def doctor_main() -> int:
    """`gpt2 doctor`."""

    def body() -> int:
        arguments = sys.argv[1:]
        command = train.parse_before_resume(DoctorCommand, arguments)
        log.setup(command.log_level)
        notify.address_of(command.notify)

        def configure(stored: Mapping[str, Any] | None) -> RunConfig:
            return train.parse_run(DoctorCommand, arguments, stored=stored).run

        # They import torch: see `gpt2.cli.parse`.
        from gpt2.inspection import doctor
        from gpt2.train import experiment_folder

        run = doctor.as_resumed(experiment_folder.resolve(command.run), configure)
        findings = doctor.examine(run, command.nproc_per_node)
        return 1 if doctor.print_findings(findings, console()) else 0

    return guarded(body)
