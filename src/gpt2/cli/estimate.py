"""What the `gpt2` command tells of runs: `estimate`, `status`, `plot`, `doctor`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from gpt2.base import validation
from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.cli.parse import guarded, parse
from gpt2.config import presets
from gpt2.config import run as run_module


@dataclass(frozen=True)
class EstimateCommand:
    """How long training takes: of the newest run, or from these flags where there is none."""

    checkpoint_dir: Path = Path("checkpoints")
    """where to look for runs"""
    preset: run_module.PresetName | None = None
    """estimate this preset instead of the newest run"""
    tokens_per_sec: float | None = None
    """estimate at this speed instead of the newest run"""
    gpus: int | None = None
    """GPUs that give this speed, or that are assumed"""

    def __post_init__(self) -> None:
        validation.require_at_least(self, 1, "gpus")
        if self.tokens_per_sec is not None and self.tokens_per_sec <= 0:
            raise ConfigError(f"tokens_per_sec={self.tokens_per_sec} must be more than 0")


def estimate_main() -> int:
    """`estimate_training_time.py` and `gpt2 estimate`."""

    def body() -> int:
        command = parse(EstimateCommand, sys.argv[1:])
        from gpt2.inspection import estimate
        from gpt2.inspection import runs as runs_module

        out = console()
        flags = (command.preset, command.tokens_per_sec, command.gpus)
        asked = any(flag is not None for flag in flags)
        run = None if asked else runs_module.newest_run(command.checkpoint_dir)
        if run is not None:
            estimate.print_run_forecast(run, out)
        else:
            if not asked:
                out.print(f"No run found in {command.checkpoint_dir}")
            run_config = presets.preset(command.preset or "gpt2-124m")
            estimate.print_assumed_forecast(
                run_config, command.tokens_per_sec, command.gpus or 1, out
            )
        return 0

    return guarded(body)
