"""The study of a search: its owner, other studies, an unreachable database, other writers."""

import json
import os
import random
import shutil
import socket
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

import mutations
from experiments.search.played import SLOT, Played, trial_of
from gpt2.base.errors import ConfigError, TrainingError
from gpt2.experiments.pool.job import Event, Job
from gpt2.experiments.search import study, trial_report, trial_source


def trained(played: Played, job: Job) -> Path:
    """The folder of a trial that has started, with a checkpoint."""
    folder = Path(job.kwargs["run"]["checkpoint"]["checkpoint_dir"])
    folder.mkdir()
    (folder / "step_000010.json").write_text("")
    return folder


def shared(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/shared.db"


@pytest.mark.parametrize("how", ["deleted", "name", "storage"])
def test_trials_of_another_study_are_never_continued(tmp_path: Path, how: str):
    folder = tmp_path / "search"
    played = Played(folder)
    trained(played, played.next())
    options: dict[str, Any] = {
        "name": {"study_name": "b"},
        "storage": {"storage": shared(tmp_path)},
    }
    if how == "deleted":
        (folder / study.FILE).unlink()
    with pytest.raises(ConfigError, match=r"trial_000 .*; trials of this study would continue"):
        Played(folder, **options.get(how, {}))
    if how != "deleted":
        assert Played(folder).next().name == "trial_000", "its own study goes on"


def test_a_database_with_flipped_bits_is_read_or_a_line(tmp_path: Path):
    played = Played(tmp_path / "search")
    played.finishes(played.next(), 3.0, 2.0)
    played.tell(played.next(), "failed", reason="out of disk space")
    played.heartbeat.end()
    database = tmp_path / "search" / study.FILE
    content = database.read_bytes()
    used = [place for place, byte in enumerate(content) if byte]

    def mutate(rng: random.Random) -> bytes:
        place = rng.choice(used)
        flipped = content[place] ^ 1 << rng.randrange(8)
        return content[:place] + bytes([flipped]) + content[place + 1 :]

    refused = 0
    for damaged in mutations.each(mutate):
        database.write_bytes(damaged)
        try:
            again = Played(tmp_path / "search")
        except ConfigError:
            refused += 1
        else:
            again.source.catch_up()
            trial_report.best_first(again.study.get_trials())
    assert refused


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, Path.touch])
def test_something_else_in_place_of_the_database(tmp_path: Path, make):
    make(tmp_path / study.FILE)
    if make is Path.touch:
        (tmp_path / study.FILE).write_text("no database" * 99)
    with pytest.raises(ConfigError, match=r"cannot read the study in .*; if it is damaged"):
        Played(tmp_path)


def test_results_of_another_study_do_not_count(tmp_path: Path):
    played = Played(tmp_path / "search")
    played.tell(played.next(), "failed", reason="out of disk space")
    (tmp_path / "search" / study.FILE).unlink()
    with pytest.raises(ConfigError, match=r"not in the study search in .*trial_000"):
        Played(tmp_path / "search")


def test_a_folder_that_went_to_another_study_before_its_first_trial(tmp_path: Path):
    folder = tmp_path / "search"
    Played(folder, storage=shared(tmp_path)).next()  # killed before the training began
    other = Played(folder, storage=shared(tmp_path), study_name="b")
    trained(other, other.next())
    with pytest.raises(ConfigError, match="trial_000"):
        Played(folder, storage=shared(tmp_path))


def test_a_new_trial_never_uses_an_old_folder(tmp_path: Path):
    """The folder appears during the search."""
    played = Played(tmp_path / "search")
    (tmp_path / "search" / "trial_000").mkdir()
    (tmp_path / "search" / "trial_000" / "latest.pt").write_text("")
    assert played.next().name == "trial_001"
    assert "exists and is not of this trial" in played.store.results["trial_000"].reason


def test_a_renamed_machine_and_a_moved_folder_keep_their_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    played = Played(tmp_path / "here", storage=shared(tmp_path))
    job = played.next()
    trained(played, job)
    played.heartbeat.end()
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
    (tmp_path / "here").rename(tmp_path / "there")
    again = Played(tmp_path / "there", storage=shared(tmp_path))
    assert again.next().name == job.name
    for folder, host in (("there", ""), ("nowhere", "renamed:")):
        found = study.location_of(again.study, trial_of(again.study, job), tmp_path / folder)
        assert found == f"{host}{tmp_path}/there/trial_000"


class BreakableStorage:
    """The storage of a study, with failures as of a lost connection."""

    def __init__(self, played: Played) -> None:
        self._storage = played.study._storage
        played.study._storage = self  # type: ignore[assignment]
        self.failures = 0
        self.calls = 0
        self.lost_reply = 0
        """the call that takes effect, but whose reply is lost"""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            cause = OperationalError("SELECT 1", {}, Exception("server closed the connection"))
            if self.failures:
                self.failures -= 1
                raise StorageInternalError("commit") from cause
            result = found(*args, **kwargs)
            if self.calls == self.lost_reply:
                raise StorageInternalError("commit") from cause
            return result

        return call


def test_an_unreachable_database_is_retried(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    played = Played(tmp_path / "search", n_trials=2)
    played.source.pauses_s = (0.001,) * 4
    storage = BreakableStorage(played)
    for number in range(2):
        storage.failures = 3
        job = played.next()
        for step in (10, 20):
            storage.failures = 2
            metrics = {"step": step, "val_loss": 9.0 - step, "total_steps": 500}
            assert played.tell(job, "reported", metrics=metrics) == "go"
        storage.failures = 4
        played.tell(job, "finished", result={})
        assert played.source.done == number + 1
    assert played.states == ["COMPLETE", "COMPLETE"], "no call took effect twice"
    assert "server closed the connection; next attempt in 0.001s" in caplog.messages[0]


def outcome_with_lost_reply(folder: Path, number: int) -> tuple[int, Any]:
    """A search that loses the reply to a call of its storage: all calls, and what it leaves."""
    played = Played(folder, startup_trials=1, patience=2)
    played.source.pauses_s = (0.001,)
    storage = BreakableStorage(played)
    storage.lost_reply = number
    first, second = played.next(), played.next()
    answers = []
    for job, *losses in ((first, 9.0, 5.0), (second, 9.5)):
        for step, loss in enumerate(losses, start=1):
            metrics = {"step": 10 * step, "val_loss": loss}
            answers.append(played.tell(job, "reported", metrics=metrics))
        played.tell(job, "finished" if job is first else "pruned", result={"tokens": 5})
    played.tell(played.next(), "failed", reason="out of disk space")
    calls, played.study._storage = storage.calls, storage._storage
    trials = [(item.state, item.value) for item in played.study.get_trials()]
    lines = (folder / "results.jsonl").read_text().splitlines()
    stored = [[json.loads(line)[key] for key in ("job", "state", "result")] for line in lines]
    return calls, (answers, trials, stored, played.source.failed_in_a_row)


def test_what_is_begun_when_the_connection_is_lost_is_done_once(tmp_path: Path):
    calls, expected = outcome_with_lost_reply(tmp_path / "0", 0)
    for number in range(1, calls + 1, 12):
        assert outcome_with_lost_reply(tmp_path / str(number), number)[1] == expected


def test_a_long_outage_ends_the_search_and_a_stop_ends_retrying(tmp_path: Path):
    played = Played(tmp_path / "search")
    job = played.next()
    storage, metrics = BreakableStorage(played), {"step": 10, "val_loss": 9.0}
    storage.failures = 10**9
    for pause_s, is_stopping in ((0.001, False), (60.0, True)):
        played.source.pauses_s = (pause_s,) * 3
        played.source.is_stopping = lambda stops=is_stopping: stops
        with pytest.raises(
            TrainingError, match=r"server closed .*; run the same command to continue"
        ):
            played.tell(job, "reported", metrics=metrics)


def test_a_trial_that_another_process_ends_in_the_study_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    played = Played(tmp_path / "search", n_trials=2)
    first, second = played.next(), played.next()
    played.validates(first, 9.0)
    played.study.tell(0, state=TrialState.FAIL)
    assert played.validates(first, 8.0, 7.0) == ["prune", "prune"]
    event = Event("pruned", SLOT, first, result={})
    played.source.event(event)
    assert played.source.as_in_study(event).kind == "failed"
    played.study.tell(1, 3.0)
    played.tell(second, "finished", result={})
    assert caplog.messages == [
        f"trial_00{n} was ended in the study by another process" for n in range(2)
    ]
    records = played.store.results
    assert records["trial_000"].state == "failed" and records["trial_001"].state == "finished"
    assert played.next().name == "trial_002", "the failed one is replaced"


def test_a_deleted_study_ends_the_search_with_a_message(tmp_path: Path):
    played = Played(tmp_path / "search")
    job = played.next()
    optuna.delete_study(study_name="search", storage=study.url(tmp_path / "search"))
    with pytest.raises(
        TrainingError, match=r"cannot read or write the study: .Record does not exist"
    ):
        played.tell(job, "reported", metrics={"step": 10, "val_loss": 9.0})


def test_an_enqueued_trial_with_invalid_values_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    played = Played(tmp_path / "search", n_trials=1)
    for _ in range(trial_source.MAX_FAILURES):
        played.study.enqueue_trial({"learning_rate": -1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert played.next().name == f"trial_{trial_source.MAX_FAILURES:03d}", (
            "others are not to blame"
        )
    assert caplog.messages[0].startswith("trial_000 failed: invalid values: ")
    assert played.store.results["trial_000"].state == "failed"
    assert Played(tmp_path / "search", n_trials=1).next().name == "trial_005"


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_second_owner_is_refused(tmp_path: Path, is_copy: bool):
    """Also in a copy of the owner's folder, which has its id."""
    clock, first, second = Clock(), tmp_path / "first", tmp_path / "second"
    one = Played(first, clock, storage=shared(tmp_path))
    one.next()
    if is_copy:
        shutil.copytree(first, second)
    clock.now += 50
    one.source.event(Event("waiting", SLOT))
    clock.now += 40
    with pytest.raises(ConfigError) as refused:
        Played(second, clock, storage=shared(tmp_path))
    owner = study.last_beat(one.study).owner
    assert owner.startswith(f"process {os.getpid()} on {socket.gethostname()}:{first}, since ")
    assert str(refused.value) == (
        f"another search runs the study search: {owner}; stop it, use another --study_name, or run "
        "one search on several machines with --engine ray; if it was killed, this command takes "
        "over in 20s"
    )
    Played(second.with_name("third"), clock, storage=shared(tmp_path), study_name="b")
    one.heartbeat.end()
    Played(second, clock, storage=shared(tmp_path))


def test_a_dead_owner_is_replaced_and_its_trials_continue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The first owner only hung: it notices, and leaves the study to the second one."""
    clock = Clock()
    one = Played(tmp_path / "one", clock, storage=shared(tmp_path))
    job = one.next()
    one.validates(job, 9.0)
    clock.now += 61
    two = Played(tmp_path / "two", clock, storage=shared(tmp_path))
    first = f"process {os.getpid()} on {socket.gethostname()}:{tmp_path}/one, since "
    assert [item.partition(first)[0] for item in caplog.messages] == [
        "took over the study search, which has had no heartbeat for 61s from "
    ]
    again = two.next()
    assert again.name == job.name and again.kwargs["parameters"] == job.kwargs["parameters"]
    folder = study.location_of(two.study, trial_of(two.study, job), tmp_path / "two")
    assert folder == f"{tmp_path}/two/trial_000"
    with pytest.raises(TrainingError, match=r"search was taken over by process .*/two, since"):
        one.source.event(Event("waiting", SLOT))
    one.heartbeat.end()
    two.finishes(again, 9.0, 5.0)
    assert two.next().name == "trial_001"
    two.heartbeat.end()
    back = Played(tmp_path / "one", clock, storage=shared(tmp_path))
    back.source.catch_up()
    assert back.store.results["trial_000"].result == {"val_loss": 5.0, "tokens": 5}
    assert back.next().name == "trial_001"


def test_a_killed_owner_is_replaced_at_once_in_its_own_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Its folder's lock shows that it has ended."""
    job = Played(tmp_path / "search").next()
    assert Played(tmp_path / "search").next().name == job.name
    assert not caplog.messages


def test_heartbeats_do_not_change_the_values_of_trials(tmp_path: Path):
    drawn = []
    for seconds in (0, 20):
        clock = Clock()
        played = Played(tmp_path / str(seconds), clock, n_trials=12, prune=False)
        for number in range(12):
            clock.now += seconds
            played.finishes(played.next(), 5.0 + number % 3)
        drawn.append([item.params for item in played.study.get_trials()])
        assert study.last_beat(played.study).beat == clock.now
    assert drawn[0] == drawn[1]


def test_an_idle_slot_does_not_read_the_study_all_the_time(tmp_path: Path):
    played = Played(tmp_path / "search", n_trials=1)
    job = played.next()
    assert played.source.next() is None
    reads = 0
    get_trials = played.study.get_trials

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal reads
        reads += 1
        return get_trials(*args, **kwargs)

    played.study.get_trials = counted  # type: ignore[method-assign]
    assert [played.source.next() for _ in range(20)] == [None] * 20 and reads == 0
    played.tell(job, "failed", reason="out of disk space")
    assert played.next().name == "trial_001", "at once, after an event"


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_of_ended_trials_are_dropped(tmp_path: Path, keep: bool):
    played = Played(tmp_path / "search", keep_checkpoints=keep)
    folders = [trained(played, job := played.next())]
    played.finishes(job, 5.0)
    folders.append(trained(played, played.next()))
    played.study.tell(1, 3.0)  # killed before it dropped them
    again = Played(tmp_path / "search", keep_checkpoints=keep)
    again.source.catch_up()
    assert [len(list(folder.iterdir())) for folder in folders] == [keep, keep]


@pytest.mark.parametrize("name", ["a b", "100%", "per%20cent", "h#sh", "ünï", "{x}", "a&b=1"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str):
    Played(tmp_path / name).next()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / study.FILE).exists()
    assert optuna.load_study(study_name="search", storage=study.url(tmp_path / name)).trials


def test_a_folder_that_no_url_can_name_is_refused(tmp_path: Path, monkeypatch):
    """SQLAlchemy before 2.1 would open `a` for the folder `a?b`."""
    monkeypatch.setattr(study, "make_url", lambda text: make_url(text.partition("%3F")[0]))
    with pytest.raises(ConfigError, match=r"a path without '.'; choose another --checkpoint_dir"):
        study.url(tmp_path / "a?b")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("postgres://user:secret@host/name", r"postgres://…@host/name: .*postgresql\+psycopg"),
        ("nonsense", r"nonsense: .*expected a --storage such as postgresql\+psycopg://"),
        ("mysql+nothing://host/name", "expected a --storage such as"),
        (
            "postgresql://user:sec:r@et@host/name?password=secret",
            r"//…@host/name\?password=…: ",
        ),
    ],
)
def test_an_invalid_url_is_refused(tmp_path: Path, address: str, words: str):
    with pytest.raises(ConfigError, match=words) as refused:
        Played(tmp_path / "search", storage=address)
    assert "sec" not in str(refused.value)


def test_the_id_is_in_the_folder(tmp_path: Path):
    Played(tmp_path / "search")
    about = json.loads((tmp_path / "search" / "study.json").read_text())
    assert about["id"] == study.folder_id(tmp_path / "search")
    assert study.folder_id(tmp_path) == ""


def test_a_damaged_study_file_is_named_and_kept(tmp_path: Path):
    Played(tmp_path / "search")
    path = tmp_path / "search" / "study.json"
    path.write_text('{"id": "41d7')
    with pytest.raises(ConfigError, match=f"{path} is damaged"):
        Played(tmp_path / "search")
    assert path.read_text() == '{"id": "41d7'
