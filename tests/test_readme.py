"""The README and docs/: commands, options, files and links that they name exist."""

import contextlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest

from gpt2.cli import main, options_page
from gpt2.config.presets import PRESETS
from gpt2.data.corpora import CORPORA
from support import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
GUIDES = [path for path in PAGES if path.name != "ARCHITECTURE.md"]  # it names files to be added
NOT_OURS = {
    *("sample.py", "convert_hf_to_gguf.py", "noise.py", "train.sh", "bench/NAME.py"),
    "ntfy.sh",  # a host
}
"""files of other tools, of the reader, and of a search"""
OPTIONS_PAGE = options_page.page()
OPTIONS = set(re.findall(r"^\| `--(\w+)`", OPTIONS_PAGE, re.MULTILINE))
OPTIONS |= {f"no_{name}" for name in OPTIONS}
OPTIONS_OF_OTHERS = {
    *("help", "module", "nnodes", "nproc_per_node", "port", "standalone"),  # tyro, torchrun
    "bind_all",  # TensorBoard
    *("nodes", "requeue", "signal", "time"),  # SLURM
    *("address", "now", "outfile", "user"),  # ray, systemd, llama.cpp
    *("data_dir", "gd", "gnc", "student_dims", "teacher_ranks"),  # examples, a reader's function
    *(
        "bfloat16",
        "budget_s",
        "head",
        "json",
        "lm_eval",
        "memory",
        "model",
        "parts",
        "ranks",
        "smoke",
        "wheels",
    ),  # bench/
}


def test_the_page_of_options_is_that_of_the_source_code():
    assert (ROOT / "docs/options.md").read_text() == OPTIONS_PAGE, (
        "stale; type: python -m gpt2.cli.options_page > docs/options.md"
    )
    assert {"learning_rate", "top_p", "num_seeds", "ddp", "space", "log_level"} <= OPTIONS
    assert all(f"| `{name}` |" in OPTIONS_PAGE for name in PRESETS)


def test_each_command_has_a_section_of_options(capsys, monkeypatch: pytest.MonkeyPatch):
    """Commands are those of `gpt2 COMMAND --help`, where it lists actions. All corpora that
    `gpt2 data` lists have the same options."""
    names = {name.replace("_", "-") for name in CORPORA}
    commands = set()
    for command in main.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["gpt2", command, "--help"])
        with contextlib.suppress(SystemExit):
            main.main()
        usage, _, listing = capsys.readouterr().out.partition("\n")
        has_actions = re.fullmatch(rf"usage: gpt2 {command} (WHAT|ACTION) \[OPTIONS]", usage)
        actions = re.findall(r"^  ([\w-]+)", listing, re.MULTILINE) if has_actions else []
        commands |= {f"{command} {'NAME' if item in names else item}" for item in actions}
        commands |= set() if has_actions else {command}
    assert {"train", "data NAME", "data order", "experiments run", "tokenizer show"} <= commands
    assert set(re.findall(r"^## gpt2 (.+)$", OPTIONS_PAGE, re.MULTILINE)) == commands


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 160
    assert (ROOT / "CONTRIBUTING.md").read_text().count("\n") <= 80


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path: Path):
    named = re.findall(
        r"(?:^|`|bin/|# |# or |--module )gpt2 ([a-z]+)", path.read_text(), re.MULTILINE
    )
    assert named or path.name == "CONTRIBUTING.md"
    assert set(named) <= set(main.COMMANDS)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make (\w+)", path.read_text(), re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_commands_exist(path: Path):
    named = re.findall(r"--([a-z]\w*)(?![\w-])", path.read_text())  # ours have no hyphens
    assert set(named) <= OPTIONS | OPTIONS_OF_OTHERS


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
