# pyright: strict, reportMissingTypeStubs=false
"""A user's program, checked in strict mode: what comes back from wdjax has a type."""

from typing import Any, assert_type

import jax
import numpy as np
import optax

import wdjax
from wdjax.audits import Audited, Finding
from wdjax.plans import PlanDiff, Planned
from wdjax.sweeps import Best, Sweep

params: wdjax.Params = {"Dense_0": {"kernel": np.ones((4, 2), np.float32), "bias": np.ones(2, np.float32)}}
mask = wdjax.only("kernel")
assert_type(mask, wdjax.Rules)
assert_type(wdjax.weights_only(), wdjax.Rules)
rates = 0.1 * wdjax.by_path({"kernel": 1.0}, default=0.5)
assert_type(rates, wdjax.Rules)

chain = optax.chain(
    optax.scale_by_adam(),
    wdjax.decoupled_decay(rates, mask, toward="init"),
    optax.scale_by_learning_rate(1e-3),
    wdjax.proximal_step(wdjax.L1(), 1e-4, learning_rate=1e-3),
)
recipe = wdjax.adamw(optax.cosine_decay_schedule(1e-3, 100), 0.1, mask)
assert_type(recipe, optax.GradientTransformation)
outer = wdjax.freeze(wdjax.with_decoupled_decay(optax.sgd(0.1), 0.1, mask, learning_rate=0.1), wdjax.only("bias"))
assert_type(outer, optax.GradientTransformationExtraArgs)
assert_type(wdjax.l2_penalty(params, 0.1, mask), jax.Array)

plan = wdjax.plan(params, 0.1, mask)
assert_type(plan, wdjax.Plan)
assert_type(plan["Dense_0/kernel"], Planned)
assert_type([row.path for row in plan], list[str])
assert_type(plan.diff(plan), PlanDiff)

report = wdjax.audit(recipe, params, expected=1e-4, mask=mask)
assert_type(report, wdjax.Audit)
assert_type(report["Dense_0/kernel"], Audited)
assert_type(report.findings, tuple[Finding, ...])
rate: float = report["Dense_0/kernel"].rate


def train(key: jax.Array, weight_decay: jax.Array) -> jax.Array:
    del key
    return (weight_decay - 0.1) ** 2


found = wdjax.sweep(train, weight_decay=[0.0, 0.1], seeds=2)
assert_type(found, Sweep)
assert_type(found.best(), Best)
assert_type(found.best().values, dict[str, float])
assert_type(found.table(), str)

watched = wdjax.monitor(recipe, 0.1, mask, learning_rate=1e-3, groups=lambda leaf: leaf.path)
state: Any = watched.init(params)
assert_type(wdjax.scalars(state), dict[str, jax.Array])
