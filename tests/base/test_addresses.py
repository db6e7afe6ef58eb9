"""No password of an address is printed, however it is given."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2.base import addresses, errors, log
from gpt2.base.errors import ConfigError
from gpt2.base.text import PlainConsole, table
from gpt2.cli import parse
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.experiments import results
from gpt2.experiments.search import best
from gpt2.experiments.training import training_job

WITH_SECRETS = [
    ("ftp://me:secret@host/data", "ftp://…@host/data"),
    ("https://secret@host/data", "https://…@host/data"),
    ("web=ftp://me:secret@host/a:0.5", "web=ftp://…@host/a:0.5"),
    ("ftp://me:sec/re?t#@secret@host/data", "ftp://…@host/data"),
    ("ftp://me:sec  re t/sec@host/data", "ftp://…@host/data"),
    ("filecache::ftp://me:secret@host/data", "filecache::ftp://…@host/data"),
    ("postgresql+psycopg://me:sec:r@et@host/name?password=secret&sslmode=require", None),
    ("postgresql://host/name?user=me&sslpassword=secret", "postgresql://host/name?user=…&s"),
    ("https://host/data?token=secret", "https://host/data?token=…"),
    ("web=https://host/data?sig=secret%2F:0.5", "web=https://host/data?sig=…:0.5"),
    ("s3://host/data?X-Amz-Signature=secret&partNumber=1", "s3://host/data?X-Amz-Signature=…&"),
    ("https://host/data#access_token=secret", "https://host/data#access_token=…"),
]


@pytest.mark.parametrize(("address", "shown"), WITH_SECRETS)
def test_what_is_secret_is_left_out(address: str, shown: str | None):
    public = addresses.without_secrets(address)
    assert "sec" not in public.replace("access", "") and public.startswith(shown or "postgresql")
    assert addresses.without_secrets(public) == public
    assert addresses.has_secret(address) and addresses.has_secret(public)
    assert addresses.public({"a": [(address,)], "b": 1}) == {"a": [[public]], "b": 1}


@pytest.mark.parametrize(
    "text",
    [
        "data/shard_?.bin and me@host, a?b=c",
        "s3://bucket/train_??.bin",
        "https://host:8080/data/x",
        "https://host:8080 does not answer; mail me@host",
        "s3://bucket: no such file; mail me@host",
        "sqlite:////home/me/study.db",
        "such as postgresql+psycopg://user:password@host/name (pip install x)",
    ],
)
def test_other_texts_stay(text: str):
    assert addresses.without_secrets(text) == text and not addresses.has_secret(text)


def print_log(text: str) -> None:
    log.setup()
    logger = logging.getLogger("gpt2.test")
    logger.warning("cannot read '%s': no answer", text)
    try:
        raise OSError(text)
    except OSError:
        logger.exception("failed")


def print_error(text: str) -> None:
    def body() -> int:
        raise ConfigError(f"cannot open {text}")

    assert parse.guarded(body) == 2


def print_narrow_table(text: str) -> None:
    shown = table(f"Shards in {text}", "shards")
    shown.add_row(text)
    out = PlainConsole(width=20)
    out.print(shown)
    out.print(f"Data: {text}", soft_wrap=True)


@pytest.mark.parametrize("shown", [print_log, print_error, print_narrow_table])
@pytest.mark.parametrize("address", [address for address, _ in WITH_SECRETS])
def test_no_way_to_the_terminal_shows_it(shown: Callable[[str], None], address: str, capsys):
    shown(address)
    out, err = capsys.readouterr()
    assert "host" in out + err and "secret" not in out + err and "et@" not in out + err


def test_reasons_that_are_stored_have_none():
    error = ConfigError("cannot read ftp://me:secret@host/x")
    assert errors.described(error) == "cannot read ftp://…@host/x"
    assert errors.described(OSError("ftp://me:secret@host")) == "OSError: ftp://…@host"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_experiment_is_the_same_with_the_password_of_an_earlier_version():
    before = {"data_root": "ftp://me:secret@host/x", "seed": 1}
    assert results.value_differences(before, before | {"data_root": "ftp://…@host/x"}) == []
    (row,) = results.value_differences(before, before | {"data_root": "ftp://me:secret@other/x"})
    assert row == "data_root: ftp://…@host/x before, ftp://…@other/x now"


def test_options_of_results_have_no_password():
    run = options.overlay(RunConfig(), {"data_root": "ftp://me:secret@host/x"})
    assert training_job.result_options(run)["data_root"] == "ftp://…@host/x"
    assert "secret" not in best.command_of(run, Path("out"))


@pytest.mark.parametrize("before", ["", "@", "h://x?", "a" * 100_000 + " "])
@pytest.mark.parametrize("part", ["://", "a://b:c", "a://b:c ", "a://b c@", "a://u@", "?a=:1"])
def test_a_text_of_many_addresses_takes_no_longer_than_it_is_long(before: str, part: str):
    """With steps that grow as the square of the length, this would take minutes."""
    addresses.without_secrets(before + part * 20_000 + "@host")
    assert addresses.without_secrets(before + part * 20_000)
