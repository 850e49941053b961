"""Random draws keyed by what they are for: (seed, epoch, sample id, purpose), never by rank, worker or time."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def key_of(*parts: int | str) -> int:
    """A 63-bit number that depends on every part; equal parts give equal numbers on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def draws_of(*parts: int | str) -> random.Random:
    """A Python generator keyed by `parts`."""
    return random.Random(key_of(*parts))


def torch_draws_of(*parts: int | str) -> torch.Generator:
    """A torch CPU generator keyed by `parts`; torch takes 32 bits of the key, enough to draw unlike for neighbours."""
    return torch.Generator().manual_seed(key_of(*parts))


def torch_seed(seed: int) -> int:
    """`seed` for a torch generator, which on CPUs takes the lowest 32 bits alone: itself where it fits into them, else
    a number there that depends on every bit."""
    return seed if 0 <= seed < 2**32 else key_of("seed", seed) % 2**32


def permutation_of(count: int, *parts: int | str) -> np.ndarray:
    """A permutation of 0..count-1 keyed by `parts`, int64 [count]."""
    return np.random.Generator(np.random.PCG64(key_of(*parts))).permutation(count)
