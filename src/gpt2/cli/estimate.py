"""`gpt2 estimate`: how long training takes."""

from dataclasses import dataclass
from pathlib import Path

from gpt2.base import validation
from gpt2.base.text import console
from gpt2.cli.parse import CommandOptions, run_command
from gpt2.config import presets
from gpt2.config.run import PresetName
from gpt2.inspection import estimate, run_status


@dataclass(frozen=True)
class EstimateCommand(CommandOptions):
    """Forecast how long training takes: of the newest run, or from these flags."""

    checkpoint_dir: Path = Path("checkpoints")
    """folder to search for runs"""
    preset: PresetName | None = None
    """estimate this preset instead of the newest run"""
    tokens_per_sec: float | None = None
    """estimate at this speed instead of the newest run's"""
    gpus: int | None = None
    """number of GPUs that reach this speed together; default is 1"""

    def __post_init__(self) -> None:
        validation.require_within(self, 1, validation.MOST_PROCESSES, "gpus")
        validation.require_within(self, 1, validation.LARGEST, "tokens_per_sec")


def estimate_main() -> int:
    """`gpt2 estimate` and `estimate_training_time.py`."""
    return run_command(EstimateCommand, _run)


def _run(command: EstimateCommand) -> int:
    out = console()
    flags = (command.preset, command.tokens_per_sec, command.gpus)
    if all(flag is None for flag in flags):
        if run := run_status.newest_run(command.checkpoint_dir):
            estimate.print_run_forecast(run, out)
            return 0
        out.print(f"No run found in {command.checkpoint_dir}")
    assumed = presets.preset(command.preset or "gpt2-124m")
    estimate.print_assumed_forecast(assumed, command.tokens_per_sec, command.gpus or 1, out)
    return 0
