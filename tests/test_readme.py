import re
from pathlib import Path

import pytest

from gpt2.cli import (
    data,
    evaluate,
    export,
    generate,
    main,
    model_source,
    plot,
    pool_options,
    search,
    seeds,
    train,
)
from gpt2.config import options as config
from gpt2.inference.sampling import Sampling
from support import ROOT

README = (ROOT / "README.md").read_text()
FIELDS = {*config._field_table(), *train.TrainCommand.__dataclass_fields__} - {"run"}
GENERATE = {*generate.GenerateCommand.__dataclass_fields__, *Sampling.__dataclass_fields__}
GENERATE |= set(model_source.ModelSource.__dataclass_fields__)
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
    assert name in main.COMMANDS


def test_options_in_commands_exist():
    known = FIELDS | GENERATE
    known |= set(export.ExportCommand.__dataclass_fields__)
    known |= {*data.Options.__dataclass_fields__, *data.Hub.__dataclass_fields__}
    known |= set(plot.PlotCommand.__dataclass_fields__)
    known |= set(evaluate.EvaluateCommand.__dataclass_fields__)
    known |= {"module", "standalone", "nproc_per_node", "port", "help", "no_bias"}
    known |= set(search.SearchCommand.__dataclass_fields__)
    known |= set(seeds.SeedsCommand.__dataclass_fields__)
    known |= set(pool_options.PoolOptions.__dataclass_fields__)  # and of the script's
    known |= {"local", "outfile"}  # of `hf download` and llama.cpp
    assert set(re.findall(r"--([a-z]\w+)", README)) <= known


def test_named_files_exist():
    layout = README.partition("## Layout")[2].partition("```")[2].partition("```")[0]
    for name in re.findall(r"(\w+\.(?:py|sh))", layout):
        assert list(Path(ROOT).glob(name)) or list(Path(ROOT, "src").rglob(name)), name
