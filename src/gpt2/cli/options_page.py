"""Prints docs/options.md, the page of all options: `python -m gpt2.cli.options_page`.

Names, types and defaults are those of the dataclasses that the commands parse; the meaning of an
option is the docstring below its field, which `--help` shows, too.
"""

import ast
import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import MISSING, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gpt2 import cli
from gpt2.cli import experiments_run
from gpt2.cli.main import COMMANDS
from gpt2.cli.parse import CommandOptions
from gpt2.config.presets import PRESETS
from gpt2.config.run import RunConfig

TYPED = {"named": "NAME", "hub": "hf"}
"""what users type for an action whose class has another name"""
INTRODUCTION = """\
# Options

Written by `python -m gpt2.cli.options_page > docs/options.md` from the source code; a test compares
the two. `gpt2 COMMAND --help` prints the same text.

Hyphens work as well as underscores. `None` is off, or the default that the text names. A switch is
turned on by `--bias`, off by `--no_bias` or `--bias False`. Invalid input ends with one line that
says what to do (in a frame, if the option does not exist) and exit code 2; under `torchrun`, which
adds its own report, it is 1, and the line stands below that report once more. Above the first line,
before any rank begins, torchrun warns of OMP_NUM_THREADS unless that is set; ranks choose their
threads themselves. A stopped run saves, then exits with 130 or 143.

These scripts are commands: `src/train_improved.py` is `gpt2 train`, `src/main_multi_gpu.py`
`gpt2 seeds`, `src/train_models.py` `gpt2 models`, `src/parallel_search.py` `gpt2 search`, and
`estimate_training_time.py` `gpt2 estimate`.

## Presets and files

`--preset` chooses a complete configuration, `--config FILE.toml` changes values of it, and flags
override both. A file lists options by name, or in a table per part (`[optim]`):

```toml
learning_rate = 3e-4
epochs = 2
mini_batch_size = 32
```

| preset | differs from the defaults below in |
|---|---|
"""


def page() -> str:
    """The page as Markdown."""
    lines = [f"| `{name}` | {_differences(run)} |" for name, run in PRESETS.items()]
    seen: set[type[Any]] = set()
    texts = {
        title: [_text(kind.__doc__ or ""), *_group(kind, seen)]
        for title, kind in _sections().items()
    }
    texts["gpt2 experiments run"] = ["```text", experiments_run.HELP, "```"]  # it has no dataclass
    for title in sorted(texts, key=_place):
        lines += ["", f"## {title}", "", *texts[title]]
    return INTRODUCTION + "\n".join(lines) + "\n"


def _place(title: str) -> int:
    """The place of a section's command in the list of commands; 0 for one about all."""
    name = title.removeprefix("gpt2 ").partition(" ")[0]
    return [*COMMANDS].index(name) + 1 if name in COMMANDS else 0


def _sections() -> dict[str, type[CommandOptions]]:
    """Title -> the dataclass of a command, or of each action of a command."""
    found: dict[str, type[CommandOptions]] = {"Every command": CommandOptions}
    for name in COMMANDS:
        modules = [
            importlib.import_module(f"gpt2.cli.{item.name}")
            for item in pkgutil.iter_modules(cli.__path__)
            if item.name == name or item.name.startswith(f"{name}_")  # data_show belongs to data
        ]
        kinds = [
            kind
            for module in modules
            for kind in vars(module).values()
            if inspect.isclass(kind)
            and issubclass(kind, CommandOptions)
            and kind.__module__ == module.__name__
        ]
        for kind in kinds:
            action = kind.__name__.removesuffix("Command").lower()
            typed = f"gpt2 {name} {TYPED.get(action, action)}"
            found[typed if len(kinds) > 1 else f"gpt2 {name}"] = kind
    return found


def _differences(run: RunConfig) -> str:
    """The options of a preset that are not the defaults, as flags."""
    usual = RunConfig().to_dict()
    flags = [
        f"`--{name} {value}`"
        for part, values in run.to_dict().items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value != usual[part][name]
    ]
    return " ".join(flags) or "nothing"


def _group(kind: type[Any], seen: set[type[Any]]) -> Iterator[str]:
    """The table of a dataclass's fields, then its parts, each under its own title.

    The options of every command, which they inherit, have a table of their own.
    """
    seen.add(kind)
    described = [
        base
        for base in reversed(kind.__mro__)
        if is_dataclass(base) and (base is kind or base is not CommandOptions)
    ]
    hints = get_type_hints(kind, include_extras=True)
    meanings = {name: text for base in described for name, text in _meanings(base).items()}
    parts = [hint for hint in hints.values() if isinstance(hint, type) and is_dataclass(hint)]
    names = [name for base in described for name in inspect.get_annotations(base)]
    own = [name for name in names if hints[name] not in parts]
    if own:
        yield from ("", "| option | default | meaning |", "|---|---|---|")
    for name in own:
        default = _default(kind.__dataclass_fields__[name].default, hints[name])
        yield f"| `{_flag(name, hints[name])}` | {default} | {meanings[name]} |"
    for part in parts:
        title = _text(part.__doc__ or "").removesuffix(".")
        if part in seen:
            yield from ("", f"Also the options of *{title}* above.")
        else:
            yield from ("", f"### {title}", *_group(part, seen))


def _meanings(kind: type[Any]) -> dict[str, str]:
    """Field name -> the docstring below it, of the fields that the class itself defines."""
    definition = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: _text(text.value.value)
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _text(docstring: str) -> str:
    """A docstring as one line of Markdown."""
    escaped = re.sub(r"([|*])", r"\\\1", " ".join(docstring.split()))
    return re.sub(r"(?<!`)--\w+", r"`\g<0>`", escaped)


def _flag(name: str, hint: Any) -> str:
    """`--name`; of a positional argument, what `--help` calls it."""
    metavars = (getattr(item, "metavar", None) for item in getattr(hint, "__metadata__", ()))
    return next((metavar for metavar in metavars if metavar), f"--{name}")


def _default(default: Any, hint: Any) -> str:
    """The default, and the other values of a choice."""
    if default is MISSING:
        return "required"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return _code(*default) or "none"
    other = [choice for choice in _choices(hint) if choice != default]
    return _code(default) + (f"; also {_code(*other)}" if other else "")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of one that may be None."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for inner in get_args(hint) for choice in _choices(inner))


def _code(*values: object) -> str:
    return ", ".join(
        f"`{value:g}`" if isinstance(value, float) else f"`{value}`" for value in values
    )


if __name__ == "__main__":
    print(page(), end="")
