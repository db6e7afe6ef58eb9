"""How good the model is while it trains: validation loss, HellaSwag, samples."""

import logging
from collections.abc import Callable

from gpt2.base.errors import DataError
from gpt2.config.lr_schedule import is_due
from gpt2.config.run import RunConfig
from gpt2.data import sampler
from gpt2.data.shards import DatasetIndex, TokenDataset
from gpt2.distributed.world import World
from gpt2.evaluation import baselines, hellaswag
from gpt2.evaluation.hellaswag import Score, Task
from gpt2.evaluation.loss import validation_loss
from gpt2.inference import generate
from gpt2.train.replica import Replica

logger = logging.getLogger(__name__)


class EvaluationStopped(Exception):
    """A stop was requested before the measurement was complete."""


class Evaluator:
    """Measures a replica when that is due; every rank has one and calls the same methods.

    `stop_reason` is called before every batch. Where it is not 0 on any rank, all raise
    EvaluationStopped.
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

    def validation_loss(
        self, step: int, stop_reason: Callable[[], int], is_last: bool
    ) -> float | None:
        """Nats per token, if it is due at `step`: every `eval_interval` steps, also before the
        first step and after the last."""
        interval, replica = self._config.evaluation.eval_interval, self._replica
        if interval is None or not (step == 0 or is_last or is_due(step, interval)):
            return None
        loss = validation_loss(
            replica.local_net,
            self._val_dataset,
            self._val_rows,
            self._world,
            replica.mini_batch_size,
            replica.autocast,
            stop_reason,
        )
        if loss is None:
            raise EvaluationStopped
        return loss

    def hellaswag(self, step: int, stop_reason: Callable[[], int], is_last: bool) -> Score | None:
        """The score, if it is due at `step`: every `hellaswag_interval` steps and after the
        last."""
        interval, replica = self._config.evaluation.hellaswag_interval, self._replica
        if not self._tasks or interval is None or not (is_last or is_due(step, interval)):
            return None
        score = hellaswag.evaluate(
            replica.model, self._tasks, self._world, replica.autocast, stop=stop_reason
        )
        if score is None:
            raise EvaluationStopped
        return score

    def samples(self, step: int, is_last: bool) -> list[str]:
        """Generated texts on rank 0, if they are due at `step`: every `sample_interval` steps and
        after the last."""
        settings = self._config.evaluation
        interval = settings.sample_interval
        if interval is None or not (is_last or is_due(step, interval)):
            return []
        if not self._world.is_rank0:
            return []
        seed = self._config.machine.seed + step
        return generate.generate_text(self._replica.model, settings.sample_prompt, seed=seed)

    def references(self) -> dict[str, float]:
        """What GPT-2 124M reaches, by the name of the curve that shows it beside ours."""
        known = {}
        if self._tasks:
            known["hellaswag/gpt2_124m"] = baselines.HELLASWAG["completion"][1]
        if self._corpus in baselines.LOSS:
            known["loss/gpt2_124m"] = baselines.LOSS[self._corpus]
        return known

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
