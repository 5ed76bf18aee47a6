"""What a penalty must have, and what the places do with one."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from .._engine.arithmetic import LeafRule, Strength, stateless
from .._engine.groups import check_even, uneven
from .._engine.text import shown


@runtime_checkable
class Penalty(Protocol):
    """A penalty for the loss and for the gradient: any object with a `value`.

    `value(w)` maps an array to a scalar and must be differentiable. If there is a method `gradient(w)`, it replaces the
    derivative of `value`: to save time, or to choose a subgradient at a corner. If the penalty is a sum over elements,
    set `is_elementwise = True`. Then strengths may be arrays.

    Place:  `penalty`, which adds strength * value(w) to the loss, and `add_penalty_to_grads`, which adds
            strength * gradient(w) to the gradient.
    Raises: where it is used: ValueError if `value` returns no scalar, or `gradient` another shape than that of `w`.

    Example:

        >>> import jax, jax.numpy as jnp, wdjax
        >>> class FourthPower:
        ...     is_elementwise = True
        ...     def value(self, w: jax.Array) -> jax.Array:
        ...         return jnp.sum(w**4) / 4
        >>> isinstance(FourthPower(), wdjax.Penalty)
        True
        >>> float(wdjax.penalty({"kernel": jnp.array([2.0])}, FourthPower(), 0.5))
        2.0
    """

    def value(self, w: jax.Array) -> jax.Array: ...


@runtime_checkable
class ProximalPenalty(Protocol):
    """A penalty for `proximal_step`: any object with a `prox`.

    `prox(w, step)` must return the argmin over v of |v - w|^2 / 2 + step * value(v). If the penalty is a sum over
    elements, set `is_elementwise = True`. Then strengths, and so `step`, may be arrays.

    Place:  `proximal_step`, which moves the weights w, where the optimizer puts them, to
            prox(w, learning_rate * strength).
    Raises: where it is used: ValueError if `prox` returns another shape than that of `w`.

    Example:

        >>> import jax, jax.numpy as jnp, wdjax
        >>> class NotBelowOne:
        ...     is_elementwise = True
        ...     def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        ...         return jnp.maximum(w, 1.0)
        >>> isinstance(NotBelowOne(), wdjax.ProximalPenalty)
        True
        >>> step = wdjax.proximal_step(NotBelowOne(), 1.0, learning_rate=0.1)
        >>> step.update(jnp.array([0.0]), step.init(jnp.array([0.5])), jnp.array([0.5]))[0].tolist()
        [0.5]
    """

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array: ...


def value(kind: Any, w: jax.Array) -> jax.Array:
    """The value of a penalty."""
    return _like(kind, "value", kind.value(w), ())


def gradient(kind: Any, w: jax.Array) -> jax.Array:
    """The gradient of a penalty, as a direction of ascent. Without a method `gradient`, it is derived from `value`."""
    if callable(getattr(kind, "gradient", None)):
        return _like(kind, "gradient", kind.gradient(w), w.shape)
    return jnp.conj(jax.grad(lambda w: value(kind, w))(w))


def prox(kind: Any, w: jax.Array, step: jax.Array) -> jax.Array:
    """The proximal map of a penalty."""
    return _like(kind, "prox", kind.prox(w, step), w.shape)


def _like(kind: Any, method: str, result: Any, shape: tuple[int, ...]) -> Any:
    if np.shape(result) != shape:
        raise ValueError(
            f"{shown(kind)}: {method} must return an array of shape {shape}, but it returned the shape "
            f"{np.shape(result)}."
        )
    return result


def weighted_value(where: str, kind: Any, w: jax.Array, strength: Strength) -> jax.Array:
    """The sum of strength times value over the parts of an array, each of which has one strength."""
    check_strength(where, kind, strength.value)
    parts = uneven(strength.value)
    held = [name for name, x in getattr(kind, "__dict__", {}).items() if np.ndim(x)]
    if parts and held and not is_ours(kind):
        raise ValueError(
            f"{where}: {shown(kind)} holds an array, {held[0]!r}, and is called for each part of a parameter whose "
            "strength is an array. Multiply that array into the strength."
        )
    if not strength.is_known:  # Where the rate is 0, an infinite weight must not make NaN of it.
        w = jnp.where((strength.value == 0) & ~jnp.isfinite(w), 0, w)

    def value(w: jax.Array) -> jax.Array:
        return _like(kind, "value", kind.value(jnp.expand_dims(w, parts)), ())

    for _ in parts:
        value = jax.vmap(value)
    sizes = [np.shape(strength.value)[axis] for axis in parts]
    return jnp.sum(jnp.reshape(strength.value, sizes) * value(jnp.moveaxis(w, parts, range(len(parts)))))


def is_ours(kind: Any) -> bool:
    """Whether the penalty is one of this room: never changed, so that jit may keep what it compiled for it."""
    return type(kind).__module__.startswith(f"{__package__}.")


def is_elementwise(kind: Any) -> bool:
    """Whether a penalty says that it is a sum over elements."""
    return getattr(kind, "is_elementwise", False)


def check_strength(where: str, kind: Any, strength: Any) -> None:
    """Raises an error if the strength differs within a part that the penalty does not split into a sum."""
    check_even(where, "strength", kind, strength)


def rule_of(kind: Any, function: Any) -> LeafRule:
    """The rule of a place for a penalty: (update, param, anchor, strength) -> update."""
    return stateless(function, is_elementwise=is_elementwise(kind), is_kept=is_ours(kind))


def check_kind(where: str, kind: Any, *needs: str) -> None:
    """Raises an error, in the name of the function `where`, if a penalty has none of the methods in `needs`."""
    is_type = isinstance(kind, type)
    has_one = any(callable(getattr(kind, method, None)) for method in needs)
    if has_one and not is_type:
        return
    its_type = kind if is_type else type(kind)
    name, is_own = its_type.__name__, its_type.__module__.partition(".")[0] not in _NOT_OWN
    if has_one:
        source = "" if is_own else f", with {name} from wdjax"
        raise TypeError(
            f"{where}: kind must be a penalty, got the class {name}, not an object. "
            f"Write {where}({name}(), ...){source}."
        )
    if is_own:
        lacks = " or ".join(f"{method}({_ARGUMENTS[method]})" for method in needs)
        method = next((each for each in _PLACES if callable(getattr(kind, each, None))), None)
        is_place = not where.startswith("assert_")
        instead = f", or use {_PLACES[method]}" if method and is_place else ""
        raise TypeError(f"{where}: {name} has no method {lacks}. Add it{instead}.")
    name = {"l1": "L1", "l2": "L2"}.get(str(kind).lower(), "L2")
    raise TypeError(
        f"{where}: kind must be a penalty with the method {' or '.join(needs)}, got {shown(kind)}. "
        f"Write {where}({name}(), ...), with {name} from wdjax; a penalty of your own needs that method."
    )


_NOT_OWN = ("builtins", "numpy", "jax", "jaxlib", "optax", "functools", "wdjax")
_ARGUMENTS = {"value": "w", "gradient": "w", "prox": "w, step"}
_IN_GRADIENT = "add_penalty_to_grads(...), which needs value or gradient"
# Where a penalty that has this method can be used.
_PLACES = {"value": _IN_GRADIENT, "gradient": _IN_GRADIENT, "prox": "proximal_step(...), which needs prox"}
