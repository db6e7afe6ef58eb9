"""Faults of the data that a rank notices while it trains: they end the run on all ranks."""

from collections.abc import Iterable

import numpy as np

from gpt2.base.errors import DataError, WrongContent
from gpt2.data.digests import Fault
from gpt2.data.sampler import Sampler
from gpt2.data.shards import DatasetIndex
from gpt2.distributed.world import World
from gpt2.train.state import TrainState


def raise_first(data: DatasetIndex, world: World, sampler: Sampler, state: TrainState) -> None:
    """Raises DataError on all ranks if one of them has noticed a fault, WrongContent if a shard
    does not hold what it should; every rank calls it, after the step is saved."""
    faults = world.gather_objects(data.content.fault)

    def raise_it() -> None:
        if fault := next(filter(None, faults), None):
            kind = DataError if fault.may_pass else WrongContent
            raise kind(
                f"{fault.reason}; {extent(fault, data, sampler, state)}; stopped after step "
                f"{state.step}, which is saved"
            )

    world.run_on_rank0(raise_it)


def extent(fault: Fault, data: DatasetIndex, sampler: Sampler, state: TrainState) -> str:
    """What has used the shard, if anything has."""
    train = [shard.file for shard in data.of("train")]
    if fault.unverified is None:
        return "no step has used it"
    if fault.unverified not in train:
        return "validation may have used it"
    data_step = sampler.first_step_with(train.index(fault.unverified))
    if data_step is None or state.step_that_reads(data_step) >= state.step:
        return "no step has used it"
    return f"step {state.step_that_reads(data_step) + 1} may have used it first"


def files_read(data: DatasetIndex, sampler: Sampler, steps: Iterable[int]) -> set[str]:
    """The files of the validation split, and of the shards that `steps` of the sampler read."""
    numbers = {int(one) for step in steps for one in np.unique(sampler.rows(step)[:, 0])}
    train = data.of("train")
    return {shard.file for shard in (*data.of("val"), *(train[number] for number in numbers))}
