"""`gpt2 export`: writes a trained model for other tools."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from gpt2.base import log
from gpt2.cli.loading import Source, load_model
from gpt2.cli.parse import guarded, parse

if TYPE_CHECKING:
    pass


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
    log.setup()

    def body() -> int:
        command = parse(ExportCommand, sys.argv[1:])
        from gpt2.inference import interchange

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
