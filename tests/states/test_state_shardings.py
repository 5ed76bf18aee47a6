"""The shardings of every state of wdjax, by wdjax' and Flax' ways to find them."""

import tempfile
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from pure import as_pure

import wdjax

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:.*rounds to nothing"),  # What a decay does in bfloat16 is not asked here.
]

LR, WD = 0.1, 0.3
KERNELS = wdjax.only("kernel")
ADAMW = wdjax.adamw(LR, WD, KERNELS)
ANCHORED = wdjax.adamw(LR, WD, KERNELS, toward="init")

# Each with what of its state is like parameters.
STATES: dict[str, tuple[Any, set[str]]] = {
    "add_l2_to_grads": (wdjax.add_l2_to_grads(WD, KERNELS), set()),
    "decoupled_decay": (wdjax.decoupled_decay(WD, KERNELS, toward="init"), {"anchor"}),
    "independent_decay": (wdjax.independent_decay(0.1, wdjax.weights_only(), toward="init"), {"anchor"}),
    "an average": (wdjax.independent_decay(0.1, KERNELS, toward=wdjax.EMA(0.9)), {"anchor"}),
    "cautious": (wdjax.cautious(wdjax.decoupled_decay(WD, KERNELS, toward="init")), {"anchor"}),
    "proximal_step": (
        wdjax.proximal_step(wdjax.GroupLasso(), WD, KERNELS, learning_rate=LR, toward="init"),
        {"anchor"},
    ),
    "sgd_l2": (wdjax.sgd_l2(LR, WD, KERNELS, momentum=0.9), {"trace"}),
    "sgdw": (wdjax.sgdw(LR, WD, KERNELS, momentum=0.9, toward="init"), {"trace", "anchor"}),
    "adam_l2": (wdjax.adam_l2(LR, WD, KERNELS), {"mu", "nu"}),
    "adamw": (ANCHORED, {"mu", "nu", "anchor"}),
    "with_decoupled_decay": (
        wdjax.with_decoupled_decay(optax.adam(LR), WD, KERNELS, learning_rate=LR, toward="init"),
        {"mu", "nu", "anchor"},
    ),
    "MultiSteps": (
        wdjax.with_decoupled_decay(optax.MultiSteps(optax.sgd(LR), 2), WD, KERNELS, learning_rate=LR),
        {"acc_grads"},
    ),
    "schedule_free": (
        wdjax.with_decoupled_decay(
            optax.contrib.schedule_free(optax.sgd(LR), LR, b1=0.9), WD, KERNELS, learning_rate=LR
        ),
        {"z"},
    ),
    "in_float32": (wdjax.in_float32(ADAMW), {"mu", "nu"}),
    "stochastic_rounding": (optax.chain(wdjax.in_float32(ADAMW), wdjax.stochastic_rounding(0)), {"mu", "nu"}),
    "compensated": (optax.chain(wdjax.in_float32(ADAMW), wdjax.compensated()), {"mu", "nu", "residual"}),
    "master_weights": (optax.chain(wdjax.in_float32(ADAMW), wdjax.master_weights()), {"mu", "nu", "weights"}),
    "monitor": (
        wdjax.monitor(ANCHORED, WD, KERNELS, learning_rate=LR, toward="init"),
        {"mu", "nu", "anchor"},
    ),
    "freeze": (wdjax.freeze(ANCHORED, wdjax.only("norm")), {"mu", "nu", "anchor"}),
    "all at once": (
        optax.chain(
            wdjax.in_float32(wdjax.monitor(wdjax.freeze(ANCHORED, wdjax.only("norm")), WD, KERNELS, learning_rate=LR)),
            wdjax.master_weights(),
        ),
        {"mu", "nu", "anchor", "weights"},
    ),
}
every_state = pytest.mark.parametrize("name", STATES)

SPECS = {
    "up": {"kernel": P(None, "model"), "bias": P("model")},
    "norm": {"scale": P(), "bias": P()},
    "down": {"kernel": P("model", None), "bias": P()},
}


def make_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def make_params() -> dict[str, Any]:
    """What `Net` and `LinenNet` have: norms in float32, and the rest in bfloat16."""
    shapes = {"up": {"kernel": (16, 32), "bias": (32,)}, "down": {"kernel": (32, 16), "bias": (16,)}}
    params = jax.tree.map(lambda shape: jnp.ones(shape, jnp.bfloat16), shapes, is_leaf=lambda x: isinstance(x, tuple))
    return params | {"norm": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}


def assert_placed(state: Any, params_like: set[str]) -> None:
    """Whether what is like parameters lies as they do, and all else is whole on every device."""
    found = set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        path = keys_of(keys)
        spec = next((SPECS[m][k] for m in SPECS for k in SPECS[m] if path[-2:] == [m, k]), None)
        if leaf.ndim:
            assert spec is not None, path
            found.add(path[-3])
        assert leaf.sharding.is_equivalent_to(NamedSharding(make_mesh(), spec if leaf.ndim else P()), leaf.ndim), path
    assert found == params_like


def keys_of(keys: Any) -> list[str]:
    # NNX and Linen put a box around what has a sharding.
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in keys]
    return [name for name in names if name != "value"]


def make_shardings(mesh: Any = None, **kwargs: Any) -> Any:
    mesh = mesh or make_mesh()
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec, **kwargs), SPECS, is_leaf=lambda x: isinstance(x, P))


@every_state
def test_shardings_of_the_whole_state(name: str) -> None:
    optimizer, params_like = STATES[name]
    shapes = jax.eval_shape(optimizer.init, make_params())
    found = wdjax.state_shardings(optimizer, make_params(), make_shardings())
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    state = jax.jit(optimizer.init, out_shardings=found)(make_params())
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
    assert_placed(state, params_like)


# States with arrays of other shapes, and more ways to name parameters.
MORE: dict[str, tuple[Any, set[str]]] = {
    "adafactor": (optax.adafactor(LR, min_dim_size_to_factor=16), {"v"}),  # Its matrices are factored.
    "MultiSteps of a chain": (optax.MultiSteps(optax.chain(optax.clip(1.0), ADAMW), 2), {"mu", "nu", "acc_grads"}),
    "masked": (optax.masked(optax.adam(LR), KERNELS.mask), {"mu", "nu"}),
    "partition": (
        optax.partition(
            {"a": optax.adam(LR), "b": optax.sgd(LR, 0.9)}, wdjax.by_path({"kernel": "a"}, default="b").values
        ),
        {"mu", "nu", "trace"},
    ),
    "muon": (optax.contrib.muon(LR), {"mu", "nu"}),
    "inject_hyperparams": (optax.inject_hyperparams(optax.adam)(LR), {"mu", "nu"}),
    "a function of params as mask": (
        optax.adamw(LR, mask=lambda tree: {name: name != "norm" for name in ("up", "down", "norm") if tree[name]}),
        {"mu", "nu"},
    ),
    "apply_if_finite": (
        optax.apply_if_finite(optax.contrib.prodigy(LR), 2),
        {"exp_avg", "exp_avg_sq", "grad_sum", "params0"},
    ),
    "lbfgs": (optax.lbfgs(LR, linesearch=None), {"params", "updates"}),  # Its memories have an axis more.
}


@pytest.mark.parametrize("name", MORE)
def test_shardings_of_states_of_optax(name: str) -> None:
    optimizer, params_like = MORE[name]
    state = jax.jit(optimizer.init, out_shardings=wdjax.state_shardings(optimizer, make_params(), make_shardings()))(
        make_params()
    )
    shapes, found = jax.tree.map(jnp.shape, make_params()), set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        path = keys_of(keys)
        is_like = path[-2:-1] and path[-2] in SPECS and shapes[path[-2]].get(path[-1]) == leaf.shape
        spec = SPECS[path[-2]][path[-1]] if is_like else P()
        assert leaf.sharding.is_equivalent_to(NamedSharding(make_mesh(), spec), leaf.ndim), path
        if is_like:
            found.add(path[-3])
    assert found == params_like


def test_ways_to_give_shardings() -> None:
    mesh, params = make_mesh(), make_params()
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    shardings = make_shardings()

    def of(params: Any, shardings: Any = None) -> Any:
        adam, *_ = wdjax.state_shardings(ADAMW, params, shardings)
        assert jax.tree.structure(adam) == jax.tree.structure(jax.eval_shape(ADAMW.init, params)[0])
        assert adam.mu == adam.nu
        return adam

    expected = of(params, shardings)
    assert expected.mu == shardings
    assert expected.count == whole
    assert of(jax.device_put(params, shardings)) == expected  # By default those of the arrays, or of their shapes.
    described = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, shardings)
    assert of(described) == expected
    assert of(described, rows).mu == jax.tree.map(lambda _: rows, params)  # What is given comes first.
    prefix = of(params, {"up": rows, "norm": whole, "down": whole})
    assert prefix.mu["up"] == {"kernel": rows, "bias": rows}
    assert prefix.mu["down"]["kernel"] == whole
    # Specs for the mesh of the context.
    specs = of(params, SPECS)
    assert specs.mu == SPECS
    assert specs.count == P()
    with jax.set_mesh(mesh):
        state = jax.jit(ADAMW.init, out_shardings=wdjax.state_shardings(ADAMW, params, SPECS))(params)
    assert_placed(state, {"mu", "nu"})
    # One device; one mesh in parts; other kinds of memory.
    one = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    assert of(params, one).count == one == of(jax.device_put(params, one)).count
    flat = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,)), P("x"))
    assert of(params, shardings | {"up": flat}).count.mesh == mesh
    host = make_shardings(memory_kind="pinned_host")
    found = of(params, host)
    assert found.mu == host
    assert found.count == NamedSharding(mesh, P(), memory_kind="pinned_host")
    assert of(params, host | {"up": shardings["up"]}).count == whole


def test_parameters_that_are_called_like_the_fields_of_a_state() -> None:
    mesh = make_mesh()
    data, model, whole = (NamedSharding(mesh, P(*axis)) for axis in (("data",), ("model",), ()))
    params = {"mu": {"w": jnp.ones(8)}, "w": jnp.ones(8), "count": jnp.ones(()), "a": {"w": jnp.ones(8)}}
    shardings = {"mu": data, "w": model, "count": whole, "a": whole}
    adam, _ = wdjax.state_shardings(optax.adam(LR), params, shardings)
    assert adam.mu == adam.nu == {"mu": {"w": data}, "w": model, "count": whole, "a": {"w": whole}}
    bare, _ = wdjax.state_shardings(optax.adam(LR), jnp.ones(8), data)
    assert bare.mu == data
    assert bare.count == whole


def test_explicit_meshes() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params = jax.device_put(make_params(), make_shardings(mesh))
    for given in (params, jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)):
        found = wdjax.state_shardings(ANCHORED, given)
        assert found[0].mu == found[1].anchor == make_shardings(mesh)
        assert found[0].count == NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        state = jax.jit(ANCHORED.init, out_shardings=found)(params)
    assert_placed(state, {"mu", "nu", "anchor"})


def test_a_template_of_shapes_for_orbax() -> None:
    params = jax.device_put(make_params(), make_shardings())
    state = ANCHORED.init(params)
    template = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(ANCHORED.init, params),
        wdjax.state_shardings(ANCHORED, params),
    )
    with tempfile.TemporaryDirectory() as directory:
        with ocp.training.Checkpointer(directory) as checkpointer:
            checkpointer.save(0, state)
        with ocp.training.Checkpointer(directory) as checkpointer:
            restored = checkpointer.load(0, template)
    chex.assert_trees_all_equal(restored, state)
    assert_placed(restored, {"mu", "nu", "anchor"})


def test_shardings_that_are_missing_or_too_many() -> None:
    params, whole = make_params(), NamedSharding(make_mesh(), P())
    shapes = jax.eval_shape(make_params)
    for given, shardings, said in (
        (shapes, None, "state_shardings: 'down/bias', 'down/kernel', 'norm/bias'.* has no sharding. Give a tree like"),
        (params, {"up": whole, "norm": whole}, "'down/bias', 'down/kernel' has no sharding"),
        (
            params,
            {"up": whole, "norm": whole, "down": whole, "tail": whole},
            "the shardings have 'tail', and params do not",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            wdjax.state_shardings(ADAMW, given, shardings)
    with pytest.raises(TypeError, match="state_shardings: optimizer must be a finished"):
        wdjax.state_shardings(params, ADAMW)


@every_state
def test_init_of_sharded_parameters_outside_of_jit(name: str) -> None:
    optimizer, params_like = STATES[name]
    shardings = jax.tree.map(lambda spec: NamedSharding(make_mesh(), spec), SPECS, is_leaf=lambda x: isinstance(x, P))
    state = optimizer.init(jax.device_put(make_params(), shardings))
    # Counts have not been placed yet: a step takes them along.
    assert_placed(
        jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, NamedSharding(make_mesh(), P())), state), params_like
    )


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def placed(initializer: Any, spec: Any) -> Any:
            return nnx.with_partitioning(initializer, spec)

        ones, zeros = nnx.initializers.ones_init(), nnx.initializers.zeros_init()
        narrow = {"param_dtype": jnp.bfloat16, "rngs": rngs}
        self.up = nnx.Linear(
            16, 32, kernel_init=placed(ones, (None, "model")), bias_init=placed(zeros, ("model",)), **narrow
        )
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.down = nnx.Linear(32, 16, kernel_init=placed(ones, ("model", None)), **narrow)


@every_state
def test_shardings_by_the_metadata_of_nnx(name: str) -> None:
    optimizer, params_like = STATES[name]

    @nnx.jit
    def create() -> Any:
        model = Net(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    with jax.set_mesh(make_mesh()):
        _, abstract = nnx.eval_shape(create)
        found = nnx.get_named_sharding(nnx.state(abstract.opt_state), make_mesh())
        state = nnx.state(create()[1].opt_state)
        assert_placed(jax.device_put(as_pure(state), as_pure(found)), params_like)
        assert_placed(as_pure(state), params_like)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        def placed(initializer: Any, *spec: Any) -> Any:
            return nn.with_partitioning(initializer, spec)

        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        x = nn.Dense(
            32,
            name="up",
            param_dtype=jnp.bfloat16,
            kernel_init=placed(ones, None, "model"),
            bias_init=placed(zeros, "model"),
        )(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(16, name="down", param_dtype=jnp.bfloat16, kernel_init=placed(ones, "model", None))(x)


@every_state
def test_shardings_by_the_boxes_of_linen(name: str) -> None:
    optimizer, params_like = STATES[name]
    model, mesh = LinenNet(), make_mesh()

    def create(key: Any) -> TrainState:
        params = model.init(key, jnp.ones((2, 16)))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    shapes = jax.eval_shape(create, jax.random.key(0))
    state = jax.jit(create, out_shardings=nn.get_sharding(shapes, mesh))(jax.random.key(0))
    assert_placed(state.opt_state, params_like)


def test_boxes_of_linen_and_variables_of_nnx() -> None:
    model, mesh = LinenNet(), make_mesh()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((2, 16)))["params"])
    with jax.set_mesh(mesh):
        model_of_nnx = Net(nnx.Rngs(0))
    boxed = jax.tree.map(jnp.zeros_like, shapes)
    for params, shardings in (
        (boxed, nn.get_sharding(shapes, mesh)),
        (nn.unbox(boxed), nn.get_sharding(shapes, mesh)),
        (boxed, make_shardings()),
        (nnx.state(model_of_nnx, nnx.Param), make_shardings()),
        (nnx.state(model_of_nnx, nnx.Param), nnx.get_named_sharding(nnx.state(model_of_nnx, nnx.Param), mesh)),
    ):
        found = wdjax.state_shardings(ANCHORED, params, shardings)
        assert jax.tree.structure(found) == jax.tree.structure(jax.eval_shape(ANCHORED.init, params))
        assert_placed(jax.jit(ANCHORED.init, out_shardings=found)(params), {"mu", "nu", "anchor"})
