"""The shardings of every state of wdjax, by Optax's and Flax' ways to find them."""

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


def is_hole(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


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


@every_state
def test_shardings_by_eval_shape_and_map_params(name: str) -> None:
    optimizer, params_like = STATES[name]
    shardings = jax.tree.map(lambda spec: NamedSharding(make_mesh(), spec), SPECS, is_leaf=lambda x: isinstance(x, P))
    shapes = jax.eval_shape(optimizer.init, make_params())
    found = optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if is_hole(leaf) else sharding,
        shapes,
        shardings,
        transform_non_params=lambda leaf: NamedSharding(make_mesh(), P()),
        is_leaf=is_hole,
    )
    state = jax.jit(optimizer.init, out_shardings=found)(make_params())
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
    assert_placed(state, params_like)


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
        assert_placed(jax.device_put(nnx.as_pure(state), nnx.as_pure(found)), params_like)
        assert_placed(nnx.as_pure(state), params_like)


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
