import pkgutil
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
    models,
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
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted(ROOT.glob("docs/*.md"))]
GUIDES = [path for path in PAGES if path.name != "ARCHITECTURE.md"]  # it names files to be added
NOT_OURS = {"sample.py", "convert_hf_to_gguf.py", "noise.py", "train.sh"}
"""files of other tools, of the reader, and of a search"""
FIELDS = {*config._field_table(), *train.TrainCommand.__dataclass_fields__} - {"run"}
GENERATE = {*generate.GenerateCommand.__dataclass_fields__, *Sampling.__dataclass_fields__}
GENERATE |= set(model_source.ModelSource.__dataclass_fields__)
GENERATE -= {"sampling", "source"}  # parts, not flags

OPTIONS = {
    name
    for command in (
        export.ExportCommand,
        data.OutputOptions,
        data.Hub,
        plot.PlotCommand,
        evaluate.EvaluateCommand,
        search.SearchCommand,
        seeds.SeedsCommand,
        models.ModelsCommand,
        pool_options.PoolOptions,
    )
    for name in command.__dataclass_fields__
}
OPTIONS |= FIELDS | GENERATE
OPTIONS |= {f"no_{name}" for name in OPTIONS}


@pytest.mark.parametrize(
    ("section", "options"), [("## Options", FIELDS), ("## Generate", GENERATE)]
)
def test_the_table_of_options_is_complete_and_true(section: str, options: set[str]):
    table = README.partition(section)[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `--")]
    listed = {name for row in rows for name in re.findall(r"--(\w+)", row)}
    assert listed == options


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path: Path):
    named = re.findall(
        r"(?:^|`|bin/|# |# or |--module )gpt2 ([a-z]+)", path.read_text(), re.MULTILINE
    )
    assert named
    assert set(named) <= set(main.COMMANDS)


def test_options_in_commands_exist():
    known = OPTIONS | {"module", "standalone", "nproc_per_node", "port", "help"}
    known |= {"local", "outfile", "torch"}  # of `hf download`, llama.cpp, and uv (--torch-backend)
    assert set(re.findall(r"--([a-z]\w+)", README)) <= known
    ours = OPTIONS | {"nproc_per_node", "student_dims", "teacher_ranks", "lm_eval", "data_dir"}
    for path in GUIDES:  # an option of another tool rarely has an underscore
        assert set(re.findall(r"--([a-z]+_\w+)", path.read_text())) <= ours, path


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_and_modules_exist(path: Path):
    text = path.read_text()
    for name in set(re.findall(r"\b[\w/]+\.(?:py|sh)\b", text)) - NOT_OURS:
        folders = [ROOT, ROOT / "src/gpt2", ROOT / "examples"]
        is_there = any((folder / name).exists() for folder in folders)
        assert is_there or [*Path(ROOT, "src").rglob(name)], name
    for name in re.findall(r"\bgpt2(?:\.[a-z_]\w*)+", text):
        if (ROOT / "src/gpt2" / name.split(".")[1]).is_dir():  # not gpt2.service or gpt2.gguf
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path):
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    ):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target
