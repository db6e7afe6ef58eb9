"""Faults of the data that a rank notices while it trains: they end the run on all ranks."""

import itertools
from collections.abc import Iterable

import numpy as np

from gpt2.base.errors import DataError, WrongContent
from gpt2.data.digests import Fault
from gpt2.data.sampler import Sampler
from gpt2.data.training_data import TrainingData
from gpt2.distributed.world import World
from gpt2.train.state import TrainState


def raise_first(data: TrainingData, world: World, sampler: Sampler, state: TrainState) -> None:
    """Raises DataError on all ranks if one of them has noticed a fault, WrongContent if a shard
    does not hold what it should; every rank calls it, after the step is saved."""
    faults = world.gather_objects(data.fault())

    def raise_it() -> None:
        if found := next(filter(None, faults), None):
            corpus, fault = found
            kind = DataError if fault.may_pass else WrongContent
            raise kind(
                f"{fault.reason}; {extent(fault, corpus, data, sampler, state)}; stopped after "
                f"step {state.step}, which is saved"
            )

    world.run_on_rank0(raise_it)


def extent(
    fault: Fault, corpus: str, data: TrainingData, sampler: Sampler, state: TrainState
) -> str:
    """What has used the shard of a corpus, if anything has."""
    train = [shard.file for shard in data.corpora[corpus].of("train")]
    if fault.unverified is None:
        return "no step has used it"
    if fault.unverified not in train:
        return "validation may have used it"
    first_shard = sampler.first_shards[list(data.corpora).index(corpus)]
    data_step = sampler.first_step_with(first_shard + train.index(fault.unverified))
    if data_step is None or state.step_that_reads(data_step) >= state.step:
        return "no step has used it"
    return f"step {state.step_that_reads(data_step) + 1} may have used it first"


def files_read(data: TrainingData, sampler: Sampler, steps: Iterable[int]) -> dict[str, set[str]]:
    """By corpus, the files of the validation split, and of the shards that `steps` of the sampler
    read."""
    numbers = {int(one) for step in steps for one in np.unique(sampler.rows(step)[:, 0])}
    ranges = itertools.pairwise(sampler.first_shards)
    found = dict[str, set[str]]()
    for (name, index), (first, end) in zip(data.corpora.items(), ranges, strict=True):
        train = index.of("train")
        read = [train[number - first] for number in numbers if first <= number < end]
        found[name] = {shard.file for shard in (*index.of("val"), *read)}
    return found
