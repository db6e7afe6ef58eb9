import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gpt2.data import permutation
from gpt2.data.permutation import Indices

UNLIKELY = 1e-4
"""probability of a chi-square that no permutation of these tests may have"""


def whole(count: int, seed: int = 1, key: int = 0) -> Indices:
    """Where a permutation takes all of `count` items."""
    return places(range(count), count, seed, key)


def places(indices, count: int, seed: int = 1, key: int = 0) -> Indices:
    random = permutation.generator(seed, key)
    return permutation.permuted(np.array(indices, dtype=np.int64), count, random)


def assert_uniform(found, cells: int, lost: int = 1) -> None:
    """Whether the numbers in `found`, each one of `cells`, are equally frequent, with so many
    degrees of freedom lost."""
    counts = np.bincount(found, minlength=cells)
    assert len(counts) == cells
    expected = counts.sum() / cells
    assert expected >= 5
    chi_square = ((counts - expected) ** 2 / expected).sum()
    probability = stats.chi2.sf(chi_square, cells - lost)
    assert UNLIKELY < probability < 1 - UNLIKELY


@pytest.mark.parametrize("counts", [range(1, 300), [4096, 65_537, 100_000]])
def test_it_is_a_bijection_of_every_count(counts):
    for count in counts:
        assert np.array_equal(np.sort(whole(count)), np.arange(count))


@given(st.integers(1000, permutation.LARGEST_COUNT), st.integers(0, 2**32), st.data())
def test_items_of_a_large_count_have_places_of_their_own(count: int, seed: int, data):
    near = data.draw(st.integers(0, count - 500))
    found = places([*range(near, near + 500)], count, seed)
    assert len(set(found.tolist())) == 500
    assert found.min() >= 0 and found.max() < count


@given(st.integers(1, 3000), st.integers(0, 2**32), st.data())
def test_the_place_of_an_item_does_not_depend_on_what_is_asked_beside_it(count, seed, data):
    asked = data.draw(st.lists(st.integers(0, count - 1), max_size=20))
    assert places(asked, count, seed).tolist() == whole(count, seed)[asked].tolist()


def test_seeds_and_epochs_have_permutations_of_their_own():
    found = {tuple(whole(30, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(found) == 400


def test_a_permutation_never_changes_between_versions():
    """A run that is resumed after an upgrade must see the rows that it would have seen."""
    assert whole(10, seed=1337).tolist() == [2, 4, 9, 5, 8, 3, 0, 1, 7, 6]
    found = places([0, 1, 2**40], 2**41 + 1, seed=1337, key=3)
    assert found.tolist() == [1150953978746, 1642789185697, 2150993036069]


@pytest.mark.parametrize(("count", "seeds"), [(2, 200), (3, 400), (4, 800), (5, 1000)])
def test_every_order_of_a_few_items_is_equally_likely(count: int, seeds: int):
    numbers = {order: n for n, order in enumerate(itertools.permutations(range(count)))}
    found = [numbers[tuple(whole(count, seed).tolist())] for seed in range(seeds)]
    assert_uniform(found, math.factorial(count))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_rounds_are_enough_for_all_orders_of_a_few_items(count: int):
    """The exact distribution after as many rounds, of truly random sums and bits."""
    one_round = Counter[tuple[int, ...]]()
    for total in range(count):
        partner = [(total - place) % count for place in range(count)]
        pairs = sorted({tuple(sorted(pair)) for pair in enumerate(partner)})
        for is_swapped in itertools.product((False, True), repeat=len(pairs)):
            moved = list(range(count))
            for (a, b), swaps in zip(pairs, is_swapped, strict=True):
                if swaps:
                    moved[a], moved[b] = b, a
            one_round[tuple(moved)] += 1 / count / 2 ** len(pairs)
    likely = Counter({tuple(range(count)): 1.0})
    for _ in range(permutation.rounds(count)):
        after = Counter[tuple[int, ...]]()
        for order, p in likely.items():
            for move, q in one_round.items():
                after[tuple(move[place] for place in order)] += p * q
        likely = after
    uniform = 1 / math.factorial(count)
    assert len(likely) == math.factorial(count)
    assert sum(abs(p - uniform) for p in likely.values()) / 2 < 1e-9


@pytest.mark.parametrize("count", [1000, 12_345])
def test_one_item_and_two_have_uniform_places_over_the_seeds(count: int):
    asked = [0, 1, 2, count // 2, count - 1]
    found = np.array([places(asked, count, seed) for seed in range(400)]) * 4 // count
    for item in range(len(asked)):
        assert_uniform(found[:, item], 4)
    for one, other in itertools.combinations(range(len(asked)), 2):
        assert_uniform(4 * found[:, one] + found[:, other], 16)


@pytest.mark.parametrize("key", [0, 1])
@pytest.mark.parametrize("count", [50_000, 2**16])
def test_the_places_of_one_permutation_are_spread_as_chance_would(count: int, key: int):
    """Items and their places, and places of neighbours, fall evenly into cells of a grid."""
    found, cells = whole(count, 7, key), 40
    parts, items = found * cells // count, np.arange(count) * cells // count
    lost = 2 * cells - 1
    assert_uniform(cells * items + parts, cells**2, lost)
    for distance in (1, 2, 64):
        assert_uniform(cells * parts[:-distance] + parts[distance:], cells**2, lost)
    neighbours = np.count_nonzero(np.abs(np.diff(found)) == 1)
    fixed = np.count_nonzero(found == np.arange(count))
    for seen, mean in ((neighbours, 2), (fixed, 1)):
        assert stats.poisson.sf(seen - 1, mean) > UNLIKELY
