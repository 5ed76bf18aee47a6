"""Every function of the room gives a rate that every place takes; every docstring has its facts."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import Row, core_row

import wdjax
from wdjax import rates

SCHEDULE = optax.linear_schedule(0.5, 0.1, 4)
GIVEN: dict[str, Any] = {
    "relative": rates.relative(0.3, SCHEDULE, peak=0.5),
    "relative, a number": rates.relative(0.3, 0.5),
    "corrected": rates.corrected(0.3, SCHEDULE, peak=0.5),
    "corrected, a number": rates.corrected(0.3, 0.5),
    "corrected, a table": rates.corrected(wdjax.by_path({"w": 0.3, "b": 0.0}), SCHEDULE, peak=0.5),
    "cosine": rates.cosine(0.1, 0.4, 4),
    "log_time": rates.log_time(0.3, 4),
    "from_timescale": rates.from_timescale(10, 0.5),
    "from_tokens": rates.from_tokens(100, 0.5, batch=1, fraction=0.1),
    "from_normalized": rates.from_normalized(0.3, batch=1, examples=2, epochs=2),
    "from_l2": rates.from_l2(0.03, 0.9),
    "from_prior": rates.from_prior(0.3, 20),
}


@core_row
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_every_place_takes_every_rate(row: Row, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), dtype), "b": jnp.asarray(rng.normal(size=3), dtype)}
    updates = {"w": jnp.asarray(rng.normal(size=(4, 3)), dtype), "b": jnp.asarray(rng.normal(size=3), dtype)}

    @jax.jit
    def second_updates(updates: Any, params: Any) -> Any:
        def second(optimizer: Any) -> Any:
            _, state = optimizer.update(updates, optimizer.init(params), params)
            return optimizer.update(updates, state, params)[0]

        return {name: second(row.build(rate)) for name, rate in GIVEN.items()}

    found = second_updates(updates, params)
    exact = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), (updates, params))
    limits = {"rtol": 2e-6, "atol": 1e-6} if dtype == jnp.float32 else {"rtol": 2**-7, "atol": 2**-8}
    for name, rate in GIVEN.items():
        by_leaf = rate.values(params) if isinstance(rate, wdjax.Rules) else {"w": rate, "b": rate}
        for key, leaf_rate in by_leaf.items():
            value = float(leaf_rate(1)) if callable(leaf_rate) else leaf_rate
            expected = row.oracle(exact[0][key], exact[1][key], value, 0.0)
            assert found[name][key].dtype == dtype
            np.testing.assert_allclose(
                np.asarray(found[name][key]).astype(np.float64), expected, **limits, err_msg=f"{name} {key}"
            )


FUNCTIONS = {name: value for name, value in vars(rates).items() if inspect.isfunction(value)}


# These say what a rate means.
NOT_RATES = {"timescale", "prior_scale", "equilibrium_rms", "equilibrium_angle"}


def test_every_function_that_gives_a_rate_is_among_the_given() -> None:
    assert len(FUNCTIONS) >= 13
    assert {name.partition(",")[0] for name in GIVEN} | NOT_RATES == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_docstring_has_its_facts(name: str) -> None:
    doc = inspect.getdoc(FUNCTIONS[name]) or ""
    facts = ["Rule:", "Units:", "Source:", "Args", "Returns", "Raises", ">>>"]
    assert [fact for fact in facts if fact not in doc] == []
    assert "." in doc.partition("\n\n")[0]
