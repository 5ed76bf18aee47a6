"""The standard rule with a model: the types of the modules tell, whatever the names; and wherever parameters are."""

import json
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from slow import slow
from test_weights_only import answers, array, decided, expected_of, fails

import wdjax
from wdjax import Rules, all_but, by_path, weights_only
from wdjax._engine.trees import flatten_with_paths, structure
from wdjax.paths import canonical_paths, register_layer


def of_model(case: zoo.Case, **options: Any) -> Rules:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return weights_only(case.model, *case.inputs, **options)


@pytest.mark.parametrize("embeddings", [True, slow(False)])
@pytest.mark.parametrize("build", [build for build in zoo.CASES if "haiku" not in build.__name__])
def test_the_zoo_by_types(build: Callable[[], zoo.Case], embeddings: bool) -> None:
    case = build()
    rules, expected = of_model(case, embeddings=embeddings), expected_of(case, embeddings)
    assert decided(rules, case.params) == expected
    assert decided(Rules.from_dict(json.loads(json.dumps(rules.to_dict()))), case.params) == expected


class LinenDeep(nn.Module):
    """Larger than any memory, and only for tracers."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not isinstance(x, jax.core.Tracer):
            raise AssertionError("it was run")
        x = nn.Dense(1_000_000, name="norm")(nn.Embed(1_000_000, 1_000_000, name="bias")(x))
        return nn.BatchNorm(use_running_average=not train, name="Dense")(x)


def test_a_linen_model_is_asked_and_never_run() -> None:
    params = {
        "bias": {"embedding": array(8, 8)},
        "norm": {"kernel": array(8, 8), "bias": array(8)},
        "Dense": {"scale": array(8), "bias": array(8)},
    }
    expected = {
        "bias/embedding": True,
        "norm/kernel": True,
        "norm/bias": False,
        "Dense/scale": False,
        "Dense/bias": False,
    }
    rules = weights_only(LinenDeep(), array(1, dtype=jnp.int32), call_kwargs={"train": True})
    assert decided(rules, params) == expected
    assert decided(rules, {"params": params}) == {f"params/{path}": flag for path, flag in expected.items()}
    assert decided(rules, FrozenDict(params)) == expected
    with_state = {"params": params, "batch_stats": {"Dense": {"mean": array(8), "var": array(8)}}}
    assert decided(rules, with_state)["batch_stats/Dense/mean"] is False
    assert repr(rules) == "weights_only(<model>)"


def test_boxes_of_partitioned_parameters_leave_no_trace() -> None:
    boxed = {
        "Dense_0": {
            "kernel": nn.Partitioned(array(2, 3), (None, "model")),
            "bias": nn.Partitioned(array(3), ("model",)),
        }
    }
    assert decided(weights_only(), boxed) == {"Dense_0/kernel": True, "Dense_0/bias": False}
    assert weights_only(nn.Dense(3), array(1, 2)).mask({"kernel": boxed["Dense_0"]["kernel"]})["kernel"].value is True


def test_wrong_inputs_of_a_linen_model() -> None:
    fails(
        r"weights_only: LinenDeep\.init failed with 0 inputs\. "
        r"Write weights_only\(model, x\), .*call_kwargs=\{'train': False\}.* The error of init: .*missing 1 required",
        lambda: weights_only(LinenDeep()),
        TypeError,
    )
    fails(
        r"with 1 input\. .*The error of init: .*'train'",
        lambda: weights_only(LinenDeep(), array(1, dtype=jnp.int32)),
        TypeError,
    )


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.Linear(4, 4, rngs=rngs)
        self.bias = nnx.Embed(5, 4, rngs=rngs)
        self.linear = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class NNXOldBlock(NNXBlock, pytree=False):
    """A module that is no tree for JAX."""


NNX_FLAGS = {
    "bias/embedding": True,
    "linear/bias": False,
    "linear/scale": False,
    "norm/bias": False,
    "norm/kernel": True,
}


@pytest.mark.parametrize("kind", [NNXBlock, NNXOldBlock])
def test_nnx_models(kind: type[NNXBlock]) -> None:
    model = kind(nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: kind(nnx.Rngs(0)))
    for asked in (model, abstract):
        params = nnx.state(model, nnx.Param)
        rules = weights_only(asked)
        assert decided(rules, params) == NNX_FLAGS
        assert decided(rules, nnx.to_pure_dict(params)) == NNX_FLAGS
        _, split, _ = nnx.split(model, nnx.Param, ...)
        assert decided(rules, split) == NNX_FLAGS
        # Statistics, counters and keys too.
        everything = decided(rules, nnx.state(model))
        assert {path for path, flag in everything.items() if flag} == {"bias/embedding", "norm/kernel"}
        assert everything.keys() >= {"linear/mean", "linear/var", "drop/rngs/count", "drop/rngs/key"}


def test_the_model_itself_as_its_parameters() -> None:
    model = NNXBlock(nnx.Rngs(0))
    assert {path for path, flag in decided(weights_only(model), model).items() if flag} == {
        "bias/embedding",
        "norm/kernel",
    }
    tree = zoo.EquinoxBlock(jax.random.key(0))
    assert decided(weights_only(tree), tree) == decided(weights_only(), tree)


class Trained(nnx.Variable):
    """A kind of Variable that a user trains."""


class NNXVariables(nnx.Module):
    def __init__(self) -> None:
        self.kernel = Trained(jnp.ones((4, 4)))
        self.scale = Trained(jnp.ones(4))
        self.mixer = Trained(jnp.ones((4, 4)))
        self.kernel_ema = nnx.BatchStat(jnp.ones((4, 4)))
        self.weight = nnx.Cache(jnp.ones((4, 4)))


def test_variables_of_other_kinds_are_told_by_name_but_state_is_state() -> None:
    model = NNXVariables()
    expected = {"kernel": True, "scale": False, "mixer": None, "kernel_ema": False, "weight": False}
    assert answers(nnx.state(model), model) == expected


class OwnNorm(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones((3, 4)))


class OwnLinear(nnx.Linear):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(4, 4, rngs=rngs)
        self.weight = nnx.Param(jnp.ones(4))
        self.norm = OwnNorm()


class NNXEinsum(nnx.Module):
    """Its attributes have the names of an array's."""

    def __init__(self, kind: Any) -> None:
        self.w, self.shape, self.dtype = nnx.Param(jnp.ones((2, 4, 4))), (2, 4, 4), kind


class EquinoxEinsum(eqx.Module):
    w: jax.Array
    inner: eqx.nn.Linear

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def dtype(self) -> Any:
        return self.w.dtype


class LinenEinsum(nn.Module):
    shape: tuple[int, ...] = (4, 4)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("w", nn.initializers.ones, self.shape)


class LinenAround(nn.Module):
    @nn.compact
    def __call__(self, inner: LinenEinsum, x: jax.Array) -> jax.Array:
        return nn.Dense(inner.shape[0])(x)


def test_a_module_with_a_shape_and_a_dtype_is_no_array() -> None:
    for kind in (jnp.float32, jnp.dtype("float32")):
        model = nnx.List([NNXEinsum(kind)])
        assert decided(weights_only(model), nnx.state(model, nnx.Param)) == {"0/w": True}
    inner = eqx.nn.Linear(4, 4, key=jax.random.key(0))
    typed = {"attn": EquinoxEinsum(jnp.ones((2, 4, 4)), inner)}
    expected = {"attn/w": True, "attn/inner/weight": True, "attn/inner/bias": False}
    assert decided(weights_only(typed), eqx.filter(typed, eqx.is_array)) == expected
    # Among the inputs of a Linen model, and as params.
    rules = weights_only(LinenAround(), LinenEinsum(), array(1, 4))
    assert decided(rules, {"Dense_0": {"kernel": array(4, 4)}}) == {"Dense_0/kernel": True}
    for wrong in (LinenEinsum(), {"layer": LinenEinsum()}, nn.Dense(4, dtype=jnp.float32)):
        fails(
            r"adamw: params must be a tree of parameters, got a",
            lambda wrong=wrong: wdjax.adamw(0.1, 0.1).init(wrong),
            TypeError,
        )


def test_what_a_module_adds_to_a_layer_of_the_library() -> None:
    model = OwnLinear(nnx.Rngs(0))
    expected = {"kernel": True, "bias": False, "weight": False, "norm/weight": False}
    assert decided(weights_only(model), nnx.state(model, nnx.Param)) == expected


class Gained(eqx.nn.StatefulLayer):
    """A norm of one's own: its base is a class of the library that has no parameters."""

    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.weight


class Scaled(eqx.nn.Linear):
    """A linear layer with a scale."""

    gain: jax.Array

    def __init__(self, key: jax.Array) -> None:
        super().__init__(4, 4, key=key)
        self.gain = jnp.ones(4)


class Weighted(eqx.nn.MLP):
    """A network with one weight for each of its outputs."""

    weight: jax.Array  # pyright: ignore[reportGeneralTypeIssues]

    def __init__(self, key: jax.Array) -> None:
        super().__init__(4, 4, 4, depth=0, key=key)
        self.weight = jnp.ones(4)


class Mixed(eqx.Module):
    norm: Scaled
    linear: Gained
    mlp: Weighted
    maps: dict[str, jax.Array]

    def __init__(self, key: jax.Array) -> None:
        self.norm, self.linear, self.mlp = Scaled(key), Gained(jnp.ones(4)), Weighted(key)
        self.maps = {"kernel": jnp.ones((4, 4)), "coef": jnp.ones((4, 4))}


MIXED_FLAGS = {
    "norm/weight": True, "norm/bias": False, "norm/gain": False, "linear/weight": False, "mlp/weight": False,
    "mlp/layers/0/weight": True, "mlp/layers/0/bias": False, "maps/kernel": True,
    "maps/coef": None,
}  # fmt: skip


def test_equinox_models() -> None:
    model = Mixed(jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    for asked in (model, eqx.filter_eval_shape(Mixed, jax.random.key(0)), params):
        assert answers(params, asked) == MIXED_FLAGS
    fails(r"can't tell what this parameter is: 'maps/coef' \(4, 4\)", lambda: weights_only(model).mask(model))


def test_stacked_layers_of_a_model() -> None:
    stacked = eqx.filter(eqx.filter_vmap(Mixed)(jax.random.split(jax.random.key(0), 3)), eqx.is_array)
    assert answers(stacked, stacked, stacked_axes=1) == MIXED_FLAGS
    # Without it a user's own vectors are not told from matrices; those of library layers are.
    assert answers(stacked, stacked) == {**MIXED_FLAGS, "linear/weight": None, "mlp/weight": None}


def test_a_list_of_models() -> None:
    models = {"actor": NNXBlock(nnx.Rngs(0)), "critic": NNXBlock(nnx.Rngs(1))}
    params = {name: nnx.state(model, nnx.Param) for name, model in models.items()}
    assert decided(weights_only(models), params) == {
        f"{name}/{path}": flag for name in models for path, flag in NNX_FLAGS.items()
    }


def test_params_that_the_model_has_not() -> None:
    model = NNXBlock(nnx.Rngs(0))
    fails(
        r"Rules\.mask: weights_only was given a model that has no parameter 'norm/kernal'\. The nearest of its \d+: "
        r"'norm/kernel', .*Give weights_only the model that these params belong to",
        lambda: weights_only(model).mask({"norm": {"kernal": array(4, 4)}}),
    )
    # An earlier rule may take it.
    assert decided(
        by_path({"extra": False}, default=weights_only(model)), {"extra": array(2), "norm": {"kernel": array(4, 4)}}
    )


@pytest.mark.parametrize("wrong", [jnp.tanh, {"kernel": np.ones((2, 2))}, "model", 0.1, optax.sgd(0.1)])
def test_what_is_no_model(wrong: Any) -> None:
    fails(
        rf"weights_only: the model must be an nnx\.Module, an equinox\.Module, or a Linen module with its inputs, got "
        rf"{type(wrong).__name__}\. If you have only parameters, write weights_only\(\)",
        lambda: weights_only(wrong),
        TypeError,
    )


@pytest.mark.parametrize("kind", [NNXBlock, nn.Dense, eqx.nn.Linear])
def test_a_class_is_no_model(kind: type) -> None:
    name = kind.__name__
    fails(rf"got the class {name}\. Give an instance of it: {name}\(", lambda: weights_only(kind), TypeError)


def test_inputs_are_for_linen() -> None:
    message = r"only a Linen module needs inputs, .*NNXBlock holds its parameters\. Write weights_only\(model\)"
    fails(message, lambda: weights_only(NNXBlock(nnx.Rngs(0)), jnp.ones(4)), TypeError)
    fails(message, lambda: weights_only(NNXBlock(nnx.Rngs(0)), call_kwargs={"train": True}), TypeError)


# Tables of positions.


class LearnedPosEmbed(eqx.Module):
    """A table that is added as it is."""

    weight: jax.Array


class RelativePositions(eqx.Module):
    embedding: jax.Array
    inner: eqx.nn.Embedding


class RotaryAttention(eqx.Module):
    weight: jax.Array


class Table(eqx.Module):
    weight: jax.Array


def test_what_is_typed_as_a_table_of_positions_does_not_decay_and_an_embedding_layer_does() -> None:
    table = jnp.ones((196, 8))
    model = {
        "table": LearnedPosEmbed(table),
        "pos_embed": eqx.nn.Embedding(196, 8, key=jax.random.key(0)),
        "a": RelativePositions(table, eqx.nn.Embedding(196, 8, key=jax.random.key(0))),
        "pos": RotaryAttention(table),
    }
    params = eqx.filter(model, eqx.is_array)
    expected = {
        "a/embedding": False,
        "a/inner/weight": True,
        "pos/weight": True,
        "pos_embed/weight": True,
        "table/weight": False,
    }
    assert decided(weights_only(model), params) == expected
    # Where the class does not say it, the name of the attribute does.
    plain = {name: Table(table[:n]) for name, n in {"pos_embed": 5, "norm": 1, "cls_token": 1, "mix": 5}.items()}
    found = decided(weights_only(plain), eqx.filter(plain, eqx.is_array))
    assert found == {"pos_embed/weight": False, "norm/weight": False, "cls_token/weight": False, "mix/weight": True}
    # By names, only what says position is known as one.
    by_name = decided(weights_only(), {"pos_embed": LearnedPosEmbed(table), "wpe": model["pos_embed"]})
    assert by_name == {"pos_embed/weight": False, "wpe/weight": True}


def test_tables_of_positions_of_linen_and_nnx() -> None:
    class PosEmbed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Embed(16, 8, name="pos_embed")(x)
            return x + self.param("embedding", nn.initializers.ones, (16, 8))

    class PositionTable(nnx.Module):
        def __init__(self) -> None:
            self.weight, self.pos_embed = nnx.Param(jnp.ones((16, 8))), nnx.Embed(16, 8, rngs=nnx.Rngs(0))

    params = {"embedding": array(16, 8), "pos_embed": {"embedding": array(16, 8)}}
    found = decided(weights_only(PosEmbed(), array(16, dtype=jnp.int32)), params)
    assert found == {"embedding": False, "pos_embed/embedding": True}
    model = PositionTable()
    found = decided(weights_only(model), nnx.state(model, nnx.Param))
    assert found == {"weight": False, "pos_embed/embedding": True}


# Registered layers.


def test_registered_layers() -> None:
    class Bilinear(eqx.Module):
        kernel: jax.Array
        mixer: jax.Array
        codes: list[jax.Array]
        inner: eqx.nn.Linear

    class Shifted(Bilinear):
        theta: jax.Array

    inner = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    square = jnp.ones((2, 2))
    model = Shifted(kernel=square, mixer=square, codes=[square], inner=inner, theta=square)
    names = {"kernel": True, "mixer": None, "codes/0": None, "inner/weight": True, "inner/bias": False, "theta": None}
    assert answers(model, model) == names
    register_layer(Bilinear, weights=("mixer",), embeddings=("codes",))
    expected = {**names, "kernel": False, "mixer": True, "codes/0": True, "theta": False}
    assert decided(weights_only(model), model) == expected
    assert decided(weights_only(model, embeddings=False), model) == {**expected, "codes/0": False}
    # The nearest class tells, and the last that was said of it.
    register_layer(Shifted, weights=["theta"])
    assert [path for path, flag in decided(weights_only(model), model).items() if flag] == ["inner/weight", "theta"]
    register_layer(Shifted, weights=["kernel"])
    assert [path for path, flag in decided(weights_only(model), model).items() if flag] == ["kernel", "inner/weight"]
    assert "kernel: 'kernel' of 'Shifted', as registered" in str(wdjax.plan(model, 0.1, weights_only(model)))


def test_a_registered_name_that_no_layer_has() -> None:
    class Odd(eqx.Module):
        mix: jax.Array

    register_layer(Odd, weights=("mixx",))
    fails(
        r"register_layer: Odd was registered with 'mixx', but in this model it has \['mix'\]\. Write "
        r"register_layer\(Odd, weights=",
        lambda: weights_only([Odd(jnp.ones((2, 2)))]),
    )
    weights_only(eqx.nn.Linear(2, 2, key=jax.random.key(0)))  # Where there is no such layer nothing is said of it.


def test_registered_layers_of_linen_and_nnx() -> None:
    class LinenTable(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            mixer = self.param("mixer", nn.initializers.ones, (4, 4))
            return nn.Dense(4, use_bias=False)(x @ mixer @ self.param("kernel", nn.initializers.ones, (4, 4)))

    class NNXTable(nnx.Module):
        def __init__(self) -> None:
            self.mixer, self.kernel = nnx.Param(jnp.ones((4, 4))), nnx.Param(jnp.ones(4))
            self.codes = nnx.List([nnx.Param(jnp.ones((4, 4)))])

    register_layer(LinenTable, weights=("mixer",))
    register_layer(NNXTable, weights=("codes",), embeddings=("mixer",))
    params = {"mixer": array(4, 4), "kernel": array(4, 4)}
    found = decided(weights_only(LinenTable(), array(1, 4)), {**params, "Dense_0": {"kernel": array(4, 4)}})
    assert found == {"mixer": True, "kernel": False, "Dense_0/kernel": True}
    params = {**params, "codes": [array(4, 4)]}
    for embeddings in (True, False):
        found = decided(weights_only(NNXTable(), embeddings=embeddings), params)
        assert found == {"mixer": embeddings, "kernel": False, "codes/0": True}


def test_wrong_registrations() -> None:
    fails(
        r"register_layer: layer must be a class, got (?s:.*)Write register_layer\(type\(module\), \.\.\.\)",
        lambda: register_layer(nn.Dense(3)),
        TypeError,
    )
    fails(
        r"register_layer: weights must be a sequence of names, got 'kernel'\. Write weights=\('kernel',\)",
        lambda: register_layer(NNXBlock, weights="kernel"),
        TypeError,
    )
    fails(
        r"register_layer: embeddings must be a sequence of names",
        lambda: register_layer(NNXBlock, embeddings=(1,)),
        TypeError,
    )


# The same decision wherever the parameters are.


@pytest.mark.parametrize("build", [zoo.equinox_blocks, zoo.equinox_stacked, zoo.linen_setup, zoo.nnx_transformer])
@pytest.mark.parametrize("hole", [None, optax.MaskedNode()])
def test_holes(build: Callable[[], zoo.Case], hole: Any) -> None:
    case = build()
    leaves, expected = flatten_with_paths(case.params), expected_of(case, embeddings=True)
    for hidden in (lambda path: path.endswith("bias"), lambda path: expected[path], lambda path: len(path) % 2 == 0):
        tree = [hole if path in expected and hidden(path) else leaf for path, leaf in leaves]
        found = decided(weights_only(), jax.tree.unflatten(structure(case.params), tree))
        assert found == {path: flag for path, flag in expected.items() if not hidden(path)}


def test_equinox_partitions() -> None:
    case = zoo.equinox_blocks()
    trained, rest = eqx.partition(case.params, eqx.is_inexact_array)
    expected = expected_of(case, embeddings=True)
    for rules in (weights_only(), weights_only(case.model), weights_only(trained)):
        assert decided(rules, trained) == expected
        assert eqx.combine(rules.mask(trained), rest) is not None
    only_blocks = eqx.filter(case.params, eqx.is_array)
    assert decided(weights_only(), only_blocks) == expected


def test_inside_optax() -> None:
    case = zoo.linen_setup()
    expected = expected_of(case, embeddings=True)
    frozen = all_but("wte", "ln_f")
    for mask in (weights_only(), of_model(case)):
        optimizer = optax.masked(wdjax.decoupled_decay(1.0, mask), frozen.mask)
        zeros = jax.tree.map(jnp.zeros_like, case.params)
        updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(case.params), case.params)
        moved = {path: bool((update != 0).any()) for path, update in flatten_with_paths(updates)}
        assert moved == {path: flag and not path.startswith(("wte", "ln_f")) for path, flag in expected.items()}
        adamw = optax.adamw(0.1, mask=mask.mask)
        jax.eval_shape(adamw.init, case.params)


def test_under_jit_and_eval_shape() -> None:
    case = zoo.linen_zoo()
    found: list[dict[str, bool]] = []

    def note(params: Any) -> Any:
        found.append(decided(weights_only(), params))
        return params

    abstract = jax.eval_shape(note, case.params)
    jax.jit(lambda params: note(params)).trace(case.params)
    assert found == [expected_of(case, embeddings=True)] * 2
    assert decided(weights_only(), abstract) == found[0]


def test_paths_are_those_of_the_mask() -> None:
    case = zoo.nnx_transformer()
    assert list(decided(weights_only(), case.params)) == canonical_paths(case.params)
