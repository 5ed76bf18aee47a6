"""Eight emulated CPU devices, compiled programs that are kept, and strict promotion wherever a test is ours alone."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import shutil
from collections.abc import Iterator

import jax
import pytest

KEPT = 50_000  # Compiled programs, of some 10 kB each; a change of wdjax leaves old ones behind.


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what XLA compiles in .pytest_cache, for all workers and for later runs: most of a test is compilation.

    Equal programs have equal keys, of the program, the flags and the version of XLA. `--cache-clear` forgets them.
    """
    if not hasattr(config, "cache"):  # Switched off, with `-p no:cacheprovider`.
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


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield
