"""What rules about norms of groups share: the radius "init", and warnings of groups for which a rule makes no sense."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, trees
from .arithmetic import compute_dtype
from .groups import Groups, UnfitShapeError
from .loop import Action
from .per_leaf import stack_counts
from .rules import Rules, check_no_mask, possible_values
from .text import listed, shown
from .unstable import automatic, is_traced

PyTree = Any


def check_radius(where: str, radius: Any, before: str) -> bool:
    """Checks a radius as far as it is not a rate. Returns whether it is a word: the norm at init.

    `before` is what comes before the radius in the call that errors show.
    """
    check_no_mask(where, "radius", radius, f"{where}({before}, radius=1.0, mask=...)")
    given = possible_values(radius) if isinstance(radius, Rules) else [radius]
    words = [value for value in given if isinstance(value, str)]
    if words and (isinstance(radius, Rules) or radius != "init"):
        raise TypeError(
            f"{where}: radius must be a number, a 0-d array, a schedule (a function of the step) or a by_path table of "
            f"these, or 'init' for the whole mask, got {shown(radius)}. Write {where}({before}, 'init', "
            "only('kernel')), and another one for the other parameters."
        )
    return bool(words)


@dataclasses.dataclass(frozen=True)
class InitialNorm:
    """The `init` of a rule: the norm of each group."""

    kind: Any

    def __call__(self, p: jax.Array) -> jax.Array:
        try:
            # A decomposition refuses a matrix whose axes are split explicitly.
            return automatic(lambda p: self.kind.norm(jnp.asarray(p, compute_dtype(p))), (p,), like=None)
        except UnfitShapeError:  # The mask leaves it out, or `update` raises the error.
            return jnp.zeros((1,) * jnp.ndim(p), jnp.finfo(compute_dtype(p)).dtype)


def check_kept(where: str, kind: Any, kept: Any, p: jax.Array) -> None:
    """Raises an error if the radii in a state are not those of the groups of this parameter."""
    if np.shape(kept) != (needed := jax.eval_shape(InitialNorm(kind), p).shape):
        raise ValueError(
            f"{where}: the state has radii of shape {np.shape(kept)}, but {shown(kind)} needs {needed}"
            ". It was made for other groups or parameters. Make a new one: optimizer.init(params)."
        )


def warn_of_zeros(action: Action, params: PyTree, state: Any, so: str) -> None:
    """Warns of radii of "init" that are zero. `so` says what becomes of the weights."""
    leaves = trees.flatten_with_paths(params)
    acts_on = zip(leaves, action.acts_on(params, leaves), strict=True)
    acting = {path for (path, leaf), acts in acts_on if acts and np.size(leaf)}
    norms = [(path, x) for path, x in trees.flatten_with_paths(state.leaf) if path in acting]
    is_known = lambda x: not is_traced(x) and getattr(x, "is_fully_addressable", True)  # noqa: E731
    zeros = [path for path, x in norms if is_known(x) and not np.all(x)]
    if zeros:
        checks.warn(
            f"{action.where}: radius='init' is 0 at {listed(zeros)}, because weights are zero, and they will {so}. "
            "Leave them out with a mask, initialize them otherwise, or give their radius by path."
        )


def warn_of_single_weights(action: Action, kind: Groups, params: PyTree, so: str) -> None:
    """Warns of parameters in which each weight is a group of its own. `so` says what becomes of it."""
    leaves = trees.flatten_with_paths(params)
    counts, acting = stack_counts(action.where, action.stacked_axes, leaves), action.acts_on(params, leaves)
    each = zip(leaves, counts, acting, strict=True)
    shapes = [(path, np.shape(leaf)[count:]) for (path, leaf), count, acts in each if acts]
    # A shape that does not fit is an error in `update`.
    single = [path for path, shape in shapes if kind.fits(len(shape)) and kind.groups(shape)[1] == 1]
    if single:
        checks.warn(
            f"{action.where}: each weight is a group of its own at {listed(single)}, so it {so}. Select the matrices: "
            "mask=only('kernel')."
        )
