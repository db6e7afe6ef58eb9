import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.base.errors import CheckpointError, ConfigError, FolderInUse
from gpt2.experiments import results
from gpt2.experiments.results import ExperimentDescription, JobResult

ABOUT = ExperimentDescription("seeds", {"target": "a:b", "grid": "rate"}, total=3)


def test_results_outlive_their_owner(tmp_path: Path):
    with results.opened(tmp_path, ABOUT) as first:
        first.add(JobResult("a", "finished", {"seed": 0}, {"loss": 1.5}))
        first.add(JobResult("b", "failed", {"seed": 1}, reason="why", traceback="where"))
        first.add(JobResult("c", "pruned", {"seed": 2}))
        first.save(metric="loss")
    with results.opened(tmp_path, ABOUT) as second:
        assert [second.is_done(job) for job in "abcd"] == [True, False, True, False]
        assert second.results["a"].result == {"loss": 1.5}
        second.add(JobResult("b", "finished", {"seed": 1}, {"loss": 1.0}))
        assert second.is_done("b")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["metric"] == "loss" and content["kind"] == "seeds"
    assert [row["job"] for row in content["results"]] == ["a", "b", "c"]


def test_an_option_that_is_not_named_has_the_value_of_earlier_versions():
    before = {"cautious_decay": True, "layer_skip": True, "seed": 1}
    assert results.value_differences(before, {"seed": 1}) == [
        "cautious_decay: True before, False now",
        "layer_skip: True before, False now",
    ]
    assert results.value_differences({"momentum_warmup": 0}, {"rate": 1}) == [
        "rate: None before, 1 now"
    ]


def test_files_are_strict_json(tmp_path: Path):
    """Also with a line of an earlier version, which wrote NaN."""
    old = '{"job": "old", "state": "finished", "values": {"x": NaN}, "result": -Infinity}\n'
    (tmp_path / results.RESULT_LINES_FILE).write_text(old)
    with results.opened(tmp_path, ABOUT) as store:
        result = {"value": float("nan"), "large": 10**400, "half": np.float32(0.5)}
        store.add(JobResult("new", "finished", {"x": 10**400}, result))
        assert store.results["new"].result == {"value": None, "large": None, "half": 0.5}
        store.save(metric="loss", mean=float("inf"))
    lines = (tmp_path / results.RESULT_LINES_FILE).read_text().splitlines()[1:]
    content = (tmp_path / results.RESULTS_FILE).read_text()
    for text in (*lines, content):
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    rows = json.loads(content)["results"]
    assert [row["result"] for row in rows] == [None, result | {"value": None, "large": None}]


def test_unknown_fields_of_a_later_version_lose_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, logger="gpt2")
    with results.opened(tmp_path, ABOUT) as first:
        for job in "ab":
            first.add(JobResult(job, "finished", {}, {"loss": 1.5}))
    lines = tmp_path / results.RESULT_LINES_FILE
    later = [json.loads(line) | {"energy_j": 3.5} for line in lines.read_text().splitlines()]
    lines.write_text("".join(json.dumps(line) + "\n" for line in later))
    description = tmp_path / results.EXPERIMENT_FILE
    description.write_text(json.dumps(json.loads(description.read_text()) | {"owner": "me"}))
    with results.opened(tmp_path, ABOUT) as second:
        assert second.is_done("a") and second.is_done("b")
        assert second.results["a"].result == {"loss": 1.5}
        second.add(JobResult("c", "finished", {}))
    assert len([text for text in caplog.messages if "energy_j" in text]) == 1, "not once per line"
    assert [json.loads(line) for line in lines.read_text().splitlines()[:2]] == later
    assert json.loads(description.read_text())["owner"] == "me"


@pytest.mark.parametrize("damaged", ["nothing", "[1]", '{"state": "finished"}'])
def test_a_damaged_line_costs_its_job_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str
):
    caplog.set_level(logging.WARNING, logger="gpt2")
    with results.opened(tmp_path, ABOUT) as first:
        for job in "ab":
            first.add(JobResult(job, "finished", {}))
    lines = tmp_path / results.RESULT_LINES_FILE
    a, b = lines.read_text().splitlines()
    lines.write_text(f"{a}\n{damaged}\n{b}\n")
    assert [result.job for result in results.read_results(tmp_path)] == ["a", "b"]
    assert "results.jsonl, line 2 is damaged" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "seeds"}'])
def test_a_damaged_description_is_an_error(tmp_path: Path, content: str):
    with results.opened(tmp_path, ABOUT):
        pass
    (tmp_path / results.EXPERIMENT_FILE).write_text(content)
    refused = pytest.raises(CheckpointError, match=r"cannot read .*experiment\.json: .*; repair it")
    with refused, results.opened(tmp_path, ABOUT):
        pass
    assert (tmp_path / results.EXPERIMENT_FILE).read_text() == content


def test_torn_line_is_cut_before_the_next_one(tmp_path: Path):
    with results.opened(tmp_path, ABOUT) as first:
        first.add(JobResult("a", "finished", {}))
    with (tmp_path / results.RESULT_LINES_FILE).open("a") as file:
        file.write('{"job": "b", "sta')
    with results.opened(tmp_path, ABOUT) as second:
        assert set(second.results) == {"a"}
        second.add(JobResult("c", "finished", {}))
    assert [record.job for record in results.read_results(tmp_path)] == ["a", "c"]


def test_results_that_were_never_written_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(_handle: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(CheckpointError, match=r"cannot write 1 result to .*results\.jsonl: .*space"),
        monkeypatch.context() as patch,
        results.opened(tmp_path, ABOUT) as book,
    ):
        patch.setattr(os, "write", fail)
        book.add(JobResult("a", "finished", {}))


def test_full_disk_loses_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, room = os.write, 0

    def write(handle: int, data: bytes) -> int:
        if not room:
            real(handle, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    with results.opened(tmp_path, ABOUT) as book:
        monkeypatch.setattr(os, "write", write)
        book.add(JobResult("a", "finished", {}))
        book.add(JobResult("b", "finished", {}))
        assert book.is_done("a")
        room = 1
        book.add(JobResult("c", "finished", {}))
    assert [record.job for record in results.read_results(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["step_000002.pt", "status.json"])
def test_a_folder_with_a_training_is_refused(tmp_path: Path, name: str):
    """Unless the experiment was there before, or the training is in a folder below."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).touch()
    with results.opened(tmp_path, ABOUT):
        (tmp_path / name).touch()
    with results.opened(tmp_path, ABOUT):
        pass
    (tmp_path / results.EXPERIMENT_FILE).unlink()
    expected = rf"holds a training \({name}\); keep this .* elsewhere with --checkpoint_dir OTHER$"
    with pytest.raises(ConfigError, match=expected), results.opened(tmp_path, ABOUT):
        pass
    assert not (tmp_path / results.EXPERIMENT_FILE).exists()


def test_second_owner_is_refused_by_name(tmp_path: Path):
    program = (
        "import sys, pathlib\nfrom gpt2.experiments.results import ExperimentDescription, opened\n"
        "with opened(pathlib.Path(sys.argv[1]), ExperimentDescription('seeds', {}, 1)):\n"
        "    print('mine', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"mine\n"
        refused = pytest.raises(FolderInUse, match=rf"another experiment.*process {owner.pid} ")
        with refused, results.opened(tmp_path, ABOUT):
            pass
        owner.kill()
        owner.wait()
    with (
        pytest.raises(ConfigError, match="target: None before, a:b now"),
        results.opened(tmp_path, ABOUT),
    ):
        pass
