"""Low-rank factors: decay the matrix that they make, not the factors.

A LoRA layer adds a product of two thin factors to a frozen weight, W = W0 + scale * A @ B, and only A and B are
trained. Weight decay asks here which matrix is to be small:

- **the factors** (`decoupled_decay` on A and B): with zero gradient A @ B is multiplied by
  (1 - learning_rate * weight_decay)^2 each step, so W goes to W0, not to zero. Beside a loss it is more than that. The
  least (|A|^2 + |B|^2) / 2 of all factors with one product is that product's nuclear norm, the sum of its singular
  values, so small singular values go to exactly zero: the rank shrinks.
- **the matrix** (`decoupled_lora_decay`): the gradient of (weight_decay / 2) * |W|^2 with respect to A and B. This is
  the decay that training all of W would have, as far as A and B reach.

One is a pull to the pretrained weights, the other a pull to zero; for LoRA neither is the better in general. What is
not factors is left alone here: `decoupled_decay` with a mask decays it.

The room: which leaves are a pair, and where their W0 may be, is read from canonical paths, and how the axes of W0 are
those of A and B from shapes (`_pairs`); the rule itself is two lines (`_pull`) and never forms a matrix of the size of
W but W0 itself.
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
from ..paths.roles import ADAPTER, role
from ..paths.standard import parameter_at
from ._pairs import WHERE, WRITE_PAIRS, Pair, checked_pairs, factors_of, has

PyTree = Any


@checks.known_arguments
def decoupled_lora_decay(
    weight_decay: Rate, mask: Mask = None, *, scale: Rate = 1.0, pairs: Mapping[str, tuple[str, str]] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Decays the matrix W = W0 + scale * A @ B that LoRA factors make, by a pull on the factors A and B alone.

    Decaying A and B themselves, `decoupled_decay` on "lora_a" and "lora_b", pulls W to W0 and lowers the rank of
    A @ B; this pulls W to zero. Only the factors are changed: biases, W0 and all else pass through untouched.

    Rule:   u_A <- u_A + weight_decay * scale * W @ B^T;  u_B <- u_B + weight_decay * scale * A^T @ W
    Place:  after `scale_by_*`, before the learning rate. Put first in the chain it is L2 in the gradient: the loss has
            then (weight_decay / 2) * |W|^2 beside it.
    Units:  per step and per unit of learning rate, but no fixed fraction of W: with zero gradient W changes by
            -learning_rate * weight_decay * scale^2 * (W B^T B + A A^T W), to first order in the learning rate. Where
            B is zero, as LoRA starts, A does not move; left alone, A @ B comes to cancel the largest singular values
            of W0, as many as the rank.
    Source: Khodak et al. 2021 (arXiv 2105.01029), "Frobenius decay", for products without a W0; Shafkat 2023,
            irhum.github.io/blog/lorawd, for LoRA. Deviation: decoupled, and times the learning rate itself, as
            `decoupled_decay`.

    The pairs are found by path, and W0 near them:

        X/lora_a, X/lora_b             X/kernel, X/base_module/kernel, X/base_layer/kernel    nnx.LoRA
        X/lora/lora_a, X/lora/lora_b   X/kernel                                               nnx.LoRALinear
        X/lora/a, X/lora/b             X/kernel                                               Gemma
        X/lora_A/kernel, ...           X/kernel, X/base_layer/kernel                          PEFT
        X/kernel_lora_a, ...           X/kernel                                               Qwix, openpi

    where `kernel` may also be `weight`, `w` or `embedding`. A is (*stack, *in, r), B is (*stack, r, *out), and W0 has
    the axes (*stack, *in, *out), a `weight` (*stack, *out, *in) as in Equinox; or these in another order if their
    sizes tell them apart, or `in` and `out` split into several axes. Factors of an (out, in) weight as PyTorch's,
    where W = W0 + scale * lora_B @ lora_A, are named in the order of the product:
    pairs={"X/weight": ("X/lora_B/weight", "X/lora_A/weight")}.

    Within `shard_map` W0 may be split with one of the factors, along `in` with A or along `out` with B, while the other
    factor is the same on all devices: what pulls on that is then summed over them. With check_vma=False nothing is
    known of that, and all three must be whole.

    Products run at the highest matrix precision, in at least float32, whatever the device's default is: each step
    reads W0 twice, widened to float32 if it is narrower, and adds about 4 * rank * size(W0) operations.

    Args:
        weight_decay: a number or 0-d array (traced is fine) >= 0, a schedule, or a `by_path` table of these.
        mask: None, `Rules` of booleans, a tree or prefix tree of booleans, or a function of params that gives one. A
            factor that is masked out stays, and still counts in W.
        scale: what the model multiplies A @ B with, alpha / rank or alpha / sqrt(rank); 1 for Flax NNX and Gemma,
            which multiply with nothing. A number, a 0-d array or a `by_path` table of these, read at A.
        pairs: for other layouts, a dict from the path of W0 to the paths of A and B; it goes before what is found.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `DecayState`; its `update` needs `params`. Updates keep their
        dtype. W0 is looked up in the keyword argument `base` of `update`, a tree with the paths of the whole model,
        and without it in `params`: optimizer.update(grads, state, params, base=frozen_params). A factor that is not
        in `params` because it is frozen, as A in LoRA-FA, is looked up there too.

    Raises:
        TypeError, ValueError: for a rate or scale that is negative, NaN, infinite or not a scalar, and for malformed
            pairs. At `init` and `update`: if params hold no factors, if the mask chooses none, or if shapes do not fit.
            At `update`: if W0 or a factor is nowhere or is quantized, or params are left out.

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
        leaves = trees.flatten_with_paths(params)
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
            if jnp.finfo(dtype).dtype.type(term.parted()[0] * size.parted()[0]) == 0:  # So small that it is 0 there.
                continue
            rules[i] = _RULES[path == pair.left, scale.is_known]
            inputs[i] = w0, left, right, _along(scale.value, jnp.ndim(param))
        updates, _ = rates.run(rules, updates, state, params, inputs=inputs)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _along(scale: Any, ndim: int) -> Any:
    """A scale; or the scales of stacked layers, which are leading axes, for an array of another rank."""
    if jnp.ndim(scale) == 0:
        return scale
    leading = max((axis + 1 for axis, size in enumerate(scale.shape) if size > 1), default=0)
    return scale.reshape(scale.shape[:leading] + (1,) * (ndim - leading))


def _rule(*, is_left: bool, is_known: bool) -> LeafRule:
    """The rule for one of the factors, and for a scale that is known while tracing or not."""

    def pulled(u: jax.Array, p: jax.Array, _: Any, strength: Strength, matrices: Any, __: Any) -> tuple[jax.Array, Any]:
        *factors, scale = matrices
        dtype = compute_dtype(u, *factors)
        w0, left, right = (cast(x, dtype) for x in factors)
        scale = cast(scale, jnp.finfo(dtype).dtype)
        of_w0, of_product = _pull(w0, left, right, is_left=is_left)
        pull = of_w0.reshape(p.shape) + scale * of_product.reshape(p.shape)
        # Within shard_map a factor may be whole, and the matrix that pulls on it split over these.
        pull = mesh_axes.total(pull, tuple(sorted(varying_axes(pull) - varying_axes(p), key=str)))
        rate = Strength(strength.value * scale, strength.is_known and is_known)
        return plus(cast(u, dtype), rate, pull), None

    return LeafRule(pulled, is_elementwise=True)


def _pull(w0: jax.Array, left: jax.Array, right: jax.Array, *, is_left: bool) -> tuple[jax.Array, jax.Array]:
    """What W0 and what the product (yet without its scale) pull on one factor: (W0 + left @ right) @ right^H, or ..."""
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if is_left:
        other = jnp.matrix_transpose(right).conj()
        return matmul(w0, other), matmul(left, matmul(right, other))
    other = jnp.matrix_transpose(left).conj()
    return matmul(other, w0), matmul(matmul(other, left), right)


def _refuse_idle(terms: Sequence[Term | None], leaves: Sequence[tuple[str, Any]], factors: Mapping[str, Pair]) -> None:
    """Refuses a mask or a table of rates that means no factor, or one whose partner and weight are not known."""
    chosen = [path for (path, _), term in zip(leaves, terms, strict=True) if term is not None]
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves if trees.is_decayable(leaf)}
    for path in chosen:
        found = None if path in factors else role(parameter_at(path, shapes))
        if found is not None and found.name == ADAPTER:
            raise ValueError(
                f"{WHERE}: {path!r} looks like a LoRA factor, and what it makes is not known. Write {WRITE_PAIRS}; "
                f"or leave it out: mask=all_but({path!r})."
            )
    if chosen and not any(path in factors for path in chosen):
        raise ValueError(
            f"{WHERE}: mask and weight_decay choose {chosen[:3]}, and no LoRA factor; the factors are "
            f"{list(factors)[:3]}, and nothing else is decayed here. Leave out mask, or choose factors with it; "
            "decoupled_decay(0.1, mask) decays the rest."
        )


_RULES = {
    (is_left, is_known): _rule(is_left=is_left, is_known=is_known)
    for is_left in (True, False)
    for is_known in (True, False)
}
