"""HellaSwag (Zellers et al. 2019): which of four endings goes on with a text?

A model chooses the ending that it finds likeliest: by the sum over its tokens (`acc`), or by the
mean (`acc_norm`), because a sum favours short endings. Two styles of text are in use:

- `completion`, of the replications of GPT-2: the text as it is, each ending after a space, and the
  mean over tokens.
- `harness`, of EleutherAI's lm-evaluation-harness 0.4: the activity as a heading, marks of WikiHow
  taken out, and the mean over the characters of an ending.
"""

import contextlib
import gzip
import itertools
import json
import math
import os
import re
import socket
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import torch

from gpt2.base import atomic_files
from gpt2.base.errors import DataError
from gpt2.data import tokenizer
from gpt2.distributed.world import World
from gpt2.evaluation import choices
from gpt2.evaluation.baselines import Style
from gpt2.evaluation.choices import Question
from gpt2.model.base import LanguageModel

REPO = "Rowan/hellaswag"
FOLDER = Path("data/hellaswag")
NAMES = ("hellaswag_val.jsonl", "hellaswag_val.jsonl.gz")
FIELDS = ("activity_label", "ctx", "ctx_a", "ctx_b", "endings", "label")


@dataclass(frozen=True)
class Task:
    """A text and four endings as token ids."""

    question: Question
    lengths: tuple[int, ...]
    """by which the loss of each ending is divided"""
    label: int
    """the ending that is right"""


@dataclass(frozen=True)
class Choice:
    """What a model chose in one task: by the sum, and by the mean."""

    by_sum: int
    by_mean: int


@dataclass(frozen=True)
class Score:
    """Shares of tasks that a model got right."""

    acc: float
    acc_norm: float
    tasks: int

    def error(self, share: float) -> float:
        """Standard error of a share, from the sample variance of right and wrong."""
        return math.sqrt(share * (1 - share) / (self.tasks - 1)) if self.tasks > 1 else math.nan


def find(path: Path | None, folder: Path = FOLDER) -> Path | None:
    """The file of tasks: `path` if it is given, else one that lies in `folder`."""
    if path is not None:
        return path
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def load(
    path: Path | None,
    limit: int | None = None,
    style: Style = "completion",
    folder: Path = FOLDER,
) -> list[Task]:
    """The first `limit` tasks of the validation split, or all of them.

    They come from `path`, or else from `folder`, where the data set from the Hugging Face hub is
    kept once it is loaded. Raises DataError if they cannot be had.
    """
    found = find(path, folder)
    items = _read(found) if found else _download(folder)
    tasks = [_task(item, style) for item in itertools.islice(items, limit)]
    if not tasks:
        raise DataError(f"{found} holds no HellaSwag tasks; choose another with --hellaswag_path")
    return tasks


def evaluate(
    model: LanguageModel,
    tasks: list[Task],
    world: World,
    autocast: torch.autocast,
    batch_tokens: int = choices.BATCH_TOKENS,
    stop: Callable[[], int] = lambda: 0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Score | None:
    """How many of `tasks` the model gets right, the same on every rank.

    None if `stop()` was not 0 on some rank before the end; `track` sees the rounds go by.
    """
    questions = [task.question for task in tasks]
    losses = choices.ending_losses(model, questions, world, autocast, batch_tokens, stop, track)
    return None if losses is None else score(tasks, losses)


def score(tasks: list[Task], losses: list[list[float]]) -> Score:
    """The score of choices by `losses`, the summed loss of each ending of each task; NaN if some of
    them are no finite numbers."""
    if not all(math.isfinite(loss) for of_task in losses for loss in of_task):
        return Score(math.nan, math.nan, len(tasks))
    chosen = [choose(task, of_task) for task, of_task in zip(tasks, losses, strict=True)]
    right = sum(choice.by_sum == task.label for choice, task in zip(chosen, tasks, strict=True))
    norm = sum(choice.by_mean == task.label for choice, task in zip(chosen, tasks, strict=True))
    return Score(right / len(tasks), norm / len(tasks), len(tasks))


def choose(task: Task, losses: list[float]) -> Choice:
    """The likeliest ending, the first of several that are alike."""
    pairs = zip(losses, task.lengths, strict=True)
    # The harness cuts an ending of marks alone down to nothing, and never chooses it by the mean.
    means = [loss / length if length else math.inf for loss, length in pairs]
    return Choice(losses.index(min(losses)), means.index(min(means)))


def _task(item: dict[str, Any], style: Style) -> Task:
    endings: list[str] = item["endings"]
    context: str = item["ctx"]
    if style == "harness":
        context = item["ctx_a"] + " " + item["ctx_b"].capitalize()
        context = _cleaned(item["activity_label"] + ": " + context)
        endings = [_cleaned(ending) for ending in endings]
    question = _question(context, endings, style)
    lengths = [len(ending) for ending in (question.endings if style == "completion" else endings)]
    return Task(question, tuple(lengths), int(item["label"]))


def _question(context: str, endings: list[str], style: Style) -> Question:
    if style == "completion":
        head = tuple(tokenizer.encode(context))
        tails = [tuple(tokenizer.encode(" " + ending)) for ending in endings]
        return Question(head, tuple(tails))
    # The harness encodes text and ending in one piece and cuts after the tokens of the text.
    head = tuple(tokenizer.encode(context.rstrip()))
    wholes = [tuple(tokenizer.encode(f"{context} {ending}")) for ending in endings]
    return Question(head, tuple(whole[len(head) :] for whole in wholes))


def _cleaned(text: str) -> str:
    """Without the marks of WikiHow, as the harness does it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The tasks of a `.jsonl` or `.jsonl.gz`, each of them checked."""
    opener: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                item = json.loads(line)
                _require_task(item)
                yield item
    except (OSError, EOFError, zlib.error, ValueError) as error:
        where = f"{path}, line {number}" if number else str(path)
        raise DataError(
            f"cannot read HellaSwag's tasks from {where}: {error}; --hellaswag_path names "
            "another file"
        ) from error


def _require_task(item: Any) -> None:
    """Raises ValueError if it is no task with a right answer."""
    if not isinstance(item, dict) or not item.keys() >= set(FIELDS):
        raise ValueError(f"not a task with {', '.join(FIELDS)}")
    texts = [item[name] for name in FIELDS if name not in ("endings", "label")]
    endings = item["endings"] if isinstance(item["endings"], list) else []
    if len(endings) != 4 or not all(isinstance(text, str) for text in (*texts, *endings)):
        raise ValueError("not a text and four endings")
    if not item["ctx"].strip() or not all(ending.strip() for ending in endings):
        raise ValueError("its text or an ending is empty")
    if str(item["label"]) not in ("0", "1", "2", "3"):
        raise ValueError(f"label {item['label']} is none of 0 to 3")


def _download(folder: Path) -> Iterator[dict[str, Any]]:
    """The data set from the hub, or from its library's own copy; from then on in `folder`."""
    try:
        if not _has_network():  # the library's own tries would take half a minute
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import datasets  # seconds to import

        rows = datasets.load_dataset(REPO, split="validation")
        items = [{name: row[name] for name in FIELDS} for row in rows]
    except Exception as error:  # the hub and the network can raise anything
        raise DataError(
            f"HellaSwag is not in {folder} and cannot be loaded from the Hugging Face hub "
            f"({error!s:.100}); put {NAMES[0]} there, or name it with --hellaswag_path"
        ) from error
    with contextlib.suppress(OSError):  # it is loaded again the next time
        folder.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(
            folder / NAMES[0], "".join(json.dumps(item) + "\n" for item in items)
        )
    yield from items


def _has_network() -> bool:
    """Whether the hub's name is known, or a proxy knows it."""
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(urllib.request.getproxies() or socket.getaddrinfo(host, None))
    except OSError:
        return False
