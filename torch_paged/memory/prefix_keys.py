"""The keys that prefixes are remembered under: a SHA-256 chain over the tokens of full blocks."""

import hashlib

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def root_key(*fields: bytes) -> bytes:
    """Where a chain begins: what a prefix's K and V depend on besides its tokens, such as a salt and the model.

    Every field goes in with its length before it, so that no two lists of fields read the same.
    """
    return _digest(*fields)


def block_keys(root: bytes, tokens: Ints, block_size: int) -> list[bytes]:
    """The key of each full block of one sequence: SHA-256 over the key before it and the block's own tokens.

    Args:
        root: from `root_key`.
        tokens: int64 `[num_tokens]`, of the sequence from its start.
        block_size: tokens of a block.

    Source: prefix hashing as in vLLM's automatic prefix caching; SHA-256 and the salt after CVE-2025-25183 and
        CVE-2025-46570.
    """
    keys, key = [], root
    for block in full_blocks(tokens, block_size):
        key = _digest(key, block.tobytes())
        keys.append(key)
    return keys


def full_blocks(tokens: Ints, block_size: int) -> Ints:
    """The tokens of the full blocks, little-endian int64 `[num_full, block_size]`."""
    num_full = len(tokens) // block_size
    return np.ascontiguousarray(tokens[: num_full * block_size], dtype="<i8").reshape(num_full, block_size)


def _digest(*fields: bytes) -> bytes:
    digest = hashlib.sha256()
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()
