"""What a run logs before its first step: what trains, on what, and where it is kept."""

import logging
from collections.abc import Iterator

from gpt2.base.text import counted
from gpt2.config import lr_schedule, mixture, options
from gpt2.config.run import RunConfig
from gpt2.data.training_data import TrainingData
from gpt2.distributed import device_name
from gpt2.distributed.world import World
from gpt2.metrics import sinks
from gpt2.train import experiment_folder
from gpt2.train.micro_batch import FittedRows
from gpt2.train.replica import Replica
from gpt2.train.resume import StartingPoint
from gpt2.train.status import Plan
from gpt2.train.training_run import TrainingRun

logger = logging.getLogger(__name__)


def log(run: TrainingRun, data: TrainingData, plan: Plan, start: StartingPoint) -> None:
    """Logs the banner of a run; every rank calls it."""
    warnings = [run.evaluator.warning, lr_schedule.warning(run.schedule, run.total_steps)]
    if start.checkpoint is not None:
        rows = {name: sum(of) for name, of in run.dataset.rows_per_shard.items()}
        warnings.append(start.rate_warning(run.config, rows, run.state.step))
        warnings.append(_validation_warning(run, data, start))
        notes = start.notes(run.config, run.world, data)
        logger.info("Resuming from:")
        for note in (f"Step: {run.state.step}", f"Epoch: {run.next_epoch()}", *notes):
            logger.info("  - %s", note)
    for warning in filter(None, warnings):
        logger.warning(warning)
    for line in (
        _model_line(plan, run.replica),
        *_device_lines(run.world),
        *_data_lines(run, data),
        _plan_line(plan, run),
        *_rows_lines(run.replica, start.fitted_rows),
        *_folder_lines(run.config, plan.run_name),
    ):
        logger.info(line)


def _validation_warning(run: TrainingRun, data: TrainingData, start: StartingPoint) -> str | None:
    """What to say of a validation on another number of rows; None if it has the same, if there is
    none, and if it is of more corpora, which `StartingPoint.notes` says."""
    before, now = start.validations(run.config, data)
    is_off = run.config.evaluation.eval_interval is None
    if is_off or before == now or before.corpora != now.corpora or start.checkpoint is None:
        return None
    typed_before = options.of_stored(start.checkpoint["config"]).eval_rows
    return (
        f"validation: on {counted(before.rows, 'row')} before, on {now.rows} from here, so val "
        "loss does not compare with before, and the best checkpoint is one from here on; "
        f"--eval_rows {typed_before} leaves it as it was"
    )


def _model_line(plan: Plan, replica: Replica) -> str:
    weights = sum(part.numel() for part in replica.model.parameters())
    kind = str(replica.dtype).removeprefix("torch.")
    where = f"{plan.world_size} × {plan.device}, {kind}"
    return f"Run {plan.run_name}: {weights / 1e6:.1f} M parameters on {where}"


def _device_lines(world: World) -> list[str]:
    """One line on rank 0, none on other ranks; every rank calls it."""
    names = world.gather_objects(device_name.of(world.device))
    return [device_name.line(names)] if names else []


def _data_lines(run: TrainingRun, data: TrainingData) -> list[str]:
    (first, *_) = data.corpora.values()
    where = "of " + ", ".join(data.corpora) if data.is_mixture else first.storage.root
    lines = [
        f"Data {where}: {data.tokens('train'):,} training tokens in "
        f"{counted(data.shard_count('train'), 'shard')}, {data.tokens('val'):,} for validation"
    ]
    if data.is_mixture:
        lines += (f"  - {line}" for line in _mixture_lines(run))
    caches = {index.cache for index in data.corpora.values() if index.storage.path is None}
    return lines + [f"  - {cache}" for cache in caches]


def _mixture_lines(run: TrainingRun) -> Iterator[str]:
    """The share of each corpus in each phase that is not over, and its epochs in the whole run."""
    state = run.state
    for phase in mixture.phases_from(run.phases, state.data_step(state.step)):
        shares = (f"{share:.1%} {name}" for name, share in phase.shares.items() if share)
        yield f"from step {state.step_that_reads(phase.first_step)} on: {', '.join(shares)}"
    of_corpora = run.sampler.corpus_epochs(state.data_step(run.total_steps))
    for (name, index), epochs in zip(run.data.corpora.items(), of_corpora, strict=True):
        steps = counted(run.total_steps, "step")
        line = f"{name} ({index.storage.root}): {epochs:.2f} epochs in {steps}"
        yield line if index.of("val") else f"{line}, without validation"


def _plan_line(plan: Plan, run: TrainingRun) -> str:
    ramp, block_size = run.sampler.ramp, plan.block_size
    accumulation = run.config.grad_accum_steps(plan.world_size, run.replica.mini_batch_size)
    sizes = [
        f"{phase.rows_per_step * block_size:,} up to step "
        f"{run.state.step_that_reads(phase.until_step):,}, "
        for phase in ramp.phases
    ]
    then = "then " if sizes else ""
    return (
        f"Plan: {counted(plan.total_steps, 'step')} of {''.join(sizes)}{then}"
        f"{ramp.rows_per_step * block_size:,} tokens (gradient accumulation {accumulation}), "
        f"{ramp.rows_before(plan.total_steps) / plan.rows_per_epoch:.2f} epochs"
    )


def _rows_lines(replica: Replica, before: FittedRows | None) -> list[str]:
    """How many rows were found to fit, and why it is another number than in the checkpoint."""
    found = replica.fitted_rows
    if found is None:
        return []
    flag = "--auto_mini_batch" if replica.config.data.auto_mini_batch else "--mini_batch_size auto"
    line = f"  - {flag}: {counted(found.rows, 'row')} at once"
    if before is not None and before.rows != found.rows:
        causes = {
            "another --mini_batch_size": before.requested != found.requested,
            "a GPU with other memory": before.memory_bytes != found.memory_bytes,
            "another share of a step for each rank": before.rows_per_rank != found.rows_per_rank,
        }
        reason = ", ".join(name for name, holds in causes.items() if holds) or "less free memory"
        line += f", {before.rows} before ({reason}); each step trains on the same tokens"
    return [line]


def _folder_lines(run_config: RunConfig, run_name: str) -> list[str]:
    folder, link = run_config.checkpoint.checkpoint_dir, experiment_folder.link(run_config)
    kept = [f"checkpoints {folder}", *sinks.places(run_config, run_name)]
    line = "Kept in: " + ", ".join(kept)
    return [line] if link is None else [line, f"Checkpoint will be saved as {link}"]
