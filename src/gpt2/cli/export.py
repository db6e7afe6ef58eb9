"""`gpt2 export`: writes a trained model for other tools."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt2.base.control_characters import visible
from gpt2.cli.model_source import ModelSource
from gpt2.cli.parse import CommandOptions, run_command


@dataclass(frozen=True)
class ExportCommand(CommandOptions):
    """Write a trained model for other tools: transformers, vLLM, llama.cpp, nanoGPT."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """folder to write"""
    format: Literal["hf", "nanogpt"] = "hf"
    """hf: a folder that transformers loads; nanogpt: a folder with ckpt.pt for its sample.py"""
    source: ModelSource = ModelSource()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the weights"""
    overwrite: bool = False
    """replace an earlier export"""


def export_main() -> int:
    """`gpt2 export`."""
    return run_command(ExportCommand, _run)


def _run(command: ExportCommand) -> int:
    # They import torch: see `gpt2.cli.parse`.
    from gpt2.cli import loading
    from gpt2.inference import foreign_files, interchange

    loaded = loading.load_model(command.source)
    loaded.require_tokens_of_bytes()
    net = loaded.model
    best_val_loss = loaded.train_state.best_val_loss if loaded.train_state else None
    trained = interchange.TrainedModel(
        net.config, net.state_dict(), loaded.step or 0, best_val_loss, loaded.tokenizer
    )
    interchange.export(trained, command.format, command.folder, command.dtype, command.overwrite)
    names = ", ".join(sorted(file.name for file in command.folder.iterdir()))
    print(visible(f"Exported {loaded} to {command.folder}: {names}"))
    if command.format == "nanogpt":
        print(foreign_files.GELU_NOTE)
    print(visible(f"\nNext:\n  {_next_command(command)}"))
    return 0


def _next_command(command: ExportCommand) -> str:
    """A command that loads the export and generates a text."""
    folder = shlex.quote(str(command.folder.resolve()))
    if command.format == "nanogpt":
        return f"python sample.py --out_dir={folder}    # in nanoGPT's folder"
    program = (
        "import sys, transformers as t; "
        "print(t.pipeline('text-generation', sys.argv[1])('Hello,', max_new_tokens=50))"
    )
    return f'python -c "{program}" {folder}    # pip install transformers'
