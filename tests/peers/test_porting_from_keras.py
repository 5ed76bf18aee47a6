"""docs/how_to/from_keras.md: Keras runs the page's Keras programs, beside the page's cells. The weights must agree."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from peer import peer

import wdjax

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported.
keras = peer("keras")
if keras.backend.backend() != "jax":
    pytest.skip("KERAS_BACKEND is another one", allow_module_level=True)

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]

PAGE = (Path(__file__).parents[2] / "docs" / "how_to" / "from_keras.md").read_text()
BLOCK = re.compile(r"^```(?:\{code-cell\} )?python\n((?::[^\n]*\n)*)(.*?)^```$", re.S | re.M)
STEPS = 40


(FLOAT64,) = (code for _, code in BLOCK.findall(PAGE) if "set_floatx" in code)
LAST_LINE = FLOAT64.rstrip().splitlines()[-1]
PROSE = PAGE.replace("\n", " ")


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float64 in Keras too, with the lines of the page."""
    dtypes = pytest.importorskip("keras.src.backend.common.dtypes")
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", dtypes.BIT64_TO_BIT32_DTYPE["float64"])
    before = jax.config.jax_enable_x64, keras.config.floatx(), keras.config.dtype_policy()
    exec(FLOAT64, {})
    with jax.numpy_rank_promotion("allow"):  # Keras relies on it.
        yield
    jax.config.update("jax_enable_x64", before[0])
    keras.config.set_floatx(before[1])
    keras.config.set_dtype_policy(before[2])


@pytest.fixture
def float32(float64: None) -> Iterator[None]:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    with jax.enable_x64(False):
        yield


def run(change: Callable[[str], str] = lambda code: code) -> dict[str, Any]:
    """Runs all blocks of the page in its order, except those cells that stand in for Keras' weights or check them."""
    namespace: dict[str, Any] = {"__name__": "from_keras"}
    for number, (options, code) in enumerate(BLOCK.findall(PAGE)):
        if "remove-cell" not in options and code != FLOAT64:
            exec(compile(change(code), f"from_keras.md, block {number}", "exec"), namespace)
    return namespace


def farthest(a: Any, b: Any) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def test_the_programs_of_the_page_agree(capsys: pytest.CaptureFixture[str]) -> None:
    page = run()
    assert page["keras_optimizer"].iterations == STEPS
    assert f"{STEPS} steps in float64, weights, moving averages and reported losses agree to 1e-13" in PROSE
    trained = page["from_keras"](page["trained"])
    assert set(jax.tree.leaves(jax.tree.map(lambda x: x.dtype.name, trained))) == {"float64"}
    assert jax.tree.reduce(max, page["difference"]) < 1e-13
    np.testing.assert_allclose(page["losses"], page["history"].history["loss"], rtol=1e-13)
    del trained["norm_1"]["mean"], trained["norm_1"]["var"]
    assert farthest(page["linen_params"], trained) < 1e-13
    # The constraint acts, and so does each regularizer.
    assert np.isclose(np.linalg.norm(trained["wide"]["kernel"], axis=0), 1.0, atol=1e-6).any()
    assert "two decays" in capsys.readouterr().out


def test_in_float32_the_outputs_of_the_page_are_those_of_keras(float32: None) -> None:
    page = run()
    assert "It prints about 1e-6" in PROSE
    assert 1e-8 < jax.tree.reduce(max, page["difference"]) < 3e-6
    np.testing.assert_allclose(page["losses"], page["history"].history["loss"], rtol=1e-5)
    (stand_in,) = (code for _, code in BLOCK.findall(PAGE) if code.startswith("# Stands in for"))
    exec(stand_in, shown := {"np": np, "jax": jax})
    starts = page["from_keras"](page["weights"]), page["from_keras"](shown["weights"])
    assert jax.tree.structure(starts[0]) == jax.tree.structure(starts[1])
    assert farthest(*starts) < 1e-6


def test_without_the_last_line_keras_computes_norms_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Without the last line, the two programs differ by about 5e-7" in PROSE
    assert LAST_LINE.startswith("dtypes.BIT64_TO_BIT32_DTYPE")
    monkeypatch.setitem(keras.src.backend.common.dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float32")
    assert 1e-7 < jax.tree.reduce(max, run()["difference"]) < 2e-6
    for name in ("mean", "var", "cos", "tanh"):
        exact, values = getattr(np, name), np.linspace(0.1, 1.0, 7)
        assert 1e-10 < abs(np.asarray(getattr(keras.ops, name)(values), float) - exact(values)).max() < 1e-6


def test_an_embedding_rounds_to_its_param_dtype() -> None:
    table = RNG.normal(size=(5, 3))
    for dtype, is_exact in ((jnp.float32, False), (jnp.float64, True)):
        embed = nnx.Embed(5, 3, param_dtype=dtype, rngs=nnx.Rngs(0))
        nnx.update(embed, {"embedding": jnp.asarray(table)})
        assert embed.embedding[...].dtype == "float64"
        assert (farthest(embed(jnp.arange(5)), table) == 0) == is_exact


def test_clipping_and_a_schedule_in_the_whole_program() -> None:
    (chain,) = (code for _, code in BLOCK.findall(PAGE) if code.startswith("clipped = "))
    keras_call = "AdamW(CosineDecay(0.01, 40), weight_decay=0.004, global_clipnorm=1.0)"
    assert f"`{keras_call}`" in PAGE
    keras_call = keras_call.replace("CosineDecay", "keras.optimizers.schedules.CosineDecay")

    def change(code: str, chain: str = chain) -> str:
        code = code.replace("AdamW(learning_rate=0.01, weight_decay=0.004)", keras_call)
        return code.replace("tx = optax.chain(adamw_with_l2(0.01), ", f"{chain}tx = optax.chain(clipped, ")

    assert jax.tree.reduce(max, run(change)["difference"]) < 1e-13
    l2, clip = "    wdjax.add_l2_to_grads(2 * 1e-4, regularized),\n", "    optax.clip_by_global_norm(1.0),\n"
    assert l2 + clip in chain
    clip_first = chain.replace(l2 + clip, clip + l2)
    assert jax.tree.reduce(max, run(lambda code: change(code, clip_first))["difference"]) > 1e-8


# What the page warns of: each of these is a mistake that a port may make.
MISTAKES = {
    "the half": ("add_l2_to_grads(2 * 1e-4", "add_l2_to_grads(1e-4"),
    "the place of epsilon": ("        scale_by_keras_adam(),", "        optax.scale_by_adam(eps=1e-7),"),
    "norms that decay": ('all_but("bias", "scale")', 'all_but("bias")'),
    "the epsilon of a norm": ("LayerNorm(16, epsilon=1e-3", "LayerNorm(16, epsilon=1e-6"),
    "no decay beside L2": ("decoupled_decay(0.004", "decoupled_decay(0.0"),
    "no constraint": ("constrain(KerasMaxNorm(), 1.0", "constrain(KerasMaxNorm(), 9.0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str) -> None:
    right, wrong = MISTAKES[mistake]
    assert right in PAGE
    skipped = "weights_only().mask(params)" if "norms" in mistake else "no such text"
    page = run(lambda code: "" if skipped in code else code.replace(right, wrong))
    found = jax.tree.reduce(max, page["difference"])
    assert found > 1e-8
    if mistake in ("the half", "the place of epsilon"):
        assert "it prints about 7e-4" in PROSE
        assert 6e-4 < found < 8e-4


@pytest.mark.slow
def test_with_the_librarys_own_constraint_the_difference_is_small() -> None:
    page = run(lambda code: code.replace("constrain(KerasMaxNorm()", "constrain(wdjax.L2Ball(per=-1)"))
    assert "With `L2Ball(per=-1)` instead of `KerasMaxNorm()`, they agree to 1e-5" in PROSE
    assert 1e-9 < jax.tree.reduce(max, page["difference"]) < 1e-5


# The other arguments of the optimizer, on one parameter.

LR, EPS = 1 / 16, 2.0**-20
RNG = np.random.default_rng(0)
START = {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)}
GRADS = [{name: RNG.normal(size=value.shape) for name, value in START.items()} for _ in range(STEPS)]


def theirs(optimizer: Any) -> tuple[dict[str, np.ndarray], Any]:
    variables = {name: keras.Variable(value, dtype="float64", name=name) for name, value in START.items()}
    optimizer.build(list(variables.values()))
    for grads in GRADS:
        optimizer.apply([jnp.asarray(grads[name]) for name in variables])
    weights = {name: np.asarray(variable.value) for name, variable in variables.items()}
    optimizer.finalize_variable_values(list(variables.values()))
    return weights, {name: np.asarray(variable.value) for name, variable in variables.items()}


def ours(optimizer: Any, average_of: Any = None) -> tuple[Any, Any]:
    params: Any = jax.tree.map(jnp.asarray, START)
    state, average, update = optimizer.init(params), params, jax.jit(optimizer.update)
    for step, grads in enumerate(GRADS):
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
        if average_of is not None:
            average = average_of(step, average, params)
    return params, average


@pytest.fixture
def page(float64: None) -> dict[str, Any]:
    """The names that the page defines, without running Keras."""
    namespace: dict[str, Any] = {}
    exec("import jax, jax.numpy as jnp, optax, wdjax", namespace)
    for name in ("scale_by_keras_adam", "clip_each", "average_of"):
        (code,) = re.findall(rf"^def {name}\(.*?(?=^\S(?!ef ))", PAGE, re.S | re.M)
        exec(code, namespace)
    return namespace


def chain(page: dict[str, Any], clip: Any, learning_rate: Any = LR) -> Any:
    adam = page["scale_by_keras_adam"](0.875, 0.9375, EPS)
    return optax.chain(clip, adam, wdjax.decoupled_decay(0.125), optax.scale_by_learning_rate(learning_rate))


def keras_adamw(learning_rate: Any = LR, **options: Any) -> Any:
    return keras.optimizers.AdamW(
        learning_rate, weight_decay=0.125, beta_1=0.875, beta_2=0.9375, epsilon=EPS, **options
    )


@pytest.mark.parametrize("argument", ["clipvalue", "global_clipnorm", "clipnorm"])
def test_clipping(page: dict[str, Any], argument: str) -> None:
    clip = {"clipvalue": optax.clip, "global_clipnorm": optax.clip_by_global_norm, "clipnorm": page["clip_each"]}
    want, _ = theirs(keras_adamw(**{argument: 1.5}))
    assert farthest(ours(chain(page, clip[argument](1.5)))[0], want) < 1e-13
    assert farthest(ours(chain(page, optax.identity()))[0], want) > 1e-4


def test_a_schedule_of_keras_counts_batches_while_gradients_accumulate(page: dict[str, Any]) -> None:
    halves = keras.optimizers.schedules.ExponentialDecay(LR, 8, 0.5)
    want, _ = theirs(keras_adamw(halves, gradient_accumulation_steps=4))

    def schedule(count: Any) -> Any:
        return LR * 0.5 ** (count / 8)

    of_updates = optax.MultiSteps(chain(page, optax.identity(), lambda n: schedule(4 * n + 4 - 1)), 4)
    assert farthest(ours(of_updates)[0], want) < 1e-6  # MultiSteps accumulates in float32.
    of_batches = optax.MultiSteps(chain(page, optax.identity(), schedule), 4)
    assert farthest(ours(of_batches)[0], want) > 1e-2


def test_the_average_of_the_weights(page: dict[str, Any]) -> None:
    weights, average = theirs(keras_adamw(use_ema=True, ema_momentum=0.99))
    got = ours(chain(page, optax.identity()), page["average_of"])
    assert farthest(got[0], weights) < 1e-13
    assert farthest(got[1], average) < 1e-13
    assert farthest(weights, average) > 0.01


def test_the_average_is_taken_before_the_constraint() -> None:
    optimizer, variable = keras.optimizers.SGD(1.0, use_ema=True), keras.Variable(np.ones(1))
    variable.constraint = keras.constraints.NonNeg()
    optimizer.apply([jnp.full(1, 3.0)], [variable])
    assert variable.value[0] == 0
    optimizer.finalize_variable_values([variable])
    assert variable.value[0] == -2


@pytest.mark.parametrize("name", ["layer_norm", "norm_1", "kernel$", "b"])
def test_names_that_are_excluded(name: str) -> None:
    layers = [keras.layers.Embedding(3, 2, name="norm_1"), keras.layers.LayerNormalization(name="layer_norm")]
    model = keras.Sequential([keras.Input((4,), dtype="int32"), *layers, keras.layers.Dense(1)])
    optimizer = keras_adamw()
    optimizer.exclude_from_weight_decay(var_names=[name])
    got = [variable.name for variable in model.trainable_variables if not optimizer._use_weight_decay(variable)]
    assert got == {"kernel$": ["kernel"], "b": ["embeddings", "beta", "bias"]}.get(name, [])


def test_a_second_exclusion_replaces_the_first() -> None:
    optimizer = keras_adamw()
    bias = keras.Variable(np.zeros(2), name="bias")
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.exclude_from_weight_decay(var_names=["gamma"])
    assert optimizer._use_weight_decay(bias)


def test_an_activity_regularizer_is_divided_by_the_batch() -> None:
    layer = keras.layers.ActivityRegularization(l2=0.5)
    h = RNG.normal(size=(6, 3))
    layer(h)
    np.testing.assert_allclose(layer.losses[0], 0.5 * np.sum(h**2) / len(h), rtol=1e-13)


def test_a_frozen_layer_is_not_in_the_losses() -> None:
    layer = keras.layers.Dense(2, kernel_regularizer="l2")
    layer(np.ones((1, 2)))
    assert len(layer.losses) == 1
    layer.trainable = False
    assert layer.losses == []


keras_schedules = keras.optimizers.schedules
SCHEDULES = {
    "CosineDecay": (
        lambda: keras_schedules.CosineDecay(0.5, 20, alpha=0.25),
        optax.cosine_decay_schedule(0.5, 20, alpha=0.25),
    ),
    "CosineDecay with a warmup": (
        lambda: keras_schedules.CosineDecay(0.25, 20, alpha=0.25, warmup_target=0.5, warmup_steps=5),
        optax.warmup_cosine_decay_schedule(0.25, 0.5, 5, 5 + 20, end_value=0.25 * 0.5),
    ),
    "ExponentialDecay": (lambda: keras_schedules.ExponentialDecay(0.5, 7, 0.75), optax.exponential_decay(0.5, 7, 0.75)),
    "PiecewiseConstantDecay": (
        lambda: keras_schedules.PiecewiseConstantDecay([10, 20], [1.0, 0.5, 0.1]),
        optax.piecewise_constant_schedule(1.0, {11: 0.5, 21: 0.2}),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule(name: str) -> None:
    build, schedule = SCHEDULES[name]
    rates = [float(schedule(jnp.asarray(step))) for step in range(30)]
    np.testing.assert_allclose(rates, [float(build()(step)) for step in range(30)], rtol=1e-5)
    assert len(set(rates)) >= 3


def test_the_first_step_and_its_decay_have_the_first_rate_of_a_schedule() -> None:
    schedule = keras_schedules.PiecewiseConstantDecay([0, 1], [0.5, 0.25, 0.125])
    optimizer, variable = keras.optimizers.SGD(schedule, weight_decay=0.5), keras.Variable(np.ones(1))
    optimizer.apply([jnp.zeros(1)], [variable])
    assert variable.value[0] == 1 - 0.5 * 0.5
