"""Each recipe in the table of docs/explanations/choosing_a_rate.md decays as much in the first step as its row says."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax import rates

PAGE = Path(__file__).parents[2] / "docs" / "explanations" / "choosing_a_rate.md"
HEADER = "| model | peak of `lr` | weight decay | per step | what decays | in wdjax | source |"


def recipes() -> dict[str, list[str]]:
    lines = PAGE.read_text().partition(HEADER)[2].strip().splitlines()[1:]
    rows = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
    return {row[0]: row for row in rows}


def test_the_table_has_its_rows() -> None:
    assert len(recipes()) == 18
    assert all(len(row) == 7 for row in recipes().values())


@pytest.mark.peers
@pytest.mark.parametrize("model", recipes())
def test_a_recipe_removes_the_share_that_its_row_says(model: str) -> None:
    _, peak, _, share, decays, call, _ = recipes()[model]
    lr = optax.constant_schedule(float(peak))
    names = {"wdjax": wdjax, "optax": optax, "rates": rates, "lr": lr, "steps": 1000, "muon": optax.identity()}
    optimizer: Any = eval(call.strip("`"), names)
    params = {"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "LayerNorm_0": {"scale": jnp.ones(3)}}
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], np.full((4, 3), -float(share)), rtol=2e-3)
    touched = [bool(np.any(u)) for u in (updates["Dense_0"]["bias"], updates["LayerNorm_0"]["scale"])]
    assert touched == [decays == "everything" or "muon" in call] * 2
