"""A pseudo-random order of any number of samples, computed without storing it."""

_ROUNDS = 8
_MASK = (1 << 64) - 1


def shuffled(place: int, count: int, key: int) -> int:
    """The sample at position `place` in the shuffled order number `key`: a permutation of 0 … count - 1.

    A Feistel network permutes the smallest range of 2^(2k) numbers that contains 0 … count - 1. If the result is not
    below `count`, it is permuted again until it is ("cycle walking"; Black and Rogaway, Ciphers with Arbitrary Finite
    Domains).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mixed(right, key * _ROUNDS + number) & low)
        place = left << half | right
        if place < count:
            return place


def _mixed(value: int, key: int) -> int:
    """A hash of two numbers (the finaliser of SplitMix64)."""
    value = (value + (key + 1) * 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
