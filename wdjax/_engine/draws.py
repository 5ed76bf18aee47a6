"""Random numbers for each parameter, determined by a seed, the count of updates, and the path of the parameter.

They do not depend on how arrays are sharded or on the other parameters, and they need no state but the count. The keys
are of one kind, whatever JAX's default is.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks
from .text import shown
from .unstable import varying_axes


def check_seed(where: str, seed: Any, write: str) -> None:
    """Raises an error for a seed that is not an integer. It may be a 0-d array, also a traced one."""
    if checks.is_whole(seed):
        return
    is_array = isinstance(seed, (np.ndarray, jax.Array))
    if not is_array or not jnp.issubdtype(seed.dtype, jnp.integer) or jnp.ndim(seed):
        found = shown(seed)
        if isinstance(seed, jax.Array):
            is_key = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
            found = f"{'a key, ' * is_key}{seed.dtype}{list(seed.shape)}"
        raise TypeError(f"{where}: seed must be an integer, got {found}. Write {write}.")


def keys(where: str, seed: Any, count: Any, paths: Sequence[str]) -> list[jax.Array]:
    """A key for each path.

    The first 64 bits of the SHA-256 of "<where> <path>" are folded into the key of seed and count, 32 bits at a time.
    So transformations with the same seed do not share random numbers. Of the seed, the low 32 bits count, with 64-bit
    numbers or without.
    """
    if not paths:
        return []
    is_known = isinstance(seed, (int, np.integer, np.ndarray))
    low = np.uint32(int(seed) & 0xFFFFFFFF) if is_known else seed.astype(jnp.uint32)
    of_step = jax.random.fold_in(jax.random.key(low, impl="threefry2x32"), count)
    hashes = b"".join(hashlib.sha256(f"{where} {path}".encode()).digest()[:8] for path in paths)
    words = np.frombuffer(hashes, ">u4").astype(np.uint32).reshape(-1, 2)
    return list(jax.vmap(lambda word: jax.random.fold_in(jax.random.fold_in(of_step, word[0]), word[1]))(words))


def keys_of_leaves(where: str, seed: Any, count: Any, leaves: Sequence[tuple[str, Any]]) -> dict[str, jax.Array]:
    """A key for each parameter, by its path.

    Within `shard_map` the parts of an array get different keys, if JAX knows that it is split (`check_vma=True`).
    """
    found = dict(zip((path for path, _ in leaves), keys(where, seed, count, [path for path, _ in leaves]), strict=True))
    for path, leaf in leaves:
        for name in sorted(varying_axes(leaf), key=str):
            found[path] = jax.random.fold_in(found[path], jax.lax.axis_index(name))
    return found
