"""How good the model is while it trains: validation loss, HellaSwag, samples."""

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
from gpt2.train.learner import Learner


class Stopped(Exception):
    """A stop came before what was measured was known."""


class Judge:
    """Measures a learner whenever that is due; every rank has one and calls the same methods."""

    def __init__(
        self, run_config: RunConfig, world: World, learner: Learner, data: DatasetIndex
    ) -> None:
        self._config, self._world, self._learner = run_config, world, learner
        self._val_shards = TokenDataset(data, "val", run_config.model.block_size)
        self._val_rows = sampler.spread(self._val_shards.rows_per_shard, run_config.eval_rows)
        self._corpus = data.corpus or ""
        self.warnings: list[str] = []
        self._tasks = world.run_on_rank0(self._load_tasks)

    def validation_loss(self, step: int, stop: Callable[[], int], last: bool) -> float | None:
        """Nats per token, if it is due at `step`; raises Stopped if `stop()` is not 0 before."""
        interval, learner = self._config.evaluation.eval_interval, self._learner
        if not interval or not (step == 0 or self._is_due(interval, step, last)):
            return None
        loss = validation_loss(
            learner.local_net,
            self._val_shards,
            self._val_rows,
            self._world,
            learner.mini_batch_size,
            learner.autocast,
            stop,
        )
        if loss is None:
            raise Stopped
        return loss

    def hellaswag(self, step: int, stop: Callable[[], int], last: bool) -> Score | None:
        """The score, if it is due at `step`; raises Stopped if `stop()` is not 0 before."""
        interval, learner = self._config.evaluation.hellaswag_interval, self._learner
        if not self._tasks or not self._is_due(interval, step, last):
            return None
        score = hellaswag.evaluate(
            learner.model, self._tasks, self._world, learner.autocast, stop=stop
        )
        if score is None:
            raise Stopped
        return score

    def samples(self, step: int, last: bool) -> list[str]:
        """Texts of the model on rank 0, if they are due at `step`."""
        settings = self._config.evaluation
        if not self._world.is_rank0 or not self._is_due(settings.sample_interval, step, last):
            return []
        seed = self._config.machine.seed + step
        return generate.generate_text(self._learner.model, settings.sample_prompt, seed=seed)

    def references(self) -> dict[str, float]:
        """What GPT-2 124M reaches, by the name of a curve beside ours."""
        known = {}
        if self._tasks:
            known["hellaswag/gpt2_124m"] = baselines.HELLASWAG["completion"][1]
        if self._corpus in baselines.LOSS:
            known["loss/gpt2_124m"] = baselines.LOSS[self._corpus]
        return known

    def _is_due(self, interval: int | None, step: int, last: bool) -> bool:
        return interval is not None and (last or is_due(step, interval))

    def _load_tasks(self) -> list[Task]:
        settings = self._config.evaluation
        if settings.hellaswag_interval is None:
            return []
        try:
            return hellaswag.load(settings.hellaswag_path, settings.hellaswag_limit)
        except DataError as error:
            if settings.hellaswag_path is not None:
                raise
            self.warnings.append(
                f"training goes on without HellaSwag: {error}; --hellaswag_interval None turns "
                "it off"
            )
            return []
