"""The `gpt2` command: imports the module of the command that is named, and runs it."""

import importlib
import sys

import gpt2
from gpt2.base.validation import suggestion
from gpt2.cli import parse

# Command -> what it does. Module `gpt2.cli.NAME`, function `NAME_main`.
COMMANDS = {
    "train": "train a model, as `torchrun … src/train_improved.py` does",
    "seeds": "train with many seeds at every point of a grid",
    "models": "train several models side by side",
    "search": "search for the best options with Optuna",
    "data": "prepare a corpus as token shards",
    "tokenizer": "train a tokenizer on files, or show the tokens of a text",
    "generate": "continue a prompt with a trained model",
    "evaluate": "measure a trained model: HellaSwag and validation loss",
    "export": "write a trained model for other tools",
    "estimate": "forecast how long training takes",
    "doctor": "check this machine and everything that a run needs",
    "plot": "draw the curves of runs",
    "experiments": "list the experiments on disk, show one, or run named ones",
    "status": "show the state of a run, also as an exit code",
    "watch": "watch a run in the terminal: progress, losses, speed, messages",
}


def main() -> int:
    """`gpt2 COMMAND …`."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"gpt2 {name}", *rest]
        return parse.guarded(lambda: _run(name))
    listing = "\n".join(f"  {command:<12} {text}" for command, text in COMMANDS.items())
    usage = f"usage: gpt2 COMMAND [OPTIONS]\n\n{listing}\n\n`gpt2 COMMAND --help` lists its options"
    if name == "--version":
        return parse.show_text(gpt2.__version__)
    if name in ("-h", "--help"):
        return parse.show_text(usage)
    print(
        f"error: unknown command {name}{suggestion(name, list(COMMANDS))}\n\n{usage}",
        file=sys.stderr,
    )
    return parse.USER_ERROR


def _run(name: str) -> int:
    module = importlib.import_module(f"gpt2.cli.{name}")
    code: int = getattr(module, f"{name}_main")()
    return code
