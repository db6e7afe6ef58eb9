"""What the `gpt2` command does with one run: `train`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2.base import log
from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.cli.parse import guarded, parse
from gpt2.config import options, presets
from gpt2.config.run import RunConfig
from gpt2.distributed.watchdog import end_with_torchrun


@dataclass(frozen=True)
class TrainCommand:
    """Pretrain GPT-2. Options override --config FILE, which overrides --preset."""

    run: RunConfig
    config: Path | None = None
    """TOML file with options, by name or in a table per part"""
    out_dir: Path | None = None
    """keep checkpoints, runs and logs under this folder"""
    list_checkpoints: bool = False
    """print the table of checkpoints and exit"""


def train_main() -> int:
    """One training run: `src/train_improved.py` and `gpt2 train`."""
    end_with_torchrun()
    from gpt2.distributed import (
        device,
        rendezvous,  # torch takes seconds to import: not for `gpt2 --help`
    )

    rank, world_size, local_rank, _ = rendezvous.env_rank()
    log.setup(rank=rank, info_stream=sys.stdout)

    def body() -> int:
        with rendezvous.reported_by_local_rank0():
            command = parse_train(sys.argv[1:], speak=local_rank == 0)
        if command.list_checkpoints:
            from gpt2.inspection import checkpoints
            from gpt2.train import experiment_folder

            if rank == 0:
                for folder in experiment_folder.folders(command.run):
                    checkpoints.print_checkpoints(folder, console())
            return 0
        from gpt2.train import experiment_folder, trainer

        result = trainer.run(command.run)
        if rank == 0 and result.state == "finished":
            run = experiment_folder.resolve(command.run)
            visible = None if run == command.run else device.visible_gpus()
            print(next_commands(run, sys.argv[1:], world_size, result.step, visible))
        return result.exit_code

    return guarded(body, tell=rendezvous.tell_torchrun)


def parse_train(arguments: Sequence[str], speak: bool = True) -> TrainCommand:
    """The training command that `arguments` say, on top of their preset, file and out_dir.

    Raises ConfigError for values that cannot work, SystemExit for flags that are none.
    """
    default = TrainCommand(run=before_flags(arguments))
    return parse(TrainCommand, arguments, default=default, speak=speak)


def before_flags(arguments: Sequence[str]) -> RunConfig:
    """The run that the preset, file and out_dir in `arguments` give, which other flags override."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "out_dir"):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    early, _ = first.parse_known_args(arguments)
    run = presets.preset(early.preset or "gpt2-124m")
    if early.config:
        run = options.from_toml(run, _read_text(Path(early.config)), early.config)
    if early.out_dir:
        out = Path(early.out_dir)
        folders = {"checkpoint_dir": "checkpoints", "runs_dir": "runs", "log_dir": "logs"}
        run = options.overlay(run, {name: out / folder for name, folder in folders.items()})
    return run


def next_commands(
    run: RunConfig,
    arguments: Sequence[str],
    world_size: int,
    step: int,
    visible_gpus: str | None = None,
) -> str:
    """What to type after a finished run; `visible_gpus` if its files are named after the first."""
    again = _without(arguments, "--resume", "--max_steps", "--init_from")
    as_script = not sys.argv[0].startswith("gpt2 ")
    train = "python src/train_improved.py" if as_script else "gpt2 train"
    estimate = "python estimate_training_time.py" if as_script else "gpt2 estimate"
    again_with = train
    if world_size > 1:
        again_with = f"torchrun --standalone --nproc_per_node={world_size} src/train_improved.py"
    if visible_gpus is not None:
        again_with = f"CUDA_VISIBLE_DEVICES={shlex.quote(visible_gpus)} {again_with}"
    folder = run.checkpoint.checkpoint_dir
    of_run = (
        "" if folder == Path("checkpoints") else f" --checkpoint_dir {shlex.quote(str(folder))}"
    )
    prompt = shlex.quote(run.evaluation.sample_prompt)
    tensorboard = "./start_tensorboard.sh" if as_script else "tensorboard"
    if run.watch.runs_dir != Path("runs") or not as_script:
        tensorboard += f" --logdir {shlex.quote(str(run.watch.runs_dir.resolve()))}"
    rows = {
        "go on": f"{again_with} {shlex.join(again)} --resume latest --max_steps {2 * step}",
        "watch": tensorboard,
        "list": f"{train}{of_run} --list_checkpoints",
        "forecast": f"{estimate}{of_run}",
        "generate": f"gpt2 generate{of_run} --checkpoint best --prompt {prompt}",
    }
    lines = [f"  {name:<9} {' '.join(text.split())}" for name, text in rows.items()]
    if sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ:
        lines.insert(0, f"  first     source {_from_here(Path(sys.prefix))}/bin/activate")
    return "\nGo on with:\n" + "\n".join(lines)


def _from_here(path: Path) -> Path:
    """`path` as it is typed in this folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from error


def _without(arguments: Sequence[str], *flags: str) -> list[str]:
    """`arguments` without these flags and their values, in either spelling."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, has_value, _ = argument.replace("-", "_").partition("=")
        if name in {flag.replace("-", "_") for flag in flags}:
            skip = not has_value
        elif skip:
            skip = False
        else:
            kept.append(argument)
    return kept
