"""LoRA factors: the pull is the gradient of the whole matrix's penalty, and where it leads is known in closed form."""

import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import wdjax
from wdjax.low_rank import decoupled_lora_decay

RATE, SCALE, LEARNING_RATE = 0.3, 2.0, 0.05
SIZES = {"in": 5, "out": 4, "rank": 2}


def arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def factors(*stack: int) -> list[np.ndarray]:
    """W0, A and B in float64."""
    return arrays((*stack, 5, 4), (*stack, 5, 2), (*stack, 2, 4))


def layer(dtype: Any = jnp.float32, *stack: int) -> dict[str, Any]:
    names = ("kernel", "lora_a", "lora_b")
    return {"dense": {name: jnp.asarray(x, dtype) for name, x in zip(names, factors(*stack), strict=True)}}


def pulls(w0: Any, a: Any, b: Any, rate: float = RATE, scale: float = SCALE) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of (rate / 2) * |W0 + scale * A @ B|^2 with respect to A and B."""
    w = w0 + scale * a @ b
    return rate * scale * w @ np.swapaxes(b, -1, -2), rate * scale * np.swapaxes(a, -1, -2) @ w


def float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained and what is frozen."""
    frozen = {"dense": {"kernel": params["dense"]["kernel"]}}
    return {"dense": {name: params["dense"][name] for name in ("lora_a", "lora_b")}}, frozen


def pulled(params: Any, *, base: Any = None, **kwargs: Any) -> Any:
    """What one update with zero gradient adds."""
    decay = decoupled_lora_decay(RATE, **{"scale": SCALE, **kwargs})
    return decay.update(zeros_like(params), decay.init(params), params, base=base)[0]


# The rule.


@pytest.mark.parametrize("stack", [(), (3,), (3, 2)])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_closed_form(stack: tuple[int, ...], run: Any) -> None:
    params = layer(jnp.float32, *stack)
    updates = jax.tree.map(lambda p: 0.5 * jnp.ones_like(p), params)
    decay = decoupled_lora_decay(RATE, scale=SCALE)
    new, state = run(decay.update)(updates, decay.init(params), params)
    want_a, want_b = pulls(*float64([params["dense"][name] for name in ("kernel", "lora_a", "lora_b")]))
    np.testing.assert_allclose(new["dense"]["lora_a"], 0.5 + want_a, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["dense"]["lora_b"], 0.5 + want_b, rtol=1e-5, atol=1e-5)
    assert np.array_equal(new["dense"]["kernel"], updates["dense"]["kernel"])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
    assert isinstance(state, wdjax.in_update.DecayState)
    assert int(state.count) == 1


@pytest.mark.usefixtures("x64")
def test_it_is_the_gradient_of_the_penalty_in_float64() -> None:
    params, frozen = split(layer(jnp.float64))

    def penalty(params: Any) -> jax.Array:
        a, b = params["dense"]["lora_a"], params["dense"]["lora_b"]
        return RATE / 2 * jnp.sum((frozen["dense"]["kernel"] + SCALE * a @ b) ** 2)

    chex.assert_trees_all_close(pulled(params, base=frozen), jax.grad(penalty)(params), rtol=1e-13, atol=1e-14)


def test_complex_factors_get_the_conjugate_transpose() -> None:
    real, imaginary = layer(), jax.tree.map(lambda x: x[::-1, ::-1], layer())
    params = jax.tree.map(jax.lax.complex, real, imaginary)
    w0, a, b = (np.asarray(params["dense"][name], np.complex128) for name in ("kernel", "lora_a", "lora_b"))
    w, new = w0 + SCALE * a @ b, pulled(params)
    np.testing.assert_allclose(new["dense"]["lora_a"], RATE * SCALE * w @ b.conj().T, rtol=1e-5)
    np.testing.assert_allclose(new["dense"]["lora_b"], RATE * SCALE * a.conj().T @ w, rtol=1e-5)


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, and of the programs that they call."""
    for eqn in jaxpr.eqns:
        yield eqn
        for called in eqn.params.values():
            yield from equations(called) if hasattr(called, "eqns") else ()


def test_the_matrix_is_never_formed() -> None:
    size_in, size_out, rank = 64, 48, 2
    shapes = ((size_in, size_out), (size_in, rank), (rank, size_out))
    names = ("kernel", "lora_a", "lora_b")
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in zip(names, shapes, strict=True)}
    decay = decoupled_lora_decay(RATE, scale=SCALE)
    trained = {name: params[name] for name in names[1:]}
    state = jax.eval_shape(decay.init, trained)
    jaxpr = jax.make_jaxpr(decay.update)(trained, state, trained, base={"kernel": params["kernel"]})
    products = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) == 6
    assert all(out.aval.shape != shapes[0] for eqn in products for out in eqn.outvars)
    assert all(set(eqn.params["precision"]) == {jax.lax.Precision.HIGHEST} for eqn in products)


# Where it leads.


def descend(optimizer: Any, params: Any, steps: int, gradient: Any = zeros_like, **extra: Any) -> Any:
    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(gradient(params), state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0])()


def matrix(params: Any, frozen: Any, scale: float = SCALE) -> np.ndarray:
    a, b = params["dense"]["lora_a"], params["dense"]["lora_b"]
    return np.asarray(frozen["dense"]["kernel"] + scale * a @ b)


@pytest.mark.usefixtures("x64")
def test_decay_of_the_factors_leads_to_w0_and_decay_of_the_matrix_to_the_least_reachable() -> None:
    params, frozen = split(layer(jnp.float64))
    w0 = np.asarray(frozen["dense"]["kernel"])
    sgd = functools.partial(optax.chain, optax.identity())
    of_factors = sgd(wdjax.decoupled_decay(RATE), optax.scale_by_learning_rate(LEARNING_RATE))
    of_matrix = sgd(decoupled_lora_decay(RATE, scale=SCALE), optax.scale_by_learning_rate(LEARNING_RATE))

    shrunk = matrix(descend(of_factors, params, 10), frozen) - w0
    shrinkage = (1 - LEARNING_RATE * RATE) ** (2 * 10)
    np.testing.assert_allclose(shrunk, shrinkage * (matrix(params, frozen) - w0), rtol=1e-12)
    np.testing.assert_allclose(matrix(descend(of_factors, params, 2000), frozen), w0, atol=1e-12)

    # What is left of W0 is what no matrix of rank 2 can cancel: its smaller singular values (Eckart and Young).
    least = descend(of_matrix, params, 4000, base=frozen)
    u, s, vt = np.linalg.svd(w0, full_matrices=False)
    np.testing.assert_allclose(matrix(least, frozen), u[:, 2:] * s[2:] @ vt[2:], atol=1e-8)
    a, b = (np.asarray(least["dense"][name]) for name in ("lora_a", "lora_b"))
    chex.assert_trees_all_close(pulls(w0, a, b), (np.zeros_like(a), np.zeros_like(b)), atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_beside_a_loss_factors_are_cut_in_rank_and_the_matrix_is_shrunk() -> None:
    """Fit A @ B to M: decay of the factors lowers each singular value by the rate, of the matrix by a fraction."""
    (target,) = arrays((4, 4))
    u, s, vt = np.linalg.svd(target)
    s = np.array([2.0, 1.0, 0.2, 0.1])  # Two below the rate.
    target = u * s @ vt
    a, b = arrays((4, 4), (4, 4), seed=1)
    params = {"dense": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}
    frozen = {"dense": {"kernel": jnp.zeros((4, 4))}}
    gradient = jax.grad(lambda p: 0.5 * jnp.sum((p["dense"]["lora_a"] @ p["dense"]["lora_b"] - target) ** 2))
    rate = optax.scale_by_learning_rate(0.1)
    cut = descend(optax.chain(wdjax.decoupled_decay(RATE), rate), params, 4000, gradient)
    shrunk = descend(optax.chain(decoupled_lora_decay(RATE), rate), params, 40000, gradient, base=frozen)
    np.testing.assert_allclose(matrix(cut, frozen, 1.0), u * np.maximum(s - RATE, 0) @ vt, atol=1e-8)
    np.testing.assert_allclose(matrix(shrunk, frozen, 1.0), target / (1 + RATE), atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_linear_model_trains_as_by_gradient_descent_on_loss_plus_penalty() -> None:
    w0, a, b = factors()
    inputs, targets = arrays((8, 5), (8, 4), seed=2)
    params, frozen = split(layer(jnp.float64))

    def loss(params: Any) -> jax.Array:
        w = frozen["dense"]["kernel"] + SCALE * params["dense"]["lora_a"] @ params["dense"]["lora_b"]
        return jnp.mean(jnp.sum((inputs @ w - targets) ** 2, axis=-1)) / 2

    optimizer = optax.chain(decoupled_lora_decay(RATE, scale=SCALE), optax.scale_by_learning_rate(LEARNING_RATE))
    trained = descend(optimizer, params, 50, jax.grad(loss), base=frozen)
    for _ in range(50):
        gradient = inputs.T @ (inputs @ (w0 + SCALE * a @ b) - targets) / 8
        pull_a, pull_b = pulls(w0, a, b)
        a, b = (
            a - LEARNING_RATE * (SCALE * gradient @ b.T + pull_a),
            b - LEARNING_RATE * (SCALE * a.T @ gradient + pull_b),
        )
    np.testing.assert_allclose(trained["dense"]["lora_a"], a, rtol=1e-10)
    np.testing.assert_allclose(trained["dense"]["lora_b"], b, rtol=1e-10)


@pytest.mark.peers
def test_first_in_the_chain_it_is_l2_in_the_gradient_and_after_adam_it_is_not_scaled() -> None:
    params, frozen = split(layer())
    grads = jax.tree.map(jnp.cos, params)
    adam, decay = optax.scale_by_adam(), decoupled_lora_decay(RATE, scale=SCALE)
    pull = pulled(params, base=frozen)
    add = functools.partial(jax.tree.map, jnp.add)

    def one(optimizer: Any, grads: Any) -> Any:
        return optimizer.update(grads, optimizer.init(params), params, base=frozen)[0]

    in_gradient, in_update = one(optax.chain(decay, adam), grads), one(optax.chain(adam, decay), grads)
    plain = optax.with_extra_args_support(adam)
    chex.assert_trees_all_close(in_gradient, one(plain, add(grads, pull)), rtol=1e-5)
    chex.assert_trees_all_close(in_update, add(one(plain, grads), pull), rtol=1e-5)


# Promises.


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_the_update_keeps_its_dtype_and_arithmetic_is_in_float32(dtypes: tuple[str, str]) -> None:
    update_dtype, param_dtype = dtypes
    params, frozen = split(layer(param_dtype))
    updates = jax.tree.map(lambda p: jnp.ones_like(p, dtype=update_dtype), params)
    decay = decoupled_lora_decay(RATE, scale=SCALE)
    new, _ = jax.jit(decay.update)(updates, decay.init(params), params, base=frozen)
    assert {x.dtype.name for x in jax.tree.leaves(new)} == {update_dtype}
    a, b = (float64(params)["dense"][name] for name in ("lora_a", "lora_b"))
    want_a, want_b = pulls(float64(frozen)["dense"]["kernel"], a, b)
    tolerance = 2.0**-8 if update_dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(float64(new)["dense"]["lora_a"], 1 + want_a, rtol=tolerance, atol=1e-6)
    np.testing.assert_allclose(float64(new)["dense"]["lora_b"], 1 + want_b, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(
    "off",
    [
        {"weight_decay": 0.0},
        {"weight_decay": 1e-60},
        {"weight_decay": RATE, "mask": {"dense": False}},
        {"weight_decay": RATE, "scale": 0.0},
        {"weight_decay": jnp.float32(0)},
        {"weight_decay": lambda count: 0.0 * jnp.asarray(count, jnp.float32)},
        {"weight_decay": wdjax.by_path({"kernel": 0.0}, default=0.0)},
    ],
    ids=["0", "nothing in float32", "mask", "scale 0", "0-d array", "schedule", "table"],
)
def test_off_leaves_the_same_bits_where_weights_are_infinite_or_nan(off: dict[str, Any]) -> None:
    params = layer()
    params["dense"]["kernel"] = params["dense"]["kernel"].at[0, 0].set(jnp.inf).at[1, 1].set(jnp.nan)
    updates = jax.tree.map(lambda p: jnp.linspace(-1, 1, p.size, dtype=p.dtype).reshape(p.shape), params)
    decay = decoupled_lora_decay(**off)
    new, _ = jax.jit(decay.update)(updates, decay.init(params), params)
    chex.assert_trees_all_equal(new, updates)


def test_a_decay_that_is_off_needs_no_w0() -> None:
    params, _ = split(layer())
    decay = decoupled_lora_decay(0.0)
    chex.assert_trees_all_equal(decay.update(params, decay.init(params), params)[0], params)


def test_masks_tables_and_schedules() -> None:
    params, frozen = split(layer())
    full = pulled(params, base=frozen)["dense"]
    only_b = pulled(params, base=frozen, mask=wdjax.only("lora_b"))["dense"]
    np.testing.assert_array_equal(only_b["lora_a"], jnp.zeros_like(full["lora_a"]))
    np.testing.assert_array_equal(only_b["lora_b"], full["lora_b"])
    rate = {"lora_a": lambda count: 0.1 * jnp.asarray(count + 1, jnp.float32), "lora_b": RATE}
    decay = decoupled_lora_decay(wdjax.by_path(rate), scale=wdjax.by_path({"dense": SCALE}))
    state, update = decay.init(params), jax.jit(decay.update)
    for step in (1, 2):
        new, state = update(zeros_like(params), state, params, base=frozen)
        np.testing.assert_allclose(new["dense"]["lora_a"], 0.1 * step / RATE * full["lora_a"], rtol=1e-5)
        np.testing.assert_allclose(new["dense"]["lora_b"], full["lora_b"], rtol=1e-6)
    assert update._cache_size() == 1


def test_traced_rates_and_scales_under_vmap() -> None:
    params, frozen = split(layer())

    def pull(rate: jax.Array, scale: jax.Array) -> Any:
        decay = decoupled_lora_decay(rate, scale=scale)
        return decay.update(zeros_like(params), decay.init(params), params, base=frozen)[0]["dense"]

    rates, scales = jnp.array([0.0, RATE, 1.0]), jnp.array([1.0, SCALE, 0.5])
    new = jax.vmap(pull)(rates, scales)
    w0, a, b = float64([frozen["dense"]["kernel"], params["dense"]["lora_a"], params["dense"]["lora_b"]])
    for i in range(3):
        want_a, want_b = pulls(w0, a, b, float(rates[i]), float(scales[i]))
        np.testing.assert_allclose(new["lora_a"][i], want_a, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new["lora_b"][i], want_b, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
def test_beside_other_transformations() -> None:
    params, frozen = split(layer())
    full = pulled(params, base=frozen)
    injected = optax.inject_hyperparams(decoupled_lora_decay)(weight_decay=RATE, scale=SCALE)
    new, _ = injected.update(zeros_like(params), injected.init(params), params, base=frozen)
    chex.assert_trees_all_close(new, full, rtol=1e-6)
    # The frozen leaf is hidden, and `base` has it.
    whole = layer()
    trained = {"dense": {"kernel": False, "lora_a": True, "lora_b": True}}
    masked = optax.masked(decoupled_lora_decay(RATE, scale=SCALE), trained)
    new, _ = masked.update(zeros_like(whole), masked.init(whole), whole, base=whole)
    chex.assert_trees_all_close(split(new)[0], full, rtol=1e-6)
    cautious = wdjax.cautious(decoupled_lora_decay(RATE, scale=SCALE))
    new, _ = cautious.update(jax.tree.map(jnp.negative, full), cautious.init(params), params, base=frozen)
    chex.assert_trees_all_close(new, jax.tree.map(jnp.negative, full))


# Layouts.

A, B, W0 = "A", "B", "W0"
LAYOUTS = {
    "nnx.LoRALinear": {"x": {"kernel": W0, "lora": {"lora_a": A, "lora_b": B}}},
    "nnx.LoRA around a module": {"x": {"base_module": {"kernel": W0}, "lora_a": A, "lora_b": B}},
    "one called lora, beside another kernel": {
        "kernel": "other",
        "lora": {"base_module": {"kernel": W0}, "lora_a": A, "lora_b": B},
    },
    "at the root": {"kernel": W0, "lora_a": A, "lora_b": B},
    "Gemma": {"x": {"w": W0, "lora": {"a": A, "b": B}}},
    "PEFT": {"x": {"base_layer": {"kernel": W0}, "lora_A": {"kernel": A}, "lora_B": {"kernel": B, "bias": "other"}}},
    "PEFT with an adapter's name": {
        "x": {"weight": W0, "lora_A": {"default": {"weight": A}}, "lora_B": {"default": {"weight": B}}}
    },
    "Qwix and openpi": {"x": {"kernel_lora_a": A, "kernel": W0, "kernel_lora_b": B, "w": "other"}},
    "an embedding": {"x": {"embedding": W0, "lora_a": A, "lora_b": B}},
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("frozen", [False, True], ids=["in params", "in base"])
def test_pairs_are_found(names: Any, frozen: bool) -> None:
    values = dict(zip((W0, A, B), factors(), strict=True))
    whole = jax.tree.map(lambda name: jnp.asarray(values.get(name, np.ones(3)), jnp.float32), names)
    params = jax.tree.map(lambda name, x: x if name in (A, B) else None, names, whole) if frozen else whole
    want = dict(zip((A, B), pulls(*factors()), strict=True))
    new = pulled(params, base=whole if frozen else None)
    for name, update in zip(jax.tree.leaves(names), jax.tree.leaves(new, is_leaf=lambda x: x is None), strict=True):
        if update is not None:
            np.testing.assert_allclose(update, want.get(name, np.zeros(update.shape)), rtol=1e-5, atol=1e-5)
        else:
            assert name not in (A, B)


# Shapes of W0, A and B, W0's axes in the order of those of A and B, and how many are stacked.
SHAPES = {
    "stacked as often as the rank": ((2, 5, 4), (2, 5, 2), (2, 2, 4), (0, 1, 2), 1),
    "DenseGeneral": ((5, 2, 3), (5, 2), (2, 2, 3), (0, 1, 2), 0),
    "DenseGeneral, flat factors": ((2, 3, 4), (6, 2), (2, 4), (0, 1, 2), 0),
    "DenseGeneral, flat factors, stacked": ((3, 5, 2, 4), (3, 5, 2), (3, 2, 8), (0, 1, 2, 3), 1),
    "BTNH,NHD->BTD": ((2, 3, 5), (2, 3, 2), (2, 5), (0, 1, 2), 0),
    "BTD,NDH->BTNH": ((2, 5, 3), (5, 2), (2, 2, 3), (1, 0, 2), 0),
    "BTD,NDH->BTNH, stacked": ((3, 2, 5, 4), (3, 5, 2), (3, 2, 2, 4), (0, 2, 1, 3), 1),
    "BTF,NHF->BTNH": ((2, 3, 5), (5, 2), (2, 2, 3), (2, 0, 1), 0),
    "square": ((4, 4), (4, 2), (2, 4), (0, 1), 0),
    "axes of one": ((1, 5, 1), (1, 5, 1), (1, 1, 1), (0, 1, 2), 1),
}


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_axes(case: Any) -> None:
    *shapes, order, stack = case
    w0, a, b = arrays(*shapes)
    params = {"kernel": w0, "lora_a": a, "lora_b": b}
    new = pulled(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
    stacked, rank = a.shape[:stack], a.shape[-1]
    flat_a, flat_b = a.reshape(*stacked, -1, rank), b.reshape(*stacked, rank, -1)
    want_a, want_b = pulls(w0.transpose(order).reshape(*stacked, flat_a.shape[-2], -1), flat_a, flat_b)
    np.testing.assert_allclose(new["lora_a"], want_a.reshape(a.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["lora_b"], want_b.reshape(b.shape), rtol=1e-5, atol=1e-5)


def test_pairs_that_are_given() -> None:
    """A weight laid out (out, in), as PyTorch's: W0 + scale * lora_B @ lora_A; and a pair that is found beside it."""
    w0, a, b = factors()
    odd = {"weight": w0.T, "down": a.T, "up": b.T}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"odd": odd, **layer()})
    new = pulled(params, pairs={"odd/weight": ("odd/up", "odd/down")})
    chex.assert_trees_all_close(new["odd"]["down"], new["dense"]["lora_a"].T, rtol=1e-5)
    chex.assert_trees_all_close(new["odd"]["up"], new["dense"]["lora_b"].T, rtol=1e-5)
    np.testing.assert_allclose(new["dense"]["lora_a"], pulls(w0, a, b)[0], rtol=1e-5, atol=1e-5)


def test_a_frozen_factor_is_found_in_base() -> None:
    params, _ = split(layer())
    whole, trained = layer(), {"dense": {"lora_b": params["dense"]["lora_b"]}}
    new = pulled(trained, base=whole)
    chex.assert_trees_all_close(new["dense"]["lora_b"], pulled(whole)["dense"]["lora_b"])


# Flax's own layers.


def model_of(kind: str) -> nnx.Module:
    rngs = nnx.Rngs(0)
    if kind == "LoRALinear":
        model: Any = nnx.LoRALinear(5, 4, lora_rank=2, rngs=rngs)
        lora = model.lora
    else:
        model = lora = nnx.LoRA(5, 2, 4, base_module=nnx.Linear(5, 4, rngs=rngs), rngs=rngs)
    lora.lora_b[...] = jnp.asarray(factors()[2], jnp.float32)  # It starts at zero, where A does not move.
    return model


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["LoRALinear", "LoRA"])
def test_nnx_training_step(kind: str) -> None:
    inputs, targets = (jnp.asarray(x, jnp.float32) for x in arrays((8, 5), (8, 4), seed=2))
    model = model_of(kind)
    chain = optax.chain(decoupled_lora_decay(RATE), optax.scale_by_learning_rate(LEARNING_RATE))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            return jnp.mean(jnp.sum((model(inputs) - targets) ** 2, axis=-1)) / 2

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads, base=nnx.state(model, nnx.Param))
        return value

    def leaf(name: str) -> np.ndarray:
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        (array,) = jax.tree.leaves(next(variable for path, variable in state if path[-1] == name))
        return np.asarray(array, np.float64)

    x, y = np.asarray(inputs, np.float64), np.asarray(targets, np.float64)
    w0, a, b = leaf("kernel"), leaf("lora_a"), leaf("lora_b")
    for _ in range(5):
        step(model, optimizer)
        gradient = x.T @ (x @ (w0 + a @ b) - y) / 8
        pull_a, pull_b = pulls(w0, a, b, scale=1.0)
        a, b = a - LEARNING_RATE * (gradient @ b.T + pull_a), b - LEARNING_RATE * (a.T @ gradient + pull_b)
    np.testing.assert_allclose(leaf("lora_a"), a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(leaf("lora_b"), b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(leaf("kernel"), w0)
    with pytest.raises(ValueError, match=r"is not in params: looked for .*kernel.*base=frozen_params"):
        optimizer.update(model, nnx.state(model, nnx.LoRAParam))


@pytest.mark.peers
def test_a_linen_module_with_boxes() -> None:
    class Adapted(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = nn.with_partitioning(nn.initializers.normal(), (None, None))
            a, b = self.param("lora_a", init, (5, 2)), self.param("lora_b", init, (2, 4))
            return nn.Dense(4, name="base_layer")(x) + x @ a @ b

    params = Adapted().init(jax.random.key(0), jnp.ones((1, 5)))["params"]
    decay = decoupled_lora_decay(RATE)
    new, _ = decay.update(zeros_like(params), decay.init(params), params)
    bare = float64(nn.unbox(params))
    want = pulls(bare["base_layer"]["kernel"], bare["lora_a"], bare["lora_b"], scale=1.0)
    np.testing.assert_allclose(new["lora_a"].value, want[0], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(new["lora_b"].value, want[1], rtol=1e-4, atol=1e-8)


# What is refused, and in which words.


def refusal(params: Any, base: Any = None, **kwargs: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        pulled(params, base=base, **kwargs)
    return str(error.value)


def init_refusal(params: Any, rate: Any = RATE, **kwargs: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        decoupled_lora_decay(rate, **kwargs).init(params)
    return str(error.value)


def test_no_factors() -> None:
    message = init_refusal({"dense": {"kernel": jnp.ones((5, 4)), "lora": {"down": jnp.ones((5, 2))}}})
    assert "there are no LoRA factors among the 2 parameters. Known names are 'lora_a' beside 'lora_b'" in message
    assert "'dense/lora/down'" in message
    assert "pairs={'path of W0': ('path of A', 'path of B')}, where W = W0 + scale * A @ B" in message


def test_no_w0() -> None:
    params, frozen = split(layer())
    decoupled_lora_decay(RATE).init(params)  # W0 may come later.
    message = refusal(params)
    assert "the W0 of 'dense/lora_a' is not in params: looked for ['dense/kernel', 'dense/weight'" in message
    assert "optimizer.update(grads, state, params, base=frozen_params)" in message
    message = refusal(params, base={"other": frozen["dense"]})
    assert "is not in base" in message
    assert "'other/kernel'" in message
    assert "pairs={'path of W0': ('dense/lora_a', 'dense/lora_b')}" in message
    assert "is not in base" in refusal(params, base={"dense": {"kernel": None}})


@pytest.mark.parametrize("sizes", [(5, 4), (4, 4)])
def test_a_weight_of_equinox_has_its_outputs_first(sizes: tuple[int, int]) -> None:
    size_in, size_out = sizes
    w0, a, b = arrays((size_out, size_in), (size_in, 2), (2, size_out))
    names = {"weight": w0, "lora_a": a, "lora_b": b}
    new = pulled({"dense": {name: jnp.asarray(x, jnp.float32) for name, x in names.items()}})["dense"]
    want_a, want_b = pulls(w0.T, a, b)
    np.testing.assert_allclose(new["lora_a"], want_a, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["lora_b"], want_b, rtol=1e-5, atol=1e-5)
    # A pair that is given is in the order of the product, as PyTorch's factors of the same weight.
    left, right = arrays((size_out, 2), (2, size_in), seed=1)
    params = {"x": {"weight": w0, "lora_A": {"weight": right}, "lora_B": {"weight": left}}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    new = pulled(params, pairs={"x/weight": ("x/lora_B/weight", "x/lora_A/weight")})["x"]
    want_left, want_right = pulls(w0, left, right)
    np.testing.assert_allclose(new["lora_B"]["weight"], want_left, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["lora_A"]["weight"], want_right, rtol=1e-5, atol=1e-5)


def test_a_factor_of_no_known_pair_is_told_of() -> None:
    params = layer()
    params["embed"] = {"lora_embedding_A": jnp.ones((9, 2)), "lora_embedding_B": jnp.ones((2, 4))}
    for message in (init_refusal(params), refusal(params)):
        assert "'embed/lora_embedding_A' looks like a LoRA factor" in message
        assert "looks like a LoRA factor, but its W0 and the other factor are not known. Write" in message
        assert "mask=all_but('embed/lora_embedding_A')" in message
    new = pulled(params, mask=wdjax.all_but("embed"))
    assert not np.any(new["embed"]["lora_embedding_A"])
    assert np.any(new["dense"]["lora_b"])


def test_frozen_weights_may_be_one_array() -> None:
    params = layer()
    params["other"] = {**layer(jnp.float32)["dense"], "kernel": params["dense"]["kernel"]}
    decoupled_lora_decay(0.1, scale=0.5).init(params)  # A warning would be an error.
    params["other"]["lora_a"] = params["dense"]["lora_a"]
    with pytest.warns(UserWarning, match="'dense/lora_a' and 'other/lora_a' are one array") as told:
        decoupled_lora_decay(0.1, scale=0.5).init(params)
    assert len(told) == 1
    assert told[0].filename == __file__


def test_several_w0() -> None:
    params = layer()
    params["dense"]["weight"] = params["dense"]["kernel"] + 0
    message = init_refusal(params)
    assert "could be any of ['dense/kernel', 'dense/weight']" in message
    assert "pairs={'dense/kernel': ('dense/lora_a', 'dense/lora_b')}" in message


def test_no_partner() -> None:
    params = layer()
    del params["dense"]["lora_b"]
    message = refusal(params)
    assert "'dense/lora_b' is neither in params nor in base" in message
    assert "base=frozen_params" in message


def test_shapes_that_do_not_fit() -> None:
    params = layer()
    params["dense"]["kernel"] = params["dense"]["kernel"].T
    params["dense"]["lora_a"] = jnp.ones((2, 5))
    params["dense"]["lora_b"] = jnp.ones((4, 2))
    for message in (init_refusal(params), refusal(split(params)[0], base=params)):
        assert "the shapes do not fit: W0 = 'dense/kernel' has (4, 5), A = 'dense/lora_a' has (2, 5)" in message
        assert "and B = 'dense/lora_b' has (4, 2)" in message
        assert "pairs={'dense/kernel': ('dense/lora_b', 'dense/lora_a')}" in message
    params["dense"]["lora_a"] = jnp.ones(5)
    assert "the shapes do not fit" in init_refusal(params)
    # Which axis of W0 is the input cannot be told from sizes.
    axes = {"kernel": jnp.ones((3, 5, 5)), "lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 3, 5))}
    assert "the shapes do not fit" in init_refusal(axes)


def test_an_update_of_another_shape() -> None:
    params, decay = layer(), decoupled_lora_decay(RATE)
    updates = {"dense": {**zeros_like(params)["dense"], "lora_a": jnp.zeros((5, 3))}}
    with pytest.raises(ValueError, match=r"the update of 'dense/lora_a' has shape \(5, 3\) and the parameter \(5, 2\)"):
        decay.update(updates, decay.init(params), params)


def test_a_quantized_w0() -> None:
    params, frozen = split(layer())
    message = refusal(params, base=jax.tree.map(lambda x: x.astype(jnp.int8), frozen))
    assert "'dense/kernel' is int8, but W0, A and B must be floating-point" in message


def test_a_mask_that_chooses_no_factor() -> None:
    message = init_refusal(layer(), mask=wdjax.only("kernel"))
    assert "choose ['dense/kernel'], but no LoRA factor. The factors are ['dense/lora_a', 'dense/lora_b']" in message
    assert "no LoRA factor" in init_refusal(layer(), wdjax.by_path({"kernel": RATE}, default=0.0))


def test_malformed_pairs() -> None:
    for pairs in ([("w", "a", "b")], {"w": "ab"}, {"w": ("a",)}, {"w": ("a", 1)}):
        assert f"pairs must be a dict of canonical paths, got {pairs!r}" in init_refusal(layer(), pairs=pairs)
    twice = {"dense/kernel": ("dense/lora_a", "dense/lora_b"), "dense/weight": ("dense/lora_a", "dense/up")}
    assert "names the factor 'dense/lora_a' twice" in init_refusal(layer(), pairs=twice)
    message = init_refusal(layer(), pairs={"dense/kernel": ("dense/lora_x", "dense/lora_y")})
    assert "names the factors 'dense/lora_x' and 'dense/lora_y', but neither is in params" in message
    assert "'dense/lora_a'" in message


def test_rates_and_arguments() -> None:
    assert "weight_decay must be finite and not negative, got -0.1" in init_refusal(layer(), -0.1)
    assert "scale must be finite and not negative, got nan" in init_refusal(layer(), scale=float("nan"))
    with pytest.raises(TypeError, match="has no argument 'toward'"):
        decoupled_lora_decay(RATE, toward="init")  # pyright: ignore[reportCallIssue]
    decay = decoupled_lora_decay(RATE)
    with pytest.raises(ValueError, match="decoupled_lora_decay needs the parameters"):
        decay.update(layer(), decay.init(layer()))
