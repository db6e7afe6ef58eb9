"""How good the model is while it trains: validation loss, HellaSwag, samples."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from gpt2.base.errors import DataError
from gpt2.checkpoint import random_state
from gpt2.config.lr_schedule import is_due
from gpt2.config.run import RunConfig
from gpt2.data import sampler, shards
from gpt2.data.sampler import Rows
from gpt2.data.shards import TokenDataset
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.data.training_data import TrainingData
from gpt2.data.vocabulary import META_PKL, Characters
from gpt2.distributed import device
from gpt2.distributed.world import World
from gpt2.evaluation import baselines, hellaswag
from gpt2.evaluation.choices import OtherWork
from gpt2.evaluation.hellaswag import Score, Task
from gpt2.evaluation.loss import Loss, validation_loss
from gpt2.evaluation.rounds import MeasurementFailed, in_rounds
from gpt2.inference import generate
from gpt2.model import evaluating
from gpt2.train.replica import Replica

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_FAILURES = 3
"""failures of a measurement in a row after which it is switched off"""
SAMPLING_ROUNDS = 16
TOKENS_OF_A_ROUND = -(-generate.IN_TRAINING.max_new_tokens // SAMPLING_ROUNDS)
"""what rank 0 generates while every other rank computes one batch of HellaSwag"""


class Validation(NamedTuple):
    """What a validation loss is of: losses compare where it is the same."""

    corpora: str
    """names of those with validation shards; empty for one without a name"""
    rows: int
    """of all of them together"""


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
        self, run_config: RunConfig, world: World, replica: Replica, data: TrainingData
    ) -> None:
        """Raises DataError if --hellaswag_path names tasks that cannot be read."""
        self._config, self._world, self._replica = run_config, world, replica
        self._val_rows = validation_rows(run_config, data)
        self.validation = validation(run_config, data)
        self._corpora = {index.corpus or "" for index in data.corpora.values()}
        self._tokenizer = data.tokenizer
        self._impossible = self._without()
        self.warning = "; ".join(
            f"training continues without {name}: {reason}"
            for name, reason in self._impossible.items()
        )
        """why HellaSwag or samples are off though they were requested"""
        self._tasks = world.run_on_rank0(self._load_tasks)
        self._sampled: dict[int, _Sampling] = {}
        """by step: samples that were generated beside HellaSwag"""
        self._failures: dict[str, int] = {}
        """how often each measurement has failed in a row"""
        self.failed_step: int | None = None
        """the last step at which a measurement failed. Samples are generated on rank 0, which alone
        knows of their failures, and writes what a resume goes by."""

    def validation_losses(
        self, step: int, stop_reason: Callable[[], int], is_last: bool
    ) -> dict[str, Loss] | None:
        """The loss on the validation rows of each corpus, if it is due at `step`: every
        `eval_interval` steps, also before the first step and after the last. None if it is not, or
        if it fails."""
        interval, replica = self._config.evaluation.eval_interval, self._replica
        if interval is None or not (step == 0 or is_last or is_due(step, interval)):
            return None

        def measure() -> dict[str, Loss] | None:
            found = dict[str, Loss]()
            for corpus, (dataset, rows) in self._val_rows.items():
                loss = validation_loss(
                    replica.local_net,
                    dataset,
                    rows,
                    self._world,
                    replica.mini_batch_size,
                    replica.autocast,
                    stop_reason,
                )
                if loss is None:
                    return None
                found[corpus] = loss
            return found

        return self._attempt("validation", step, measure)

    def hellaswag(self, step: int, stop_reason: Callable[[], int], is_last: bool) -> Score | None:
        """The score, if it is due at `step`: every `hellaswag_interval` steps and after the last.

        With several ranks, rank 0 generates samples meanwhile, if they are due, too.
        """
        interval, replica = self._config.evaluation.hellaswag_interval, self._replica
        if not self._tasks or interval is None or not (is_last or is_due(step, interval)):
            return None
        # HellaSwag and the sampling beside it each set the model's mode and restore it, in turns.
        with evaluating(replica.model), self._sampling_beside(step, is_last) as sampling:
            return self._attempt(
                "HellaSwag",
                step,
                lambda: hellaswag.evaluate(
                    replica.model,
                    self._tasks,
                    self._world,
                    replica.autocast,
                    stop=stop_reason,
                    other_work=sampling,
                    vocab_size=self._tokenizer.vocab_size,
                ),
            )

    def samples(self, step: int, is_last: bool) -> list[str]:
        """Generated texts on rank 0, if they are due at `step`: every `sample_interval` steps and
        after the last."""
        if not self._world.is_rank0 or not self._are_samples_due(step, is_last):
            return []
        texts, alone = list[str](), World(0, 1, self._world.device)
        sampling = self._sampled.pop(step, None) or self._sampling(step)

        def finish(_round: int) -> None:
            texts.extend(sampling.finished())

        self._attempt("sampling", step, lambda: in_rounds(alone, range(1), finish, lambda: 0))
        return texts

    def _are_samples_due(self, step: int, is_last: bool) -> bool:
        interval = self._config.evaluation.sample_interval
        is_on = interval is not None and "samples" not in self._impossible
        return is_on and (is_last or is_due(step, interval))

    def _sampling(self, step: int) -> "_Sampling":
        seed = self._config.machine.seed + step
        prompt = self._config.evaluation.sample_prompt
        return _Sampling(self._replica, self._tokenizer, prompt, seed)

    @contextlib.contextmanager
    def _sampling_beside(self, step: int, is_last: bool) -> Iterator[OtherWork | None]:
        """The sampling of this step as other work of rank 0, which is complete after the block."""
        if self._world.size == 1 or not self._are_samples_due(step, is_last):
            yield None
            return
        with contextlib.closing(self._sampling(step)) as sampling:
            is_off = "sampling" in self.switched_off  # only rank 0 knows, and only it advances
            yield OtherWork(
                SAMPLING_ROUNDS, lambda: None if is_off else sampling.advance(TOKENS_OF_A_ROUND)
            )
            if self._world.is_rank0 and not is_off:
                sampling.advance()
                self._sampled = {step: sampling}

    @property
    def switched_off(self) -> tuple[str, ...]:
        """The measurements that are switched off, because they failed too often."""
        return tuple(name for name, count in self._failures.items() if count >= MAX_FAILURES)

    def references(self) -> dict[str, float]:
        """What GPT-2 124M reaches, by the name of the curve that shows it beside ours. Its loss is
        per token, so that of other tokens does not compare."""
        known = {}
        if self._tasks:
            known["reference/hellaswag_gpt2_124m"] = baselines.HELLASWAG["completion"][1]
        if self._tokenizer is GPT2_TOKENIZER and len(self._corpora) == 1:
            for corpus in self._corpora & baselines.LOSS.keys():
                known["reference/loss_gpt2_124m"] = baselines.LOSS[corpus]
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

    def _without(self) -> dict[str, str]:
        """What was requested and is not possible with the data's tokenizer, and why."""
        settings, found = self._config.evaluation, dict[str, str]()
        if settings.hellaswag_interval is not None and isinstance(self._tokenizer, Characters):
            found["HellaSwag"] = f"the data's {META_PKL} has tokens of its own"
        if settings.sample_interval is not None:
            try:
                self._tokenizer.encode(settings.sample_prompt)
            except DataError as error:
                found["samples"] = f"{error}; choose another --sample_prompt"
        return found

    def _load_tasks(self) -> list[Task]:
        settings = self._config.evaluation
        if settings.hellaswag_interval is None or "HellaSwag" in self._impossible:
            return []
        try:
            return hellaswag.load(
                settings.hellaswag_path, settings.hellaswag_limit, tokenizer=self._tokenizer
            )
        except DataError as error:
            if settings.hellaswag_path is not None:
                raise
            self.warning = (
                f"training continues without HellaSwag: {error}; --hellaswag_interval None turns "
                "it off"
            )
            return []


def validation_rows(
    run_config: RunConfig, data: TrainingData
) -> dict[str, tuple[TokenDataset, Rows]]:
    """By corpus, its validation split and the rows of it to measure, as many as
    `_validation_row_counts` says, and raises."""
    found = dict[str, tuple[TokenDataset, Rows]]()
    for name, count in _validation_row_counts(run_config, data).items():
        dataset = TokenDataset(data.corpora[name], "val", run_config.model.block_size)
        found[name] = dataset, sampler.spread(dataset.rows_per_shard, count)
    return found


def validation(run_config: RunConfig, data: TrainingData) -> Validation:
    """What the validation losses of a run on `data` are of; raises as `_validation_row_counts`."""
    rows = _validation_row_counts(run_config, data)
    return Validation(" ".join(data.validated), sum(rows.values()))


def _validation_row_counts(run_config: RunConfig, data: TrainingData) -> dict[str, int]:
    """By corpus, how many rows a validation has: an equal share of `run_config.eval_rows`, rounded
    up, or all that there are.

    Corpora of a mixture without validation shards are left out; raises DataError if all lack them.
    """
    indices = {name: index for name, index in data.corpora.items() if index.of("val")}
    indices = indices or dict(data.corpora)
    share, block_size = -(-run_config.eval_rows // len(indices)), run_config.model.block_size
    rows = {
        name: sum(shards.rows_per_shard(index, "val", block_size))
        for name, index in indices.items()
    }
    return {name: min(share, of_corpus) for name, of_corpus in rows.items()}


class _Sampling:
    """The samples of one step, which can be generated piece by piece."""

    def __init__(self, replica: Replica, tokenizer: Tokenizer, prompt: str, seed: int) -> None:
        self._autocast = replica.autocast
        self._steps = generate.stream_text(
            replica.model, prompt, generate.IN_TRAINING, seed=seed, tokenizer=tokenizer
        )
        self._pieces: list[list[str]] = []
        self._error: Exception | None = None

    def advance(self, tokens: int | None = None) -> None:
        """Generates this many more tokens, or all (None). An error is kept for `finished`."""
        try:
            with self._autocast:
                self._pieces += itertools.islice(self._steps, tokens)
        except Exception as error:
            self._error = error

    def finished(self) -> list[str]:
        """The whole texts. Raises the error that ended the sampling, if one did."""
        self.advance()
        if self._error is not None:
            raise self._error
        return ["".join(text) for text in zip(*self._pieces, strict=True)]

    def close(self) -> None:
        """Ends the sampling, complete or not, which restores the mode of the model."""
        self._steps.close()
