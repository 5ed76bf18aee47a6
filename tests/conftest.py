"""Eight emulated CPU devices, a cache of compiled programs, strict dtype promotion except with other libraries."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest

KEPT = 50_000  # The most compiled programs in the cache, about 10 kB each. Changes to wdjax leave old ones behind.


def pytest_configure(config: pytest.Config) -> None:
    """Caches compiled programs in .pytest_cache, for all workers and later runs: compilation takes most of a test.

    The key of a program depends on the program, the flags and the version of XLA. `--cache-clear` empties the cache.
    """
    if not hasattr(config, "cache"):  # Disabled by `-p no:cacheprovider`.
        return
    folder = config.cache.mkdir("compiled")
    if not hasattr(config, "workerinput") and sum(1 for _ in folder.iterdir()) > KEPT:
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    peers = request.node.get_closest_marker("peers") is not None
    with jax.numpy_dtype_promotion("standard" if peers else "strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def same_numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test draws the same numbers from the RNG of its file, whichever tests ran before it in its worker."""
    if hasattr(request.module, "RNG"):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(0))


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield
