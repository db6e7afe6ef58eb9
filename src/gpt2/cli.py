"""The `gpt2` command and what the scripts call: parses flags, prints errors, sets exit codes."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gpt2
from gpt2 import config
from gpt2.cli_parse import guarded, parse
from gpt2.config import RunConfig
from gpt2.errors import CheckpointError, ConfigError
from gpt2.failures import end_with_torchrun
from gpt2.tables import console


def main() -> int:
    """`gpt2 COMMAND …`."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"gpt2 {name}", *rest]
        return COMMANDS[name][0]()
    if name == "--version":
        print(gpt2.__version__)
        return 0
    listing = "\n".join(f"  {command:<12} {text}" for command, (_, text) in COMMANDS.items())
    usage = f"usage: gpt2 COMMAND [OPTIONS]\n\n{listing}\n\n`gpt2 COMMAND --help` lists its options"
    if name in ("-h", "--help"):
        print(usage)
        return 0
    print(
        f"error: unknown command {name}{config.suggestion(name, list(COMMANDS))}\n\n{usage}",
        file=sys.stderr,
    )
    return 2


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
    from gpt2 import distributed  # torch takes seconds to import: not for `gpt2 --help`

    rank, world_size, local_rank, _ = distributed.env_rank()

    def body() -> int:
        command = parse_train(sys.argv[1:], speak=local_rank == 0)
        if command.list_checkpoints:
            from gpt2 import monitor

            if rank == 0:
                monitor.print_checkpoints(command.run.checkpoint.checkpoint_dir, console())
            return 0
        from gpt2 import train

        result = train.run(command.run)
        if rank == 0 and result.state == "finished":
            print(next_commands(command.run, sys.argv[1:], world_size, result.step))
        return result.exit_code

    return guarded(body, speak=local_rank == 0, tell=distributed.tell_torchrun)


def parse_train(arguments: Sequence[str], speak: bool = True) -> TrainCommand:
    """The training command that `arguments` say, on top of their preset, file and out_dir.

    Raises ConfigError for values that cannot work, SystemExit for flags that are none.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "out_dir"):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    early, _ = first.parse_known_args(arguments)
    run = config.preset(early.preset or "gpt2-124m")
    if early.config:
        run = config.from_toml(run, _read_text(Path(early.config)), early.config)
    if early.out_dir:
        out = Path(early.out_dir)
        folders = {"checkpoint_dir": "checkpoints", "runs_dir": "runs", "log_dir": "logs"}
        run = config.overlay(run, {name: out / folder for name, folder in folders.items()})
    return parse(TrainCommand, arguments, default=TrainCommand(run=run), speak=speak)


def next_commands(run: RunConfig, arguments: Sequence[str], world_size: int, step: int) -> str:
    """What to type after a finished run."""
    again = _without(arguments, "--resume", "--max_steps", "--init_from")
    as_script = not sys.argv[0].startswith("gpt2 ")
    train = "python src/train_improved.py" if as_script else "gpt2 train"
    estimate = "python estimate_training_time.py" if as_script else "gpt2 estimate"
    again_with = train
    if world_size > 1:
        again_with = f"torchrun --standalone --nproc_per_node={world_size} src/train_improved.py"
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


def data_main() -> int:
    """`gpt2 data …`."""
    from gpt2 import cli_data

    return cli_data.data_main()


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt with a trained model."""

    checkpoint: str = "latest"
    """latest, best, a step or a path"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder of the run's checkpoints"""
    prompt: str = "Hello, I'm a language model,"
    """text to continue"""
    num_samples: int = 3
    """how many continuations"""
    max_new_tokens: int = 100
    """tokens of each, at most"""
    temperature: float = 0.8
    """0 takes the likeliest token"""
    top_k: int | None = 50
    """choose among this many likeliest tokens"""
    seed: int = 1
    """seed of the choice"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    trust_checkpoint: bool = False
    """unpickle a checkpoint that this user did not write: it can run any code"""

    def __post_init__(self) -> None:
        config.require_at_least(self, 1, "num_samples", "max_new_tokens", "top_k")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} is negative; 0 is greedy")


def generate_main() -> int:
    """`gpt2 generate`."""

    def body() -> int:
        command = parse(GenerateCommand, sys.argv[1:])
        from gpt2 import checkpoint as checkpoints
        from gpt2 import distributed, generate, model, monitor
        from gpt2.config import MachineConfig, ModelConfig

        path = checkpoints.find(command.checkpoint_dir, command.checkpoint, _warn)
        if path is None:
            others = monitor.run_folders(command.checkpoint_dir, "step_*.json")
            way_out = f"use --checkpoint_dir {others[0]}" if others else "train a model first"
            raise CheckpointError(f"no checkpoint in {command.checkpoint_dir}; {way_out}")
        state = checkpoints.load(path, trust=command.trust_checkpoint, warn=_warn)
        with distributed.join(MachineConfig(device=command.device)) as world:
            net = model.build(ModelConfig(**state["config"]["model"])).to(world.device)
            net.load_state_dict(state["model"])
            texts = generate.generate_text(
                net,
                command.prompt,
                num_samples=command.num_samples,
                max_new_tokens=command.max_new_tokens,
                temperature=command.temperature,
                top_k=command.top_k,
                seed=command.seed,
            )
        print(f"{path} (step {state['progress']['step']})")
        for number, text in enumerate(texts, 1):
            print(f"--- sample {number}\n{text}")
        return 0

    return guarded(body)


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


STATUS_CODES = {"running": 0, "finished": 0, "stopped": 3, "failed": 4, "dead": 4}
COMMANDS: dict[str, tuple[Callable[[], int], str]] = {
    "train": (train_main, "train a model; `torchrun … src/train_improved.py` does the same"),
    "data": (data_main, "prepare a corpus as token shards"),
    "generate": (generate_main, "continue a prompt with a trained model"),
    "estimate": (estimate_main, "how long training takes"),
    "status": (status_main, "what a run does, also as an exit code for scripts"),
}


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


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
