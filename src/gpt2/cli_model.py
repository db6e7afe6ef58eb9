"""What the `gpt2` command does with a trained model: `generate`, `export`."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from gpt2 import config
from gpt2.cli_parse import guarded, parse
from gpt2.errors import CheckpointError, ConfigError
from gpt2.sampling import Sampling

if TYPE_CHECKING:
    from gpt2.model.base import LanguageModel


@dataclass(frozen=True)
class Source:
    """Which model."""

    checkpoint: str = "latest"
    """latest, best, a step or a path; hf:FOLDER or nanogpt:FILE for a model of other tools"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder of the run's checkpoints"""
    trust_checkpoint: bool = False
    """unpickle a checkpoint that this user did not write: it can run any code"""


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt with a trained model. The texts go to standard output, all else to
    standard error."""

    source: Source = Source()
    prompt: str = "Hello, I'm a language model,"
    """text to continue; - reads it from standard input, an empty one begins a document"""
    stream: bool = False
    """show the text while it is made; of several, the first, and then the others"""
    interactive: bool = False
    """continue each line that is typed, with --stream; an empty line takes the prompt again"""
    sampling: Sampling = Sampling()
    seed: int = 1
    """seed of the choice; each answer of --interactive has the next one"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""

    def __post_init__(self) -> None:
        config.require_at_least(self, 0, "seed")
        if self.seed >= 2**63:  # more than torch takes
            raise ConfigError(f"seed={self.seed} is too large; it must be less than {2**63}")
        if self.interactive and self.prompt == "-":
            raise ConfigError(
                "--prompt - and --interactive both read standard input; leave one of them out"
            )


def generate_main() -> int:
    """`gpt2 generate`."""

    def body() -> int:
        command = parse(GenerateCommand, sys.argv[1:])
        from gpt2 import cli_generate, distributed

        loaded = load_model(command.source)
        print(loaded, file=sys.stderr, flush=True)
        prompt = cli_generate.read_prompt(command.prompt)
        give = cli_generate.stream_texts if command.stream else cli_generate.print_texts
        if command.interactive:
            give = cli_generate.converse
        with distributed.join(config.MachineConfig(device=command.device)) as world:
            give(loaded.model.to(world.device), prompt, command.sampling, command.seed)
        return 0

    return guarded(body)


@dataclass(frozen=True)
class ExportCommand:
    """Write a trained model for other tools: transformers, vLLM, llama.cpp, nanoGPT."""

    folder: tyro.conf.Positional[Path]
    """folder to write"""
    format: Literal["hf", "nanogpt"] = "hf"
    """hf: a folder that transformers loads; nanogpt: one with a ckpt.pt for its sample.py"""
    source: Source = Source()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the weights"""
    overwrite: bool = False
    """replace an earlier export"""


def export_main() -> int:
    """`gpt2 export`."""

    def body() -> int:
        command = parse(ExportCommand, sys.argv[1:])
        from gpt2 import interchange

        loaded = load_model(command.source)
        net = loaded.model
        trained = interchange.Trained(
            net.config, net.state_dict(), loaded.step or 0, loaded.progress.get("best_val_loss")
        )
        interchange.export(
            trained, command.format, command.folder, command.dtype, command.overwrite
        )
        names = ", ".join(sorted(file.name for file in command.folder.iterdir()))
        print(f"{loaded} is now {command.folder}: {names}")
        if command.format == "nanogpt":
            print(interchange.GELU_NOTE)
        print(f"\nGo on with:\n  {_next_command(command)}")
        return 0

    return guarded(body)


def _next_command(command: ExportCommand) -> str:
    """What to type after an export."""
    folder = shlex.quote(str(command.folder.resolve()))
    if command.format == "nanogpt":
        return f"python sample.py --out_dir={folder}    # in nanoGPT's folder"
    program = (
        "import sys, transformers as t; "
        "print(t.pipeline('text-generation', sys.argv[1])('Hello,', max_new_tokens=50))"
    )
    return f'python -c "{program}" {folder}    # pip install transformers'


@dataclass(frozen=True)
class Loaded:
    """A model that was trained, on the CPU, and what its checkpoint says of it."""

    source: str
    model: "LanguageModel"
    progress: dict[str, Any]
    config: dict[str, Any] | None
    """of its run; None for one that came from other tools"""

    @property
    def step(self) -> int | None:
        return self.progress.get("step")

    def __str__(self) -> str:
        return self.source if self.step is None else f"{self.source} (step {self.step})"


def load_model(source: Source, speak: bool = True) -> Loaded:
    """The model that `source` names, on the CPU, in float32; warnings if this process may speak.

    Raises CheckpointError if it is not there, or its weights are no finite numbers.
    """
    import torch

    from gpt2 import checkpoint, interchange, model, monitor

    warn = _warn if speak else _ignore
    which, folder, trust = source.checkpoint, source.checkpoint_dir, source.trust_checkpoint
    progress, run, shown = {}, None, which
    if interchange.is_foreign(which):
        shape, weights = interchange.read(which, trust=trust, warn=warn)
        weights = {name: part.float() for name, part in weights.items()}
    else:
        path = checkpoint.find(folder, which, warn)
        if path is None:
            others = monitor.run_folders(folder, "step_*.json")
            way_out = f"use --checkpoint_dir {others[0]}" if others else "train a model first"
            raise CheckpointError(f"no checkpoint in {folder}; {way_out}")
        state = checkpoint.load(path, trust=trust, warn=warn)
        weights, progress, run, shown = (
            state["model"],
            state["progress"],
            state["config"],
            str(path),
        )
        shape = config.ModelConfig(**run["model"])
    if not all(bool(part.isfinite().all()) for part in weights.values()):
        raise CheckpointError(
            f"{shown} has weights that are no finite numbers: its training diverged; use an "
            "earlier checkpoint"
        )
    with torch.device("meta"):  # weights that are replaced at once need not be drawn
        net = model.build(shape)
    net.load_state_dict(weights, assign=True)
    return Loaded(shown, net, progress, run)


def _ignore(_text: str) -> None:
    pass


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
