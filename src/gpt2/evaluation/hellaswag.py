"""HellaSwag (Zellers et al. 2019): which of four endings continues a text?

A model chooses its likeliest ending, by the sum of the token losses (`acc`) or by their mean
(`acc_norm`), because a sum favours short endings. There are two styles of prompt:

- `completion`, of the replications of GPT-2: the text as it is, each ending after a space, and the
  mean over tokens, which are those of the model's tokenizer.
- `harness`, of EleutherAI's lm-evaluation-harness 0.4: the activity as a heading, without WikiHow's
  markup, and the mean over the characters of an ending: `acc_norm` compares across tokenizers.
"""

import contextlib
import gzip
import itertools
import json
import math
import os
import re
import socket
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import torch

from gpt2.base import atomic_files, json_fields, regular_file
from gpt2.base.errors import DataError
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.distributed.world import World
from gpt2.evaluation import choices
from gpt2.evaluation.baselines import PromptStyle
from gpt2.evaluation.choices import OtherWork, Question
from gpt2.model.base import LanguageModel

REPO = "Rowan/hellaswag"
FOLDER = Path("data/hellaswag")
NAMES = ("hellaswag_val.jsonl", "hellaswag_val.jsonl.gz")
OFFLINE_VARIABLES = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""each can forbid the hub's libraries to use the network"""
FIELDS = ("activity_label", "ctx", "ctx_a", "ctx_b", "endings", "label")


@dataclass(frozen=True)
class Task:
    """A text and four endings as token ids."""

    question: Question
    lengths: tuple[int, ...]
    """divisor of each ending's loss for `acc_norm`"""
    label: int
    """index of the right ending"""


@dataclass(frozen=True)
class Choice:
    """Indices of the endings that a model chose in one task, by sum and by mean."""

    by_sum: int
    by_mean: int


@dataclass(frozen=True)
class Score:
    """Shares of tasks for which the model chose the right ending."""

    acc: float
    acc_norm: float
    tasks: int

    def error(self, share: float) -> float:
        """Standard error of a share, from the sample variance of right and wrong."""
        return math.sqrt(share * (1 - share) / (self.tasks - 1)) if self.tasks > 1 else math.nan


def find(path: Path | None, folder: Path = FOLDER) -> Path | None:
    """The file of tasks: `path` if given, else the one in `folder`, else None."""
    if path is not None:
        return path
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def load(
    path: Path | None,
    limit: int | None = None,
    style: PromptStyle = "completion",
    folder: Path = FOLDER,
    tokenizer: Tokenizer = GPT2_TOKENIZER,
) -> list[Task]:
    """The first `limit` tasks of the validation split, or all of them.

    They are read from `path`, else from `folder`, else downloaded from the Hugging Face hub to
    `folder`. Raises DataError if they cannot be read or downloaded.
    """
    found = find(path, folder)
    items = _read(found) if found else _download(folder)
    tasks = [_task(item, style, tokenizer) for item in itertools.islice(items, limit)]
    if not tasks:
        raise DataError(
            f"{found} contains no HellaSwag tasks; choose another file with --hellaswag_path"
        )
    return tasks


def evaluate(
    model: LanguageModel,
    tasks: list[Task],
    world: World,
    autocast: torch.autocast,
    batch_tokens: int | None = None,
    stop: Callable[[], int] = lambda: 0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
    other_work: OtherWork | None = None,
    vocab_size: int = GPT2_TOKENIZER.vocab_size,
) -> Score | None:
    """How many of `tasks` the model gets right, the same on every rank.

    Returns None if `stop()` was not 0 on some rank before the end. The other options are those of
    `choices.ending_losses`.
    """
    questions = [task.question for task in tasks]
    losses = choices.ending_losses(
        model, questions, world, autocast, batch_tokens, stop, track, other_work, vocab_size
    )
    return None if losses is None else score(tasks, losses)


def score(tasks: list[Task], losses: list[list[float]]) -> Score:
    """The score that follows from `losses`, the summed loss of each ending of each task; NaN if a
    loss is NaN or infinite."""
    if not all(math.isfinite(loss) for of_task in losses for loss in of_task):
        return Score(math.nan, math.nan, len(tasks))
    chosen = [choose(task, of_task) for task, of_task in zip(tasks, losses, strict=True)]
    right = sum(choice.by_sum == task.label for choice, task in zip(chosen, tasks, strict=True))
    norm = sum(choice.by_mean == task.label for choice, task in zip(chosen, tasks, strict=True))
    return Score(right / len(tasks), norm / len(tasks), len(tasks))


def choose(task: Task, losses: list[float]) -> Choice:
    """The endings with the lowest sum and mean of `losses`; of equal ones, the first."""
    pairs = zip(losses, task.lengths, strict=True)
    # An ending of markup alone becomes empty in the harness, which never chooses it by the mean.
    means = [loss / length if length else math.inf for loss, length in pairs]
    return Choice(losses.index(min(losses)), means.index(min(means)))


def _task(item: dict[str, Any], style: PromptStyle, tokenizer: Tokenizer) -> Task:
    endings: list[str] = item["endings"]
    context: str = item["ctx"]
    if style == "harness":
        context = item["ctx_a"] + " " + item["ctx_b"].capitalize()
        context = _cleaned(item["activity_label"] + ": " + context)
        endings = [_cleaned(ending) for ending in endings]
    question = _question(context, endings, style, tokenizer)
    lengths = [len(ending) for ending in (question.endings if style == "completion" else endings)]
    return Task(question, tuple(lengths), int(item["label"]))


def _question(
    context: str, endings: list[str], style: PromptStyle, tokenizer: Tokenizer
) -> Question:
    if style == "completion":
        head = tuple(tokenizer.encode(context))
        tails = [tuple(tokenizer.encode(" " + ending)) for ending in endings]
        return Question(head, tuple(tails))
    # The harness encodes context and ending together and splits after the context's tokens.
    head = tuple(tokenizer.encode(context.rstrip()))
    wholes = [tuple(tokenizer.encode(f"{context} {ending}")) for ending in endings]
    # A tokenizer that merges over spaces may have no token for an ending alone.
    return Question(head, tuple(whole[len(head) :] or whole[-1:] for whole in wholes))


def _cleaned(text: str) -> str:
    """`text` without WikiHow's markup, as the harness removes it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The tasks in a `.jsonl` or `.jsonl.gz` file. Raises DataError, with the line, if one is
    invalid."""
    opener: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        regular_file.require(path)
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                item = json_fields.parse(line)
                _require_task(item)
                yield item
    except (OSError, EOFError, zlib.error, ValueError) as error:
        where = f"{path}, line {number}" if number else str(path)
        raise DataError(
            f"cannot read HellaSwag tasks from {where}: {error}; choose another file with "
            "--hellaswag_path"
        ) from error


def _require_task(item: Any) -> None:
    """Raises ValueError if `item` is not a task with a label."""
    if not isinstance(item, dict) or not item.keys() >= set(FIELDS):
        raise ValueError(f"expected an object with {', '.join(FIELDS)}")
    texts = [item[name] for name in FIELDS if name not in ("endings", "label")]
    endings = item["endings"] if isinstance(item["endings"], list) else []
    if len(endings) != 4 or not all(isinstance(text, str) for text in (*texts, *endings)):
        raise ValueError("expected a text and four endings")
    if not item["ctx"].strip() or not all(ending.strip() for ending in endings):
        raise ValueError("the text or an ending is empty")
    if str(item["label"]) not in ("0", "1", "2", "3"):
        raise ValueError(f"expected a label from 0 to 3, got {item['label']}")


def _download(folder: Path) -> Iterator[dict[str, Any]]:
    """The tasks from the hub, or from the cache of its library; also written to `folder`."""
    has_network = _has_network()
    try:
        # Without a network, the library's own retries take half a minute.
        with contextlib.nullcontext() if has_network else _offline():
            import datasets  # seconds to import

            rows = datasets.load_dataset(REPO, split="validation")
        items = [{name: row[name] for name in FIELDS} for row in rows]
    except Exception as error:  # the hub and the network can raise anything
        reason = f"{error!s:.100}"
        if isinstance(error, ConnectionError):  # its text names classes of the library
            reason = _unreachable(has_network)
        raise DataError(
            f"HellaSwag is not in {folder} and cannot be downloaded from the Hugging Face hub "
            f"({reason}); put {NAMES[0]} there, or name a file with --hellaswag_path"
        ) from error
    with contextlib.suppress(OSError):  # the next run downloads it again
        folder.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(
            folder / NAMES[0], "".join(json.dumps(item) + "\n" for item in items)
        )
    yield from items


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Within it, the hub's libraries are told to use their caches only. They read the variable when
    they are imported; it does not stay, as processes that are started later would inherit it."""
    is_set = "HF_HUB_OFFLINE" in os.environ
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        yield
    finally:
        if not is_set:
            del os.environ["HF_HUB_OFFLINE"]


def _unreachable(has_network: bool) -> str:
    """Why the hub cannot be reached."""
    if not has_network:
        return f"no network: {_hub_host()} is not found"
    # They read the variables when they are imported, and know which ones they obey.
    libraries = (sys.modules.get(name) for name in ("datasets.config", "huggingface_hub.constants"))
    if any(getattr(library, "HF_HUB_OFFLINE", False) for library in libraries):
        values = {name: os.environ.get(name, "").upper() for name in OFFLINE_VARIABLES}
        if names := [name for name, value in values.items() if value in ("1", "ON", "YES", "TRUE")]:
            return f"the environment variable {names[0]} forbids it"
        return "there was no network when this process first looked for it: start it again"
    return f"{_hub_host()} cannot be reached"


def _has_network() -> bool:
    """Whether the hub's host name resolves, or a proxy is set."""
    try:
        return bool(urllib.request.getproxies() or socket.getaddrinfo(_hub_host(), None))
    except OSError:
        return False


def _hub_host() -> str | None:
    return urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
