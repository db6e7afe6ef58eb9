"""What a run says of itself before its first step: what trains, on what, and where it is kept."""

from pathlib import Path

from gpt2.base.text import counted
from gpt2.config.run import RunConfig
from gpt2.data.sampler import Sampler
from gpt2.data.shards import DatasetIndex, TokenDataset
from gpt2.distributed.world import World
from gpt2.metrics import sinks
from gpt2.train.learner import Learner
from gpt2.train.status import Plan


def lines(
    run_config: RunConfig,
    plan: Plan,
    data: DatasetIndex,
    shards: TokenDataset,
    learner: Learner,
    link: Path | None,
) -> list[str]:
    return [
        _of_model(plan, learner),
        *_of_data(data, shards),
        *_of_plan(plan, run_config, learner.mini_batch_size),
        *_of_places(run_config, plan.run_name, link),
    ]


def _of_model(plan: Plan, learner: Learner) -> str:
    weights = sum(part.numel() for part in learner.model.parameters())
    kind = str(learner.dtype).removeprefix("torch.")
    where = f"{plan.world_size} × {plan.device}, {kind}"
    return f"Run {plan.run_name}: {weights / 1e6:.1f} M parameters on {where}"


def _of_data(data: DatasetIndex, shards: TokenDataset) -> list[str]:
    line = (
        f"Data {data.storage.root}: {data.tokens('train'):,} training tokens in "
        f"{counted(len(shards.shards), 'shard')}, {data.tokens('val'):,} for validation"
    )
    return [line] if data.storage.path is not None else [line, f"  - {data.cache}"]


def _of_plan(plan: Plan, run_config: RunConfig, mini_batch_size: int) -> list[str]:
    accumulation = run_config.grad_accum_steps(plan.world_size, mini_batch_size)
    line = (
        f"Plan: {plan.total_steps:,} steps of {run_config.data.total_batch_size:,} tokens "
        f"(gradient accumulation {accumulation}), "
        f"{plan.total_steps * plan.rows_per_step / plan.rows_per_epoch:.2f} epochs"
    )
    if not run_config.data.auto_mini_batch:
        return [line]
    return [line, f"  - --auto_mini_batch: {mini_batch_size} rows at once"]


def _of_places(run_config: RunConfig, run_name: str, link: Path | None) -> list[str]:
    folder = run_config.checkpoint.checkpoint_dir
    kept = [f"checkpoints {folder}", *sinks.places(run_config, run_name)]
    line = "Kept in: " + ", ".join(kept)
    return [line] if link is None else [line, f"Checkpoint will be saved as {link}"]


def plan_of(
    run_config: RunConfig, run_name: str, total_steps: int, order: Sampler, world: World
) -> Plan:
    """What `status.json` says of it."""
    return Plan(
        run_name=run_name,
        preset=run_config.preset,
        total_steps=total_steps,
        rows_per_step=run_config.rows_per_step,
        rows_per_epoch=order.rows_per_epoch,
        block_size=run_config.model.block_size,
        checkpoint_interval=run_config.checkpoint.checkpoint_interval,
        world_size=world.size,
        device=world.device.type,
        log_file=str(sinks.log_file(run_config).resolve()),
    )
