"""How `monitor` reads the decays in an optimizer: as the derivative of the update with respect to a gate.

The gate multiplies each decay, and it is 1. The derivative of the optimizer's update is then the decay in this update,
with all that follows it in the chain: the learning rate of this step, masks, a cautious selection. Only the arithmetic
between the decay and the end of the chain is differentiated. The update itself keeps every bit.

Optax passes the probe as an extra argument of `update` through chains and wrappers to each decay.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import trees
from .arithmetic import cast, compute_dtype

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DecayProbe:
    """The extra argument `decay_probe` of the decays' `update`.

    Attributes:
        gate: shape (), 1.0: the number to differentiate with respect to.
        report: called by each decay with its `Action` and the parameters that it sees.
    """

    gate: jax.Array
    report: Callable[[Any, PyTree], None] = dataclasses.field(metadata={"static": True})

    def within(self, outer: "DecayProbe | None") -> "DecayProbe":
        """A probe that reads for both: a monitor may be within another one."""
        if outer is None:
            return self

        def report(action: Any, params: PyTree) -> None:
            self.report(action, params)
            outer.report(action, params)

        return DecayProbe(self.gate * outer.gate, report)


def gated(
    probe: DecayProbe | None,
    action: Any,
    params: PyTree,
    decayed: Callable[[PyTree], PyTree],
    updates: PyTree,
    new: PyTree,
) -> PyTree:
    """`new`, the updates after a decay. Its derivative with respect to the gate is what `decayed` adds to updates."""
    if probe is None:
        return new
    probe.report(action, params)
    blanks = jax.tree.map(blank, updates, is_leaf=trees.is_hole)

    def of_leaf(new: Any, blank: Any, alone: Any) -> Any:
        return new if alone is blank else _gated(new, cast(alone, new.dtype), probe.gate)

    return jax.tree.map(of_leaf, new, blanks, decayed(blanks), is_leaf=trees.is_hole)


def blank(update: Any) -> Any:
    """An update of -0.0, in the dtype of the arithmetic: adding it changes no bit of any number."""
    return -jnp.zeros_like(update, dtype=compute_dtype(update)) if trees.is_decayable(update) else update


@jax.custom_jvp
def _gated(update: jax.Array, decay: jax.Array, gate: jax.Array) -> jax.Array:
    return update


@_gated.defjvp
def _gated_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    _, decay, _ = primals
    of_update, _, of_gate = tangents
    return _gated(*primals), of_update + decay * cast(of_gate, decay.dtype)
