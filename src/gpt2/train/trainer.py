"""One training run: assembles data, learner, checkpoints and metrics; holds the loop.

At step N, N updates are done (on a GPU, the last may be under way) and the next one trains on
portion N of the data. What is due at N (validation, samples, a checkpoint) happens between them.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2.base.errors import Diverged, UserError
from gpt2.checkpoint import metadata, store
from gpt2.checkpoint.async_save import Saver
from gpt2.config import flops
from gpt2.config.lr_schedule import is_due, lr_at
from gpt2.config.run import RunConfig
from gpt2.data.loader import Loader
from gpt2.data.sampler import Sampler
from gpt2.data.shards import DatasetIndex, TokenDataset
from gpt2.distributed import device, rendezvous
from gpt2.distributed.signals import StopRequest
from gpt2.distributed.watchdog import TORCHRUN_IS_GONE
from gpt2.distributed.world import World
from gpt2.metrics import sinks
from gpt2.metrics.records import Metrics, Sink, StepRecord
from gpt2.train import banner, experiment_folder
from gpt2.train.evaluator import Judge, Stopped
from gpt2.train.learner import Learner, Underway, Update
from gpt2.train.report import Report, always_go
from gpt2.train.resume import Start
from gpt2.train.setup import claimed_folder, open_data, require_enough_rows
from gpt2.train.state import Progress, Result
from gpt2.train.status import Heartbeat, RunState

# Answers of `report` share a number line with signals, so that all ranks agree on one number.
STOP, PRUNE = 1001, 1002
DATA_SLICE_S = 1.0
SHORT_S = 1.0
"""An update of less is begun before all is heard of the one before. Longer ones hide what the host
does by themselves, and a stop would have to wait for two of them."""


def run(
    run_config: RunConfig,
    report: Report = always_go,
    run_name: str | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> Result:
    """Trains as `run_config` says, from its beginning or from a checkpoint, to its end or a stop.

    `report` is called on rank 0: with step, total_steps, loss and tokens_per_s after each update,
    with step and val_loss or hellaswag (acc_norm) when these are measured. It steers: "stop" saves
    and returns, "prune" only returns; on a GPU, after the update that was begun meanwhile.
    `run_name` is what its logs call a new run, by default its preset (or experiment) and time.
    With several ranks, an error that is no UserError ends the process; the first rank that fails
    calls `on_failure` with it before. Raises UserError for what the user can mend.
    """
    with rendezvous.join(run_config.machine, run_config.experiment.gpu_id, on_failure) as world:
        resolved = world.run_on_rank0(lambda: experiment_folder.resolve(run_config))
        run_name = world.run_on_rank0(lambda: run_name or experiment_folder.run_name(resolved))
        return _train(resolved, run_name, world, report)


def _train(run_config: RunConfig, run_name: str, world: World, report: Report) -> Result:
    world.run_on_rank0(lambda: experiment_folder.require_possible(run_config))
    data = open_data(run_config, world)
    with claimed_folder(run_config, world):
        start, stop = Start.find(run_config, world), StopRequest()
        training = Training(run_config, run_name, world, data, start, report, stop)
        with stop:  # until the last checkpoint is on the disk
            try:
                result = training.loop()
            except KeyboardInterrupt:  # the second one: leave at once
                training.tell("stopped", "interrupted")
                raise
            except Diverged as error:
                training.tell("stopped", str(error))
                training.close()
                raise
            except BaseException as error:
                training.tell("failed", world.reason(error))
                training.close()
                raise
            training.close()
            return result


@dataclass(frozen=True)
class Begun:
    """The update that leads to `step`, of which nothing was heard yet."""

    step: int
    learning_rate: float
    underway: Underway


class Training:
    """A run that is ready to take its next step.

    What an earlier run left is not touched before everything that could be refused was checked.
    """

    def __init__(
        self,
        run_config: RunConfig,
        run_name: str,
        world: World,
        data: DatasetIndex,
        start: Start,
        report: Report,
        stop: StopRequest,
    ) -> None:
        self.config, self.world, self.start = run_config, world, start
        self.report, self.stop = report, stop
        self.run_name, self.link = run_name, experiment_folder.link(run_config)
        block_size = run_config.model.block_size
        self.train_shards = TokenDataset(data, "train", block_size)
        self.order = Sampler(
            self.train_shards.rows_per_shard,
            run_config.rows_per_step,
            run_config.machine.seed,
            run_config.data.shuffle,
        )
        self.total_steps = run_config.total_steps(self.order.rows_per_epoch)
        self.schedule = run_config.lr_schedule(self.total_steps)
        self.data_fingerprint = data.fingerprint()
        require_enough_rows(run_config, world)
        start.require_agreement(run_config, self.data_fingerprint)
        world.run_on_rank0(lambda: sinks.require_folders(run_config))

        self.learner = Learner(run_config, world, start.weights)
        self.judge = Judge(run_config, world, self.learner, data)
        self.peak_flops = device.peak_flops(world, self.learner.dtype)
        self.progress = Progress()
        if start.state is not None:
            self._restore(start.state)
        checkpoints = run_config.checkpoint.checkpoint_dir.resolve()
        here = start.path is not None and start.path.resolve().parent == checkpoints
        resumed_step = start.step if here else None
        self.saver = Saver(world, run_config.checkpoint, start.path, resumed_step, self.link)
        if world.watchdog is not None:
            world.watchdog.wait_while(lambda: self.saver.is_busy)
        self.first_step = self.progress.step
        self.older = world.run_on_rank0(lambda: store.list_checkpoints(checkpoints))
        self.metrics = self._open_metrics()
        self.loader = self._loader()
        self.begun: Begun | None = None
        """the update of which nothing was heard yet"""
        self.runs_ahead = False
        plan = banner.plan_of(run_config, self.run_name, self.total_steps, self.order, world)
        self.status = Heartbeat(checkpoints if world.is_rank0 else None, plan)
        self.tell("running")
        for line in (
            *(f"WARNING: {warning}" for warning in self.judge.warnings),
            *start.lines(run_config, world, self._next_epoch()),
            *banner.lines(run_config, plan, data, self.train_shards, self.learner, self.link),
        ):
            self._say(line)

    def loop(self) -> Result:
        """Trains until the last step or until somebody says stop."""
        while True:
            self._catch_up_if_due()
            if self.progress.step >= self.total_steps:
                break
            if reason := self.world.all_reduce_max(self.stop.number):
                return self._stopped(reason)
            if self._judge_if_due():
                continue
            self._save_if_due()
            self._announce_epoch()
            if reason := self._stop_before_data():
                return self._stopped(reason)
            self._train_step()
            self.saver.log_outcomes()
            self.status.beat(self.progress.step)
        if self._judge_if_due(last=True):
            return self._stopped(self.world.all_reduce_max(self.stop.number))
        return self._finished()

    def _stop_before_data(self) -> int:
        """Waits until every rank has the batches of the next step; why to stop, if that comes
        first. A shard that is long in coming keeps no rank waiting in a collective."""
        while True:
            ready = self.loader.is_ready(within_s=DATA_SLICE_S)
            if reason := self.world.all_reduce_max(self.stop.number):
                return reason
            if not self.world.all_reduce_max(not ready):
                return 0
            self._catch_up()
            self.status.beat(self.progress.step)

    def close(self) -> None:
        """Lets what is being written reach the disk, and ends the threads."""
        try:
            self.saver.wait()
        finally:
            self.loader.close()
            self.metrics.close()

    def _loader(self) -> Loader:
        return Loader(
            self.train_shards,
            self.order,
            map(self._portion, range(self.progress.step, self.total_steps)),
            rank=self.world.rank,
            world_size=self.world.size,
            mini_batch_size=self.learner.mini_batch_size,
            pin_memory=self.world.device.type == "cuda",
        )

    def _portion(self, step: int) -> int:
        """Which portion of the data the update after `step` trains on."""
        first, count = self.progress.left_out or (self.total_steps, 0)
        return step if step < first else step + count

    def _train_step(self) -> None:
        """One update on portion `progress.step` of the data. A GPU is not waited for if they are
        short: what the update was like is heard when the next one has begun."""
        step = self.progress.step
        rate = lr_at(step, self.schedule)
        try:
            underway = self.learner.begin(self.loader.next_step(), rate)
        except UserError:
            self._catch_up()  # of the one before something is to be told, too
            raise
        self._catch_up()
        if self.progress.step != step:  # it went back
            return
        self.begun = Begun(step + 1, rate, underway)
        self.progress.step = step + 1
        if not self.runs_ahead:
            self._catch_up()

    def _catch_up_if_due(self) -> None:
        """Before others look at the model, or tell something, all is heard of its last update."""
        step, settings = self.progress.step, self.config.evaluation
        intervals = (
            settings.eval_interval,
            settings.hellaswag_interval,
            settings.sample_interval,
            self.config.checkpoint.checkpoint_interval,
        )
        is_due_now = any(is_due(step, every) for every in intervals)
        if is_due_now or self._epochs_done() or step >= self.total_steps:
            self._catch_up()

    def _catch_up(self) -> None:
        """Hears of the update that was begun last, unless that is done, and tells of it."""
        if self.begun is None:
            return
        begun, self.begun = self.begun, None
        update = begun.underway.result()
        self.runs_ahead = self.learner.runs_ahead and max(update.rank_s) < SHORT_S
        record = self._record(begun, update)
        self.progress.train_loss = record.loss
        self.metrics.step(record)
        self._ask(
            step=record.step,
            total_steps=self.total_steps,
            loss=record.loss,
            tokens_per_s=record.tokens_per_s,
        )
        self._go_back_if_bad(record)

    def _record(self, begun: Begun, update: Update) -> StepRecord:
        tokens_per_s = self.config.data.total_batch_size / update.elapsed_s
        return StepRecord(
            step=begun.step,
            epoch=self.order.epoch_at(self._portion(begun.step - 1)),
            loss=update.loss,
            learning_rate=begun.learning_rate,
            grad_norm=update.grad_norm,
            applied=update.applied,
            elapsed_s=update.elapsed_s,
            tokens_per_s=tokens_per_s,
            mfu=flops.mfu(tokens_per_s, self.config.model, self.peak_flops),
            rank_s=update.rank_s,
            gpu=device.gpu_usage(self.world.device),
            steps_left=self.total_steps - begun.step,
        )

    def _go_back_if_bad(self, record: StepRecord) -> None:
        """Counts updates that were left out; after too many in a row, goes back to the newest
        checkpoint and leaves out the data that they had. Once: then it is not the data."""
        progress, limit = self.progress, self.config.optim.max_bad_steps
        if record.applied:
            progress.bad_in_a_row = 0
            return
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        self._say(
            f"WARNING: step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}: "
            f"no update ({progress.bad_in_a_row} in a row, {progress.bad_steps} in all)"
        )
        if progress.bad_in_a_row < limit:
            return
        reason = (
            f"{limit} updates in a row, up to step {record.step}, had no finite loss or gradient"
        )
        if progress.left_out is not None:
            raise Diverged(
                f"{reason}, also after leaving out the data of steps {progress.left_out[0] + 1} to "
                f"{sum(progress.left_out)}; use a lower --learning_rate from an earlier checkpoint"
            )
        first = record.step - progress.bad_in_a_row
        path = self.world.run_on_rank0(lambda: self._checkpoint_before(first))
        if path is None:
            raise Diverged(
                f"{reason}, and there is no checkpoint to go back to; use a lower --learning_rate, "
                "a longer --warmup_steps or a smaller --checkpoint_interval"
            )
        self._go_back(path, left_out=(first, progress.bad_in_a_row))

    def _go_back(self, path: Path, left_out: tuple[int, int]) -> None:
        bad_steps = self.progress.bad_steps
        self.loader.close()
        trust = self.config.checkpoint.trust_checkpoint
        state = store.load(path, trust=trust, world=self.world)
        self._restore(state)
        self.progress.bad_steps, self.progress.left_out = bad_steps, left_out
        self.progress.bad_in_a_row = 0
        self.saver.assume_saved(self.progress.step)
        self.metrics.close()
        self.metrics = self._open_metrics()
        self._say(
            f"WARNING: back to step {self.progress.step} ({path}); the data of steps "
            f"{left_out[0] + 1} to {sum(left_out)} is left out from here on"
        )
        self.loader = self._loader()

    def _checkpoint_before(self, step: int) -> Path | None:
        """The newest checkpoint of this run up to `step`, or where the run began.

        Those that lay in the folder already and are further on belong to a way that was left.
        """
        self.saver.wait()
        left = {
            item.metadata.sequence for item in self.older if item.training.step > self.first_step
        }
        found = store.list_checkpoints(self.config.checkpoint.checkpoint_dir)
        mine = [
            item
            for item in found
            if item.training.step <= step and item.metadata.sequence not in left
        ]
        good = store.newest_good(mine)
        began = self.start.path if self.first_step <= step else None
        return good.path if good else began

    def _judge_if_due(self, last: bool = False) -> bool:
        """Judges the model as it is at this step, unless that is done already; whether a stop came
        in between."""
        if self.progress.judged_step == self.progress.step:
            return False
        try:
            self._judge(last)
        except Stopped:
            return True
        self.progress.judged_step = self.progress.step
        if self.progress.step == self.start.step:
            self.saver.assume_saved(None)  # the checkpoint of this step knows more from here on
        return False

    def _judge(self, last: bool) -> None:
        progress, step, epoch = self.progress, self.progress.step, self._epoch()

        def asked() -> int:  # before every batch
            if self.status.beat(self.progress.step):
                self._ask(step=step)
            return self.stop.number

        if progress.validated_step != step:
            loss = self.judge.validation_loss(step, asked, last)
            progress.validated_step, progress.val_loss = step, loss
            if loss is not None:
                if math.isfinite(loss):
                    best = progress.best_val_loss
                    progress.best_val_loss = loss if best is None else min(loss, best)
                self.metrics.validation(step, epoch, loss)
                self._ask(step=step, val_loss=loss)
        if score := self.judge.hellaswag(step, asked, last):
            progress.hellaswag = score.acc_norm
            self.metrics.hellaswag(step, epoch, score.acc, score.acc_norm, score.tasks)
            self._ask(step=step, hellaswag=score.acc_norm)
        if texts := self.judge.samples(step, last):
            self.metrics.samples(step, texts)

    def _ask(self, **metrics: float) -> None:
        if self.world.is_rank0:
            self.stop.request({"go": 0, "stop": STOP, "prune": PRUNE}[self.report(**metrics)])

    def _announce_epoch(self) -> None:
        for epoch in self._epochs_done():
            self._say(f"Completed Epoch {epoch}")
            if self.progress.step < self.total_steps:
                if self.order.shuffle != "none":
                    count = len(self.train_shards.shards)
                    self._say(f"Shuffled {count} training shards for new epoch")
                self._say(f"Starting Epoch {epoch + 1}")

    def _epochs_done(self) -> range:
        """The epochs that the last update has ended."""
        if self.progress.step == 0:
            return range(0)
        return range(self._epoch(), self._next_epoch())

    def _epoch(self) -> int:
        """The epoch of the last update (of the first one, before it)."""
        return self.order.epoch_at(self._portion(max(0, self.progress.step - 1)))

    def _next_epoch(self) -> int:
        """The epoch of the next update."""
        return self.order.epoch_at(self._portion(self.progress.step))

    def _save_if_due(self) -> None:
        progress = self.progress
        if not is_due(progress.step, self.config.checkpoint.checkpoint_interval):
            return
        if progress.bad_in_a_row:
            self._say(f"WARNING: no checkpoint of step {progress.step}: its update is left out")
        else:
            self.saver.save_in_background(self._facts(), self._state)
            self.metrics.flush()  # a kill loses no curve up to a step that is kept

    def _facts(self) -> metadata.TrainingMetadata:
        step, plain_config = self.progress.step, json.dumps(self.config.to_dict())
        return metadata.TrainingMetadata(
            step=step,
            epoch=self._epoch(),
            tokens=step * self.config.data.total_batch_size,
            train_loss=self.progress.train_loss,
            val_loss=self.progress.val_loss if self.progress.validated_step == step else None,
            world_size=self.world.size,
            run_name=self.run_name,
            config_digest=hashlib.sha256(plain_config.encode()).hexdigest()[:16],
        )

    def _state(self) -> metadata.CheckpointState:
        """What a checkpoint holds, beside the random states of all ranks."""
        return {
            "progress": asdict(self.progress),
            "epoch": self._epoch(),
            "tokens": self.progress.step * self.config.data.total_batch_size,
            "run_name": self.run_name,
            "data_fingerprint": self.data_fingerprint,
            "config": self.config.to_dict(),
            **self.learner.state(),
        }

    def _stopped(self, reason: int) -> Result:
        self._catch_up()
        if reason == PRUNE:
            self.tell("stopped", "pruned")
            return self.progress.result("pruned")
        self.saver.save_now(self._facts(), self._state)
        names = {STOP: "on request", TORCHRUN_IS_GONE: "because torchrun is gone"}
        by = names.get(reason, f"by signal {reason}")
        self._say(f"Stopped {by} at step {self.progress.step}; --resume latest goes on")
        self.tell("failed" if reason == TORCHRUN_IS_GONE else "stopped", by)
        return self.progress.result("stopped", exit_code=0 if reason == STOP else 128 + reason)

    def _finished(self) -> Result:
        if self.progress.step == self.start.step:
            self._say(
                f"Nothing to do: step {self.progress.step} of {self.total_steps} is reached; "
                "raise --max_steps or --epochs to go on"
            )
        else:
            self._announce_epoch()
        self.saver.save_now(self._facts(), self._state)
        self.tell("finished")
        return self.progress.result("finished")

    def _restore(self, state: metadata.CheckpointState) -> None:
        self.progress = Progress(**state["progress"])
        self.run_name = experiment_folder.run_name(self.config, state["run_name"])
        self.learner.restore(state, self.progress.step)

    def _open_metrics(self) -> Metrics:
        found: list[Sink] = []  # stays empty off rank 0
        references = self.judge.references()
        self.world.run_on_rank0(
            lambda: found.extend(
                sinks.open_sinks(self.config, self.run_name, self.progress.step, references)
            )
        )
        return Metrics(found)

    def _say(self, text: str) -> None:
        self.metrics.message(text)

    def tell(self, state: RunState, reason: str | None = None) -> None:
        """Writes to `status.json` how the run is."""
        self.status.write(state, self.progress.step, reason)
