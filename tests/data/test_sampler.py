from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt2.data import permutation
from gpt2.data.batch_ramp import RampPhase
from gpt2.data.sampler import PERMUTED_AT_ONCE, Sampler, micro_batches, share, spread

ramps = st.lists(
    st.builds(RampPhase, until_step=st.integers(1, 30), rows_per_step=st.integers(1, 30)),
    max_size=3,
    unique_by=lambda phase: phase.until_step,
).map(lambda phases: tuple(sorted(phases, key=lambda phase: phase.until_step)))
samplers = st.builds(
    Sampler,
    rows_per_shard=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any).map(tuple),
    rows_per_step=st.integers(1, 30),
    seed=st.integers(0, 2**32),
    shuffle=st.sampled_from(["shards", "rows", "global", "none"]),
    ramp_phases=ramps,
)
shard_by_shard = samplers.filter(lambda sampler: sampler.shuffle != "global")
worlds = st.integers(1, 8)


def epoch_rows(sampler: Sampler, epoch: int) -> list[tuple[int, int]]:
    """The rows of an epoch, by reading it as one step."""
    by_epoch = replace(sampler, rows_per_step=sampler.rows_per_epoch, ramp_phases=())
    return list(map(tuple, by_epoch.rows(epoch).tolist()))


def size_of(sampler: Sampler, step: int) -> int:
    """Rows of a step, as the phases say it."""
    sizes = [phase.rows_per_step for phase in sampler.ramp_phases if step < phase.until_step]
    return [*sizes, sampler.rows_per_step][0]


def first_row_of(sampler: Sampler, step: int) -> int:
    return sum(size_of(sampler, before) for before in range(step))


@given(samplers, st.integers(0, 40))
def test_a_step_reads_the_next_rows_of_the_listed_epochs(sampler: Sampler, step: int):
    listed: list[tuple[int, int]] = []
    epoch = 0
    first, end = first_row_of(sampler, step), first_row_of(sampler, step + 1)
    while len(listed) < end:
        listed += epoch_rows(sampler, epoch)
        epoch += 1
    assert list(map(tuple, sampler.rows(step).tolist())) == listed[first:end]
    of_rows = [row // sampler.rows_per_epoch for row in range(first, end)]
    assert sampler.epoch_at(step) == of_rows[0]
    assert list(sampler.epochs_of(step)) == sorted({*of_rows})


@given(samplers, st.integers(0, 100), worlds, st.integers(1, 9))
def test_ranks_and_micro_batches_divide_the_rows_of_a_step(
    sampler: Sampler, step: int, world_size: int, mini_batch_size: int
):
    shares = [sampler.rows(step, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), sampler.rows(step))
    micros = [micro for rows in shares for micro in micro_batches(rows, mini_batch_size)]
    assert np.array_equal(np.concatenate(micros), sampler.rows(step))
    assert all(len(micro) <= mini_batch_size for micro in micros)


@given(shard_by_shard, st.integers(0, 5))
def test_an_epoch_reads_its_shards_one_after_another(sampler: Sampler, epoch: int):
    rows = epoch_rows(sampler, epoch)
    shards = [shard for shard, _ in rows]
    expected = [
        shard
        for shard in sampler.corpora[0].shards_of(epoch).tolist()
        for _ in range(sampler.rows_per_shard[shard])
    ]
    assert shards == expected
    in_order = [
        row
        for shard in sampler.corpora[0].shards_of(epoch)
        for row in range(sampler.rows_per_shard[shard])
    ]
    if sampler.shuffle != "rows":
        assert [row for _, row in rows] == in_order


@given(shard_by_shard, st.integers(0, 40))
def test_the_shard_after_a_step_is_the_next_one_that_is_read(sampler: Sampler, step: int):
    last = first_row_of(sampler, step + 1) - 1
    epochs = range(last // sampler.rows_per_epoch + 2)
    read = [(epoch, shard) for epoch in epochs for shard, _ in epoch_rows(sampler, epoch)]
    following = next(shard for epoch, shard in read[last:] if (epoch, shard) != read[last])
    assert sampler.shards_after(step) == [following]


@given(st.integers(0, 1000), worlds)
def test_shares_differ_by_at_most_one(count: int, world_size: int):
    sizes = [len(share(count, rank, world_size)) for rank in range(world_size)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@given(samplers)
def test_every_row_of_an_epoch_is_seen_once(sampler: Sampler):
    epochs = 3
    steps = range(sampler.ramp.steps_for(epochs * sampler.rows_per_epoch))
    seen = np.concatenate([sampler.rows(step) for step in steps])
    assert len(seen) - size_of(sampler, steps[-1]) < epochs * sampler.rows_per_epoch
    for epoch in range(epochs):
        part = seen[epoch * sampler.rows_per_epoch : (epoch + 1) * sampler.rows_per_epoch]
        assert sorted(map(tuple, part.tolist())) == [
            (shard, row)
            for shard, count in enumerate(sampler.rows_per_shard)
            for row in range(count)
        ]


@given(samplers, st.integers(1, 20))
def test_epoch_boundaries(sampler: Sampler, epoch: int):
    first = sampler.first_step_of(epoch)
    assert sampler.epoch_at(first) >= epoch
    assert sampler.epoch_at(first - 1) < epoch


def test_epoch_0_is_in_name_order_and_later_ones_are_shuffled_by_seed_and_epoch():
    rows = (1,) * 50
    sampler, same, other = (Sampler(rows, 5, seed) for seed in (1, 1, 2))
    assert sampler.corpora[0].shards_of(0).tolist() == list(range(50))
    permutations = {tuple(sampler.corpora[0].shards_of(epoch)) for epoch in range(20)}
    assert len(permutations) == 20
    assert sampler.corpora[0].shards_of(7).tolist() == same.corpora[0].shards_of(7).tolist()
    assert sampler.corpora[0].shards_of(7).tolist() != other.corpora[0].shards_of(7).tolist()


def test_the_permutation_never_changes_between_versions():
    """A run that is resumed after an upgrade must see the rows that it would have seen."""
    sampler = Sampler((8, 8), 16, seed=1337, shuffle="rows")
    assert sampler.rows(2)[:, 1].tolist() == [4, 0, 2, 5, 1, 6, 3, 7, 6, 5, 7, 3, 4, 1, 0, 2]
    assert Sampler((1,) * 8, 1, seed=1337).corpora[0].shards_of(1).tolist() == [
        1,
        6,
        4,
        7,
        3,
        5,
        0,
        2,
    ]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5).map(tuple), st.integers(1, 300))
def test_spread_rows_are_distinct_and_cover_the_split(rows_per_shard: tuple[int, ...], count: int):
    rows = list(map(tuple, spread(rows_per_shard, count).tolist()))
    total = sum(rows_per_shard)
    assert len(rows) == len(set(rows)) == min(count, total)
    assert rows == sorted(rows)
    assert all(row < rows_per_shard[shard] for shard, row in rows)
    starts = np.cumsum((0, *rows_per_shard))
    positions = [starts[shard] + row for shard, row in rows]
    gaps = np.diff([*positions, total])
    assert max(gaps) - min(gaps) <= 1


def test_what_shuffle_permutes():
    shapes = {"rows_per_shard": (40, 40, 40), "rows_per_step": 120, "seed": 5}
    none, shards, rows = (Sampler(**shapes, shuffle=kind) for kind in ("none", "shards", "rows"))
    assert epoch_rows(none, 0) == epoch_rows(none, 3) == epoch_rows(shards, 0)
    epochs = [epoch_rows(rows, epoch) for epoch in range(5)]
    assert len({tuple(epoch) for epoch in epochs}) == 5
    inner = {tuple(row for shard, row in epochs[0] if shard == number) for number in range(3)}
    assert len(inner) == 3, "each shard has a permutation of its own"
    assert epochs[2] == epoch_rows(Sampler(**shapes, shuffle="rows"), 2)
    assert epochs[2] != epoch_rows(replace(rows, seed=6), 2)


def test_global_shuffling_permutes_the_rows_of_all_shards_anew_in_every_epoch():
    shapes = {"rows_per_shard": (40, 0, 60, 30), "rows_per_step": 40, "seed": 5}
    sampler = Sampler(**shapes, shuffle="global")
    in_order = epoch_rows(Sampler(**shapes, shuffle="none"), 0)
    epochs = [epoch_rows(sampler, epoch) for epoch in range(5)]
    assert len({tuple(epoch) for epoch in epochs} | {tuple(in_order)}) == 6
    assert all(sorted(epoch) == in_order for epoch in epochs)
    assert all({*sampler.rows(step)[:, 0].tolist()} == {0, 2, 3} for step in range(20))
    assert epochs[2] == epoch_rows(Sampler(**shapes, shuffle="global"), 2)
    assert epochs[2] != epoch_rows(replace(sampler, seed=6), 2)
    assert sampler.shards_after(3) == []


def test_steps_of_a_large_corpus_read_its_permutation_wherever_a_run_is_resumed():
    counts = (PERMUTED_AT_ONCE - 1, 2 * PERMUTED_AT_ONCE, 5000)
    sampler, total = Sampler(counts, 700, seed=3, shuffle="global"), sum(counts)
    places = [
        permutation.permuted(np.arange(total), total, permutation.generator(3, epoch))
        for epoch in range(3)
    ]
    starts = np.cumsum((0, *counts))
    for step in (70, 0, 1, 69, 25, 26, 5, 6, 50):  # at ends of epochs and of blocks among others
        rows = sampler.rows(step)
        expected = np.concatenate(places)[step * 700 : (step + 1) * 700]
        assert np.array_equal(starts[rows[:, 0]] + rows[:, 1], expected)


def test_the_global_permutation_never_changes_between_versions():
    sampler = Sampler((3, 4, 3), 10, seed=1337, shuffle="global")
    assert sampler.rows(1).tolist() == [
        *([1, 0], [1, 2], [2, 1], [0, 2], [1, 3]),
        *([2, 0], [2, 2], [1, 1], [0, 0], [0, 1]),
    ]
