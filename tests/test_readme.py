import re
from pathlib import Path

import pytest

from gpt2 import (
    cli,
    cli_data,
    cli_evaluate,
    cli_experiments,
    cli_model,
    cli_search,
    cli_watch,
    config,
)
from gpt2.sampling import Sampling
from support import ROOT

README = (ROOT / "README.md").read_text()
FIELDS = {*config._field_table(), "config", "out_dir", "list_checkpoints"}
GENERATE = {*cli_model.GenerateCommand.__dataclass_fields__, *Sampling.__dataclass_fields__}
GENERATE |= set(cli_model.Source.__dataclass_fields__)
GENERATE -= {"sampling", "source"}  # parts, not flags


@pytest.mark.parametrize(
    ("section", "options"), [("## Options", FIELDS), ("## Generate", GENERATE)]
)
def test_the_table_of_options_is_complete_and_true(section: str, options: set[str]):
    table = README.partition(section)[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `--")]
    listed = {name for row in rows for name in re.findall(r"--(\w+)", row)}
    assert listed == options


@pytest.mark.parametrize("name", sorted(set(re.findall(r"gpt2 ([a-z]+)", README))))
def test_commands_exist(name: str):
    assert name in cli.COMMANDS


def test_options_in_commands_exist():
    known = FIELDS | GENERATE
    known |= set(cli_model.ExportCommand.__dataclass_fields__)
    known |= {*cli_data.Options.__dataclass_fields__, *cli_data.Hub.__dataclass_fields__}
    known |= set(cli_watch.PlotCommand.__dataclass_fields__)
    known |= set(cli_evaluate.EvaluateCommand.__dataclass_fields__)
    known |= {"module", "standalone", "nproc_per_node", "port", "help", "no_bias"}
    known |= set(cli_search.SearchCommand.__dataclass_fields__)
    known |= set(cli_experiments.SeedsCommand.__dataclass_fields__)
    known |= set(cli_experiments.PoolOptions.__dataclass_fields__)  # and of the script's
    known |= {"local", "outfile"}  # of `hf download` and llama.cpp
    assert set(re.findall(r"--([a-z]\w+)", README)) <= known


def test_named_files_exist():
    layout = README.partition("## Layout")[2].partition("```")[2].partition("```")[0]
    for name in re.findall(r"(\w+\.(?:py|sh))", layout):
        assert list(Path(ROOT).glob(name)) or list(Path(ROOT, "src").rglob(name)), name
