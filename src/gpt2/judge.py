"""How good the model is while it trains: validation loss, HellaSwag, samples."""

from collections.abc import Callable
from dataclasses import dataclass

from gpt2 import generate
from gpt2.config import RunConfig
from gpt2.data import order
from gpt2.data.shards import Catalog, ShardSet
from gpt2.distributed import World
from gpt2.errors import DataError
from gpt2.evaluation import hellaswag
from gpt2.evaluation.hellaswag import Score, Task
from gpt2.evaluation.loss import validation_loss
from gpt2.learner import Learner
from gpt2.metrics import Metrics
from gpt2.schedule import is_due

# GPT-2 124M's validation loss on FineWeb, measured with its published weights by Karpathy's
# build-nanogpt; on other text it would say nothing.
GPT2_124M_LOSS_ON_FINEWEB = 3.29
FINEWEB = ("fineweb", "fineweb_edu")


@dataclass(frozen=True)
class Judgement:
    """What was due at a step."""

    val_loss: float | None
    """nats per token"""
    hellaswag: Score | None


class Judge:
    """Measures a learner whenever that is due; every rank has one and calls the same methods."""

    def __init__(
        self, run_config: RunConfig, world: World, learner: Learner, data: Catalog
    ) -> None:
        self._config, self._world, self._learner = run_config, world, learner
        self._val_shards = ShardSet(data, "val", run_config.model.block_size)
        self._val_rows = order.spread(self._val_shards.rows_per_shard, run_config.eval_rows)
        self.warnings: list[str] = []
        self._tasks = world.on_main(self._load_tasks)

    def judge(
        self, step: int, epoch: int, metrics: Metrics, stop: Callable[[], int], last: bool = False
    ) -> Judgement | None:
        """What is due at `step`, told to `metrics`; None if `stop()` was not 0 before the end."""
        settings, learner = self._config.evaluation, self._learner
        loss = score = None
        if settings.eval_interval and (step == 0 or last or is_due(step, settings.eval_interval)):
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
                return None
            metrics.validation(step, epoch, loss)
        if self._tasks and self._is_due(settings.hellaswag_interval, step, last):
            score = hellaswag.evaluate(
                learner.model, self._tasks, self._world, learner.autocast, stop=stop
            )
            if score is None:
                return None
            metrics.hellaswag(step, epoch, score.acc, score.acc_norm, score.tasks)
        if self._is_due(settings.sample_interval, step, last) and self._world.is_main:
            seed = self._config.machine.seed + step
            texts = generate.generate_text(learner.model, settings.sample_prompt, seed=seed)
            metrics.samples(step, texts)
        return Judgement(loss, score)

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


def references(data: Catalog) -> dict[str, float]:
    """What GPT-2 124M reaches, for curves beside our own, by the name of the curve."""
    known = {"hellaswag/gpt2_124m": hellaswag.PUBLISHED["completion"][1]}
    loss = gpt2_124m_loss(data)
    return known if loss is None else known | {"loss/gpt2_124m": loss}


def gpt2_124m_loss(data: Catalog) -> float | None:
    """GPT-2 124M's loss on the validation split of `data`, where it is known."""
    return GPT2_124M_LOSS_ON_FINEWEB if data.corpus in FINEWEB else None
