"""`gpt2 status`: what a run does, also as an exit code."""

import sys
from dataclasses import dataclass
from pathlib import Path

from gpt2.base.errors import CheckpointError
from gpt2.base.text import console
from gpt2.cli.parse import guarded, parse

STATUS_CODES = {"running": 0, "finished": 0, "stopped": 3, "failed": 4, "dead": 4}


@dataclass(frozen=True)
class StatusCommand:
    """What a run does. Exit code: 0 running or finished, 3 stopped, 4 failed or dead."""

    checkpoint_dir: Path = Path("checkpoints")
    """folder of the run, or one above several: the newest is shown"""


def status_main() -> int:
    """`gpt2 status`."""

    def body() -> int:
        command = parse(StatusCommand, sys.argv[1:])
        from gpt2.inspection import runs as runs_module

        run = runs_module.newest_run(command.checkpoint_dir)
        if run is None:
            raise CheckpointError(
                f"no run in {command.checkpoint_dir}; --checkpoint_dir names another folder"
            )
        runs_module.print_state(run, console())
        return STATUS_CODES[run.state]

    return guarded(body)
