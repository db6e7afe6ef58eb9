import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # small models: threads of several processes only wait
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import settings

import foreign_shards
import support
from gpt2.base import log
from gpt2.data import prepare

settings.register_profile("any_machine", deadline=None)  # no test depends on the machine's speed
settings.load_profile("any_machine")


def pytest_collection_finish() -> None:
    """Collections of garbage leave out what is imported, and a run has nothing more to freeze."""
    gc.freeze()


@pytest.fixture(autouse=True)
def own_signing_key(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """Tests sign checkpoints with a key of their own, also in the processes that they start."""
    home = tmp_path_factory.getbasetemp() / "config_home"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))


@pytest.fixture(autouse=True)
def own_log_setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with the logging that Python has before `log.setup`: pytest's caplog sees
    every message. A command that a test runs in this process sets up logging for that test only."""
    monkeypatch.setenv(log.LEVEL_VARIABLE, "info")
    yield
    logger = logging.getLogger(log.ROOT)
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(scope="session")
def gpt2_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of GPT-2's tokens, with a manifest."""
    folder = tmp_path_factory.mktemp("data") / "small"
    prepare.prepare(support.SMALL_CORPUS, folder, workers=1)
    return folder


@pytest.fixture(scope="session")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with a vocabulary of a hundred characters, as nanoGPT writes it. Small runs on it take a
    third of the time: most of what they compute otherwise are logits of GPT-2's 50,257 tokens."""
    folder = tmp_path_factory.mktemp("characters")
    foreign_shards.nanogpt_characters(folder, support.small_text())
    return folder


@pytest.fixture(scope="session")
def data_root(gpt2_tokens: Path) -> Path:
    """The data of small runs; some folders of tests have `characters` instead."""
    return gpt2_tokens
