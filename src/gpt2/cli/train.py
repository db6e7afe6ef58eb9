"""`gpt2 train`: one training run."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gpt2.base import addresses, log
from gpt2.base.control_characters import visible
from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import require
from gpt2.cli.parse import CommandOptions, discard, guarded, parse, text_of_file
from gpt2.config import mixture, options, presets
from gpt2.config.model import MODERN_FLAGS
from gpt2.config.run import RunConfig
from gpt2.distributed.watchdog import end_with_torchrun
from gpt2.metrics import notify
from gpt2.train.notices import Notices

logger = logging.getLogger(__name__)
HIDDEN_BY = {"epochs": "max_steps", "eval_batches": "eval_rows"}
"""options that have no effect beside another one: with --epochs, the --max_steps of a preset or a
checkpoint is dropped"""
SEVERAL_VALUES = ("data_root", "mixture", "batch_ramp")
FITTING = (
    *("--architecture", "--n_head", "--n_embd", "--block_size", "--window"),
    *(f"--{switch}{name}" for name in MODERN_FLAGS for switch in ("", "no_")),
    "--total_batch_size",
    *(f"--{name}" for name in SEVERAL_VALUES),
)
"""options whose values must fit each other"""
OF_MUON = ("cautious_decay", "momentum_warmup")
"""options that AdamW ignores"""


@dataclass(frozen=True)
class TrainCommand(CommandOptions):
    """Pretrain GPT-2. Flags override --config FILE, which overrides --preset. At a resume, options
    that are not given come from the checkpoint."""

    run: RunConfig
    config: Path | None = None
    """TOML file with options, by name or in a table per part"""
    out_dir: Path | None = None
    """keep checkpoints, runs and logs under this folder; --checkpoint_dir, --runs_dir and --log_dir
    win for their part"""
    list_checkpoints: bool = False
    """print the table of checkpoints and exit"""
    notify: str | None = field(default=None, repr=False)
    """http(s) address of a webhook, which gets a message when the run ends, fails, hangs or goes
    back; default is GPT2_NOTIFY_URL, which does not show in `ps`"""


class RunCommand(Protocol):
    """A command with the options of a run, --config and --out_dir."""

    def __init__(self, *, run: RunConfig) -> None: ...

    @property
    def run(self) -> RunConfig: ...


CommandOfRun = TypeVar("CommandOfRun", bound=RunCommand)


def train_main() -> int:
    """`gpt2 train` and `src/train_improved.py`: one training run."""
    # Before torch is imported, which takes 2 s: a rank whose torchrun dies meanwhile must end, too.
    end_with_torchrun()
    return guarded(_train_as_rank)


def _train_as_rank() -> int:
    from gpt2.distributed import rendezvous

    rank, world_size, local_rank, _ = rendezvous.env_rank()

    def body() -> int:
        arguments = sys.argv[1:]
        with rendezvous.reported_by_local_rank0():
            command = parse_before_resume(TrainCommand, arguments, quiet=local_rank > 0)
            address = notify.address_of(command.notify)
        log.setup(command.log_level, rank=rank, info_stream="stdout")
        if command.list_checkpoints:
            return _list_checkpoints(command.run) if rank == 0 else 0
        arguments = _without(arguments, "--notify")
        hide_secrets()
        folder = command.run.checkpoint.checkpoint_dir
        notices = Notices(address if rank == 0 else None, f"training in {folder}")
        with notices.posting_failure():
            return _train(command.run, arguments, rank, world_size, notices)

    return guarded(body, rank=rank, report=rendezvous.report_to_torchrun)


def _train(
    run_config: RunConfig,
    arguments: Sequence[str],
    rank: int,
    world_size: int,
    notices: Notices,
) -> int:
    # They import torch: see `gpt2.cli.parse`.
    from gpt2.distributed import visible_gpus
    from gpt2.metrics import sinks
    from gpt2.train import experiment_folder, trainer

    def configure(stored: Mapping[str, Any] | None) -> RunConfig:  # called on rank 0
        nonlocal run_config
        run_config = parse_run(TrainCommand, arguments, quiet=True, stored=stored).run
        require_effect(arguments, run_config)
        sinks.require_usable(run_config)
        return run_config

    result = trainer.run(run_config, configure=configure, notices=notices)
    if rank == 0 and result.state == "finished":
        run = experiment_folder.resolve(run_config)
        gpus = None if run == run_config else visible_gpus.ids()
        try:
            commands = next_commands(run, arguments, world_size, result.step, gpus)
            print(visible(addresses.without_secrets(commands)), flush=True)
        except OSError as error:  # a full disk, a closed pipe: the run has finished all the same
            logger.warning("cannot write to standard output: %s", error)
            discard(sys.stdout)
    return result.exit_code


def hide_secrets() -> None:
    """Removes --notify, and passwords in addresses, from `sys.argv`, which W&B and worker processes
    record."""
    sys.argv[1:] = addresses.public(_without(sys.argv[1:], "--notify"))


def _list_checkpoints(run_config: RunConfig) -> int:
    # They import torch: see `gpt2.cli.parse`.
    from gpt2.inspection import checkpoints
    from gpt2.train import experiment_folder

    for folder in experiment_folder.folders(run_config):
        checkpoints.print_checkpoints(folder, console())
    return 0


def parse_train(arguments: Sequence[str]) -> TrainCommand:
    """The training command that `arguments` describe, complete without a checkpoint."""
    return parse_run(TrainCommand, arguments)


def parse_before_resume(
    kind: type[CommandOfRun], arguments: Sequence[str], quiet: bool = False
) -> CommandOfRun:
    """The command before it is known which checkpoint it resumes: folders and machine are final.

    Values that do not fit the preset are left out if it resumes: they may fit the checkpoint.
    Raises as `parse_run` does.
    """
    try:
        command = parse_run(kind, arguments, quiet)
    except ConfigError as error:
        try:
            command = parse_run(kind, _without(arguments, *FITTING), quiet)
        except ConfigError as without:  # of the file, if its values fit these options alone
            is_resumed = any(argument.startswith("--resume") for argument in arguments)
            raise without if is_resumed else error from None
        if command.run.checkpoint.resume_from is None:
            raise
        return command
    if command.run.checkpoint.resume_from is None:
        require_effect(arguments, command.run)
    return command


def require_effect(arguments: Sequence[str], run: RunConfig) -> None:
    """Raises ConfigError for an option in OF_MUON that is typed, and on, beside AdamW. Those of a
    preset or a file are part of a recipe, of which --optimizer may replace a part."""
    for name in OF_MUON:
        is_typed = len(_without(arguments, f"--{name}")) < len(arguments)
        require(
            not (is_typed and getattr(run.optim, name) and run.optim.optimizer == "adamw"),
            f"--{name} has no effect on optimizer=adamw; omit it, or use --optimizer normuon or "
            "muon",
        )


def parse_run(
    kind: type[CommandOfRun],
    arguments: Sequence[str],
    quiet: bool = False,
    stored: Mapping[str, Any] | None = None,
) -> CommandOfRun:
    """The command that `arguments` describe, on top of their preset, file and out_dir; and, if it
    resumes, of the configuration that is `stored` in its checkpoint.

    Raises ConfigError for values that cannot work, SystemExit for unknown flags.
    """
    try:
        run = _run_of_file(arguments, stored)
    except ConfigError as of_file:  # its values may fit the flags instead of the preset
        run = _run_of_file(arguments, stored, is_complete=False)
        try:
            return parse(kind, arguments, kind(run=run), quiet)
        except ConfigError as error:
            raise of_file if str(of_file).endswith(str(error)) else error from None
    return parse(kind, arguments, kind(run=run), quiet)


def _run_of_file(
    arguments: Sequence[str], stored: Mapping[str, Any] | None, is_complete: bool = True
) -> RunConfig:
    """The run that --preset, --config and --out_dir in `arguments` give, without other flags.

    Unless it `is_complete`, its values need not fit each other. A preset is complete: `stored`
    counts unless another preset is given. tyro takes the defaults of all flags as one object, so
    the three flags that choose the defaults are read before it parses.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "out_dir", *HIDDEN_BY, *HIDDEN_BY.values()):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    for name in SEVERAL_VALUES:
        spellings = (f"--{name}", f"--{name.replace('_', '-')}")
        parser.add_argument(*spellings, nargs="*", action="append")
    flags, _ = parser.parse_known_args(arguments)
    run = presets.preset(flags.preset or "gpt2-124m")
    if stored is not None and flags.preset in (None, stored.get("preset")):
        run = options.on_stored(run, stored)
    for name, hidden_by in HIDDEN_BY.items():
        if getattr(flags, name) is not None and getattr(flags, hidden_by) is None:
            run = options.overlay(run, {hidden_by: None}, is_complete=is_complete)
    if flags.config:
        run = with_file(run, Path(flags.config), is_complete)
    for name in SEVERAL_VALUES:
        given = getattr(flags, name) or []
        # Of folders without names, the last one counts, as of other options.
        is_list = name != "data_root" or all(
            mixture.is_named(*one) for one in given if len(one) == 1
        )
        require(
            len(given) < 2 or not is_list,
            f"--{name} is given more than once; put all its values behind one --{name}",
        )
        # tyro would leave weights of a file or a checkpoint beside these.
        if given and name != "batch_ramp":
            run = options.overlay(run, {name: given[-1]}, is_complete=is_complete)
    if flags.out_dir:
        out = Path(flags.out_dir)
        folders = {"checkpoint_dir": "checkpoints", "runs_dir": "runs", "log_dir": "logs"}
        paths = {name: out / folder for name, folder in folders.items()}
        run = options.overlay(run, paths, is_complete=is_complete)
    return run


def next_commands(
    run: RunConfig,
    arguments: Sequence[str],
    world_size: int,
    step: int,
    gpus: Sequence[str] | None = None,
) -> str:
    """Commands to type after a finished run; `gpus` are the visible ones if its files are named
    after a GPU."""
    flags = _without(arguments, "--resume", "--max_steps", "--decay_steps", "--init_from")
    as_script = not sys.argv[0].startswith("gpt2 ")
    train = "python src/train_improved.py" if as_script else "gpt2 train"
    estimate = "python estimate_training_time.py" if as_script else "gpt2 estimate"
    launcher = train
    if world_size > 1:
        launcher = f"torchrun --standalone --nproc_per_node={world_size} src/train_improved.py"
    if gpus is not None:
        launcher = f"CUDA_VISIBLE_DEVICES={shlex.quote(','.join(gpus))} {launcher}"
    folder = run.checkpoint.checkpoint_dir
    folder_flag = (
        "" if folder == Path("checkpoints") else f" --checkpoint_dir {shlex.quote(str(folder))}"
    )
    # A decay that ends later raises the learning rate again, which is necessary if it is 0 now; a
    # warm-up just goes on.
    decay_steps = run.optim.decay_steps or (step if step > run.optim.warmup_steps else None)
    decay = "" if decay_steps is None else f" --decay_steps {decay_steps}"
    if run.optim.min_lr_ratio == 0:
        decay = "" if run.optim.decay_steps is None else " --decay_steps None"
    prompt = shlex.quote(run.evaluation.sample_prompt)
    tensorboard = "./start_tensorboard.sh" if as_script else "tensorboard"
    if run.watch.runs_dir != Path("runs") or not as_script:
        tensorboard += f" --logdir {shlex.quote(str(run.watch.runs_dir.resolve()))}"
    rows = {
        "resume": f"{launcher} {shlex.join(flags)} --resume latest --max_steps {2 * step}{decay}",
        "watch": tensorboard if run.watch.use_tensorboard else f"gpt2 watch{folder_flag}",
        "list": f"{train}{folder_flag} --list_checkpoints",
        "estimate": f"{estimate}{folder_flag}",
        "generate": f"gpt2 generate{folder_flag} --checkpoint best --prompt {prompt}",
    }
    lines = [f"  {name:<9} {' '.join(text.split())}" for name, text in rows.items()]
    if sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ:
        lines.insert(0, f"  activate  source {_relative(Path(sys.prefix))}/bin/activate")
    return "\nNext:\n" + "\n".join(lines)


def _relative(path: Path) -> Path:
    """`path` relative to the current folder, if it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def with_file(run: RunConfig, path: Path, is_complete: bool = True) -> RunConfig:
    """`run` with the values in the file of --config."""
    text = text_of_file(path, "--config")
    return options.from_toml(run, text, str(path), is_complete=is_complete)


def _without(arguments: Sequence[str], *flags: str) -> list[str]:
    """`arguments` without these flags and their values, in either spelling."""
    kept: list[str] = []
    left_out = {flag.replace("-", "_") for flag in flags}
    values_to_skip = 0
    for argument in arguments:
        name, has_value, _ = argument.replace("-", "_").partition("=")
        if argument.startswith("--"):
            values_to_skip = 0
        if argument.startswith("--") and name in left_out:
            has_several = name.lstrip("_") in SEVERAL_VALUES
            values_to_skip = len(arguments) if has_several else 0 if has_value else 1
        elif values_to_skip:
            values_to_skip -= 1
        else:
            kept.append(argument)
    return kept
