"""Shrinking weights and adding noise to them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import checks, draws, trees
from .._engine.arithmetic import LeafRule, Strength, cast, minus, narrowed_like, plus, stateless, widened
from .._engine.loop import Action, transformation
from .._engine.probe import DecayProbe
from .._engine.rules import check_no_mask
from .._engine.text import shown
from .._engine.types import Mask, Params, Rate
from .._engine.unstable import is_traced

PyTree = Any


@checks.known_arguments
def shrink_and_perturb(
    shrink: Rate,
    noise: Rate,
    mask: Mask = None,
    *,
    seed: int | np.integer[Any] | jax.Array,
    fresh: Callable[[jax.Array], Params] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks the weights after the optimizer's step and adds noise, so that a trained network can learn anew.

    Rule:   p + u <- (1 - shrink) * (p + u) + noise * n; n is standard normal, or `fresh(key)`
    Place:  last in the chain, after the learning rate. Outside a chain, between two rounds of training, give its
            `update` zeros for u.
    Units:  per step. `shrink` is the fraction of a weight that is removed, as in `independent_decay`. `noise` is in
            units of the weights, or a multiple of the fresh weights. The learning rate scales neither. With zero
            gradient, constant rates and standard normal noise, the variance of a weight tends to
            noise^2 / (1 - (1 - shrink)^2).
    Source: Ash & Adams 2020 (arXiv 1910.08475), by their code, once before each round; the code of L2 Init (arXiv
            2308.11958), after each step. Both add fresh weights. Deviation: Ash & Adams' shrinkage is the factor that
            is kept, so their 0.4 is shrink=0.6.

    Adam's moments and all other states stay as they are. Ash & Adams start each round with a new state:
    `optimizer.init(params)`.

    Args:
        shrink, mask: as `independent_decay`; a number given for shrink is at most 1.
        noise: a rate, as shrink. The two need not change together: a schedule for both makes steps with neither.
        seed: an integer or 0-d integer array (may be traced), of which the low 32 bits count. Seed, count of updates,
            and path and shape of a parameter determine its noise, whatever the devices and the sharding are, and
            whatever happens to other parameters. Two in one chain need two seeds. Inside `shard_map`, parts of an array
            differ if it knows them (`check_vma=True`, the default). Under `vmap` all members draw the same numbers,
            unless the seed is mapped.
        fresh: None for Gaussian noise; or a function from a key to a tree like params, such as
            `lambda key: model.init(key, x)["params"]`, for noise as the initializers draw it. It is called in each
            update. What mask or rate leave out may be missing. In `optax.inject_hyperparams` name it in static_args.

    Returns: an `optax.GradientTransformation` with a `DecayState`. Its `update` needs `params`. Updates keep their
    dtype.
    Raises: TypeError or ValueError for a number above 1 as shrink, a seed that is not an integer, and, at `update`,
            fresh weights that do not fit params. Otherwise as `decoupled_decay`.

    Example:

        >>> import jax, jax.numpy as jnp, optax, wdjax
        >>> restart = wdjax.on_weights.shrink_and_perturb(0.5, 0.1, seed=0, fresh=lambda key: {"kernel": jnp.ones(2)})
        >>> params = {"kernel": jnp.array([3.0, -4.0])}
        >>> still = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = restart.update(still, restart.init(params), params)
        >>> [round(float(w), 6) for w in optax.apply_updates(params, updates)["kernel"]]
        [1.6, -1.9]
    """
    where = "shrink_and_perturb"
    for name, rate in (("shrink", shrink), ("noise", noise)):
        check_no_mask(where, name, rate, f"{where}(shrink=0.1, noise=0.01, mask=..., seed=0)")
    draws.check_seed(where, seed, f"{where}(..., seed=0)")
    if fresh is not None and not callable(fresh):
        raise TypeError(
            f"{where}: fresh must be a function from a key to a tree like params, got {shown(fresh)}. Write "
            "fresh=lambda key: model.init(key, x)['params']."
        )
    # The state comes from an action that warns of nothing: beside noise, no shrink rounds to nothing on average.
    action = Action(where, {"shrink": shrink}, mask)
    _check_shrink(where, action.rates["shrink"])
    shrinking = transformation(dataclasses.replace(action, is_per_step=True), _SHRUNK, is_decay=True)
    perturbing = Action(where, {"noise": noise}, mask)

    def init_fn(params: PyTree) -> Any:
        perturbing.init(params, aliases=lambda path: False)  # The other one warns of them.
        return action.init(params)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, *, decay_probe: DecayProbe | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        # Both parts are computed in at least float32, and their sum is rounded once.
        wide, new_state = shrinking.update(widened(updates), state, params, decay_probe=decay_probe)
        leaves = trees.flatten_with_paths(params)
        acting = [leaf for leaf, acts in zip(leaves, perturbing.acts_on(params, leaves), strict=True) if acts]
        if fresh is None:
            of_each = draws.keys_of_leaves(where, seed, state.count, acting)
        else:
            of_each = _fresh_weights(where, fresh, seed, state.count, acting)
        inputs = [of_each.get(path) for path, _ in leaves]
        wide, _ = perturbing.run(_GAUSSIAN if fresh is None else _FRESH, wide, state, params, inputs=inputs)
        return narrowed_like(wide, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_shrink(where: str, shrink: Any) -> None:
    """Raises an error for a number above 1. In a table it may be a multiplier."""
    is_known = isinstance(shrink, float) or (isinstance(shrink, jax.Array) and not is_traced(shrink))
    if is_known and getattr(shrink, "is_fully_addressable", True) and np.asarray(shrink) > 1:
        raise ValueError(
            f"{where}: shrink is the fraction of a weight that is removed, at most 1, got {shown(shrink)}. Where "
            "shrinkage is the factor that is kept, as in Ash & Adams 2020, write shrink=1 - factor."
        )


def _shrunk(update: jax.Array, p: jax.Array, _: Any, rate: Strength) -> jax.Array:
    return minus(update, rate, p + update)


def _gaussian(update: jax.Array, p: jax.Array, _: Any, rate: Strength, key: jax.Array, __: Any) -> Any:
    return plus(update, rate, jax.random.normal(key, p.shape, p.dtype)), None


def _with_fresh(update: jax.Array, p: jax.Array, _: Any, rate: Strength, fresh: jax.Array, __: Any) -> Any:
    return plus(update, rate, cast(fresh, p.dtype)), None


_SHRUNK = stateless(_shrunk)
_GAUSSIAN, _FRESH = (LeafRule(rule, is_elementwise=True) for rule in (_gaussian, _with_fresh))


def _fresh_weights(
    where: str, fresh: Callable[[jax.Array], Params], seed: Any, count: Any, leaves: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
    """The fresh weights of these parameters, by path."""
    if not leaves:
        return {}
    given = dict(trees.flatten_with_paths(fresh(draws.keys(f"{where} fresh", seed, count, [""])[0])))
    for path, leaf in leaves:
        weights: Any = given.get(path)
        fits = trees.is_decayable(weights) and np.shape(weights) == np.shape(leaf)
        if not fits or (jnp.iscomplexobj(weights) and not jnp.iscomplexobj(leaf)):
            found = f"{weights.dtype}{list(np.shape(weights))}" if hasattr(weights, "dtype") else "nothing"
            raise ValueError(
                f"{where}: fresh(key) must return a tree like params, but at {path!r} it has {found}, and params have "
                f"{jnp.result_type(leaf)}{list(np.shape(leaf))}. Write fresh=lambda key: model.init(key, x)['params']. "
                "Within shard_map it must return the parts that are on this device."
            )
    return {path: given[path] for path, _ in leaves}
