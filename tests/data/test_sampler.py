from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt2.data import sampler
from gpt2.data.sampler import Sampler

orders = st.builds(
    Sampler,
    rows_per_shard=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any).map(tuple),
    rows_per_step=st.integers(1, 30),
    seed=st.integers(0, 2**32),
    shuffle=st.sampled_from(["shards", "rows", "none"]),
)
worlds = st.integers(1, 8)


def epoch_rows(line: Sampler, epoch: int) -> list[tuple[int, int]]:
    """An epoch's list, spelled out by reading the epoch as one step."""
    return list(map(tuple, replace(line, rows_per_step=line.rows_per_epoch).rows(epoch).tolist()))


@given(orders, st.integers(0, 40))
def test_a_step_is_a_portion_of_the_spelled_out_epochs(line: Sampler, step: int):
    spelled_out: list[tuple[int, int]] = []
    epoch = 0
    while len(spelled_out) < (step + 1) * line.rows_per_step:
        spelled_out += epoch_rows(line, epoch)
        epoch += 1
    first = step * line.rows_per_step
    assert (
        list(map(tuple, line.rows(step).tolist()))
        == (spelled_out[first : first + line.rows_per_step])
    )


@given(orders, st.integers(0, 100), worlds, st.integers(1, 9))
def test_ranks_and_micro_batches_share_the_step_out(
    line: Sampler, step: int, world_size: int, mini_batch_size: int
):
    shares = [line.rows(step, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), line.rows(step))
    micros = [micro for rows in shares for micro in sampler.micro_batches(rows, mini_batch_size)]
    assert np.array_equal(np.concatenate(micros), line.rows(step))
    assert all(len(micro) <= mini_batch_size for micro in micros)


@given(orders, st.integers(0, 5))
def test_an_epoch_reads_its_shards_one_after_another(line: Sampler, epoch: int):
    rows = epoch_rows(line, epoch)
    shards = [shard for shard, _ in rows]
    expected = [
        shard for shard in line.shards_of(epoch).tolist() for _ in range(line.rows_per_shard[shard])
    ]
    assert shards == expected
    in_order = [row for shard in line.shards_of(epoch) for row in range(line.rows_per_shard[shard])]
    if line.shuffle != "rows":
        assert [row for _, row in rows] == in_order


@given(orders, st.integers(0, 40))
def test_the_shard_after_a_step_is_the_next_one_that_is_read(line: Sampler, step: int):
    last = (step + 1) * line.rows_per_step - 1
    epochs = range(last // line.rows_per_epoch + 2)
    read = [(epoch, shard) for epoch in epochs for shard, _ in epoch_rows(line, epoch)]
    assert line.shard_after(step) == next(
        shard for epoch, shard in read[last:] if (epoch, shard) != read[last]
    )


@given(st.integers(0, 1000), worlds)
def test_shares_differ_by_at_most_one(count: int, world_size: int):
    sizes = [len(sampler.share(count, rank, world_size)) for rank in range(world_size)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@given(orders)
def test_every_row_of_an_epoch_is_seen_once(line: Sampler):
    epochs = 3
    steps = range(-(-epochs * line.rows_per_epoch // line.rows_per_step))
    seen = np.concatenate([line.rows(step) for step in steps])
    for epoch in range(epochs):
        part = seen[epoch * line.rows_per_epoch : (epoch + 1) * line.rows_per_epoch]
        assert sorted(map(tuple, part.tolist())) == [
            (shard, row) for shard, count in enumerate(line.rows_per_shard) for row in range(count)
        ]


@given(orders, st.integers(1, 20))
def test_epoch_boundaries(line: Sampler, epoch: int):
    first = line.first_step_of(epoch)
    assert line.epoch_at(first) >= epoch
    assert line.epoch_at(first - 1) < epoch


def test_epoch_0_is_in_name_order_and_later_ones_are_shuffled_by_seed_and_epoch():
    rows = (1,) * 50
    line, same, other = (Sampler(rows, 5, seed) for seed in (1, 1, 2))
    assert line.shards_of(0).tolist() == list(range(50))
    permutations = {tuple(line.shards_of(epoch)) for epoch in range(20)}
    assert len(permutations) == 20
    assert line.shards_of(7).tolist() == same.shards_of(7).tolist()
    assert line.shards_of(7).tolist() != other.shards_of(7).tolist()


def test_the_permutation_never_changes_between_versions():
    """A run that is resumed after an upgrade must see the rows that it would have seen."""
    line = Sampler((8, 8), 16, seed=1337, shuffle="rows")
    assert line.rows(2)[:, 1].tolist() == [4, 0, 2, 5, 1, 6, 3, 7, 6, 5, 7, 3, 4, 1, 0, 2]
    assert Sampler((1,) * 8, 1, seed=1337).shards_of(1).tolist() == [1, 6, 4, 7, 3, 5, 0, 2]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5).map(tuple), st.integers(1, 300))
def test_spread_rows_are_distinct_and_cover_the_split(rows_per_shard: tuple[int, ...], count: int):
    rows = list(map(tuple, sampler.spread(rows_per_shard, count).tolist()))
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
