"""examples/high_dimensional_regression.py against d2l.ai's own cells run in PyTorch, from scratch and concise.

`data/d2l_replay.npz` holds three float64 runs with their data, initial parameters and result, on fixed batches
(0-4, 5-9, 10-14, 15-19 in every epoch); `data/d2l_pytorch.npz` holds what twenty seeds ended with, one seed a row,
in the columns that the JSON beside it names. The concise version's loss has no 1/2, and its bias is drawn too.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from load_example import load_example
from scipy import stats
from slow import slow, slow_but

DATA = Path(__file__).parent / "data"
SEEDS = 20
VERSIONS = {"scratch": 1.0, "concise": 2.0}  # The factor of half the mean squared error in the loss.


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example("high_dimensional_regression")


@pytest.mark.parametrize("place", ["loss", "gradient", "update"])
@pytest.mark.parametrize("lam", [0, 3])
@pytest.mark.parametrize("version", VERSIONS)
def test_each_place_replays_the_book(example: Any, x64: None, version: str, lam: int, place: str) -> None:
    with np.load(DATA / "d2l_replay.npz") as file:
        stored = dict(file)

    def of_all(name: str) -> np.ndarray:
        return np.stack([stored[f"s{seed}/{name}"] for seed in range(3)])

    w0 = of_all("w0")[..., 0]
    b0 = of_all("b0_concise")[:, 0] if version == "concise" else np.zeros(3)
    batches = jnp.broadcast_to(jnp.arange(20).reshape(4, 5), (100, 4, 5))
    X, y = of_all("X_train"), of_all("y_train")[..., 0]

    def one(*problem: jax.Array) -> dict[str, jax.Array]:
        return example.train(*problem, batches, float(lam), place, VERSIONS[version])

    path = jax.jit(jax.vmap(one))(X, y, w0, b0)
    assert path["w"].dtype == jnp.float64
    run = f"{version}_lambda{lam}"
    np.testing.assert_allclose(path["w"][:, -1], of_all(f"{run}/w")[..., 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(path["b"][:, -1], of_all(f"{run}/b")[:, 0], rtol=0, atol=1e-12)

    predicted = np.einsum("sni,sei->sen", X, path["w"]) + np.asarray(path["b"])[..., None]
    losses = VERSIONS[version] * 0.5 * np.mean((predicted - y[:, None]) ** 2, axis=-1)
    np.testing.assert_allclose(losses[:, 4::5], of_all(f"{run}/curves")[..., 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lam", [slow(0), 3])
@pytest.mark.parametrize("version", slow_but(VERSIONS, "concise"))
def test_twenty_seeds_end_where_the_books_do(example: Any, version: str, lam: int) -> None:
    columns = json.loads((DATA / "d2l_pytorch.json").read_text())["columns"]
    with np.load(DATA / "d2l_pytorch.npz") as file:
        reference = dict(zip(columns, file[f"{version}_lambda{lam}"].T, strict=True))

    problems = jax.jit(jax.vmap(example.draw))(jax.random.split(jax.random.key(0), SEEDS))
    if version == "concise":
        problems = problems._replace(b0=jax.random.normal(jax.random.key(1), (SEEDS,)))
    result = example.train_all(problems, float(lam), "gradient", VERSIONS[version])
    for name in ("norm_w", "test_half_mse"):
        ours, theirs = np.asarray(result[name][:, -1], np.float64), reference[name]
        assert ours.shape == theirs.shape == (SEEDS,)
        assert stats.ks_2samp(ours, theirs).pvalue > 0.01, name  # pyright: ignore[reportAttributeAccessIssue]
        error = np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / SEEDS)
        assert abs(ours.mean() - theirs.mean()) < 3 * error, name
