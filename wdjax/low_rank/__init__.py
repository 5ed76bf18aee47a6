"""Low-rank factors: decay the matrix that they form, not the factors.

A LoRA layer adds a product of two thin factors to a frozen weight, W = W0 + scale * A @ B, and trains only A and B.
There are two matrices that weight decay may shrink:

- **the factors** (`decoupled_decay` on A and B): with zero gradient, A @ B is multiplied by
  (1 - learning_rate * weight_decay)^2 each step, so W goes to W0, not to zero. Combined with a loss, this also lowers
  the rank: the least (|A|^2 + |B|^2) / 2 among factors with the same product is the product's nuclear norm, the sum of
  its singular values, so small singular values go to exactly zero.
- **the matrix** (`decoupled_lora_decay`): the gradient of (weight_decay / 2) * |W|^2 with respect to A and B. This is
  the decay of a fully trained W, as far as A and B can express it.

The first pulls toward the pretrained weights, the second toward zero. For LoRA neither is better in general. This
module decays only factors. For all other parameters use `decoupled_decay` with a mask.

`_pairs` finds pairs and their W0 by canonical paths, and matches the axes of W0 with those of A and B by shape. The
rule (`_pull`) is two lines and never forms a matrix of the size of W except W0 itself.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._engine import checks, mesh_axes, trees
from .._engine.arithmetic import LeafRule, Strength, Term, cast, compute_dtype, plus
from .._engine.loop import Action, DecayState
from .._engine.types import Mask, Rate
from .._engine.unstable import varying_axes
from ..paths.parameters import parameter_at
from ..paths.roles import ADAPTER, role
from ._pairs import WHERE, WRITE_PAIRS, Pair, checked_pairs, factors_of, has

PyTree = Any


@checks.known_arguments
def decoupled_lora_decay(
    weight_decay: Rate, mask: Mask = None, *, scale: Rate = 1.0, pairs: Mapping[str, tuple[str, str]] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Decays the matrix W = W0 + scale * A @ B of LoRA factors, through a pull on the factors A and B alone.

    Decaying A and B themselves, with `decoupled_decay` on "lora_a" and "lora_b", pulls W to W0 and lowers the rank of
    A @ B. This transformation pulls W to zero. It changes only the factors: biases, W0 and all other parameters pass
    through untouched.

    Rule:   u_A <- u_A + weight_decay * scale * W @ B^T;  u_B <- u_B + weight_decay * scale * A^T @ W
    Place:  after `scale_by_*`, before the learning rate. First in the chain, it is L2 in the gradient: the same as
            adding (weight_decay / 2) * |W|^2 to the loss.
    Units:  per step and per unit of learning rate, but not a fixed fraction of W: with zero gradient, W changes by
            -learning_rate * weight_decay * scale^2 * (W B^T B + A A^T W), to first order in the learning rate. While
            B is zero, as at the start of LoRA, A does not move. Without a loss, A @ B converges to cancel the largest
            singular values of W0, as many as the rank.
    Source: Khodak et al. 2021 (arXiv 2105.01029), "Frobenius decay", for products without a W0; Shafkat 2023,
            irhum.github.io/blog/lorawd, for LoRA. Deviation: decoupled, with the learning rate itself as a factor, as
            in `decoupled_decay`.

    Pairs are found by their paths, and W0 by a path next to them:

        X/lora_a, X/lora_b             X/kernel, X/base_module/kernel, X/base_layer/kernel    nnx.LoRA
        X/lora/lora_a, X/lora/lora_b   X/kernel                                               nnx.LoRALinear
        X/lora/a, X/lora/b             X/kernel                                               Gemma
        X/lora_A/kernel, ...           X/kernel, X/base_layer/kernel                          PEFT
        X/kernel_lora_a, ...           X/kernel                                               Qwix, openpi

    where `kernel` may also be `weight`, `w` or `embedding`. A is (*stack, *in, r), B is (*stack, r, *out), and W0 has
    the axes (*stack, *in, *out), or (*stack, *out, *in) for a `weight`, as in Equinox. The axes may have another order
    if their sizes tell them apart, and `in` and `out` may be split into several axes. For an (out, in) weight as in
    PyTorch, where W = W0 + scale * lora_B @ lora_A, name the factors in the order of the product:
    pairs={"X/weight": ("X/lora_B/weight", "X/lora_A/weight")}.

    Within `shard_map`, W0 may be split together with one factor: along `in` with A or along `out` with B. The other
    factor must be the same on all devices; its pull is summed over them. With check_vma=False JAX does not know which
    arrays are split, so all three must be whole.

    Products run at the highest matrix precision, in at least float32, whatever the device's default is. Each step reads
    W0 twice, cast to float32 if it is narrower, and adds about 4 * rank * size(W0) operations.

    Args:
        weight_decay: as `decoupled_decay`.
        mask: None, `Rules` of booleans, a tree or prefix tree of booleans, or a function of params that returns one. A
            factor that is masked out does not change, but still counts in W.
        scale: the factor of A @ B in the model: alpha / rank or alpha / sqrt(rank); 1 for Flax NNX and Gemma, which
            have no factor. A number, a 0-d array or a `by_path` table of these, looked up at the path of A.
        pairs: for other layouts, a dict from the path of W0 to the paths of A and B. It overrides the pairs found.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `DecayState`. Its `update` needs `params`. Updates keep their
        dtype. W0 is looked up in the keyword argument `base` of `update`, a tree with the paths of the whole model:
        optimizer.update(grads, state, params, base=frozen_params). Without `base` it is looked up in `params`. A frozen
        factor that is not in `params`, such as A in LoRA-FA, is also looked up in `base`.

    Raises:
        TypeError, ValueError: for a rate or scale that is negative, NaN, infinite or not a scalar, and for malformed
            pairs. At `init` and `update`: if params hold no factors, if the mask chooses none, or if shapes do not fit.
            At `update`: if W0 or a factor is missing or quantized, or if params are missing.

    Example:

        >>> import jax.numpy as jnp, optax
        >>> import wdjax
        >>> optimizer = optax.chain(
        ...     optax.scale_by_adam(), wdjax.decoupled_lora_decay(0.1), optax.scale_by_learning_rate(1.0)
        ... )
        >>> frozen = {"dense": {"kernel": jnp.array([[2.0]])}}
        >>> params = {"dense": {"lora_a": jnp.array([[1.0]]), "lora_b": jnp.array([[0.5]])}}
        >>> grads = {"dense": {"lora_a": jnp.array([[0.0]]), "lora_b": jnp.array([[0.0]])}}
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params, base=frozen)
        >>> {name: round(float(u[0, 0]), 6) for name, u in updates["dense"].items()}
        {'lora_a': -0.125, 'lora_b': -0.25}
    """
    rates, scales = Action(WHERE, {"weight_decay": weight_decay}, mask), Action(WHERE, {"scale": scale})
    given = checked_pairs(pairs)

    def init_fn(params: PyTree) -> DecayState:
        leaves = trees.parameters(WHERE, params)
        tree = dict(leaves)
        factors = factors_of(list(tree), given)
        state = rates.init(params, aliases=factors.__contains__)
        scales.init(params, aliases=lambda path: False)
        _refuse_idle(rates.terms(params, leaves, state), leaves, factors)
        for pair in factors.values():  # W0 may come later, in `base`.
            if has(tree, pair.left) and has(tree, pair.right) and (weight := pair.weight_in(tree)):
                pair.layout(tree[weight], weight, tree[pair.left], tree[pair.right])
        return state

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, *, base: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, DecayState]:
        del extra_args
        checks.params_given(WHERE, params)
        leaves = trees.flatten_with_paths(params)
        tree = dict(leaves)
        frozen = tree if base is None else dict(trees.flatten_with_paths(base))
        factors = factors_of(list(tree), given)
        terms, sizes = rates.terms(params, leaves, state), scales.terms(params, leaves, state)
        _refuse_idle(terms, leaves, factors)
        scale_of = dict(zip(tree, sizes, strict=True))
        rules: list[LeafRule | None] = [None] * len(leaves)
        inputs: list[Any] = [None] * len(leaves)
        for i, ((path, param), term) in enumerate(zip(leaves, terms, strict=True)):
            pair = factors.get(path)
            size = pair and (scale_of.get(pair.left) or scale_of.get(pair.right))
            if term is None or pair is None or size is None:  # It does not decay, or its scale is 0.
                continue
            w0, left, right = pair.matrices(tree, frozen, is_given=base is not None)
            dtype = compute_dtype(w0, left, right)
            scale = size.strength(dtype)
            if jnp.finfo(dtype).dtype.type(term.parted()[0] * size.parted()[0]) == 0:  # Underflows to 0 in dtype.
                continue
            rules[i] = _RULES[path == pair.left, scale.is_known]
            inputs[i] = w0, left, right, _along(pair.left, scale.value, left.ndim - 2, jnp.ndim(param))
        updates, _ = rates.run(rules, updates, state, params, inputs=inputs)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _along(path: str, scale: Any, stack: int, ndim: int) -> Any:
    """A scale for a factor of so many axes. It may differ by layer, along the leading axes that stack layers."""
    if jnp.ndim(scale) == 0:
        return scale
    if any(size > 1 for size in scale.shape[stack:]):
        raise ValueError(
            f"{WHERE}: the scale of {path!r} is an array of shape {scale.shape}, but it must be one number, or one for "
            f"each stacked layer: here {stack} leading axes stack layers."
        )
    return scale.reshape(scale.shape[:stack] + (1,) * (ndim - stack))


def _rule(*, is_left: bool, is_known: bool) -> LeafRule:
    """The rule for the left or right factor, and for a scale that is or is not known during tracing."""

    def pulled(u: jax.Array, p: jax.Array, _: Any, strength: Strength, matrices: Any, __: Any) -> tuple[jax.Array, Any]:
        *factors, scale = matrices
        dtype = compute_dtype(u, *factors)
        w0, left, right = (cast(x, dtype) for x in factors)
        scale = cast(scale, jnp.finfo(dtype).dtype)
        of_w0, of_product = _pull(w0, left, right, is_left=is_left)
        pull = of_w0.reshape(p.shape) + scale * of_product.reshape(p.shape)
        # Within shard_map a factor may be whole while the matrix that pulls on it is split over these axes.
        pull = mesh_axes.total(pull, tuple(sorted(varying_axes(pull) - varying_axes(p), key=str)))
        rate = Strength(strength.value * scale, strength.is_known and is_known)
        return plus(cast(u, dtype), rate, pull), None

    return LeafRule(pulled, is_elementwise=True)


def _pull(w0: jax.Array, left: jax.Array, right: jax.Array, *, is_left: bool) -> tuple[jax.Array, jax.Array]:
    """The pulls of W0 and of the unscaled product on one factor: the terms of (W0 + left @ right) @ right^H, or ..."""
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if is_left:
        other = jnp.matrix_transpose(right).conj()
        return matmul(w0, other), matmul(left, matmul(right, other))
    other = jnp.matrix_transpose(left).conj()
    return matmul(other, w0), matmul(matmul(other, left), right)


def _refuse_idle(terms: Sequence[Term | None], leaves: Sequence[tuple[str, Any]], factors: Mapping[str, Pair]) -> None:
    """Raises an error if the mask and rates choose no known factor, or a factor of an unknown pair."""
    chosen = [path for (path, _), term in zip(leaves, terms, strict=True) if term is not None]
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves if trees.is_decayable(leaf)}
    for path in chosen:
        found = None if path in factors else role(parameter_at(path, shapes))
        if found is not None and found.name == ADAPTER:
            raise ValueError(
                f"{WHERE}: {path!r} looks like a LoRA factor, but its W0 and the other factor are not known. "
                f"Write {WRITE_PAIRS}; or leave it out: mask=all_but({path!r})."
            )
    if chosen and not any(path in factors for path in chosen):
        raise ValueError(
            f"{WHERE}: mask and weight_decay choose {chosen[:3]}, but no LoRA factor. The factors are "
            f"{list(factors)[:3]}, and only they decay here. Leave out the mask, or choose factors with it; "
            "decoupled_decay(0.1, mask) decays other parameters."
        )


_RULES = {
    (is_left, is_known): _rule(is_left=is_left, is_known=is_known)
    for is_left in (True, False)
    for is_known in (True, False)
}
