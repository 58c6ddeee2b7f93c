"""One random stream per named thing, so that the order of work never changes a result."""

import hashlib

import numpy as np


def generator_for(*key: str | int) -> np.random.Generator:
    """A generator that depends on the key alone, for example ``(seed, task, split, drawing, view)``.

    Two keys that differ anywhere give independent streams: the PCG64 state is taken from the key's SHA-256.
    """
    digest = hashlib.sha256("\0".join(str(part) for part in key).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype="<u4"))
