"""Random streams of the order of data, and permutations that are computed, not stored. Pure."""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
ROUNDS_PER_BIT = 6
LEAST_BITS = 8
"""a small count has the rounds of a count of 256, as few rounds leave some orders likelier"""
LARGEST_COUNT = 1 << 62
"""of items; sums of two indices fit into 64 bits"""


def generator(seed: int, key: int, stream: int = 0) -> np.random.Generator:
    """An independent stream of random numbers for each triple of seed, key and stream."""
    counter = [0, 0, 0, stream]  # the highest word: streams never overlap
    return np.random.Generator(np.random.Philox(key=[seed, key], counter=counter))


def permuted(indices: Indices, count: int, random: np.random.Generator) -> Indices:
    """Where a random permutation of `count` items takes each of `indices`.

    It is a swap-or-not network (Hoang, Morris, Rogaway 2012): every round pairs each index with
    another one, and a pseudorandom bit of the pair says whether the two are swapped. So it is a
    bijection for every count, without a table and without cycle walking.

    After r rounds, the places of any q items together are at most
    count^1.5 / (r + 2) * ((count + q) / (2 count))^(r / 2 + 1) away from uniform in total variation
    (the paper's bound on mixing). With `rounds` that is less than 1 / count for a tenth of all
    items, and at most 2 % for 40 % of them. For all items the bound says nothing; for counts so
    small that the distance can be computed, it is below 1e-9.
    """
    sums = random.integers(count, size=rounds(count), dtype=np.uint64)
    keys = random.integers(1 << 64, size=rounds(count), dtype=np.uint64)
    places, divisor = indices.astype(np.uint64), np.uint64(count)
    for total, key in zip(sums + divisor, keys, strict=True):
        partners = (total - places) % divisor
        is_swapped = _bits(np.maximum(places, partners), key)
        places = np.where(is_swapped, partners, places)
    return places.astype(np.int64)


def rounds(count: int) -> int:
    """The rounds that `permuted` takes for `count` items, 6 for each bit of an index."""
    return ROUNDS_PER_BIT * max(LEAST_BITS, (count - 1).bit_length())


def _bits(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.bool_]:
    """A pseudorandom bit of each value: the highest one of SplitMix64's output function (Steele,
    Lea, Flood 2014, figure 17) of value and key."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed >= np.uint64(1 << 63)
