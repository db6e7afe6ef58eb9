"""The `gpt2` command: finds what a command's name stands for."""

import importlib
import os
import sys

import gpt2
from gpt2.base.validation import suggestion

# A command's function lies in the module before the colon, which is imported for it alone.
COMMANDS = {
    "train": (
        "train:train_main",
        "train a model, as `torchrun … src/train_improved.py` does",
    ),
    "seeds": ("seeds:seeds_main", "train with many seeds, at every point of a grid"),
    "models": ("models:models_main", "train several models at the same time"),
    "search": ("search:search_main", "search for the best options, with Optuna"),
    "data": ("data:data_main", "prepare a corpus as token shards"),
    "generate": ("generate:generate_main", "continue a prompt with a trained model"),
    "evaluate": ("evaluate:evaluate_main", "measure a trained model: HellaSwag, loss"),
    "export": ("export:export_main", "write a trained model for other people's tools"),
    "estimate": ("estimate:estimate_main", "how long training takes"),
    "doctor": ("doctor:doctor_main", "check this machine, and all that a run needs"),
    "plot": ("plot:plot_main", "draw the curves of runs"),
    "experiments": ("experiments:experiments_main", "what many trainings together have done"),
    "status": ("status:status_main", "what a run does, also as an exit code for scripts"),
}


def main() -> int:
    """`gpt2 COMMAND …`."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"gpt2 {name}", *rest]
        module, function = COMMANDS[name][0].split(":")
        code: int = getattr(importlib.import_module(f"gpt2.cli.{module}"), function)()
        return code
    if name == "--version":
        print(gpt2.__version__)
        return 0
    listing = "\n".join(f"  {command:<12} {text}" for command, (_, text) in COMMANDS.items())
    usage = f"usage: gpt2 COMMAND [OPTIONS]\n\n{listing}\n\n`gpt2 COMMAND --help` lists its options"
    if name in ("-h", "--help"):
        try:
            print(usage, flush=True)
        except BrokenPipeError:  # the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    print(
        f"error: unknown command {name}{suggestion(name, list(COMMANDS))}\n\n{usage}",
        file=sys.stderr,
    )
    return 2
