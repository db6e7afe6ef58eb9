"""Faults of the data that a rank notices while it trains: they end the run on all ranks."""

from collections.abc import Iterable

import numpy as np

from gpt2.base.errors import DataError
from gpt2.data.digests import Fault
from gpt2.data.sampler import Sampler
from gpt2.data.shards import DatasetIndex
from gpt2.distributed.world import World
from gpt2.train.state import TrainState


def raise_first(data: DatasetIndex, world: World, sampler: Sampler, state: TrainState) -> None:
    """Raises DataError on all ranks if one of them has noticed a fault; every rank calls it, after
    the step is saved."""
    faults = world.gather_objects(data.content.fault)

    def raise_it() -> None:
        if fault := next(filter(None, faults), None):
            text = description(fault, data, sampler, state)
            raise DataError(f"stopped after step {state.step}, which is saved; {text}")

    world.run_on_rank0(raise_it)


def description(fault: Fault, data: DatasetIndex, sampler: Sampler, state: TrainState) -> str:
    """What is wrong, and which step may have read it first."""
    train = [shard.file for shard in data.of("train")]
    if fault.unverified is None:
        return f"step {state.step + 1} would have been the first to read {fault.reason}"
    if fault.unverified not in train:
        return f"validation may have read {fault.reason}"
    first = state.step_that_reads(sampler.first_step_with(train.index(fault.unverified))) + 1
    if first > state.step:
        return f"no step has read {fault.reason}"
    return f"step {first} is the first that may have read {fault.reason}"


def files_read(data: DatasetIndex, sampler: Sampler, steps: Iterable[int]) -> set[str]:
    """The files of the validation split, and of the shards that `steps` of the sampler read."""
    numbers = {int(one) for step in steps for one in np.unique(sampler.rows(step)[:, 0])}
    train = data.of("train")
    return {shard.file for shard in (*data.of("val"), *(train[number] for number in numbers))}
