"""What a run says of itself before its first step: what trains, on what, and where it is kept."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpt2 import sinks
from gpt2.data.shards import Catalog
from gpt2.status import Plan
from gpt2.tables import counted

if TYPE_CHECKING:
    from gpt2.train import Training


def plan(training: "Training") -> Plan:
    run_config = training.config
    return Plan(
        run_name=training.run_name,
        preset=run_config.preset,
        total_steps=training.total_steps,
        rows_per_step=run_config.rows_per_step,
        rows_per_epoch=training.order.rows_per_epoch,
        block_size=run_config.model.block_size,
        checkpoint_interval=run_config.checkpoint.checkpoint_interval,
        world_size=training.world.size,
        device=training.world.device.type,
        log_file=str(sinks.log_file(run_config).resolve()),
    )


def lines(training: "Training", data: Catalog) -> Iterator[str]:
    run_config, world, learner = training.config, training.world, training.learner
    for warning in training.judge.warnings:
        yield f"WARNING: {warning}"
    if training.start.state is not None:
        yield f"Loading checkpoint from: {training.start.path}"
        yield "Resuming from:"
        yield f"  - Step: {training.progress.step}"
        yield f"  - Epoch: {training.next_epoch()}"
        for note in training.start.notes(run_config, world):
            yield f"  - {note}"
    weights = sum(part.numel() for part in learner.model.parameters())
    kind = str(learner.dtype).removeprefix("torch.")
    where = f"{world.size} × {world.device.type}, {kind}"
    yield f"Run {training.run_name}: {weights / 1e6:.1f} M parameters on {where}"
    shards = counted(len(training.train_shards.shards), "shard")
    yield (
        f"Data {data.storage.root}: {data.tokens('train'):,} training tokens in {shards}, "
        f"{data.tokens('val'):,} for validation"
    )
    if data.storage.path is None:
        yield f"  - {data.cache}"
    accumulation = run_config.grad_accum_steps(world.size, learner.mini_batch_size)
    epochs = training.total_steps * run_config.rows_per_step / training.order.rows_per_epoch
    yield (
        f"Plan: {training.total_steps:,} steps of {run_config.data.total_batch_size:,} tokens "
        f"(gradient accumulation {accumulation}), {epochs:.2f} epochs"
    )
    if run_config.data.auto_mini_batch:
        yield f"  - --auto_mini_batch: {learner.mini_batch_size} rows at once"
    folder = run_config.checkpoint.checkpoint_dir
    kept = [f"checkpoints {folder}", *sinks.places(run_config, training.run_name)]
    yield "Kept in: " + ", ".join(kept)
    if training.link is not None:
        yield f"Checkpoint will be saved as {training.link}"
