"""Trains a small model and saves it after every step, until it is killed: `python saves_until_killed.py DIRECTORY`.

`test_checkpoints.py` kills it, and knows from the functions here what each step should have saved.
"""

import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

import wdjax

OPTIMIZER = wdjax.with_decoupled_decay(
    optax.adam(1e-2), optax.linear_schedule(0.5, 0.0, 1000), learning_rate=1e-2, toward="init"
)


def start() -> dict[str, Any]:
    # Large enough that a save takes its time, and small enough for hundreds of them.
    rng = np.random.default_rng(0)
    params = {f"layer_{i}": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for i in range(16)}
    return {"params": params, "opt_state": OPTIMIZER.init(params), "step": jnp.zeros([], jnp.int32)}


@jax.jit
def train(state: dict[str, Any]) -> dict[str, Any]:
    params, step = state["params"], state["step"]
    grads = jax.tree.map(lambda p: jnp.sin(3 * p + step), params)
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"], params)
    return {"params": optax.apply_updates(params, updates), "opt_state": opt_state, "step": step + 1}


def checkpointer(directory: str) -> ocp.training.Checkpointer:
    every_step = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    return ocp.training.Checkpointer(directory, save_decision_policy=every_step)


def main(directory: str) -> None:
    with checkpointer(directory) as saved:
        state = start() if saved.latest is None else saved.load(saved.latest, start())
        for _ in itertools.count():
            state = train(state)
            saved.save_async(int(state["step"]), state)  # Goes on in the background while the next step is made.


if __name__ == "__main__":
    main(sys.argv[1])
