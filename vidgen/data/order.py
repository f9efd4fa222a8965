"""Seeded shuffles by arithmetic: where an element goes is computed, never stored."""

from __future__ import annotations

from typing import Any

import numpy as np

ROUNDS = 6  # of the Feistel network


def mix(*keys: Any) -> np.ndarray:
    """A 64-bit hash of integers; arrays among them broadcast.

    Each key goes through the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014).

    Returns:
      u64, of the keys' broadcast shape.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permute(index: Any, n: Any, *key: Any) -> np.ndarray:
    """Where a permutation of range(n), drawn by `key`, sends `index`: a bijection for every key.

    A Feistel network over the pairs (index mod a, index div a) with a·b just above n, walked on until it lands below
    n (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

    Args:
      index: integers in [0, n).
      n: size of the domain, ≥ 1; an array where each index has a domain of its own.
      key: integers or arrays of them; all arguments broadcast.

    Returns:
      i64 in [0, n), of the broadcast shape.
    """
    index, n = np.broadcast_arrays(np.asarray(index, np.int64), np.asarray(n, np.int64))
    a = np.ceil(np.sqrt(n)).astype(np.int64)
    b = -(-n // a)
    keys = mix(*key)

    def walk(index: np.ndarray) -> np.ndarray:
        low, high = index % a, index // a
        for step in range(ROUNDS):
            if step % 2:
                high = ((high.astype(np.uint64) + mix(keys, step, low) % b_u64) % b_u64).astype(np.int64)
            else:
                low = ((low.astype(np.uint64) + mix(keys, step, high) % a_u64) % a_u64).astype(np.int64)
        return high * a + low

    a_u64, b_u64 = a.astype(np.uint64), b.astype(np.uint64)
    out = walk(index)
    while (outside := out >= n).any():
        out = np.where(outside, walk(np.where(outside, out, index)), out)
    return out
