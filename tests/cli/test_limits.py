"""Every number that a user can give has limits; NaN and infinity are refused everywhere."""

import dataclasses
import math
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2.base.errors import ConfigError
from gpt2.cli import estimate, generate, main, options_page, search, seeds
from gpt2.cli.train import parse_train, train_main
from gpt2.config import options, presets
from gpt2.config.run import RunConfig
from gpt2.experiments import grid
from gpt2.experiments.search import space

DIGITS_400 = "9" * 400  # more than any float
NOT_FINITE = (math.nan, math.inf, -math.inf)


def numbers() -> Iterator[tuple[type[Any], str, tuple[Any, ...]]]:
    """Dataclass, field and types of each numeric option of each command."""
    seen: set[type[Any]] = set()
    kinds: list[type[Any]] = list(options_page._sections().values())
    while kinds:
        kind = kinds.pop()
        if kind in seen:
            continue
        seen.add(kind)
        for name, hint in typing.get_type_hints(kind).items():
            types = typing.get_args(hint) or (hint,)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                kinds.append(hint)
            elif int in types or float in types:
                yield kind, name, types


@pytest.mark.parametrize(
    ("kind", "name", "types"), [*numbers()], ids=lambda item: getattr(item, "__name__", str(item))
)
def test_every_number_has_limits(kind: type[Any], name: str, types: tuple[Any, ...]):
    known = {"run": RunConfig(), "vocab_size": 300}
    required: dict[str, Any] = {
        field.name: known.get(field.name, "x")
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    wrong = [10**30, -(10**30)] if int in types else []
    wrong += [*NOT_FINITE, 1e300, -1e300] if float in types else []
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^{name}="):
            kind(**required | {name: value})


def test_presets_are_within_the_limits_and_their_edges_are_valid():
    assert all(options.overlay(run, run.to_dict()) == run for run in presets.PRESETS.values())
    edges = {"seed": 2**63 - 1, "learning_rate": 10, "weight_decay": 10, "min_lr_ratio": 1}
    assert options.overlay(RunConfig(), edges).machine.seed == 2**63 - 1


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", f"1{'0' * 400}"])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "grad_clip", "cache_gb"])
def test_toml_and_flags_refuse_what_is_no_usable_number(name: str, value: str, tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text(f"{name} = {value}\n")
    with pytest.raises(ConfigError, match=name):
        parse_train(["--config", str(file)])
    with pytest.raises(ConfigError, match=name):
        parse_train([f"--{name}={value}"])


def test_an_integer_of_many_digits_is_an_error_of_its_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"a\.toml: "):
        options.from_toml(RunConfig(), f"seed = {'9' * 5000}", "a.toml")
    with pytest.raises(ConfigError, match=r"a\.toml: "):
        space.parse(f"[n_layer]\nlow = 1\nhigh = {'9' * 5000}", RunConfig(), "a.toml")


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e400"])
def test_a_grid_has_finite_numbers(text: str):
    with pytest.raises(ConfigError, match="expected a finite number"):
        grid.parse_grid([f"learning_rate=1e-3,{text}"])


def test_a_grid_takes_large_integers():
    assert grid.parse_grid([f"width={DIGITS_400}"]) == {"width": [int(DIGITS_400)]}


@pytest.mark.parametrize(
    "text",
    [
        "[learning_rate]\nlow = 1e-4\nhigh = inf",
        "[learning_rate]\nlow = nan\nhigh = 1e-2",
        "[learning_rate]\nlow = 1e-4\nhigh = 1e300",
        f"[learning_rate]\nlow = 1e-4\nhigh = {DIGITS_400}",
        f"[n_layer]\nlow = 1\nhigh = {DIGITS_400}",
        f"[n_embd]\nlow = 768\nhigh = {10**30}\nstep = 24",
        f"[window]\nlow = 1\nhigh = {10**12}",
        "[weight_decay]\nchoices = [0.1, inf]",
        "[seed]\nchoices = [1, 18446744073709551616]",
        "[weight_decay]\nlow = 0.0\nhigh = 1.0\nstep = inf",
    ],
)
def test_a_space_has_finite_numbers_within_the_limits(text: str):
    with pytest.raises(ConfigError, match=r"a\.toml: "):
        space.parse(text, RunConfig(), "a.toml")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (train_main, ["--learning_rate", "inf"]),
        (train_main, ["--seed", str(2**64)]),
        (train_main, ["--collective_timeout", "nan"]),
        (generate.generate_main, ["--temperature", "1e300"]),
        (generate.generate_main, ["--temperature", "nan"]),
        (seeds.seeds_main, ["--job_timeout", "inf"]),
        (seeds.seeds_main, ["--first_seed", str(2**63)]),
        (search.search_main, ["--grace", "nan"]),
        (estimate.estimate_main, ["--tokens_per_sec", "inf"]),
        (estimate.estimate_main, ["--tokens_per_sec", "1e-300"]),
    ],
)
def test_a_command_refuses_them_in_one_line(monkeypatch, capsys, command, flags):
    monkeypatch.setattr(sys, "argv", ["gpt2", *flags])
    assert command() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flags[0].removeprefix('--')}=") and error.count("\n") == 1


def test_the_slowest_forecast_has_an_end(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpt2", "estimate", "--tokens_per_sec", "1"])
    assert main.main() == 0
    assert "Left: " in capsys.readouterr().out
