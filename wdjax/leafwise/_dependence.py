"""Whether an optimizer treats every parameter by itself, read off from what it computes.

An optimizer is traced on one parameter, and on two of them. It is elementwise, array by array, if what it computes for
either of the two is, operation by operation, what it computes for the one: then nothing of the other is in it, and
nothing of its place. Values are never looked at, so a clip that happens not to clip is found too.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.extend.core import Literal

from .._action import Owner, telling
from .._leaves import Alone
from .._steps import nodes

# Calls of functions, which are looked through, and where they keep the body.
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
_BODIES = ("jaxpr", "call_jaxpr")


def refuse_mixing(optimizer: Any) -> None:
    """Refuses an optimizer that mixes parameters, or treats them by their place.

    Raises:
        ValueError: if it does, or can't be run on a parameter alone.
    """
    numbers: dict[Any, int] = {}
    kinds = (optax.MaskedState, optax.PartitionState)
    write = "optax.chain(optax.clip_by_global_norm(1.0), leafwise(optax.adam(1e-3)))"
    try:
        if nodes(optimizer.init(Alone(np.zeros([], np.float32))), kinds):
            raise ValueError("it has a mask or labels of Optax's, which can't be asked of one.")
        computed = [_computed(optimizer, count, which, numbers) for count, which in ((1, 0), (2, 0), (2, 1))]
    except Exception as error:
        raise ValueError(
            f"leafwise: the optimizer can't be run on a parameter alone: {error} What needs more than the gradient of "
            f"each parameter goes around it, before or behind: {write}. A mask of Optax's goes around too, "
            "optax.masked(leafwise(optax.adam(1e-3)), mask), and decays of wdjax take theirs: adamw(lr, 0.1, mask)."
        ) from error
    if any(each != computed[0] for each in computed):
        raise ValueError(
            "leafwise: the optimizer mixes parameters, or treats them by their place in the tree, as a clip by the "
            "global norm, added noise, apply_if_finite and MultiSteps do. Put that around, before or behind what "
            f"treats each by itself: {write}."
        )


class _Nothing(dict[Any, None]):
    """Tells every decay to do nothing: it treats each parameter by itself."""

    def __missing__(self, _: Any) -> None:
        return None


def _computed(optimizer: Any, count: int, which: int, numbers: dict[Any, int]) -> list[tuple[Any, int]]:
    """What an update computes for one of `count` parameters and for all together, each as the number of a term."""
    params = Alone(*(np.zeros((4, 3), np.float32) for _ in range(count)))
    state = jax.tree.map(
        lambda x: np.zeros([], np.int32) if isinstance(x, Owner) else x,
        optimizer.init(params),
        is_leaf=lambda x: isinstance(x, Owner),
    )
    arguments = (params, state, params)
    with telling(_Nothing()):
        traced, results = jax.make_jaxpr(optimizer.update, return_shape=True)(*arguments)
    if not isinstance(results[0], Alone):
        raise ValueError("its updates are no tree like params.")
    inputs = [
        _number(numbers, ("input", path, None if place is None else place == which))
        for path, place in _places(arguments)
    ]
    outputs = _terms(traced.jaxpr, traced.consts, inputs, numbers)
    return [
        (path, term)
        for (path, place), term in zip(_places(results), outputs, strict=True)
        if place is None or place == which
    ]


def _places(tree: Any) -> list[tuple[str, int | None]]:
    """For each leaf its path, and which parameter it belongs to; None for what all share."""
    found: list[tuple[str, int | None]] = []
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Alone)):
        own = enumerate(node.leaves) if isinstance(node, Alone) else [(None, node)]
        for place, part in own:
            found += [(jax.tree_util.keystr((*path, *inner)), place) for inner, _ in jax.tree.leaves_with_path(part)]
    return found


def _terms(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int], numbers: dict[Any, int]) -> list[int]:
    """The term that each output of a jaxpr is, given those of its inputs."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {
        var: _number(numbers, ("constant", _constant(value)))
        for var, value in zip(jaxpr.constvars, consts, strict=True)
    }

    def term(atom: Any) -> int:
        if isinstance(atom, Literal):
            return _number(numbers, ("literal", str(atom.val), str(atom.aval)))
        return known[atom]

    for equation in jaxpr.eqns:
        operands = [term(atom) for atom in equation.invars]
        inner = next((equation.params[name] for name in _BODIES if name in equation.params), None)
        if equation.primitive.name in _CALLS and inner is not None:
            results = _terms(inner.jaxpr, inner.consts, operands, numbers)
        else:
            how = sorted((name, str(value)) for name, value in equation.params.items() if not callable(value))
            operation = (equation.primitive.name, tuple(map(tuple, how)), tuple(operands))
            results = [_number(numbers, (*operation, k)) for k in range(len(equation.outvars))]
        known |= dict(zip(equation.outvars, results, strict=True))
    return [term(atom) for atom in jaxpr.outvars]


def _constant(value: Any) -> Any:
    if isinstance(value, Tracer) or np.size(value) > 1000:
        return id(value)
    return str(jax.typeof(value)), np.asarray(value).tobytes()


def _number(numbers: dict[Any, int], term: Any) -> int:
    return numbers.setdefault(term, len(numbers))
