"""Random streams of the order of data, and permutations that are computed, not stored. Pure."""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
ROUNDS_PER_BIT = 6
LARGEST_COUNT = 1 << 62
"""of items; sums of two indices fit into int64"""


def generator(seed: int, key: int, stream: int = 0) -> np.random.Generator:
    """An independent stream of random numbers for each triple of seed, key and stream."""
    counter = [0, 0, 0, stream]  # the highest word: streams never overlap
    return np.random.Generator(np.random.Philox(key=[seed, key], counter=counter))


def permuted(indices: Indices, count: int, random: np.random.Generator) -> Indices:
    """Where a random permutation of `count` items takes each of `indices`.

    It is a swap-or-not network (Hoang, Morris, Rogaway 2012, section 1): every round pairs each
    index with another one, and a pseudorandom bit of the pair says whether the two are swapped. So
    it is a bijection for every count, without a table. 6 log2(count) rounds are what the paper
    proves to be enough (section 3).
    """
    rounds = ROUNDS_PER_BIT * max(1, (count - 1).bit_length())
    sums = random.integers(count, size=rounds)
    keys = random.integers(1 << 64, size=rounds, dtype=np.uint64)
    places = indices.copy()
    for total, key in zip(sums.tolist(), keys, strict=True):
        partners = total - places
        partners[partners < 0] += count
        is_swapped = _bits(np.maximum(places, partners), key)
        np.copyto(places, partners, where=is_swapped)
    return places


def _bits(values: Indices, key: np.uint64) -> npt.NDArray[np.bool_]:
    """A pseudorandom bit of each value: the highest one of SplitMix64's output function (Steele,
    Lea, Flood 2014, figure 17) of value and key."""
    mixed = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(63)).astype(np.bool_)
