"""How good the model is while it trains: validation loss, HellaSwag, samples."""

import logging
from collections.abc import Callable
from typing import TypeVar

from gpt2.base.errors import DataError
from gpt2.checkpoint import random_state
from gpt2.config.lr_schedule import is_due
from gpt2.config.run import RunConfig
from gpt2.data import sampler
from gpt2.data.shards import DatasetIndex, TokenDataset
from gpt2.distributed import device
from gpt2.distributed.world import World
from gpt2.evaluation import baselines, hellaswag
from gpt2.evaluation.hellaswag import Score, Task
from gpt2.evaluation.loss import validation_loss
from gpt2.evaluation.rounds import MeasurementFailed, in_rounds
from gpt2.inference import generate
from gpt2.train.replica import Replica

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_FAILURES = 3
"""failures of a measurement in a row after which it is switched off"""


class EvaluationStopped(Exception):
    """A stop was requested before the measurement was complete."""


class Evaluator:
    """Measures a replica when that is due; every rank has one and calls the same methods.

    `stop_reason` is called before every batch. Where it is not 0 on any rank, all raise
    EvaluationStopped.

    A measurement that fails is None and never ends the run: it is logged with its traceback, and
    tried again when it is next due. One that has failed MAX_FAILURES times in a row is switched off
    until the run is resumed. Random streams are as they were after each measurement.
    """

    def __init__(
        self, run_config: RunConfig, world: World, replica: Replica, data: DatasetIndex
    ) -> None:
        """Raises DataError if --hellaswag_path names tasks that cannot be read."""
        self._config, self._world, self._replica = run_config, world, replica
        self._val_dataset = TokenDataset(data, "val", run_config.model.block_size)
        self._val_rows = sampler.spread(self._val_dataset.rows_per_shard, run_config.eval_rows)
        self._corpus = data.corpus or ""
        self.warning: str | None = None
        """why HellaSwag is off though it was requested"""
        self._tasks = world.run_on_rank0(self._load_tasks)
        self._failures: dict[str, int] = {}
        """how often each measurement has failed in a row"""
        self.failed_step: int | None = None
        """the last step at which a measurement failed. Samples are generated on rank 0, which alone
        knows of their failures, and writes what a resume goes by."""

    def validation_loss(
        self, step: int, stop_reason: Callable[[], int], is_last: bool
    ) -> float | None:
        """Nats per token, if it is due at `step`: every `eval_interval` steps, also before the
        first step and after the last."""
        interval, replica = self._config.evaluation.eval_interval, self._replica
        if interval is None or not (step == 0 or is_last or is_due(step, interval)):
            return None
        return self._attempt(
            "validation",
            step,
            lambda: validation_loss(
                replica.local_net,
                self._val_dataset,
                self._val_rows,
                self._world,
                replica.mini_batch_size,
                replica.autocast,
                stop_reason,
            ),
        )

    def hellaswag(self, step: int, stop_reason: Callable[[], int], is_last: bool) -> Score | None:
        """The score, if it is due at `step`: every `hellaswag_interval` steps and after the
        last."""
        interval, replica = self._config.evaluation.hellaswag_interval, self._replica
        if not self._tasks or interval is None or not (is_last or is_due(step, interval)):
            return None
        return self._attempt(
            "HellaSwag",
            step,
            lambda: hellaswag.evaluate(
                replica.model, self._tasks, self._world, replica.autocast, stop=stop_reason
            ),
        )

    def samples(self, step: int, is_last: bool) -> list[str]:
        """Generated texts on rank 0, if they are due at `step`: every `sample_interval` steps and
        after the last."""
        settings = self._config.evaluation
        interval = settings.sample_interval
        if interval is None or not (is_last or is_due(step, interval)):
            return []
        if not self._world.is_rank0:
            return []
        model, seed, texts = self._replica.model, self._config.machine.seed + step, list[str]()
        alone = World(0, 1, self._world.device)

        def generate_them(_round: int) -> None:
            texts.extend(generate.generate_text(model, settings.sample_prompt, seed=seed))

        self._attempt(
            "sampling", step, lambda: in_rounds(alone, range(1), generate_them, lambda: 0)
        )
        return texts

    @property
    def switched_off(self) -> tuple[str, ...]:
        """The measurements that are switched off, because they failed too often."""
        return tuple(name for name, count in self._failures.items() if count >= MAX_FAILURES)

    def references(self) -> dict[str, float]:
        """What GPT-2 124M reaches, by the name of the curve that shows it beside ours."""
        known = {}
        if self._tasks:
            known["reference/hellaswag_gpt2_124m"] = baselines.HELLASWAG["completion"][1]
        if self._corpus in baselines.LOSS:
            known["reference/loss_gpt2_124m"] = baselines.LOSS[self._corpus]
        return known

    def _attempt(self, name: str, step: int, measure: Callable[[], T | None]) -> T | None:
        """What `measure` returns; None if it fails or is switched off. Raises EvaluationStopped if
        it returns None."""
        if name in self.switched_off:
            self.failed_step = step  # it is missing: a resume makes it up
            return None
        try:
            with random_state.kept(self._world.device):
                result = measure()
        except MeasurementFailed as failure:
            self._on_failure(name, step, failure)
            return None
        if result is None:
            raise EvaluationStopped
        self._failures[name] = 0
        return result

    def _on_failure(self, name: str, step: int, failure: MeasurementFailed) -> None:
        """Logs the failure. Raises an error that leaves the device unusable."""
        self.failed_step = step
        self._failures[name] = count = self._failures.get(name, 0) + 1
        logger.warning("step %d: %s failed; training continues\n%s", step, name, failure.trace)
        if count >= MAX_FAILURES:
            logger.warning(
                "%s is SWITCHED OFF: it failed %d times in a row; a resumed run tries it again",
                name,
                count,
            )
        device.recover(self._world.device)

    def _load_tasks(self) -> list[Task]:
        settings = self._config.evaluation
        if settings.hellaswag_interval is None:
            return []
        try:
            return hellaswag.load(settings.hellaswag_path, settings.hellaswag_limit)
        except DataError as error:
            if settings.hellaswag_path is not None:
                raise
            self.warning = (
                f"training continues without HellaSwag: {error}; --hellaswag_interval None turns "
                "it off"
            )
            return []
