"""Weights & Biases as a sink of `metrics`: the curves of many runs on one page."""

import html
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.config.experiment_name import ExperimentConfig
from gpt2.metrics.records import StepRecord

INSTALL = "pip install --editable '.[wandb]'"
CONNECT_S = 30
FINISH_S = 20  # torchrun kills a stopped rank after 30 s


class WandB:
    """Curves and samples of one run, which keeps its id however often it is resumed.

    W&B's steps only go up: those up to `told_step`, which an earlier process has told, stay as they
    are. Where its server does not answer, all is kept in `folder`/wandb for `wandb sync`.
    """

    def __init__(
        self,
        settings: ExperimentConfig,
        folder: Path,
        run_name: str,
        hparams: dict[str, Any],
        told_step: int,
        warn: Callable[[str], None],
    ) -> None:
        """Raises ConfigError if wandb is not installed, or knows no user."""
        self._wandb = _load()
        self._told_step = told_step
        try:
            self._run = self._begin(settings, folder, run_name, hparams)
        except self._wandb.errors.UsageError as error:
            raise ConfigError(
                f"--use_wandb: {str(error).rstrip('.')}; or WANDB_MODE=offline keeps all on this "
                "machine"
            ) from error
        except Exception as error:  # its server does not answer, or refuses
            self._wandb.teardown()  # or the id would be in use
            self._run = self._begin(settings, folder, run_name, hparams, mode="offline")
            place = Path(self._run.dir).parent
            warn(f"WARNING: W&B is offline ({_first_line(error):.120}); later: wandb sync {place}")

    def _begin(
        self,
        settings: ExperimentConfig,
        folder: Path,
        run_name: str,
        hparams: dict[str, Any],
        mode: str | None = None,
    ) -> Any:
        quiet = self._wandb.Settings(
            silent=True, console="off", init_timeout=CONNECT_S, finish_timeout=FINISH_S
        )
        self._wandb.setup(settings=quiet)  # before it could ask for a key, and wait
        return self._wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_run_name or settings.name or run_name,
            group=settings.name,
            id=run_name,
            resume="allow",
            dir=str(folder),
            config=hparams,
            mode=mode,
            settings=quiet,
        )

    def step(self, record: StepRecord, left_s: float | None) -> None:
        values = {
            "loss/train": record.loss,
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": record.grad_norm,
            "train/epoch": record.epoch,
            "speed/tokens_per_s": record.tokens_per_s,
            "speed/step_ms": record.elapsed_s * 1000,
            "speed/mfu": record.mfu,
            **{f"gpu/{name}": value for name, value in record.gpu.items()},
        }
        self._log(
            {name: value for name, value in values.items() if math.isfinite(value)}, record.step
        )

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self._log({"loss/val": loss}, step)

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        self._log({"hellaswag/acc": acc, "hellaswag/acc_norm": acc_norm}, step)

    def samples(self, step: int, texts: list[str]) -> None:
        blocks = "<hr>".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
        self._log({"samples": self._wandb.Html(blocks)}, step)

    def message(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._tell(self._run.finish)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step >= self._told_step:  # the validation of the last step may not have been told
            self._tell(lambda: self._run.log(values, step=step))

    def _tell(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # of many kinds: none of them may end the training
            raise OSError(f"{type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _load() -> Any:
    try:
        return importlib.import_module("wandb")  # half a second, and optional
    except ImportError as error:
        raise ConfigError(f"--use_wandb needs W&B's package ({error}); run: {INSTALL}") from error
