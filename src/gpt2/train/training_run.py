"""A run that is ready to train: its parts, and what happens around an update."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpt2.base import addresses
from gpt2.base.errors import DataError
from gpt2.base.text import brief, counted
from gpt2.checkpoint.async_save import Saver
from gpt2.checkpoint.metadata import CheckpointState, TrainingMetadata
from gpt2.config import flops, mixture
from gpt2.config.lr_schedule import Schedule
from gpt2.config.mixture import StepPhase
from gpt2.config.run import RunConfig
from gpt2.data import saved_tokenizer
from gpt2.data.digests import Fault
from gpt2.data.loader import Loader, MicroBatch
from gpt2.data.sampler import Sampler, Shuffle
from gpt2.data.training_data import UNNAMED, MixedDataset, TrainingData
from gpt2.data.verifier import Verifier
from gpt2.distributed.signals import StopRequest
from gpt2.distributed.watchdog import TORCHRUN_IS_GONE
from gpt2.distributed.world import World
from gpt2.evaluation.loss import Loss
from gpt2.metrics import sinks
from gpt2.metrics.records import CorpusLoss, EventRecord, Metrics, Sink, StepRecord
from gpt2.metrics.sinks import RunStart
from gpt2.train import data_faults
from gpt2.train.evaluator import EvaluationStopped, Evaluator
from gpt2.train.garbage import Garbage
from gpt2.train.notices import Notices
from gpt2.train.replica import Replica
from gpt2.train.report import Report
from gpt2.train.resume import MIXTURE
from gpt2.train.run_identity import RunIdentity
from gpt2.train.state import End, RunResult, TrainState, Update
from gpt2.train.status import RunState, StatusFile
from gpt2.train.step_profiler import StepProfiler
from gpt2.train.stop_vote import StopVote

logger = logging.getLogger(__name__)
# Above all signal numbers, so that one number is a signal, an answer of `report` or a fault.
STOP, PRUNE, DATA_FAULT = 1001, 1002, 1003
DATA_SLICE_S = 1.0
"""how long a rank waits for its batches before it votes"""
SHUFFLED: dict[Shuffle, str] = {
    "shards": "{shards}",
    "rows": "{shards} and the rows of each",
    "global": "the {rows} of {shards}",
}


@dataclass
class TrainingRun:
    """The parts of a run. Every rank has one, and calls the same methods in the same order."""

    config: RunConfig
    name: str
    world: World
    dataset: MixedDataset
    """the training split"""
    data: TrainingData
    """all splits"""
    verifiers: Mapping[str, Verifier]
    """by name of corpus, on the first rank of each machine, for local data"""
    sampler: Sampler
    phases: tuple[StepPhase, ...]
    """the weights of several corpora, from the first step of the run on; none with one corpus"""
    schedule: Schedule
    total_steps: int
    replica: Replica
    evaluator: Evaluator
    saver: Saver
    status: StatusFile
    stop: StopRequest
    notices: Notices
    report: Report
    """called on rank 0; it steers the run"""
    peak_flops: float
    """of all devices together, FLOP/s"""
    state: TrainState
    identity: RunIdentity
    resumed_from: Path | None
    earlier_saves: frozenset[int]
    """sequence numbers of checkpoints in the folder that are further on than `first_step`: they
    belong to an earlier course of the run"""
    is_closing: bool = False
    """whether it is being closed, which may take longer than another rank's failure allows"""
    first_step: int = field(init=False)
    """where this process began"""
    stop_vote: StopVote = field(init=False)
    metrics: Metrics = field(init=False)
    loader: Loader = field(init=False)
    profiler: StepProfiler | None = None
    """on rank 0, if the user requests it"""
    garbage: Garbage = field(default_factory=Garbage)

    def __post_init__(self) -> None:
        self.first_step, self.metrics = self.state.step, Metrics([])
        self.stop_vote = StopVote(self.world, self.stop, lambda: self.status.beat(self.state.step))
        if self.world.watchdog is not None:
            self.world.watchdog.wait_while(lambda: self.saver.is_busy or self.is_closing)
            self.world.watchdog.call_before_exit(self._ended_by_watchdog)
        self.data.on_fault(lambda: self.stop.request(DATA_FAULT))

    def open(self, events: Iterable[EventRecord] = ()) -> None:
        """Opens the metrics sinks, records `events` first, and starts to read data from
        `state.step` on."""
        found: list[Sink] = []  # stays empty off rank 0
        start = RunStart(
            config=self.config,
            name=self.name,
            step=self.state.step,
            references=self.evaluator.references(),
            run_id=self.identity.unique_name(self.name),
        )
        self.world.run_on_rank0(lambda: found.extend(sinks.open_sinks(start)))
        self.metrics = Metrics(found, events)
        try:
            self.loader = Loader(
                self.dataset,
                self.sampler,
                map(self.state.data_step, range(self.state.step, self.total_steps)),
                rank=self.world.rank,
                world_size=self.world.size,
                mini_batch_size=self.replica.mini_batch_size,
                pin_memory=self.world.device.type == "cuda",
            )
        except BaseException:
            self.metrics.close()
            raise
        watch = self.config.watch
        if watch.profile is not None and self.world.is_rank0:
            folder, device = watch.runs_dir / self.name, self.world.device
            self.profiler = StepProfiler(watch.profile, folder, device, self.state.step)

    def start_verifiers(self) -> None:
        for verifier in self.verifiers.values():
            verifier.start(is_waiting=lambda: self.loader.is_behind())

    def close(self) -> None:
        """Waits for the checkpoint that is being written, ends the loader's thread, closes the
        sinks."""
        self.is_closing = True
        try:
            self.saver.wait()
        finally:
            self.garbage.close()
            if self.profiler is not None:
                self.profiler.close()
            for verifier in self.verifiers.values():
                verifier.close()
            self.loader.close()
            self.notices.close()
            self.metrics.close()

    def save_if_due(self) -> None:
        """Begins to save a checkpoint of this step, if one is due."""
        step = self.state.step
        if not self.saver.is_due(step):
            return
        if self.state.bad_in_a_row:
            logger.warning("no checkpoint of step %d: its update was skipped", step)
            return
        self.saver.save_in_background(self.metadata(), self.checkpoint_state)
        self.metrics.flush()  # a kill loses no curve up to a step that is kept

    def evaluate_if_due(self, is_last: bool = False) -> bool:
        """Measures what is due at this step and is not measured yet. Returns False if a stop ended
        it early. A run that resumes here measures what a stop or a failure has left."""
        if self.state.evaluated_step == self.state.step:
            return True
        try:
            self._evaluate(is_last)
        except EvaluationStopped:
            return False
        self.status.switched_off = self.evaluator.switched_off
        if self.evaluator.failed_step != self.state.step:
            self.state.evaluated_step = self.state.step
            self.saver.add_measured(self.state.step, is_evaluated=True)
        return True

    def _evaluate(self, is_last: bool) -> None:
        state, step, epoch = self.state, self.state.step, self._epoch()

        def stop_reason() -> int:  # before every batch
            if self.status.beat(step):
                self._report(step=step)
            return self.stop.number

        if state.validated_step != step:
            losses = self.evaluator.validation_losses(step, stop_reason, is_last)
            if losses is not None:
                loss = Loss.of_all(losses.values())
                val_loss, bits_per_byte = loss.per_token, loss.bits_per_byte
                state.add_validation(val_loss, bits_per_byte)
                self.metrics.validation(step, epoch, val_loss, bits_per_byte, _by_corpus(losses))
                self.saver.add_measured(
                    step,
                    val_loss=val_loss,
                    bits_per_byte=bits_per_byte,
                    validated=self.evaluator.validation.corpora,
                    val_rows=self.evaluator.validation.rows,
                )
                self._report(step=step, val_loss=val_loss)
        if state.scored_step != step:
            score = self.evaluator.hellaswag(step, stop_reason, is_last)
            if score is not None:
                state.add_hellaswag(score.acc_norm)
                self.metrics.hellaswag(step, epoch, score.acc, score.acc_norm, score.tasks)
                self.saver.add_measured(step, hellaswag=score.acc_norm)
                self._report(step=step, hellaswag=score.acc_norm)
        if texts := self.evaluator.samples(step, is_last):
            self.metrics.samples(step, texts)

    def announce_epochs(self) -> None:
        """Logs the epochs that the last update has completed."""
        if self.state.step == 0:
            return
        for epoch in range(self._epoch(), self.next_epoch()):
            logger.info("Completed Epoch %d", epoch)
            if self.state.step < self.total_steps:
                what = SHUFFLED.get(self.sampler.shuffle)
                if what and not self.phases:  # each corpus of a mixture has epochs of its own
                    shards, rows = self.data.shard_count("train"), self.sampler.rows_per_epoch
                    logger.info(
                        "Shuffled %s for new epoch",
                        what.format(
                            shards=counted(shards, "training shard"), rows=counted(rows, "row")
                        ),
                    )
                logger.info("Starting Epoch %d", epoch + 1)

    def next_micro_batches(self) -> list[MicroBatch] | None:
        """This rank's micro-batches of the next step; None if the ranks agree to stop first.

        While a shard is being downloaded, this rank votes every DATA_SLICE_S, so that no other rank
        waits longer than that in a collective.
        """
        while not self.loader.is_ready(within_s=DATA_SLICE_S):
            if self.stop_vote.is_to_stop_waiting():
                return None
        try:
            return self.loader.next_step()
        except DataError as error:
            self.data.report(Fault(str(error), may_pass=True))
            self.stop_vote.is_to_stop_waiting()  # to which the other ranks have come
            return None

    def log_step(self, update: Update, learning_rate: float) -> None:
        """Records the update that led to this step, and reports it."""
        state = self.state
        state.train_loss = update.loss
        tokens_per_s = self.tokens_of(state.step - 1) / update.elapsed_s
        self.metrics.step(
            StepRecord(
                step=state.step,
                epoch=self._epoch(),
                loss=update.loss,
                learning_rate=learning_rate,
                grad_norm=update.grad_norm,
                applied=update.applied,
                loss_scale=update.loss_scale,
                elapsed_s=update.elapsed_s,
                tokens_per_s=tokens_per_s,
                mfu=flops.mfu(tokens_per_s, self.config.model, self.peak_flops),
                rank_s=update.rank_s,
                rank_gpu=update.rank_gpu,
                steps_left=self.total_steps - state.step,
                corpora={
                    name: loss
                    for name, loss in zip(self.data.corpora, update.corpus_losses, strict=False)
                    if loss is not None
                },
            ),
            tokens_left=self.tokens_until(self.total_steps) - self.tokens_until(state.step),
        )
        self._report(
            step=state.step,
            total_steps=self.total_steps,
            loss=update.loss,
            tokens_per_s=tokens_per_s,
        )
        self.saver.log_outcomes()
        self.notices.stepped(update.elapsed_s)
        self.status.beat(state.step)
        self.garbage.after_step()
        if self.profiler is not None:
            self.profiler.step()

    def stopped(self) -> RunResult:
        """Ends the run before its last step: saves, unless it is pruned.

        Raises DataError, after the save, if a fault of the data is the reason.
        """
        reason = self.world.all_reduce_max(self.stop.number)
        if reason == PRUNE:
            self.ended("stopped", "pruned")
            return self._result("pruned")
        self.saver.save_now(self.metadata(), self.checkpoint_state)
        data_faults.raise_first(self.data, self.world, self.sampler, self.state)
        names = {STOP: "on request", TORCHRUN_IS_GONE: "because torchrun is gone"}
        by = names.get(reason, f"by signal {reason}")
        logger.info("Stopped %s at step %d; --resume latest continues", by, self.state.step)
        ending: RunState = "failed" if reason == TORCHRUN_IS_GONE else "stopped"
        self.ended(ending, by)
        return self._result("stopped", exit_code=0 if reason == STOP else 128 + reason)

    def finished(self) -> RunResult:
        """Ends the run at its last step: saves, then measures."""
        step = self.state.step
        if self.config.evaluation.eval_interval is not None and self.state.validated_step != step:
            # A run that was stopped here had nothing due at this step; after the last one it is.
            self.state.evaluated_step = None
        if step != self.first_step or self.resumed_from is None:
            self.announce_epochs()
        elif self.state.evaluated_step == step:
            logger.info(
                "Nothing to do: step %d of %d is reached; to continue, raise --max_steps or "
                "--epochs",
                step,
                self.total_steps,
            )
        self.saver.save_now(self.metadata(), self.checkpoint_state)
        if not self.evaluate_if_due(is_last=True):
            return self.stopped()
        if self._is_stopped_before_verified():
            return self.stopped()
        data_faults.raise_first(self.data, self.world, self.sampler, self.state)
        self.ended("finished")
        return self._result("finished")

    def _is_stopped_before_verified(self) -> bool:
        """Waits until what this process has read is verified; whether a signal or a fault of the
        data ends that. The answers of `report` have no effect on a run that is complete."""
        self.stop.withdraw(STOP, PRUNE)
        if not all(verifier.is_done for verifier in self.verifiers.values()):
            steps = map(self.state.data_step, range(self.first_step, self.state.step))
            read = data_faults.files_read(self.data, self.sampler, steps)
            while not all(
                verifier.wait_for(read[name], DATA_SLICE_S / len(self.verifiers))
                for name, verifier in self.verifiers.items()
            ):
                if self.stop_vote.is_to_stop_waiting():
                    break
            else:
                self.stop_vote.is_to_stop()
        else:
            self.stop_vote.is_to_stop()
        return self.world.all_reduce_max(self.stop.number) != 0

    def _result(self, end: End, exit_code: int = 0) -> RunResult:
        return self.state.result(end, self.tokens_until(self.state.step), exit_code)

    def ended(self, ending: RunState, reason: str | None = None) -> None:
        """Writes to `status.json` how the run ends, and posts it; a long reason is in the log."""
        if reason is not None:
            whole, reason = reason, brief(reason, sinks.log_file(self.config))
            if reason != whole:
                self.metrics.event("ERROR", whole)
        self.status.write(ending, self.state.step, reason)
        self.notices.ended(ending, self.state, reason)

    def _ended_by_watchdog(self, reason: str) -> None:
        self.ended("failed", reason)
        self.notices.close()

    def metadata(self) -> TrainingMetadata:
        """What the JSON beside a checkpoint of this step says of the training."""
        state, plain_config = self.state, json.dumps(self.config.to_dict())
        return TrainingMetadata(
            step=state.step,
            epoch=self._epoch(),
            tokens=self.tokens_until(state.step),
            train_loss=state.train_loss,
            val_loss=state.val_loss if state.validated_step == state.step else None,
            bits_per_byte=state.bits_per_byte if state.validated_step == state.step else None,
            hellaswag=state.hellaswag if state.scored_step == state.step else None,
            is_evaluated=state.evaluated_step == state.step,
            world_size=self.world.size,
            run_name=self.name,
            config_digest=hashlib.sha256(plain_config.encode()).hexdigest()[:16],
            run_id=self.identity.id,
            parent_run=self.identity.parent,
            validated=self.evaluator.validation.corpora,
            val_rows=self.evaluator.validation.rows,
        )

    def checkpoint_state(self) -> CheckpointState:
        """What a checkpoint of this step holds, beside the random states of all ranks."""
        return {
            "progress": self.state.to_dict(),
            "epoch": self._epoch(),
            "tokens": self.tokens_until(self.state.step),
            "run_name": self.name,
            "run": asdict(self.identity),
            "data_fingerprint": self.data.fingerprints(),
            **({MIXTURE: mixture.to_plain(self.phases)} if self.phases else {}),
            saved_tokenizer.KEY: saved_tokenizer.to_plain(self.data.tokenizer),
            "config": addresses.public(self.config.to_dict()),
            **self.replica.state_dict(),
        }

    def tokens_of(self, step: int) -> int:
        """Tokens of the update after `step` finished ones, over all ranks."""
        rows = self.sampler.ramp.rows_of(self.state.data_step(step))
        return rows * self.config.model.block_size

    def tokens_until(self, step: int) -> int:
        """Tokens of the first `step` updates."""
        return self.state.rows_until(step, self.sampler.ramp) * self.config.model.block_size

    def next_epoch(self) -> int:
        """The epoch of the next update."""
        return self.sampler.epoch_at(self.state.data_step(self.state.step))

    def _epoch(self) -> int:
        """The epoch of the last update (of the first one, before it)."""
        return self.sampler.epoch_at(self.state.data_step(max(0, self.state.step - 1)))

    def _report(self, **metrics: float) -> None:
        if self.world.is_rank0:
            answer = self.report(**metrics)
            self.stop.request({"go": 0, "stop": STOP, "prune": PRUNE}[answer])


def _by_corpus(losses: Mapping[str, Loss]) -> dict[str, CorpusLoss]:
    """The validation losses of a mixture; none of a corpus alone."""
    return {
        name: CorpusLoss(loss.per_token, loss.bits_per_byte)
        for name, loss in losses.items()
        if name != UNNAMED
    }
