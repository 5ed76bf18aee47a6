"""Finds pairs of low-rank factors, the weight that their product is added to, and which axes belong together."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from .._engine import trees
from .._engine.text import shown
from ..paths.hints import nearest

WHERE = "decoupled_lora_decay"
WRITE_PAIRS = "pairs={'path of W0': ('path of A', 'path of B')}, where W = W0 + scale * A @ B"

# Names of factors: "lora_a" (NNX), "kernel_lora_a" beside "kernel" (Qwix, openpi), "lora/a" (Gemma), "lora_A/kernel"
# and "lora_A/default/weight" (PEFT).
_FACTOR = re.compile(
    r"(?P<root>(?:.*/)?)(?P<stem>lora/|(?:(?P<weight>[^/]+)_)?lora_)(?P<side>[abAB])"
    r"(?P<rest>(?:(?:/[^/]+)?/(?:kernel|weight|w))?)"
)
_WEIGHTS = ("kernel", "weight", "w", "embedding")
_NEAR = (*_WEIGHTS, *(f"{module}/{name}" for module in ("base_module", "base_layer") for name in _WEIGHTS))


class Pair(NamedTuple):
    """One low-rank matrix, W = W0 + scale * left @ right, by canonical paths.

    Attributes:
        left, right: the paths of the factors.
        weights: groups of paths where W0 may be. The first group with a path in the tree counts, and it must have only
            one.
        is_given: whether the user wrote the pair, in the order of the product.
    """

    left: str
    right: str
    weights: tuple[tuple[str, ...], ...]
    is_given: bool = False

    def weight_in(self, tree: dict[str, Any]) -> str | None:
        """The path of W0 in a tree, or None if it is not there."""
        for group in self.weights:
            found = [path for path in group if has(tree, path)]
            if len(found) > 1:
                raise ValueError(
                    f"{WHERE}: the W0 of {self.left!r} could be any of {found}. "
                    f"Write pairs={{{found[0]!r}: {(self.left, self.right)!r}}} with the one that it is added to."
                )
            if found:
                return found[0]
        return None

    def matrices(self, tree: dict[str, Any], frozen: dict[str, Any], *, is_given: bool) -> tuple[Any, Any, Any]:
        """W0, left and right as (stacks of) matrices: (*stack, in, out), (*stack, in, r), (*stack, r, out)."""
        left, right = (self._factor(path, tree, frozen) for path in (self.left, self.right))
        weight = self.weight_in(frozen)
        if weight is None:
            raise ValueError(self._no_weight(frozen, is_given=is_given))
        w0 = frozen[weight]
        for path, leaf in ((self.left, left), (self.right, right), (weight, w0)):
            if not trees.is_decayable(leaf):
                raise ValueError(
                    f"{WHERE}: {path!r} is {getattr(leaf, 'dtype', type(leaf).__name__)}, but W0, A and B must be "
                    "floating-point. Pass a dequantized W0: optimizer.update(grads, state, params, base=...)."
                )
        stack, order = self.layout(w0, weight, left, right)
        lead, rank = jnp.shape(left)[:stack], jnp.shape(left)[-1]
        size_in, size_out = math.prod(jnp.shape(left)[stack:-1]), math.prod(jnp.shape(right)[stack + 1 :])
        return (
            jnp.transpose(w0, order).reshape(*lead, size_in, size_out),
            jnp.reshape(left, (*lead, size_in, rank)),
            jnp.reshape(right, (*lead, rank, size_out)),
        )

    def layout(self, w0: Any, weight: str, left: Any, right: Any) -> tuple[int, tuple[int, ...]]:
        """How many axes are stacked, and the order in which the axes of W0 are (*stack, *in, *out)."""
        shapes = jnp.shape(w0), jnp.shape(left), jnp.shape(right)
        is_weight = weight.rpartition("/")[2] == "weight"
        found = _layout(*shapes, out_first=is_weight and not self.is_given)
        if found is None:
            raise ValueError(
                f"{WHERE}: the shapes do not fit: W0 = {weight!r} has {shapes[0]}, A = {self.left!r} has {shapes[1]} "
                f"and B = {self.right!r} has {shapes[2]}. They must be (*stack, *in, *out), (*stack, *in, r) and "
                f"(*stack, r, *out). If the product is B @ A, as for a weight of layout (out, in), write "
                f"pairs={{{weight!r}: {(self.right, self.left)!r}}}. If W0 is another weight, write {WRITE_PAIRS}."
            )
        return found

    def _factor(self, path: str, tree: dict[str, Any], frozen: dict[str, Any]) -> Any:
        if has(tree, path) or has(frozen, path):
            return tree[path] if has(tree, path) else frozen[path]
        raise ValueError(
            f"{WHERE}: A = {self.left!r} and B = {self.right!r} are a pair, but {path!r} is neither in params nor in "
            f"base. {_nearest(path, [*tree, *frozen])} If it is frozen, pass it: optimizer.update(grads, state, "
            f"params, base=frozen_params). If it has another name, write {WRITE_PAIRS}."
        )

    def _no_weight(self, frozen: dict[str, Any], *, is_given: bool) -> str:
        looked_for = [path for group in self.weights for path in group]
        what = f"{WHERE}: the W0 of {self.left!r} is not in {'base' if is_given else 'params'}: looked for {looked_for}"
        near = _nearest(looked_for[0], list(frozen))
        pairs = f"pairs={{'path of W0': {(self.left, self.right)!r}}}"
        pairs += ". If the product is not added to a weight, exclude it: mask=all_but(...)"
        if is_given:
            return f"{what}. {near} base has the paths of the whole model. If W0 has another name, write {pairs}."
        return (
            f"{what}. Pass the frozen weights: optimizer.update(grads, state, params, base=frozen_params). "
            f"If W0 has another name in params, write {pairs}. {near}"
        )


def factors_of(paths: Sequence[str], given: Mapping[str, tuple[str, str]]) -> dict[str, Pair]:
    """The pair of each factor among the paths: the given pairs, and those that are recognized by name."""
    pairs = [Pair(left, right, ((weight,),), is_given=True) for weight, (left, right) in given.items()]
    named = {path: pair for pair in pairs for path in (pair.left, pair.right)}
    for pair in pairs:
        if pair.left not in paths and pair.right not in paths:
            raise ValueError(
                f"{WHERE}: pairs names the factors {pair.left!r} and {pair.right!r}, but neither is in params. "
                f"{_nearest(pair.left, paths)} Write {WRITE_PAIRS}."
            )
    found = {path: named.get(path) or _pair_of(path) for path in paths}
    factors = {path: pair for path, pair in found.items() if pair is not None}
    if not factors:
        raise ValueError(
            f"{WHERE}: there are no LoRA factors among the {len(paths)} parameters. Known names are 'lora_a' beside "
            "'lora_b', 'kernel_lora_a' beside 'kernel_lora_b', 'lora/a' beside 'lora/b' and 'lora_A/kernel' beside "
            f"'lora_B/kernel'. {_nearest('lora_a', paths)} Write {WRITE_PAIRS}."
        )
    return factors


def _pair_of(path: str) -> Pair | None:
    """The pair that a path belongs to by its name, or None if it is not the name of a factor."""
    match = _FACTOR.fullmatch(path)
    if match is None:
        return None
    root, sides = match["root"], "ab" if match["side"] in "ab" else "AB"
    left, right = (root + match["stem"] + side + match["rest"] for side in sides)
    if match["weight"]:
        return Pair(left, right, ((root + match["weight"],),))
    # A LoRA module called "lora" is a child of the layer that it adapts, unless it has its own base.
    roots = (root, root.removesuffix("lora/")) if ("/" + root).endswith("/lora/") else (root,)
    return Pair(left, right, tuple(tuple(r + name for name in _NEAR) for r in roots))


def _layout(
    w0: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], *, out_first: bool
) -> tuple[int, tuple[int, ...]] | None:
    """As `Pair.layout`, for shapes; None if they do not fit."""
    if len(left) < 2 or len(right) < 2:
        return None
    for stack in range(min(len(w0), len(left) - 1, len(right) - 1)):
        ins, outs, rest = left[stack:-1], right[stack + 1 :], w0[stack:]
        fits = w0[:stack] == left[:stack] == right[:stack] and left[-1] == right[stack]
        # The sizes decide how many axes are stacked. Other numbers that fit differ only by axes of size 1.
        if not fits or math.prod(rest) != math.prod(ins) * math.prod(outs):
            continue
        plain = tuple(range(len(w0)))
        split = _split(rest, outs, ins) if out_first else None
        if split is not None:
            return stack, (*plain[:stack], *plain[stack + split :], *plain[stack : stack + split])
        if _split(rest, ins, outs) is not None:
            return stack, plain
        orders = []
        for chosen in itertools.combinations(range(len(rest)), len(ins)):
            order = (*chosen, *(axis for axis in range(len(rest)) if axis not in chosen))
            if tuple(rest[axis] for axis in order) == ins + outs:
                orders.append((*plain[:stack], *(stack + axis for axis in order)))
        if len(orders) == 1:
            return stack, orders[0]
    return None


def _split(rest: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]) -> int | None:
    """How many axes of W0 have the first sizes, if the rest have the second, each as they are or flattened to one."""

    def alike(axes: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
        return axes == sizes or (math.prod(axes),) == sizes

    return next((k for k in range(len(rest) + 1) if alike(rest[:k], first) and alike(rest[k:], second)), None)


def checked_pairs(pairs: Any) -> dict[str, tuple[str, str]]:
    """The pairs as a dict of strings. Raises an error for anything else."""
    if pairs is None:
        return {}
    is_pair = isinstance(pairs, Mapping) and all(
        isinstance(weight, str)
        and isinstance(factors, (tuple, list))
        and len(factors) == 2
        and all(isinstance(path, str) for path in factors)
        for weight, factors in pairs.items()
    )
    if not is_pair:
        raise TypeError(f"{WHERE}: pairs must be a dict of canonical paths, got {shown(pairs)}. Write {WRITE_PAIRS}.")
    paths = [path for factors in pairs.values() for path in factors]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise ValueError(
            f"{WHERE}: pairs names the factor {twice[0]!r} twice, but a factor belongs to one matrix. "
            "Write each factor once."
        )
    return {weight: (left, right) for weight, (left, right) in pairs.items()}


def has(tree: dict[str, Any], path: str) -> bool:
    return path in tree and not trees.is_hole(tree[path])


def _nearest(path: str, paths: Sequence[str]) -> str:
    known = sorted(set(paths))
    return f"The nearest of {len(known)} paths: {nearest(path, known)}."
