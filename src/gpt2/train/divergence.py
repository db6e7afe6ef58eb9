"""Updates with a loss or gradient that is NaN, infinite or a spike: reported and counted. After too
many skipped ones in a row, the run goes back to a checkpoint and skips their data."""

import logging
from dataclasses import replace
from pathlib import Path

from gpt2.base.errors import Diverged
from gpt2.base.text import counted
from gpt2.checkpoint import store
from gpt2.optim import loss_scale, spikes
from gpt2.train import saved_run
from gpt2.train.resume import StartingPoint
from gpt2.train.saved_run import SavedRun
from gpt2.train.state import Update
from gpt2.train.training_run import TrainingRun

logger = logging.getLogger(__name__)


def go_back_if_bad(run: TrainingRun, update: Update) -> None:
    """Counts the update if it is a spike or was skipped. After `max_bad_steps` skipped ones in a
    row, goes back to the newest checkpoint before them. An overflow does not count as such: in
    float16, that is how the scale of the loss is found.

    Raises Diverged if there is no such checkpoint, or if the run went back before: then the data
    is not the cause.
    """
    state, limit = run.state, run.config.optim.max_bad_steps
    if loss_scale.is_too_large(update.loss_scale, update.loss, update.grad_norm):
        state.overflows += 1
        logger.info(
            "step %d: gradients overflow float16 with the loss scaled by %g: no update, and a "
            "smaller scale (%s in all)",
            state.step,
            update.loss_scale,
            counted(state.overflows, "overflow"),
        )
        return
    state.spikes += update.is_spike
    numbers = f"step {state.step}: loss {update.loss}, gradient norm {update.grad_norm}"
    if update.is_spike:
        numbers += (
            f", more than {spikes.LIMIT_STD:g} standard deviations above the last updates "
            f"({counted(state.spikes, 'spike')} in all)"
        )
    if update.applied:
        state.bad_in_a_row = 0
        if update.is_spike:
            logger.warning("%s; --skip_spikes would skip it", numbers)
        return
    state.bad_steps += 1
    state.bad_in_a_row += 1
    logger.warning(
        "%s: no update (%d in a row, %d in all)", numbers, state.bad_in_a_row, state.bad_steps
    )
    run.notices.skipped(state, numbers)
    if state.bad_in_a_row < limit:
        return
    updates = f"{counted(limit, 'update')} in a row, up to step {state.step}"
    reason = f"{updates}, had no finite loss or gradient"
    if run.config.optim.skip_spikes:
        reason += ", or a spike"
    if state.left_out is not None:
        raise Diverged(
            f"{reason}, also after skipping the data of steps {state.left_out[0] + 1} to "
            f"{sum(state.left_out)}; use a lower --learning_rate from an earlier checkpoint"
        )
    first = state.step - state.bad_in_a_row
    path = run.world.run_on_rank0(lambda: _newest_checkpoint(run, up_to_step=first))
    if path is None:
        raise Diverged(
            f"{reason}, and there is no checkpoint to go back to; use a lower --learning_rate, "
            "a longer --warmup_steps or a smaller --checkpoint_interval"
        )
    _go_back(run, path, left_out=(first, state.bad_in_a_row))
    run.notices.went_back(run.state.step, f"{reason}; their data is skipped")


def _newest_checkpoint(run: TrainingRun, up_to_step: int) -> Path | None:
    """The newest undamaged checkpoint of this run up to a step, or the one that it resumed from."""
    run.saver.wait()
    candidates = [
        item
        for item in store.list_checkpoints(run.config.checkpoint.checkpoint_dir)
        if item.training.step <= up_to_step and item.metadata.sequence not in run.earlier_saves
    ]
    good = store.newest_good(candidates)
    if good is not None:
        return good.path
    return run.resumed_from if run.first_step <= up_to_step else None


def _go_back(run: TrainingRun, path: Path, left_out: tuple[int, int]) -> None:
    before = run.state
    run.loader.close()
    trust = run.config.checkpoint.trust_checkpoint
    checkpoint = saved_run.load(path, trust=trust, world=run.world, parts=SavedRun)
    start = StartingPoint(path, checkpoint)
    state = start.train_state(run.world, start.validations(run.config, run.data))
    run.state = replace(
        state,
        bad_steps=before.bad_steps,
        spikes=before.spikes,
        overflows=before.overflows,
        bad_in_a_row=0,
        left_out=left_out,
    )
    with saved_run.explained(path):
        run.replica.load_state_dict(checkpoint, run.state.step)
    run.saver.assume_saved(run.state.step)
    run.metrics.close()
    run.open()
    logger.warning(
        "back to step %d (%s); the data of steps %d to %d is skipped from here on",
        run.state.step,
        path,
        left_out[0] + 1,
        sum(left_out),
    )
