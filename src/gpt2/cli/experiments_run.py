"""`gpt2 experiments run`: trains several named experiments side by side.

It does not use tyro: flags of the trainings are inside its positional arguments and after `--`.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt2.base.errors import ConfigError
from gpt2.base.text import shortened
from gpt2.cli.experiment_notices import posting_end
from gpt2.cli.parse import USER_ERROR
from gpt2.config import gpu_list
from gpt2.experiments.named import experiments
from gpt2.experiments.pool.job import Slot

HELP = """\
Trains several named experiments side by side, one at a time on each GPU, and waits for all:

  gpt2 experiments run [OPTIONS] 'NAME [FLAGS …]' … [-- FLAGS OF ALL …]
  gpt2 experiments run 'lr1e3 --learning_rate 1e-3' 'lr3e4 --learning_rate 3e-4' \\
      -- --preset demo --resume latest

  --gpus 0,2-3   the GPUs to use, or none; default is CUDA_VISIBLE_DEVICES, else all of this machine
  --max_gpus N   use at most N of these GPUs
  --notify URL   post one message when all have ended; default is GPT2_NOTIFY_URL
  --slots N      train on the CPU, N experiments at a time, each on its share of the cores;
                 default without a GPU is 2

What an experiment prints goes to logs/NAME_gpu_ID/console_DATE_TIME.log. After Ctrl+C or SIGTERM
all save and end; a second one kills them. Exit code: 0 all finished, 1 one failed, 2 wrong usage,
130 / 143 stopped. Started again, an experiment waits for the GPU that it had before."""
OPTIONS = ("--gpus", "--max_gpus", "--slots", "--notify")
MOST_CELLS = 80
"""of the names in a message to --notify"""


@dataclass(frozen=True)
class RunArguments:
    """What stands on the command line."""

    texts: Sequence[str]
    """`NAME FLAGS…` each"""
    common: Sequence[str]
    """the flags of all experiments"""
    options: Mapping[str, str]
    """the command's own, by name"""

    def count(self, option: str) -> int | None:
        """The value of --slots or --max_gpus; raises ConfigError if it is no number."""
        text = self.options.get(option)
        if text is not None and not re.fullmatch("[1-9][0-9]{0,3}", text):
            raise ConfigError(f"{option} {text}: expected a number from 1 to 9999")
        return None if text is None else int(text)


def run_experiments(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code; raises ConfigError for wrong arguments."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "-h" in own or "--help" in own:
        print(HELP)
        return 0
    read = read_arguments(arguments)
    if not read.texts:
        print(HELP, file=sys.stderr)
        return USER_ERROR
    named = experiments.parse_all(read.texts, read.common)
    names = shortened(", ".join(item.name for item in named), MOST_CELLS)
    with posting_end(read.options.get("--notify"), f"experiments {names}", None) as ended:
        # `_slots` may import torch to count GPUs.
        return ended(*experiments.run(named, _slots(read)))


def read_arguments(arguments: Sequence[str]) -> RunArguments:
    """The arguments by their meaning; raises ConfigError for an unknown option."""
    texts: list[str] = []
    options: dict[str, str] = {}
    rest = list(arguments)
    while rest and (argument := rest.pop(0)) != "--":
        name, has_value, value = argument.partition("=")
        name = f"--{name.removeprefix('--').replace('-', '_')}"
        if argument.startswith("--") and name in OPTIONS:
            if not has_value and not rest:
                raise ConfigError(f"{name} needs a value")
            options[name] = value if has_value else rest.pop(0)
        elif argument.startswith("-"):
            raise ConfigError(f"unknown option {argument}; flags of all experiments come after --")
        else:
            texts.append(argument)
    return RunArguments(texts, rest, options)


def _slots(read: RunArguments) -> list[Slot]:
    """The slots that the options choose, else those of the machine."""
    count, max_gpus = read.count("--slots"), read.count("--max_gpus")
    given = read.options.get("--gpus")
    gpus = None if given is None else gpu_list.parse(given, "--gpus")
    if count is not None and given is not None and gpus != []:
        raise ConfigError("use either --gpus or --slots")
    if count is not None and max_gpus is not None:
        raise ConfigError("use either --max_gpus or --slots")
    return experiments.slots_of(gpus if count is None else [], max_gpus, count)
