"""NaN in losses and gradients; batches that do not fit into memory."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from faults.harness import trial
from gpt2.base import log
from gpt2.base.errors import TrainingError
from gpt2.checkpoint import store
from gpt2.data.loader import Loader
from gpt2.evaluation.loss import Loss
from gpt2.inspection import run_status
from gpt2.model.gpt2 import GPT2
from gpt2.train import evaluator, trainer, training_run
from gpt2.train.report import Answer
from support import losses, small_config

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def data_root(characters: Path) -> Path:
    return characters


@pytest.fixture(autouse=True)
def logged_as_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages on standard output, warnings on standard error."""
    log.setup(info_stream="stdout")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Makes the gradients of the given updates NaN, counted from 1 since the test began."""
    calls: list[int] = []

    def at(*updates: int) -> None:
        gradient_norm = trainer.gradient_norm

        def poisoned(net: torch.nn.Module) -> torch.Tensor:
            calls.append(len(calls) + 1)
            if calls[-1] in updates:
                next(iter(net.parameters())).grad[0, 0] = float("nan")
            return gradient_norm(net)

        monkeypatch.setattr(trainer, "gradient_norm", poisoned)

    return at


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return store.load(out / "checkpoints" / f"step_{step:06d}.pt")["model"]


@trial("NaN in a gradient")
def test_a_bad_update_is_left_out(data_root: Path, tmp_path: Path, poison, capsys):
    poison(7, 8, 10)
    result = trainer.run(small_config(data_root, tmp_path))
    assert (result.state, result.step) == ("finished", 20)
    out = capsys.readouterr().err
    assert "WARNING: step 7: loss 4." in out
    assert "gradient norm nan: no update (1 in a row, 1 in all)" in out
    assert "gradient norm nan: no update (2 in a row, 2 in all)" in out
    assert "gradient norm nan: no update (1 in a row, 3 in all)" in out
    assert "WARNING: no checkpoint of step 10: its update was skipped" in out
    assert not (tmp_path / "checkpoints/step_000010.pt").exists()
    assert all(torch.isfinite(part).all() for part in weights(tmp_path, 20).values())
    log = losses(tmp_path / "logs/log.txt")
    assert log[20] < log[1] - 0.5


def record_data_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The steps whose data each loader reads that is created from now on."""
    data_steps: list[list[int]] = []

    def recording(
        dataset: object, sampler: object, steps: Iterable[int], **options: object
    ) -> Loader:
        data_steps.append(list(steps))
        return Loader(dataset, sampler, data_steps[-1], **options)

    monkeypatch.setattr(training_run, "Loader", recording)
    return data_steps


@trial("NaN until it goes back")
def test_many_bad_updates_go_back_and_leave_the_data_out(
    data_root: Path, tmp_path: Path, poison, capsys, monkeypatch
):
    poison(13, 14, 15)
    data_steps = record_data_steps(monkeypatch)
    changes = {"max_bad_steps": 3, "dropout": 0.0, "eval_interval": None}
    trainer.run(small_config(data_root, tmp_path / "bad", **changes))
    out = capsys.readouterr().err
    assert "WARNING: back to step 10 " in out
    assert "the data of steps 13 to 15 is skipped from here on" in out
    loading = f"Loading checkpoint from: {tmp_path}/bad/checkpoints/step_000010.pt\n"
    assert loading in (tmp_path / "bad/logs/log.txt").read_text()
    bad = losses(tmp_path / "bad/logs/log.txt")
    assert list(bad) == list(range(1, 21))
    trainer.run(small_config(data_root, tmp_path / "good", **changes, checkpoint_interval=12))
    good = losses(tmp_path / "good/logs/log.txt")
    assert [bad[step] for step in range(1, 13)] == [good[step] for step in range(1, 13)]
    assert bad[13] != good[13]
    state = store.load(tmp_path / "bad/checkpoints/step_000020.pt")
    assert state["progress"]["left_out"] == (12, 3)
    assert state["progress"]["bad_steps"] == 3

    resumed = tmp_path / "bad/checkpoints/step_000020.pt"
    trainer.run(
        small_config(data_root, tmp_path / "more", **changes, resume=str(resumed), max_steps=22)
    )

    back = [*range(10, 12), *range(15, 23)]  # the data of steps 13 to 15 is skipped
    assert data_steps == [[*range(20)], back, [*range(20)], [23, 24]]


def test_it_never_goes_to_a_later_checkpoint_of_an_abandoned_run(
    data_root: Path, tmp_path: Path, poison, capsys
):
    trainer.run(small_config(data_root, tmp_path, checkpoint_interval=5))
    poison(2, 3)  # steps 12 and 13, while checkpoints 15 and 20 of the former run exist
    changes = {"max_bad_steps": 2, "checkpoint_interval": 50}
    trainer.run(small_config(data_root, tmp_path, **changes, resume="10", max_steps=21))
    assert "WARNING: back to step 10 " in capsys.readouterr().err


def test_it_does_not_go_back_to_a_checkpoint_among_bad_updates(
    data_root: Path, tmp_path: Path, poison, capsys
):
    poison(12, 13, 14)

    def stop_at_13(**metrics: float) -> Answer:
        return "stop" if metrics["step"] == 13 else "go"

    config = small_config(data_root, tmp_path, max_bad_steps=3)
    trainer.run(config, stop_at_13)
    assert (tmp_path / "checkpoints/step_000013.pt").exists()
    result = trainer.run(small_config(data_root, tmp_path, max_bad_steps=3, resume="latest"))
    assert (result.state, result.step) == ("finished", 20)
    out = capsys.readouterr().err
    assert "WARNING: back to step 10 " in out
    assert "the data of steps 12 to 14 is skipped" in out


def test_it_goes_back_once_only(data_root: Path, tmp_path: Path, poison):
    poison(13, 14, 18, 19)
    with pytest.raises(TrainingError, match=r"2 updates in a row, up to step \d+, had no finite"):
        trainer.run(small_config(data_root, tmp_path, max_bad_steps=2))
    assert run_status.newest_run(tmp_path / "checkpoints").state == "stopped"  # for good


def test_without_a_checkpoint_to_go_back_to_training_fails(data_root: Path, tmp_path: Path, poison):
    poison(3, 4)
    with pytest.raises(TrainingError, match="no checkpoint to go back to; use a lower --learning"):
        trainer.run(small_config(data_root, tmp_path, max_bad_steps=2))


def test_a_nan_or_infinite_validation_is_never_the_best(
    data_root: Path, tmp_path: Path, monkeypatch
):
    values = [5.0, float("nan"), 4.0, float("inf"), 6.0]
    measured = iter([Loss(value, targets=1, text_bytes=4) for value in values])
    monkeypatch.setattr(evaluator, "validation_loss", lambda *_, **__: next(measured))
    result = trainer.run(small_config(data_root, tmp_path, checkpoint_interval=5))
    assert result.best_val_loss == 4.0
    assert (tmp_path / "checkpoints/best.pt").resolve().name == "step_000010.pt"


CUDA_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, rows: int, error: RuntimeError = CUDA_IS_FULL
) -> None:
    """Makes the model's forward pass raise `error` for more than `rows` rows."""
    forward = GPT2.forward

    def limited(net: GPT2, tokens_BT: torch.Tensor, *rest: object, **options: object):
        if len(tokens_BT) > rows:
            raise error
        return forward(net, tokens_BT, *rest, **options)

    monkeypatch.setattr(GPT2, "forward", limited)


@pytest.mark.parametrize(
    "error",
    [
        CUDA_IS_FULL,
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_what_fits(data_root: Path, tmp_path: Path, monkeypatch, error):
    limit_memory(monkeypatch, rows=3, error=error)
    message = (
        r"4 rows of block_size=8 at once do not fit into the memory; use --mini_batch_size 2 "
        r"\(the total batch stays\), or --auto_mini_batch"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.run(small_config(data_root, tmp_path, mini_batch_size=64, eval_interval=None))
    limit_memory(monkeypatch, rows=0, error=error)
    with pytest.raises(TrainingError, match=r"^1 row of block_size=8 at once does not fit into"):
        trainer.run(small_config(data_root, tmp_path, mini_batch_size=1, eval_interval=None))


def test_auto_mini_batch_finds_what_fits(data_root: Path, tmp_path: Path, monkeypatch, capsys):
    trainer.run(small_config(data_root, tmp_path / "2", mini_batch_size=2, dropout=0.0))
    limit_memory(monkeypatch, rows=3)
    changes = {"mini_batch_size": 64, "auto_mini_batch": True, "dropout": 0.0}
    trainer.run(small_config(data_root, tmp_path / "auto", **changes))
    assert "--auto_mini_batch: 2 rows at once" in capsys.readouterr().out
    one, other = (losses(tmp_path / name / "logs/log.txt") for name in ("auto", "2"))
    assert one == pytest.approx(other, abs=1e-5)


def test_auto_mini_batch_gives_up_at_one_row(data_root: Path, tmp_path: Path, monkeypatch):
    limit_memory(monkeypatch, rows=0)
    with pytest.raises(TrainingError, match="a single row of block_size=8 does not fit"):
        trainer.run(small_config(data_root, tmp_path, auto_mini_batch=True))
