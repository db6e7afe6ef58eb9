"""A named experiment: its name, the flags of its training, and where its logs lie. Pure."""

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2.base.errors import ConfigError
from gpt2.config import experiment_name, gpu_list

NAME = re.compile(r"\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Experiment:
    """One training among several."""

    name: str
    flags: tuple[str, ...]
    """of its training, without --experiment_name"""

    def folder(self, environment: Mapping[str, str]) -> Path:
        """The folder of its logs, as --log_dir or --out_dir choose it, if it trains on the first
        GPU in the CUDA_VISIBLE_DEVICES of this environment."""
        given: dict[str, str] = {}
        for flag, following in itertools.pairwise((*self.flags, "")):
            name, has_value, value = flag.partition("=")
            given[name.replace("-", "_")] = value if has_value else following
        log_dir = given.get("__log_dir") or Path(given.get("__out_dir", ""), "logs")
        shown = gpu_list.shown_by(environment[gpu_list.VARIABLE])
        gpu_id = experiment_name.first_gpu(shown or [])
        return Path(log_dir) / experiment_name.label(self.name, gpu_id)

    def console(self, environment: Mapping[str, str], begun: str) -> Path:
        """The file for what it prints; `begun` is the date and time when the command started."""
        return self.folder(environment) / f"console_{begun}.log"


def parse_all(texts: Sequence[str], common: Sequence[str] = ()) -> list[Experiment]:
    """An experiment for each text `NAME FLAGS…`; `common` flags come before its own.

    Raises ConfigError for a name that no file can have, a name that two have, and an open quote.
    """
    experiments: list[Experiment] = []
    for text in texts:
        name, *rest = text.split(maxsplit=1) or [""]
        if not NAME.fullmatch(name):
            raise ConfigError(f"'{text}' must begin with a name of letters, digits, . _ and -")
        if any(name == other.name for other in experiments):
            raise ConfigError(f"two experiments have the name {name}")
        try:
            own = shlex.split(rest[0]) if rest else []
        except ValueError as error:
            raise ConfigError(f"'{text}' has an unmatched quote") from error
        experiments.append(Experiment(name, (*common, *own)))
    return experiments
