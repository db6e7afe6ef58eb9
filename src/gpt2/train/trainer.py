"""Pretraining, from top to bottom: `train` is the loop, `train_step` one update of the weights.

At step N, N updates are done, and the next one trains on step N of the sampler. What is due at N
(a checkpoint, validation, HellaSwag, samples) happens before that update. The parts that the loop
uses are built by `setup.build`; each of them decides for itself whether it is due.

Shapes: B rows, T time.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from gpt2.base.errors import Diverged, WrongContent, is_of_a_name
from gpt2.checkpoint import random_state
from gpt2.config.lr_schedule import lr_at
from gpt2.config.run import RunConfig
from gpt2.data.loader import MicroBatch
from gpt2.distributed import rendezvous
from gpt2.distributed.device import DeviceTimestamp
from gpt2.distributed.gpu_usage import GpuUsage
from gpt2.distributed.signals import StopRequest
from gpt2.distributed.world import World
from gpt2.optim.build import gradient_norm, set_learning_rate
from gpt2.train import divergence, experiment_folder, memory_snapshot, setup
from gpt2.train.loss_sums import LossSums, corpus_losses
from gpt2.train.notices import Notices
from gpt2.train.replica import Replica
from gpt2.train.report import Report, always_go
from gpt2.train.resume import Configure
from gpt2.train.state import RunResult, Update
from gpt2.train.stop_vote import StopVote
from gpt2.train.training_run import TrainingRun

logger = logging.getLogger(__name__)


def train(run: TrainingRun) -> RunResult:
    """Trains until the last step, or until a stop is requested."""
    while run.state.step < run.total_steps:
        run.save_if_due()
        run.evaluate_if_due()
        learning_rate = lr_at(run.state.step, run.schedule)
        batch_tokens = run.tokens_of(run.state.step)
        micro_batches = run.next_micro_batches()
        update = micro_batches and train_step(
            run.replica, micro_batches, batch_tokens, learning_rate, run.stop_vote
        )
        if not update:
            return run.stopped()
        run.announce_epochs()
        run.state.step += 1
        run.log_step(update, learning_rate)
        divergence.go_back_if_bad(run, update)
    return run.finished()


def train_step(
    replica: Replica,
    micro_batches: Sequence[MicroBatch],
    batch_tokens: int,
    learning_rate: float,
    stop_vote: StopVote | None = None,
) -> Update | None:
    """One update of the weights from this rank's share of a step.

    A micro-batch is tokens and targets, (B, T) int64, and of a mixture corpora, (B). The loss is
    the mean over the `batch_tokens` of all ranks; DDP averages gradients, hence the factor before
    `backward`. An update whose loss or gradient norm is NaN or infinite is skipped on every rank,
    and so is a spike if the run skips spikes. Raises TrainingError if memory is too small.

    A rank that receives a stop request leaves out its micro-batches but the last, before which the
    ranks agree. If they stop, returns None: weights, moments and random streams are as before.
    """
    world, optim, loss_scale = replica.world, replica.config.optim, replica.loss_scale
    started = computed = DeviceTimestamp(world.device)
    streams = random_state.rng_state(world.device)
    sums = LossSums(replica.corpus_count, world.device)
    with replica.out_of_memory_explained(*micro_batches[0][0].shape):
        for number, micro_batch in enumerate(micro_batches, 1):
            is_last = number == len(micro_batches)
            if stop_vote and is_last and stop_vote.is_to_stop():
                replica.optimizer.zero_grad(set_to_none=True)
                random_state.set_rng_state(streams, world.device)
                return None
            if stop_vote and stop_vote.is_requested and not is_last:
                continue
            tokens_BT, targets_BT, *corpora_B = world.to_device(*micro_batch)
            with replica.exchanging_gradients(is_last):
                loss, losses_B = replica.losses(tokens_BT, targets_BT)
                if is_last:
                    computed = DeviceTimestamp(world.device)
                (loss * loss_scale.times(world.size / batch_tokens)).backward()
            sums.add(loss, losses_B, *corpora_B)
        grad_norm = loss_scale.unscaled(gradient_norm(replica.model))
        loss, norm, *of_corpora = world.all_reduce_sum(sums.with_norm(grad_norm))
        numbers = torch.stack([loss / batch_tokens, norm / world.size])
        is_applied, is_spike = replica.spikes.add(numbers, optim.skip_spikes)
        set_learning_rate(replica.optimizer, learning_rate)
        replica.optimizer.clip_and_step(grad_norm, optim.grad_clip, is_applied, loss_scale.scale)
        replica.optimizer.zero_grad(set_to_none=True)
        scale = loss_scale.update(norm)
    finished = DeviceTimestamp(world.device)
    gpu = world.measure_gpu()  # while the device computes
    outcome = torch.stack([*numbers, is_applied, is_spike, scale, *of_corpora]).tolist()
    ranks = world.gather([computed.since(started), *gpu])
    return Update(
        loss=outcome[0],
        grad_norm=outcome[1],
        applied=bool(outcome[2]),
        is_spike=bool(outcome[3]),
        loss_scale=outcome[4] or None,
        elapsed_s=finished.since(started),
        rank_s=[computed_s for computed_s, *_ in ranks],
        rank_gpu=[GpuUsage(*usage).known() for _, *usage in ranks],
        corpus_losses=corpus_losses(outcome[5:], replica.config.model.block_size),
    )


def run(
    run_config: RunConfig,
    report: Report = always_go,
    run_name: str | None = None,
    on_failure: Callable[[Exception], None] | None = None,
    configure: Configure | None = None,
    notices: Notices | None = None,
) -> RunResult:
    """Trains until the last step or a stop request, from scratch or from a checkpoint.

    `report` is called on rank 0: with step, total_steps, loss and tokens_per_s after each update,
    with step and val_loss or hellaswag (acc_norm) when these are measured. It steers: "stop" saves
    and returns, "prune" only returns. `run_name` is what logs call a new run, by default its preset
    (or experiment) and time. With several ranks, any error but a UserError ends the process; the
    first rank that fails calls `on_failure(error)` first. `configure` is called on rank 0 once the
    checkpoint is found; without it, `run_config` is complete and takes nothing from a checkpoint.
    `notices` of rank 0 posts what happens to the run. Raises UserError for what the user can fix.
    """
    notices, gpu_id = notices or Notices(), run_config.experiment.gpu_id
    with (
        rendezvous.join(run_config.machine, gpu_id, on_failure) as world,
        notices.posting_failure(),  # here, too, as `join` may end the process
    ):
        resolved = world.run_on_rank0(lambda: experiment_folder.resolve(run_config))
        name = world.run_on_rank0(lambda: run_name or experiment_folder.run_name(resolved))
        world.run_on_rank0(lambda: experiment_folder.require_possible(resolved))
        recording = memory_snapshot.recording(resolved.watch, world.device)
        with setup.claimed_folder(resolved, world, notices), recording:
            stop = StopRequest()
            training_run = setup.build(resolved, name, world, report, stop, configure, notices)
            with stop:  # until the last checkpoint is on the disk
                return _train_and_close(training_run, world)


def _train_and_close(run: TrainingRun, world: World) -> RunResult:
    """Trains, waits for the last checkpoint and closes the run, however it ends."""
    try:
        result = train(run)
    except KeyboardInterrupt:  # the second Ctrl+C: leave at once
        run.ended("stopped", "interrupted")
        raise
    except BaseException as error:
        if isinstance(error, Diverged | WrongContent):
            run.ended("stopped", str(error))
        else:
            if world.size == 1 and is_of_a_name(error):
                # The command prints a line of it; of several ranks, the watchdog logs it.
                logger.exception("the run failed:")
            run.ended("failed", world.reason(error))
        run.close()
        raise
    run.close()
    return result
