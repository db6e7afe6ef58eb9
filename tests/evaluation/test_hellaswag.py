import gzip
import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import own_tokens
from gpt2 import model
from gpt2.base.errors import DataError
from gpt2.config.model import ModelConfig
from gpt2.data import tokenizer
from gpt2.data.tokenizer import Gpt2Tokenizer
from gpt2.distributed import world
from gpt2.evaluation import choices, hellaswag
from gpt2.evaluation.baselines import PromptStyle
from gpt2.evaluation.choices import Question
from gpt2.evaluation.hellaswag import Choice, Score, Task


def item(activity: str, ctx_a: str, ctx_b: str, endings: list[str], label: str) -> dict[str, Any]:
    ctx = f"{ctx_a} {ctx_b}" if ctx_b else ctx_a
    texts = {"activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": ctx}
    return {"ind": 7, **texts, "endings": endings, "source_id": "own~1", "label": label}


ENDINGS = ["rests.", "folds the dough twice.", "eats a chair.", "is blue."]
ITEMS = [
    item("Baking bread", "A cook holds dough.", "then Anna", ENDINGS, "1"),
    item(
        "Home and Garden",
        "[header] How to water ferns [title] Use soft water. [step] Ferns dislike lime.",
        "",
        [
            "Rain is best. [title] Water at dawn. [step] Evenings are damp.",
            "[substeps] Boil it.  Let it cool.",
            "Add lime   and salt.",
            "Sell them [title]",
        ],
        "0",
    ),
    item("Making coffee", "He takes beans. [step]", "", ["He waits.", *ENDINGS[1:]], "0"),
    item("Barista", "She smiles", "", ["et sert un café ☕.", *ENDINGS[1:]], "0"),
    item("Sailing", "The wind turns", "", ["[step]", *ENDINGS[1:]], "2"),
    item("Knitting", "A hand pulls yarn.", "it", ENDINGS, "3"),
    item("Chess", "A pawn moves. [title] Think. [step] Wait.", "", ENDINGS, "1"),
    item("Running", "Two people run.", "one", ENDINGS, "2"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "tasks.jsonl", ITEMS)


def written(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def words(tokens: tuple[int, ...]) -> list[str]:
    return [tokenizer.decode([token]) for token in tokens]


def texts(task: Task) -> list[str]:
    question = task.question
    return [tokenizer.decode([*tokens]) for tokens in (question.context, *question.endings)]


def test_completion_keeps_the_texts_as_they_are(path: Path):
    tasks = hellaswag.load(path)
    assert [task.label for task in tasks] == [1, 0, 0, 0, 2, 3, 1, 2]
    first = tasks[0]
    assert words(first.question.context) == [
        *("A", " cook", " holds", " dough", ".", " then", " Anna")
    ]
    assert words(first.question.endings[1]) == [" folds", " the", " dough", " twice", "."]
    assert first.lengths == (2, 5, 4, 3)  # tokens
    assert texts(tasks[1]) == [
        "[header] How to water ferns [title] Use soft water. [step] Ferns dislike lime.",
        " Rain is best. [title] Water at dawn. [step] Evenings are damp.",
        " [substeps] Boil it.  Let it cool.",
        " Add lime   and salt.",
        " Sell them [title]",
    ]


def test_harness_cleans_the_texts(path: Path):
    tasks = hellaswag.load(path, style="harness")
    assert [task.label for task in tasks] == [1, 0, 0, 0, 2, 3, 1, 2]
    first = tasks[0]
    assert words(first.question.context) == [
        *("B", "aking", " bread", ":", " A", " cook", " holds", " dough", "."),
        *(" Then", " ann", "a"),  # str.capitalize makes the rest small
    ]
    assert words(first.question.endings[1]) == [" folds", " the", " dough", " twice", "."]
    assert first.lengths == (6, 22, 13, 8)  # characters, without the space before
    assert texts(tasks[1]) == [
        "Home and Garden: How to water ferns. Use soft water. Ferns dislike lime.",
        " Rain is best.. Water at dawn. Evenings are damp.",
        "  Boil it. Let it cool.",
        " Add lime  and salt.",  # three spaces become two
        " Sell them. ",
    ]
    assert tasks[1].lengths == (48, 22, 19, 11)


def test_harness_moves_spaces_at_the_end_of_a_text_to_the_endings(path: Path):
    question = hellaswag.load(path, style="harness")[2].question
    assert words(question.context) == ["Making", " coffee", ":", " He", " takes", " beans", "."]
    assert words(question.endings[0]) == [" ", " He", " waits", "."]


def test_harness_counts_characters_not_bytes(path: Path):
    task = hellaswag.load(path, style="harness")[3]
    assert task.lengths[0] == 18
    assert texts(task)[1] == " et sert un café ☕."


def test_an_ending_of_markup_alone_has_no_mean(path: Path):
    """The harness divides its log-likelihood by 0, which gives minus infinity."""
    task = hellaswag.load(path, style="harness")[4]
    assert task.lengths[0] == 0
    assert words(task.question.endings[0]) == [" "]
    assert hellaswag.choose(task, [1.0, 50.0, 40.0, 90.0]) == Choice(by_sum=0, by_mean=1)


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_the_texts_are_the_same_in_tokens_of_another_tokenizer(path: Path, style: PromptStyle):
    own = own_tokens.trained()
    tasks, in_own = (
        hellaswag.load(path, style=style),
        hellaswag.load(path, None, style, tokenizer=own),
    )
    for task, other in zip(tasks, in_own, strict=True):
        question = other.question
        assert all(question.endings)
        assert [own.decode(item) for item in (question.context, *question.endings)] == texts(task)
        assert other.label == task.label
        tokens = tuple(map(len, question.endings))
        assert other.lengths == (tokens if style == "completion" else task.lengths)


def test_no_ending_is_empty_where_a_token_spans_words(path: Path):
    class OneToken(Gpt2Tokenizer):
        def encode(self, text: str) -> list[int]:
            return [7]

    for task in hellaswag.load(path, style="harness", tokenizer=OneToken()):
        assert task.question.endings == ((7,),) * 4


def test_choices():
    task = Task(Question((1,), ((2,), (3, 4), (5,), (6,))), (1, 4, 1, 1), 1)
    assert hellaswag.choose(task, [3.0, 4.0, 5.0, 6.0]) == Choice(by_sum=0, by_mean=1)
    assert hellaswag.choose(task, [9.0, 36.0, 9.0, 9.0]) == Choice(by_sum=0, by_mean=0)  # the first


def test_score():
    tasks = [Task(Question((1,), ((2,),) * 4), (1, 4, 1, 1), label) for label in (0, 1, 1, 3)]
    score = hellaswag.score(tasks, [[3.0, 4.0, 5.0, 6.0]] * 4)
    assert score == Score(acc=0.25, acc_norm=0.5, tasks=4)
    assert score.error(score.acc_norm) == pytest.approx(math.sqrt(1 / 3) / 2)  # of 0, 1, 1, 0
    assert math.isnan(Score(1.0, 1.0, 1).error(1.0))


def test_evaluate(path: Path, monkeypatch: pytest.MonkeyPatch):
    tasks = hellaswag.load(path)
    net = model.build(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    alone = world.World(0, 1, torch.device("cpu"))
    full = torch.autocast("cpu", enabled=False)
    losses = choices.ending_losses(net, [task.question for task in tasks], alone, full)
    assert losses is not None
    assert hellaswag.evaluate(net, tasks, alone, full) == hellaswag.score(tasks, losses)
    assert hellaswag.evaluate(net, tasks, alone, full, stop=lambda: 15) is None


def test_no_line_after_the_limit_is_read(path: Path):
    with path.open("a") as file:
        file.write("{broken\n")
    assert len(hellaswag.load(path, 3)) == 3
    assert len(hellaswag.load(path, 8)) == 8


def test_compressed(path: Path, tmp_path: Path):
    compressed = tmp_path / "tasks.jsonl.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert hellaswag.load(compressed) == hellaswag.load(path)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ITEMS[0].items() if key != name}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            without("ctx_b"),
            "expected an object with activity_label, ctx, ctx_a, ctx_b, endings, label",
        ),
        ([1, 2], "expected an object with"),
        (ITEMS[0] | {"label": "4"}, "expected a label from 0 to 3, got 4"),
        (ITEMS[0] | {"label": ""}, "expected a label from 0 to 3, got "),  # of the test split
        (ITEMS[0] | {"endings": ENDINGS[:3]}, "expected a text and four endings"),
        (ITEMS[0] | {"endings": 4}, "expected a text and four endings"),
        (ITEMS[0] | {"endings": "four"}, "expected a text and four endings"),
        (ITEMS[0] | {"ctx_a": None}, "expected a text and four endings"),
        (ITEMS[0] | {"endings": [*ENDINGS[:3], " "]}, "the text or an ending is empty"),
        (ITEMS[0] | {"ctx": ""}, "the text or an ending is empty"),
    ],
)
def test_an_invalid_task_is_reported_with_its_line(tmp_path: Path, bad: Any, message: str):
    path = written(tmp_path / "bad.jsonl", [ITEMS[0], bad])
    assert f"{path}, line 2: {message}" in refusal(path)


def test_bad_files(path: Path, tmp_path: Path):
    text = path.read_bytes()
    (broken := tmp_path / "broken.jsonl").write_bytes(text[:-20])
    assert f"{broken}, line 8: " in refusal(broken)
    (latin := tmp_path / "latin.jsonl").write_bytes(b'{"ctx": "caf\xe9"}\n')
    assert "can't decode" in refusal(latin)
    (plain := tmp_path / "plain.gz").write_bytes(text)
    assert f"{plain}: Not a gzipped file" in refusal(plain)
    (short := tmp_path / "short.gz").write_bytes(gzip.compress(text)[:-30])
    assert "Compressed file ended" in refusal(short)
    (empty := tmp_path / "empty.jsonl").touch()
    assert f"{empty} contains no HellaSwag tasks" in refusal(empty)
    assert "No such file" in refusal(tmp_path / "missing.jsonl")
    assert "Is a directory" in refusal(tmp_path)


def refusal(path: Path) -> str:
    """The error message for a file, one line."""
    with pytest.raises(DataError) as raised:
        hellaswag.load(path)
    message = str(raised.value)
    assert "\n" not in message
    assert "--hellaswag_path" in message
    return message


def test_find(path: Path, tmp_path: Path):
    assert hellaswag.find(path, tmp_path) == path
    assert hellaswag.find(None, tmp_path) is None
    compressed = tmp_path / "hellaswag_val.jsonl.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert hellaswag.find(None, tmp_path) == compressed
    assert len(hellaswag.load(None, folder=tmp_path)) == 8
    plain = written(tmp_path / "hellaswag_val.jsonl", ITEMS[:2])
    assert hellaswag.find(None, tmp_path) == plain


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the `datasets` library reads in place of the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(hellaswag, "REPO", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def test_the_tasks_are_downloaded_once(hub: Path, path: Path, tmp_path: Path):
    written(hub / "train.jsonl", ITEMS[:2])
    validation = written(hub / "validation.jsonl", ITEMS)
    folder = tmp_path / "data" / "hellaswag"
    tasks = hellaswag.load(None, style="harness", folder=folder)
    assert tasks == hellaswag.load(path, style="harness")
    kept = folder / "hellaswag_val.jsonl"
    assert [*folder.iterdir()] == [kept]
    assert json.loads(kept.read_text().splitlines()[3])["endings"][0] == "et sert un café ☕."
    validation.unlink()
    assert hellaswag.load(None, style="harness", folder=folder) == tasks


def test_another_data_set_on_the_hub(hub: Path, tmp_path: Path):
    written(hub / "train.jsonl", ITEMS)
    with pytest.raises(DataError, match="Unknown split") as raised:
        hellaswag.load(None, folder=tmp_path / "kept")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "kept").exists()


def fail(host: str, *_: object) -> None:
    raise socket.gaierror(-2, f"no address of {host}")


def find(*_: object) -> list[str]:
    return ["address"]


@pytest.mark.parametrize(
    ("given", "look_up", "is_offline", "set_to", "reason"),
    [
        ("", fail, False, "1", "no network: huggingface.co is not found"),
        ("HF_HUB_OFFLINE=1", fail, True, "1", "no network: huggingface.co is not found"),
        ("HF_HUB_OFFLINE=1", find, True, "1", "the environment variable HF_HUB_OFFLINE forbids it"),
        ("HF_HUB_OFFLINE=0", find, False, "0", "huggingface.co cannot be reached"),
        (
            "HF_DATASETS_OFFLINE=on",
            find,
            True,
            None,
            "the environment variable HF_DATASETS_OFFLINE forbids it",
        ),
        (
            "TRANSFORMERS_OFFLINE=1",
            find,
            True,
            None,
            "the environment variable TRANSFORMERS_OFFLINE forbids it",
        ),
        (
            "",
            find,
            True,
            None,
            "there was no network when this process first looked for it: start it again",
        ),
        ("", find, False, None, "huggingface.co cannot be reached"),
    ],
)
def test_why_the_hub_cannot_be_reached(
    given, look_up, is_offline, set_to, reason, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """If the host name does not resolve, the library looks into its cache only: otherwise it would
    retry for half a minute. What its text calls the reason is a class, so that is not shown. A
    variable is only blamed if the user set it and the library obeys it."""
    seen = []

    def load(*_: object, **__: object) -> None:
        seen.append(os.environ.get("HF_HUB_OFFLINE"))
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", is_offline)
    for name in hellaswag.OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(*given.split("="))
    before = dict(os.environ)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError) as raised:
        hellaswag.load(None, folder=tmp_path)
    assert str(raised.value) == (
        f"HellaSwag is not in {tmp_path} and cannot be downloaded from the Hugging Face hub "
        f"({reason}); put hellaswag_val.jsonl there, or name a file with --hellaswag_path"
    )
    assert seen == [set_to]
    assert dict(os.environ) == before  # processes that are started later inherit it
