"""A zoo of real parameter trees: every layer of Flax Linen, Flax NNX, Equinox and Haiku, and what each leaf of it is.

The role of a leaf is derived from the type of the module that owns it, by the tables below, and never from its shape or
from its name alone: a bias that `scan` has stacked has two axes, an Equinox norm calls its scale `weight` as a linear
layer does, and a list of layers has no names at all. A leaf is meant to decay if its role is in `DECAYED`.

    case = linen_zoo()                      # or any other of CASES
    case.params                             # what a user gives to `optimizer.init`
    case.roles["Dense_0/kernel"]            # "kernel"

The trees have the structure that the libraries make, boxes and Variables and holes included. The numbers in them are
positive and unlike, and none is zero, so that a decay shows wherever it acts. Nothing is compiled to make them.

Run as a program, the file says which public layers of the libraries no zoo holds, and why.
"""

import collections
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import wdjax

DECAYED = ("kernel", "embedding", "adapter")
ROLES = (*DECAYED, "bias", "norm", "other")


class Case(NamedTuple):
    """A tree of parameters, and what each of its leaves is.

    Attributes:
        name: of the function that builds it.
        library: "linen", "nnx", "equinox" or "haiku".
        params: what a user gives to `optimizer.init`.
        roles: of every leaf, by its canonical path, in the order of the tree.
        model: the module; None for Haiku, which has none outside of a transformed function.
        inputs: what Linen's `init` takes after the key; () for the others.
    """

    name: str
    library: str
    params: Any
    roles: dict[str, str]
    model: Any
    inputs: tuple[Any, ...]


CASES: list[Callable[[], Case]] = []

# The types of all modules that were met in building a case, by their path; and the rows of the tables that were used.
_MET: dict[str, dict[str, set[type]]] = {}
_USED: set[tuple[type, str]] = set()


def case(build: Callable[[str], Case]) -> Callable[[], Case]:
    """Registers a builder: it gets its own name, runs once, and never under the strict promotion of a test."""

    @functools.cache
    def built() -> Case:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
            return build(build.__name__)

    built.__name__ = built.__qualname__ = build.__name__
    built.__doc__ = build.__doc__
    CASES.append(built)
    return built


# What a module's own parameters are. A subclass without a row has the row of its base; "*" stands for any name.

Row = dict[str, str]
_WEIGHTS: Row = {"kernel": "kernel", "bias": "bias"}
_NORM: Row = {"scale": "norm", "bias": "norm"}
_ALL_NORM: Row = {"*": "norm"}

LINEN: dict[type, Row] = {
    nn.Dense: _WEIGHTS,
    nn.DenseGeneral: _WEIGHTS,
    nn.Einsum: _WEIGHTS,
    nn.Conv: _WEIGHTS,
    nn.ConvLocal: _WEIGHTS,
    nn.ConvTranspose: _WEIGHTS,
    nn.recurrent.DenseParams: _WEIGHTS,  # What `OptimizedLSTMCell` keeps its gates in.
    nn.Embed: {"embedding": "embedding"},
    nn.BatchNorm: _NORM,
    nn.LayerNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.InstanceNorm: _NORM,
    nn.RMSNorm: {"scale": "norm"},
    nn.WeightNorm: _ALL_NORM,  # Its parameters are called by path: "Dense_0/kernel/scale".
    nn.PReLU: {"negative_slope": "other"},
}

NNX: dict[type, Row] = {
    nnx.Linear: _WEIGHTS,
    nnx.LinearGeneral: _WEIGHTS,
    nnx.Einsum: _WEIGHTS,
    nnx.Conv: _WEIGHTS,
    nnx.ConvTranspose: _WEIGHTS,
    nnx.Embed: {"embedding": "embedding"},
    nnx.LoRA: {"lora_a": "adapter", "lora_b": "adapter"},
    nnx.BatchNorm: _NORM | {"mean": "other", "var": "other"},
    nnx.LayerNorm: _NORM,
    nnx.GroupNorm: _NORM,
    nnx.InstanceNorm: _NORM,
    nnx.RMSNorm: {"scale": "norm"},
    nnx.WeightNorm: {"scales": "norm"},
    nnx.SpectralNorm: {"batch_stats": "other"},
    nnx.PReLU: {"negative_slope": "other"},
    nnx.RngStream: {"key": "other", "count": "other"},
    nnx.MultiHeadAttention: {"cached_key": "other", "cached_value": "other", "cache_index": "other"},
}

_EQUINOX_WEIGHTS: Row = {"weight": "kernel", "bias": "bias"}
_EQUINOX_NORM: Row = {"weight": "norm", "bias": "norm"}
EQUINOX: dict[type, Row] = {
    eqx.nn.Linear: _EQUINOX_WEIGHTS,
    eqx.nn.Conv: _EQUINOX_WEIGHTS,
    eqx.nn.ConvTranspose: _EQUINOX_WEIGHTS,
    eqx.nn.GRUCell: {"weight_ih": "kernel", "weight_hh": "kernel", "bias": "bias", "bias_n": "bias"},
    eqx.nn.LSTMCell: {"weight_ih": "kernel", "weight_hh": "kernel", "bias": "bias"},
    eqx.nn.Embedding: {"weight": "embedding"},
    eqx.nn.BatchNorm: _EQUINOX_NORM,
    eqx.nn.LayerNorm: _EQUINOX_NORM,
    eqx.nn.GroupNorm: _EQUINOX_NORM,
    eqx.nn.RMSNorm: _EQUINOX_NORM,
    eqx.nn.WeightNorm: {"g": "norm"},
    eqx.nn.StateIndex: {"init": "other"},  # Statistics and singular vectors, in a model made without its State.
    eqx.nn.PReLU: {"negative_slope": "other"},
}

_HAIKU_WEIGHTS: Row = {"w": "kernel", "b": "bias"}
_HAIKU_NORM: Row = {"scale": "norm", "offset": "norm"}
HAIKU: dict[type, Row] = {
    hk.Linear: _HAIKU_WEIGHTS,
    hk.ConvND: _HAIKU_WEIGHTS,
    hk.ConvNDTranspose: _HAIKU_WEIGHTS,
    hk.DepthwiseConv1D: _HAIKU_WEIGHTS,
    hk.DepthwiseConv2D: _HAIKU_WEIGHTS,
    hk.DepthwiseConv3D: _HAIKU_WEIGHTS,
    hk.GRU: {"w_i": "kernel", "w_h": "kernel", "b": "bias"},
    hk.Bias: {"b": "bias"},
    hk.Embed: {"embeddings": "embedding"},
    hk.nets.VectorQuantizer: {"embeddings": "embedding"},  # The codebook: a table of vectors, one for each code.
    hk.BatchNorm: _HAIKU_NORM,
    hk.GroupNorm: _HAIKU_NORM,
    hk.LayerNorm: _HAIKU_NORM,
    hk.RMSNorm: {"scale": "norm"},
}

TABLES: dict[str, dict[type, Row]] = {"linen": LINEN, "nnx": NNX, "equinox": EQUINOX, "haiku": HAIKU}


Kind = TypeVar("Kind", bound=type)


def owns(library: str, **row: str) -> Callable[[Kind], Kind]:
    """Declares what the parameters of a module of the zoo's own are."""

    def declare(kind: Kind) -> Kind:
        TABLES[library][kind] = row
        return kind

    return declare


def role_of(library: str, segments: Sequence[str], owners: Mapping[str, Iterable[type]]) -> str:
    """The role of the leaf at a path: that of its name in the row of the innermost module around it that has one."""
    table, path = TABLES[library], "/".join(segments)
    for cut in reversed(range(len(segments))):
        kinds = owners.get("/".join(segments[:cut]), ())
        known = {
            next(base for base in kind.__mro__ if base in table) for kind in kinds if table.keys() & {*kind.__mro__}
        }
        # Modules that share a scope have one path: the name of the parameter tells whose it is.
        claims = [(kind, name) for kind in known for name in (segments[cut], "*") if name in table[kind]]
        if known:
            if len({table[kind][name] for kind, name in claims}) != 1:
                raise ValueError(f"{path!r} of {library}: claimed by {claims} of {known}")
            _USED.update(claims)
            return table[claims[0][0]][claims[0][1]]
    raise ValueError(f"{path!r} of {library} has no owner in the table; met were {dict(owners)}")


def finished(
    name: str,
    library: str,
    params: Any,
    owners: dict[str, set[type]],
    model: Any = None,
    inputs: tuple[Any, ...] = (),
    *,
    segments: Mapping[str, Sequence[str]] | None = None,
) -> Case:
    """The case, its roles looked up; `segments` takes paths apart where "/" alone does not tell how."""
    _MET[name] = owners
    paths = wdjax.paths.canonical_paths(params)
    apart = {path: path.split("/") for path in paths} if segments is None else segments
    return Case(name, library, params, {path: role_of(library, apart[path], owners) for path in paths}, model, inputs)


def filled(tree: Any) -> Any:
    """The tree with numbers for the shapes in it; what is no shape stays."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(rng.integers(9, size=(*leaf.shape, 2)), jnp.uint32))
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype))

    return jax.tree.map(fill, tree)


def sequences() -> tuple[jax.Array, jax.Array]:
    """Features and tokens of two sequences of four."""
    return jnp.asarray(np.linspace(-1, 1, 32).reshape(2, 4, 4), jnp.float32), jnp.zeros((2, 4), jnp.int32)


# Flax Linen.


def linen(name: str, model: nn.Module, *inputs: Any) -> Case:
    owners: dict[str, set[type]] = collections.defaultdict(set)

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        owners["/".join(context.module.path)].add(type(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    params = filled(variables["params"])
    # A parameter of WeightNorm is itself called by a path, "layer_instance/fc1/kernel/scale".
    segments = {"/".join(keys): keys for keys in flatten_dict(nn.unbox(params))}
    return finished(name, "linen", params, owners, model, inputs, segments=segments)


class LinenZoo(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        image = x[..., None]
        nn.Dense(3)(x)
        nn.Dense(3, use_bias=False)(x)
        nn.DenseGeneral((2, 3))(x)
        nn.DenseGeneral(3, axis=(-2, -1))(x)
        nn.DenseGeneral(3, batch_dims=(0,))(x)
        nn.Einsum((4, 2, 3), "blf,fhd->blhd")(x)
        nn.Einsum((4, 3), "blf,fd->bld", use_bias=False)(x)
        nn.Embed(5, 4)(tokens)
        nn.Conv(3, (3,))(x)
        nn.Conv(2, (3, 3), use_bias=False)(image)
        nn.Conv(4, (3,), feature_group_count=4)(x)
        nn.ConvTranspose(3, (3,))(x)
        nn.ConvTranspose(3, (2, 2), use_bias=False)(image)
        nn.ConvLocal(3, (3,))(x)
        nn.ConvLocal(3, (3,), use_bias=False)(x)
        nn.BatchNorm(use_running_average=True)(x)
        nn.LayerNorm()(x)
        nn.LayerNorm(use_bias=False)(x)
        nn.LayerNorm(use_scale=False)(x)
        nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1))(x)
        nn.GroupNorm(num_groups=2)(x)
        nn.InstanceNorm()(x)
        nn.RMSNorm()(x)
        nn.SpectralNorm(nn.Dense(3))(x, update_stats=False)
        nn.WeightNorm(nn.Dense(3))(x)
        nn.WeightNorm(nn.Conv(3, (3,)), feature_axes=None)(x)
        nn.WeightNorm(nn.MultiHeadDotProductAttention(2), variable_filter={"kernel"})(x)
        nn.PReLU()(x)
        nn.Dropout(0.5)(x, deterministic=True)
        nn.MultiHeadDotProductAttention(2, normalize_qk=True)(x)
        nn.MultiHeadDotProductAttention(2, use_bias=False)(x)
        nn.MultiHeadAttention(2)(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Flax 0.12 still has it.
            nn.SelfAttention(2)(x)
        for cell in (nn.LSTMCell, nn.OptimizedLSTMCell, nn.SimpleCell, nn.GRUCell, nn.MGUCell):
            nn.RNN(cell(3))(x)
        nn.RNN(nn.ConvLSTMCell(2, (3,)))(image)
        nn.RNN(nn.SimpleCell(3), name="named")(x)
        nn.Bidirectional(nn.RNN(nn.GRUCell(3)), nn.RNN(nn.LSTMCell(3)))(x)
        lone = nn.GRUCell(3)
        lone(lone.initialize_carry(jax.random.key(0), (2, 4)), x[:, 0])
        return nn.Sequential([nn.Dense(3), nn.LayerNorm(), nn.tanh, nn.Embed(5, 3).attend])(x)


@case
def linen_zoo(name: str) -> Case:
    """Every layer of Linen, in default names."""
    return linen(name, LinenZoo(), *sequences())


class LinenBlock(nn.Module):
    """All that looks otherwise once it is stacked."""

    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, None]:
        x = nn.LayerNorm()(x) + nn.Embed(5, 4)(tokens)
        x = nn.MultiHeadDotProductAttention(2)(x)
        x = nn.LayerNorm(use_bias=False)(x)
        x = nn.Dense(4)(nn.Dense(6)(x))
        x = nn.RMSNorm()(x)
        return nn.Dense(4, use_bias=False)(nn.PReLU()(x)), None


_STACKED: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


class LinenScan(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        along = {**_STACKED, "in_axes": nn.broadcast, "length": 3}
        x, _ = nn.scan(LinenBlock, **along)()(x, tokens)
        x, _ = nn.scan(nn.remat(LinenBlock), **along)(name="blocks")(x, tokens)
        # Along the last axis, and twice.
        last = {**along, "variable_axes": {"params": -1}}
        x, _ = nn.scan(LinenBlock, **last)(name="last")(x, tokens)
        x, _ = nn.scan(nn.scan(LinenBlock, **along), **{**along, "length": 2})(name="twice")(x, tokens)
        boxed = {**along, "metadata_params": {nn.PARTITION_NAME: "layers"}}
        x, _ = nn.scan(LinenBoxed, **boxed)(name="boxed")(x, tokens)
        return nn.Dense(2)(x)


class LinenBoxed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, None]:
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("model",))
        scale_init = nn.with_partitioning(nn.initializers.ones_init(), ("model",))
        return nn.Dense(4, kernel_init=kernel_init, bias_init=bias_init)(nn.RMSNorm(scale_init=scale_init)(x)), None


@case
def linen_scan(name: str) -> Case:
    """Blocks stacked by `nn.scan`: plain, rematerialized, along another axis, nested, boxed."""
    return linen(name, LinenScan(), *sequences())


class LinenVmap(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        heads, _ = nn.vmap(LinenBlock, in_axes=None, axis_size=3, **_STACKED)()(x, tokens)
        named, _ = nn.vmap(LinenBlock, in_axes=None, axis_size=3, **_STACKED)(name="experts")(x, tokens)
        dense = nn.vmap(nn.Dense, in_axes=None, axis_size=3, **_STACKED)(2)(x)
        norm = nn.vmap(nn.LayerNorm, in_axes=None, axis_size=3, **_STACKED)()(x)
        return heads.sum() + named.sum() + dense.sum() + norm.sum()


@case
def linen_vmap(name: str) -> Case:
    """Blocks and single layers stacked by `nn.vmap`."""
    return linen(name, LinenVmap(), *sequences())


class LinenMLP(nn.Module):
    def setup(self) -> None:
        self.fc1 = nn.Dense(6)
        self.fc2 = nn.Dense(4, use_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nn.gelu(self.fc1(x)))


class LinenLayer(nn.Module):
    def setup(self) -> None:
        self.ln_1 = nn.LayerNorm()
        self.attn = nn.MultiHeadDotProductAttention(2)
        self.ln_2 = nn.RMSNorm()
        self.mlp = LinenMLP()

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class LinenTransformer(nn.Module):
    def setup(self) -> None:
        self.wte = nn.Embed(5, 4)
        self.wpe = nn.Embed(4, 4)
        self.h = [LinenLayer() for _ in range(2)]
        self.branches = {"left": nn.Dense(4), "right": nn.Sequential([nn.Dense(4), nn.LayerNorm()])}
        self.rnn = nn.RNN(nn.GRUCell(4))
        self.ln_f = nn.LayerNorm()
        self.lm_head = nn.Dense(5, use_bias=False)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.wte(tokens) + self.wpe(jnp.arange(4))
        for layer in self.h:
            x = layer(x)
        x = self.rnn(self.branches["left"](x) + self.branches["right"](x))
        return self.lm_head(self.ln_f(x)) + self.wte.attend(x)  # The table serves twice, and is one leaf.


@case
def linen_setup(name: str) -> Case:
    """Modules inside modules, made in `setup`, in lists and dictionaries, with a shared table."""
    return linen(name, LinenTransformer(), sequences()[1])


@owns(
    "linen",
    kernel="kernel",
    bias="bias",
    pos_embedding="other",
    cls_token="other",
    logit_scale="other",
    gamma="other",
    initial_state="other",
)
class LinenRaw(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal, ones = nn.initializers.normal(), nn.initializers.ones_init()
        x = x @ self.param("kernel", normal, (4, 4)) + self.param("bias", normal, (4,))
        x = x + self.param("pos_embedding", normal, (1, 4, 4)) + self.param("cls_token", normal, (1, 1, 4))
        x = nn.LayerNorm()(x) * self.param("gamma", ones, (4,)) * self.param("logit_scale", ones, ())
        return nn.Dense(4)(x) + self.param("initial_state", normal, (4,))


class LinenRawNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = LinenRaw(name="encoder")(LinenRaw()(x))
        x, _ = nn.scan(LinenScannedRaw, length=3, **_STACKED)(name="stack")(x, None)
        return x


class LinenScannedRaw(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return LinenRaw()(x), None


@case
def linen_raw(name: str) -> Case:
    """Parameters of a user's own module, beside the root, inside, and stacked."""
    return linen(name, LinenRawNet(), sequences()[0])


@case
def linen_raw_root(name: str) -> Case:
    """Parameters of a user's own module that is the root: paths of one segment."""
    return linen(name, LinenRaw(), sequences()[0])


@owns("linen", lora_a="adapter", lora_b="adapter")
class LinenAdapted(nn.Module):
    """A dense layer with an adapter, in one scope: its kernel and bias are siblings of the factors."""

    rank: int = 2

    def setup(self) -> None:
        self.base = nn.Dense(4)
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        down = self.param("lora_a", nn.initializers.normal(), (x.shape[-1], self.rank))
        up = self.param("lora_b", nn.initializers.zeros_init(), (self.rank, 4))
        return self.base(x) + x @ down @ up


@owns("linen", gamma="other")
class LinenScaledNorm(nn.Module):
    """A norm with a scale of its own, in one scope with it."""

    def setup(self) -> None:
        self.norm = nn.LayerNorm()
        nn.share_scope(self, self.norm)
        self.gamma = self.param("gamma", nn.initializers.ones_init(), (4,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x) * self.gamma


class LinenShared(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        twice = nn.Dense(4, name="twice")
        return twice(twice(LinenScaledNorm(name="scaled")(LinenAdapted()(x))))


@case
def linen_share_scope(name: str) -> Case:
    """Modules that share a scope with their own submodule, and a layer that is called twice."""
    return linen(name, LinenShared(), sequences()[0])


class LinenNormed(nn.Module):
    def setup(self) -> None:
        self.dense = nn.Dense(4)
        self.weight_norm = nn.WeightNorm(self.dense)
        self.spectral_norm = nn.SpectralNorm(nn.Dense(4, use_bias=False))
        self.mlp = nn.WeightNorm(LinenMLP())

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp(self.spectral_norm(self.weight_norm(x), update_stats=False))


@case
def linen_weight_norm(name: str) -> Case:
    """Norms of weights, around layers with names and around a whole module."""
    return linen(name, LinenNormed(), sequences()[0])


# Flax NNX.


def nnx_case(name: str, make: Callable[[nnx.Rngs], nnx.Module], *of: Any) -> Case:
    """A case of those Variables of the model that the filters take: of its `Param`s if there is no filter."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    nnx.update(model, filled(nnx.state(model)))
    for _, node in nnx.iter_graph(model):
        if isinstance(node, dict):  # The magnitudes of WeightNorm are bare arrays in a dictionary.
            node.update(filled(node))
    owners = {"/".join(map(str, path)): {type(node)} for path, node in nnx.iter_graph(model)}
    return finished(name, "nnx", nnx.state(model, *(of or (nnx.Param,))), owners, model)


def nnx_layers(rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """Every layer of NNX, under a name that a user would give it."""
    cell = {"in_features": 4, "hidden_features": 3, "rngs": rngs}
    return {
        "linear": nnx.Linear(4, 3, rngs=rngs),
        "linear_without_bias": nnx.Linear(4, 3, use_bias=False, rngs=rngs),
        "linear_general": nnx.LinearGeneral(4, (2, 3), rngs=rngs),
        "linear_general_batch": nnx.LinearGeneral(4, 3, batch_axis={0: 2}, rngs=rngs),
        "einsum": nnx.Einsum("blf,fhd->blhd", (4, 2, 3), (2, 3), rngs=rngs),
        "einsum_without_bias": nnx.Einsum("blf,fd->bld", (4, 3), rngs=rngs),
        "embed": nnx.Embed(5, 4, rngs=rngs),
        "conv": nnx.Conv(4, 3, (3,), rngs=rngs),
        "conv_2d": nnx.Conv(2, 3, (3, 3), use_bias=False, rngs=rngs),
        "conv_transpose": nnx.ConvTranspose(4, 3, (3,), rngs=rngs),
        "prelu": nnx.PReLU(),
        "dropout": nnx.Dropout(0.5, rngs=rngs),
        "batch_norm": nnx.BatchNorm(4, rngs=rngs),
        "layer_norm": nnx.LayerNorm(4, rngs=rngs),
        "layer_norm_without_bias": nnx.LayerNorm(4, use_bias=False, rngs=rngs),
        "layer_norm_without_scale": nnx.LayerNorm(4, use_scale=False, rngs=rngs),
        "group_norm": nnx.GroupNorm(4, 2, rngs=rngs),
        "instance_norm": nnx.InstanceNorm(4, rngs=rngs),
        "rms_norm": nnx.RMSNorm(4, rngs=rngs),
        "weight_norm": nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
        "spectral_norm": nnx.SpectralNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
        "attention": nnx.MultiHeadAttention(2, 4, normalize_qk=True, dropout_rate=0.5, decode=False, rngs=rngs),
        "attention_without_bias": nnx.MultiHeadAttention(2, 4, use_bias=False, decode=False, rngs=rngs),
        "lora": nnx.LoRA(4, 2, 3, rngs=rngs),
        "lora_around": nnx.LoRA(4, 2, 3, base_module=nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
        "lora_linear": nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs),
        "lstm_cell": nnx.LSTMCell(**cell),
        "optimized_lstm_cell": nnx.OptimizedLSTMCell(**cell),
        "gru_cell": nnx.GRUCell(**cell),
        "simple_cell": nnx.SimpleCell(**cell),
        "rnn": nnx.RNN(nnx.LSTMCell(**cell), rngs=rngs),
        "bidirectional": nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(**cell), rngs=rngs), nnx.RNN(nnx.SimpleCell(**cell), rngs=rngs), rngs=rngs
        ),
        "sequential": nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.tanh, nnx.LayerNorm(3, rngs=rngs)),
        "list": nnx.List([nnx.Linear(4, 3, rngs=rngs), nnx.RMSNorm(3, rngs=rngs)]),
        "dict": nnx.Dict(left=nnx.Linear(4, 3, rngs=rngs), right=nnx.RMSNorm(3, rngs=rngs)),
    }


class NNXAttributes(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        for name, layer in nnx_layers(rngs).items():
            setattr(self, name, layer)


class NNXList(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(list(nnx_layers(rngs).values()))


@case
def nnx_zoo(name: str) -> Case:
    """Every layer of NNX, under conventional names."""
    return nnx_case(name, NNXAttributes)


@case
def nnx_zoo_state(name: str) -> Case:
    """Every layer of NNX, with all of its state: statistics, singular vectors, keys and counters too."""
    return nnx_case(name, NNXAttributes, ...)


@case
def nnx_zoo_list(name: str) -> Case:
    """Every layer of NNX, in a list: nothing but numbers above the Variables."""
    return nnx_case(name, NNXList)


@case
def nnx_zoo_list_state(name: str) -> Case:
    """Every layer of NNX, in a list, with all of its state."""
    return nnx_case(name, NNXList, ...)


@case
def nnx_zoo_sequential(name: str) -> Case:
    """Every layer of NNX, in a `Sequential`."""
    return nnx_case(name, lambda rngs: nnx.Sequential(*nnx_layers(rngs).values()))


class NNXBlock(nnx.Module):
    """All that looks otherwise once it is stacked."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.norm1 = nnx.LayerNorm(4, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(4, rngs=rngs)
        self.norm3 = nnx.LayerNorm(4, use_bias=False, rngs=rngs)
        self.fc1 = nnx.Linear(4, 6, rngs=rngs)
        self.act = nnx.PReLU()
        self.fc2 = nnx.Linear(6, 4, use_bias=False, rngs=rngs)
        self.adapter = nnx.LoRA(4, 2, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm3(self.norm2(x)))))


class NNXListBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        block = NNXBlock(rngs)
        names = ("embed", "norm1", "attn", "norm2", "norm3", "fc1", "act", "fc2", "adapter", "drop", "batch_norm")
        self.layers = nnx.List([getattr(block, name) for name in names])


def nnx_vmapped(kind: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> Any:
    """Three modules in one, as documented: keys are split, and all state gets an axis."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs: nnx.Rngs) -> Any:
        return kind(rngs)

    return make(rngs)


def nnx_scanned(kind: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> Any:
    """Three modules in one, by a scan over split keys."""

    @nnx.split_rngs(splits=3)
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def make(count: jax.Array, rngs: nnx.Rngs) -> Any:
        return count + 1, kind(rngs)

    return make(jnp.zeros((), jnp.int32), rngs)[1]


class NNXStacked(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx_vmapped(NNXBlock, rngs)
        self.scanned = nnx_scanned(NNXBlock, rngs)
        self.lists = nnx_vmapped(NNXListBlock, rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, block: NNXBlock) -> jax.Array:
            return block(x)

        return self.head(self.norm(forward(forward(x, self.blocks), self.scanned)))


@case
def nnx_stacked(name: str) -> Case:
    """Blocks stacked by `nnx.vmap` and `nnx.scan`, with attributes and with a list inside."""
    return nnx_case(name, NNXStacked)


@case
def nnx_stacked_state(name: str) -> Case:
    """The same blocks with all of their state."""
    return nnx_case(name, NNXStacked, ...)


@owns(
    "nnx",
    kernel="kernel",
    bias="bias",
    pos_embedding="other",
    cls_token="other",
    logit_scale="other",
    gamma="other",
    initial_state="other",
    tokens="other",
    lora="adapter",
)
class NNXRaw(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(jnp.ones((4, 4)))
        self.bias = nnx.Param(jnp.ones(4))
        self.pos_embedding = nnx.Param(jnp.ones((1, 4, 4)))
        self.cls_token = nnx.Param(jnp.ones((1, 1, 4)))
        self.logit_scale = nnx.Param(jnp.ones(()))
        self.gamma = nnx.Param(jnp.ones(4))
        self.initial_state = nnx.Param(jnp.ones(4))
        self.tokens = nnx.List([nnx.Param(jnp.ones((1, 4))) for _ in range(2)])
        self.lora = nnx.LoRAParam(jnp.ones((4, 2)))
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.linear = nnx.Linear(4, 4, rngs=rngs)


class NNXRawNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = NNXRaw(rngs)
        self.layers = nnx.List([NNXRaw(rngs)])
        self.stack = nnx_vmapped(NNXRaw, rngs)


@case
def nnx_raw(name: str) -> Case:
    """Variables of a user's own module: inside, in a list, and stacked."""
    return nnx_case(name, NNXRawNet)


@case
def nnx_raw_root(name: str) -> Case:
    """Variables of a user's own module that is the root: paths of one segment."""
    return nnx_case(name, NNXRaw)


class NNXTransformerLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(4, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.ln_2 = nnx.RMSNorm(4, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.gelu, nnx.Linear(6, 4, use_bias=False, rngs=rngs))


class NNXTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(4, 4, rngs=rngs)
        self.wpe = nnx.Embed(4, 4, rngs=rngs)
        self.h = nnx.List([NNXTransformerLayer(rngs) for _ in range(2)])
        self.ln_f = nnx.LayerNorm(4, rngs=rngs)
        self.lm_head = nnx.Linear(4, 4, use_bias=False, rngs=rngs)


class NNXTied(nnx.Module):
    """One Variable in two modules is one leaf, under the name that sorts first."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.net = NNXTransformer(rngs)
        self.net.lm_head.kernel = self.net.wte.embedding
        self.decoder = nnx.Linear(4, 4, rngs=rngs)
        self.encoder = nnx.Embed(4, 4, rngs=rngs)
        self.encoder.embedding = self.decoder.kernel
        self.left = nnx.Linear(4, 4, rngs=rngs)
        self.right = self.left


@case
def nnx_transformer(name: str) -> Case:
    """Modules inside modules, in lists and sequences, under conventional names."""
    return nnx_case(name, NNXTransformer)


@case
def nnx_tied(name: str) -> Case:
    """Variables and modules that are shared."""
    return nnx_case(name, NNXTied)


class NNXAdapted(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.around = nnx.LoRA(4, 2, 4, base_module=nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
        self.layers = nnx.List([nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs), nnx.LoRA(4, 2, 4, rngs=rngs)])
        self.stack = nnx_vmapped(lambda rngs: nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs), rngs)


@case
def nnx_lora(name: str) -> Case:
    """Adapters and what they adapt."""
    return nnx_case(name, NNXAdapted)


@case
def nnx_lora_only(name: str) -> Case:
    """Adapters alone, as they are trained."""
    return nnx_case(name, NNXAdapted, nnx.LoRAParam)


class NNXNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.weight_norm = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), feature_axes=-1, rngs=rngs)
        self.deep = nnx.WeightNorm(NNXTransformerLayer(rngs), rngs=rngs)
        self.spectral_norm = nnx.SpectralNorm(NNXTransformerLayer(rngs), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(4, rngs=rngs)


@case
def nnx_weight_norm_state(name: str) -> Case:
    """Norms of the weights of layers and modules, with their state: the magnitudes of WeightNorm are no `Param`s."""
    return nnx_case(name, NNXNormed, ...)


class NNXCached(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=rngs)
        self.attention.init_cache((2, 4, 4))


@case
def nnx_cache_state(name: str) -> Case:
    """Attention with its cache."""
    return nnx_case(name, NNXCached, ...)


# Equinox.


def equinox(name: str, make: Callable[[jax.Array], Any], *, with_state: bool = True) -> Case:
    """A case of the inexact arrays of a model; with `with_state`, of one whose state is kept apart."""
    build = eqx.nn.make_with_state(make) if with_state else lambda key: (make(key), None)
    model, _ = filled(eqx.filter_eval_shape(build, jax.random.key(0)))
    params = eqx.filter(model, eqx.is_inexact_array)
    owners: dict[str, set[type]] = {}
    for keys, _ in jax.tree_util.tree_flatten_with_path(model)[0]:
        node, path = model, []
        owners[""] = {type(model)}
        for key in keys:
            match key:
                case jax.tree_util.GetAttrKey():
                    node = getattr(node, key.name)
                    path.append(key.name)
                case jax.tree_util.SequenceKey():
                    node = node[key.idx]
                    path.append(str(key.idx))
                case jax.tree_util.DictKey():
                    node = node[key.key]
                    path.append(str(key.key))
                case _:
                    raise ValueError(f"{name}: {key!r} of {keys} is no step in a model")
            owners["/".join(path)] = {type(node)}
    return finished(name, "equinox", params, owners, model)


def equinox_layers(key: jax.Array) -> dict[str, Any]:
    """Every layer of Equinox, under a name that a user would give it."""
    layers = {
        "linear": eqx.nn.Linear(4, 3, key=key),
        "linear_without_bias": eqx.nn.Linear(4, 3, use_bias=False, key=key),
        "linear_to_scalar": eqx.nn.Linear(4, "scalar", key=key),
        "conv": eqx.nn.Conv(2, 2, 3, 3, key=key),
        "conv1d": eqx.nn.Conv1d(2, 3, 3, key=key),
        "conv2d": eqx.nn.Conv2d(2, 3, 3, use_bias=False, key=key),
        "conv3d": eqx.nn.Conv3d(2, 3, 3, key=key),
        "conv_transpose": eqx.nn.ConvTranspose(2, 2, 3, 3, key=key),
        "conv_transpose1d": eqx.nn.ConvTranspose1d(2, 3, 3, key=key),
        "conv_transpose2d": eqx.nn.ConvTranspose2d(2, 3, 3, use_bias=False, key=key),
        "conv_transpose3d": eqx.nn.ConvTranspose3d(2, 3, 3, key=key),
        "gru_cell": eqx.nn.GRUCell(4, 3, key=key),
        "gru_cell_without_bias": eqx.nn.GRUCell(4, 3, use_bias=False, key=key),
        "lstm_cell": eqx.nn.LSTMCell(4, 3, key=key),
        "attention": eqx.nn.MultiheadAttention(
            2, 4, use_query_bias=True, use_key_bias=True, use_value_bias=True, use_output_bias=True, key=key
        ),
        "attention_without_bias": eqx.nn.MultiheadAttention(2, 4, key=key),
        "embedding": eqx.nn.Embedding(5, 4, key=key),
        "rope": eqx.nn.RotaryPositionalEmbedding(4),
        "batch_norm": eqx.nn.BatchNorm(4, "batch", mode="batch"),
        "batch_norm_ema": eqx.nn.BatchNorm(4, "batch", mode="ema"),
        "layer_norm": eqx.nn.LayerNorm(4),
        "layer_norm_without_bias": eqx.nn.LayerNorm(4, use_bias=False),
        "layer_norm_without_weight": eqx.nn.LayerNorm(4, use_weight=False),
        "layer_norm_2d": eqx.nn.LayerNorm((4, 4)),
        "group_norm": eqx.nn.GroupNorm(2, 4),
        "rms_norm": eqx.nn.RMSNorm(4),
        "rms_norm_without_bias": eqx.nn.RMSNorm(4, use_bias=False),
        "weight_norm": eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=key)),
        "weight_norm_conv": eqx.nn.WeightNorm(eqx.nn.Conv2d(2, 3, 3, key=key), axis=None),
        "spectral_norm": eqx.nn.SpectralNorm(eqx.nn.Linear(4, 3, key=key), "weight", key=key),
        "prelu": eqx.nn.PReLU(),
        "dropout": eqx.nn.Dropout(0.5),
        "identity": eqx.nn.Identity(),
        "activation": eqx.nn.Lambda(jax.nn.relu),
        "mlp": eqx.nn.MLP(4, 3, 6, 2, key=key),
        "mlp_scan": eqx.nn.MLP(4, 3, 6, 3, scan=True, key=key),
        "sequential": eqx.nn.Sequential(
            [eqx.nn.Linear(4, 3, key=key), eqx.nn.Lambda(jnp.tanh), eqx.nn.LayerNorm(3), eqx.nn.PReLU()]
        ),
    }
    shared = (eqx.nn.Embedding(4, 4, key=key), eqx.nn.Linear(4, 4, key=key))
    return layers | {"shared": eqx.nn.Shared(shared, lambda pair: pair[1].weight, lambda pair: pair[0].weight)}


class EquinoxList(eqx.Module):
    layers: list[Any]


@case
def equinox_zoo(name: str) -> Case:
    """Every layer of Equinox, under conventional names."""
    return equinox(name, equinox_layers)


@case
def equinox_zoo_list(name: str) -> Case:
    """Every layer of Equinox, in a list: nothing but numbers above the arrays."""
    return equinox(name, lambda key: EquinoxList(list(equinox_layers(key).values())))


@case
def equinox_zoo_sequential(name: str) -> Case:
    """Every layer of Equinox that is one, in a `Sequential`."""
    apart = {"shared", "attention", "attention_without_bias"}
    return equinox(name, lambda key: eqx.nn.Sequential([v for k, v in equinox_layers(key).items() if k not in apart]))


@case
def equinox_zoo_state_inside(name: str) -> Case:
    """Every layer of Equinox, in a model made without its State: the first statistics are among the arrays."""
    return equinox(name, lambda key: EquinoxList(list(equinox_layers(key).values())), with_state=False)


class EquinoxAttention(eqx.Module):
    qkv: eqx.nn.Linear
    proj: eqx.nn.Linear
    q_norm: eqx.nn.RMSNorm

    def __init__(self, key: jax.Array) -> None:
        self.qkv = eqx.nn.Linear(4, 12, key=key)
        self.proj = eqx.nn.Linear(4, 4, use_bias=False, key=key)
        self.q_norm = eqx.nn.RMSNorm(4, use_bias=False)


class EquinoxBlock(eqx.Module):
    """All that looks otherwise once it is stacked, under conventional names."""

    norm1: eqx.nn.LayerNorm
    attn: EquinoxAttention
    norm2: eqx.nn.RMSNorm
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    conv: eqx.nn.Conv2d
    act: eqx.nn.PReLU
    ln_f: eqx.nn.LayerNorm
    layernorm: eqx.nn.LayerNorm
    group_norm: eqx.nn.GroupNorm

    def __init__(self, key: jax.Array) -> None:
        self.norm1 = eqx.nn.LayerNorm(4)
        self.attn = EquinoxAttention(key)
        self.norm2 = eqx.nn.RMSNorm(4)
        self.mlp = eqx.nn.MLP(4, 4, 6, 1, key=key)
        self.norm = eqx.nn.LayerNorm(4, use_bias=False)
        self.fc1 = eqx.nn.Linear(4, 6, key=key)
        self.fc2 = eqx.nn.Linear(6, 4, use_bias=False, key=key)
        self.embed = eqx.nn.Embedding(5, 4, key=key)
        self.attention = eqx.nn.MultiheadAttention(
            2, 4, use_query_bias=True, use_key_bias=True, use_value_bias=True, use_output_bias=True, key=key
        )
        self.conv = eqx.nn.Conv2d(2, 3, 3, key=key)
        self.act = eqx.nn.PReLU()
        self.ln_f = eqx.nn.LayerNorm((2, 4))
        self.layernorm = eqx.nn.LayerNorm(4)
        self.group_norm = eqx.nn.GroupNorm(2, 4)


def equinox_list_block(key: jax.Array) -> EquinoxList:
    block = EquinoxBlock(key)
    return EquinoxList([getattr(block, field.name) for field in dataclasses.fields(block)])


def equinox_vmapped(make: Callable[[jax.Array], Any], key: jax.Array) -> Any:
    return eqx.filter_vmap(make)(jax.random.split(key, 3))


class EquinoxBlocks(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: EquinoxBlock
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.embed = eqx.nn.Embedding(5, 4, key=key)
        self.blocks = equinox_vmapped(EquinoxBlock, key)
        self.norm = eqx.nn.LayerNorm(4)
        self.head = eqx.nn.Linear(4, 5, key=key)


@case
def equinox_blocks(name: str) -> Case:
    """Blocks in a list, not stacked."""
    return equinox(name, lambda key: EquinoxList([EquinoxBlock(key), EquinoxBlock(key)]))


@case
def equinox_stacked(name: str) -> Case:
    """Blocks stacked by `filter_vmap`, with attributes inside."""
    return equinox(name, EquinoxBlocks)


@case
def equinox_stacked_list(name: str) -> Case:
    """Blocks stacked by `filter_vmap`, with a bare list inside, and single layers stacked so."""
    single = (
        lambda key: eqx.nn.Linear(4, 3, key=key),
        lambda _: eqx.nn.LayerNorm(4),
        lambda _: eqx.nn.RMSNorm(4, use_bias=False),
        lambda key: eqx.nn.Embedding(5, 4, key=key),
        lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=key)),
    )
    return equinox(
        name, lambda key: EquinoxList([equinox_vmapped(make, key) for make in (equinox_list_block, *single)])
    )


@owns(
    "equinox",
    kernel="kernel",
    weight="kernel",
    bias="bias",
    positional_embedding="other",
    cls_token="other",
    logit_scale="other",
    gamma="other",
    initial_state="other",
    tokens="other",
)
class EquinoxRaw(eqx.Module):
    kernel: jax.Array
    weight: jax.Array
    bias: jax.Array
    positional_embedding: jax.Array
    cls_token: jax.Array
    logit_scale: jax.Array
    gamma: jax.Array
    initial_state: jax.Array
    tokens: list[jax.Array]
    norm: eqx.nn.LayerNorm
    linear: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.kernel, self.weight, self.bias = jnp.ones((4, 4)), jnp.ones((4, 4)), jnp.ones(4)
        self.positional_embedding, self.cls_token = jnp.ones((4, 4)), jnp.ones((1, 4))
        self.logit_scale, self.gamma, self.initial_state = jnp.ones(()), jnp.ones(4), jnp.ones(4)
        self.tokens = [jnp.ones((1, 4)), jnp.ones((1, 4))]
        self.norm = eqx.nn.LayerNorm(4)
        self.linear = eqx.nn.Linear(4, 4, key=key)


class EquinoxRawNet(eqx.Module):
    encoder: EquinoxRaw
    layers: list[EquinoxRaw]
    stack: EquinoxRaw

    def __init__(self, key: jax.Array) -> None:
        self.encoder, self.layers = EquinoxRaw(key), [EquinoxRaw(key)]
        self.stack = equinox_vmapped(EquinoxRaw, key)


@case
def equinox_raw(name: str) -> Case:
    """Arrays of a user's own module: inside, in a list, and stacked."""
    return equinox(name, EquinoxRawNet)


@case
def equinox_raw_root(name: str) -> Case:
    """Arrays of a user's own module that is the root: paths of one segment."""
    return equinox(name, EquinoxRaw)


class EquinoxTied(eqx.Module):
    shared: eqx.nn.Shared
    norm: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array) -> None:
        pair = (eqx.nn.Linear(4, 5, key=key), eqx.nn.Embedding(5, 4, key=key))
        self.shared = eqx.nn.Shared(pair, lambda pair: pair[1].weight, lambda pair: pair[0].weight)
        self.norm = eqx.nn.LayerNorm(4)


@case
def equinox_tied(name: str) -> Case:
    """A linear layer that lends its weight to an embedding: a hole where the table would be."""
    return equinox(name, EquinoxTied)


class EquinoxNormed(eqx.Module):
    conv: eqx.nn.SpectralNorm
    bn1: eqx.nn.BatchNorm
    blocks: list[Any]
    fc: eqx.nn.WeightNorm

    def __init__(self, key: jax.Array) -> None:
        self.conv = eqx.nn.SpectralNorm(eqx.nn.Conv2d(2, 3, 3, key=key), "weight", key=key)
        self.bn1 = eqx.nn.BatchNorm(3, "batch", mode="batch")
        self.blocks = [eqx.nn.Conv2d(3, 3, 3, key=key), eqx.nn.BatchNorm(3, "batch", mode="ema")]
        self.fc = eqx.nn.WeightNorm(eqx.nn.Linear(3, 2, key=key))


@case
def equinox_normed(name: str) -> Case:
    """Norms with state and norms of weights, the state kept apart."""
    return equinox(name, EquinoxNormed)


@case
def equinox_normed_state_inside(name: str) -> Case:
    """The same norms, with the first statistics and singular vectors among the arrays."""
    return equinox(name, EquinoxNormed, with_state=False)


# Haiku.


def haiku(name: str, forward: Callable[..., Any], *inputs: Any) -> Case:
    owners: dict[str, set[type]] = collections.defaultdict(set)
    met: dict[str, set[type]] = collections.defaultdict(set)

    def note_owner(create: Any, shape: Any, dtype: Any, init: Any, context: Any) -> Any:
        owners[context.module_name].add(type(context.module))
        return create(shape, dtype, init)

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        met[context.method_name].add(type(context.module))
        return call(*args, **kwargs)

    def watched(*args: Any) -> Any:
        with hk.custom_creator(note_owner), hk.intercept_methods(note):
            return forward(*args)

    params, _ = jax.eval_shape(hk.transform_with_state(watched).init, jax.random.key(0), *inputs)
    # Inside a stack of layers a module does not know the name of the stack.
    inside = dict(owners)
    for module in params:
        ends = (module.split("/", cut)[-1] for cut in range(module.count("/") + 1))
        owners[module] = next(inside[end] for end in ends if end in inside)
    found = finished(name, "haiku", filled(params), owners)
    _MET[name] = {**owners, **met}
    return found


def haiku_forward(x: jax.Array, tokens: jax.Array) -> None:
    image, volume, vectors = x[..., None], x[..., None, None], x[:, 0]
    hk.Linear(3)(x)
    hk.Linear(3, with_bias=False)(x)
    hk.Bias()(x)
    hk.Bias(bias_dims=[-2, -1])(x)
    hk.Embed(5, 4)(tokens)
    hk.ConvND(2, 3, 3)(image)
    hk.Conv1D(3, 3)(x)
    hk.Conv2D(3, 3, with_bias=False)(image)
    hk.Conv2D(3, 3, data_format="NCHW")(image)  # Its bias has the shape (3, 1, 1).
    hk.Conv3D(3, 3)(volume)
    hk.ConvNDTranspose(2, 3, 3)(image)
    hk.Conv1DTranspose(3, 3)(x)
    hk.Conv2DTranspose(3, 3, with_bias=False)(image)
    hk.Conv3DTranspose(3, 3)(volume)
    hk.DepthwiseConv1D(2, 3)(x)
    hk.DepthwiseConv2D(2, 3)(image)
    hk.DepthwiseConv3D(2, 3)(volume)
    hk.SeparableDepthwiseConv2D(2, 3)(image)  # pyright: ignore[reportPrivateImportUsage]
    hk.BatchNorm(True, True, 0.9)(x, is_training=True)
    hk.GroupNorm(2)(x)
    hk.InstanceNorm(True, True)(x)
    hk.LayerNorm(-1, True, True)(x)
    hk.LayerNorm(-1, True, False)(x)
    hk.LayerNorm((-2, -1), True, True)(x)
    hk.RMSNorm(-1)(x)
    hk.MultiHeadAttention(2, 2, w_init=hk.initializers.VarianceScaling())(x, x, x)
    hk.MultiHeadAttention(2, 2, w_init=hk.initializers.VarianceScaling(), with_bias=False)(x, x, x)
    for core in (hk.VanillaRNN, hk.LSTM, hk.GRU):
        core(3)(vectors, core(3, name="initial").initial_state(2))
    for inputs, convolution in ((x, hk.Conv1DLSTM), (image, hk.Conv2DLSTM), (volume, hk.Conv3DLSTM)):
        recurrent = convolution(inputs.shape[1:-1], output_channels=2, kernel_shape=3)
        recurrent(inputs, recurrent.initial_state(2))
    reset = hk.ResetCore(hk.LSTM(3))
    reset((vectors, jnp.zeros(2, bool)), reset.initial_state(2))
    deep = hk.DeepRNN([hk.GRU(3), jax.nn.relu, hk.LSTM(3), hk.IdentityCore()])
    hk.dynamic_unroll(deep, jnp.swapaxes(x, 0, 1), deep.initial_state(2))
    skips = hk.deep_rnn_with_skip_connections([hk.VanillaRNN(3), hk.VanillaRNN(3)])
    skips(vectors, skips.initial_state(2))
    hk.Sequential([hk.Linear(3), jnp.tanh, hk.RMSNorm(-1)])(x)
    hk.SpectralNorm()(x[0])
    hk.nets.MLP([3, 2])(x)
    hk.nets.VectorQuantizer(4, 5, 0.25)(x, is_training=True)
    hk.nets.MobileNetV1((1, 2), (2, 2), num_classes=2)(x[..., None], is_training=True)
    hk.nets.MobileNetV1((1, 2), (2, 2), num_classes=2, use_bn=False)(x[..., None], is_training=True)
    for second in (False, True):
        hk.nets.ResNet(
            (1, 1, 1, 1), 2, resnet_v2=second, bottleneck=second, channels_per_group=(4, 4, 4, 4), strides=(1, 1, 1, 1)
        )(image, is_training=True)


@case
def haiku_zoo(name: str) -> Case:
    """Every layer and net of Haiku, in default names."""
    return haiku(name, haiku_forward, *sequences())


class HaikuBlock(hk.Module):
    """All that looks otherwise once it is stacked."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.out = hk.Linear(4, with_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = hk.LayerNorm(-1, True, True)(x) + hk.Embed(5, 4)(jnp.zeros(4, jnp.int32))
        x = hk.MultiHeadAttention(2, 2, w_init=hk.initializers.VarianceScaling(), model_size=4)(x, x, x)
        x = hk.LayerNorm(-1, True, False)(x)
        x = hk.Linear(4)(hk.RMSNorm(-1)(x))
        return self.out(hk.Bias()(x))


def haiku_stack(x: Any) -> jax.Array:
    x = hk.Linear(4)(x)
    x = hk.layer_stack(3)(lambda x: HaikuBlock()(x))(x)
    x = hk.layer_stack(3, name="blocks")(lambda x: HaikuBlock("block")(x))(x)
    x, _ = hk.layer_stack(3, with_per_layer_inputs=True)(lambda x, y: (hk.Linear(4)(hk.RMSNorm(-1)(x)) + y, None))(
        x, jnp.zeros(3)
    )
    twice = hk.layer_stack(2, name="outer")(hk.layer_stack(3, name="inner")(lambda x: HaikuBlock()(x)))
    return hk.LayerNorm(-1, True, True)(twice(x))


@case
def haiku_layer_stack(name: str) -> Case:
    """Blocks stacked by `hk.layer_stack`: without a name, with one, with inputs for each layer, nested."""
    return haiku(name, haiku_stack, sequences()[0])


# Parameters outside of any module, and of a name scope, which is a module of a private class.
HAIKU[NoneType] = {"logit_scale": "other"}
HAIKU[hk.Module] = {"cls_token": "other"}


@owns(
    "haiku",
    w="kernel",
    b="bias",
    pos_embedding="other",
    cls_token="other",
    logit_scale="other",
    gamma="other",
    initial_state="other",
)
class HaikuRaw(hk.Module):
    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.initial_state = hk.get_parameter("initial_state", (4,), init=jnp.ones)
        self.linear = hk.Linear(4)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x @ hk.get_parameter("w", (4, 4), init=jnp.ones) + hk.get_parameter("b", (4,), init=jnp.ones)
        for name, shape in {
            "pos_embedding": (1, 4, 4),
            "cls_token": (1, 1, 4),
            "logit_scale": (),
            "gamma": (4,),
        }.items():
            x = x * hk.get_parameter(name, shape, init=jnp.ones)
        return hk.LayerNorm(-1, True, True)(self.linear(x + self.initial_state))


def haiku_raw_forward(x: Any) -> jax.Array:
    x = HaikuRaw("encoder")(HaikuRaw()(x)) * hk.get_parameter("logit_scale", (), init=jnp.ones)
    with hk.name_scope("scope"):
        x = hk.layer_stack(3)(lambda x: HaikuRaw()(x))(x) * hk.get_parameter("cls_token", (4,), init=jnp.ones)
    shared = hk.Linear(4, name="twice")
    return shared(shared(x))


@case
def haiku_raw(name: str) -> Case:
    """Parameters of a user's own module, of no module, and stacked; a layer that is called twice."""
    return haiku(name, haiku_raw_forward, sequences()[0])


# Whether a layer is missing.

NAMESPACES: dict[str, Sequence[tuple[Any, type]]] = {
    "linen": [(nn, nn.Module)],
    "nnx": [(nnx, nnx.Module)],
    "equinox": [(eqx.nn, eqx.Module)],
    "haiku": [(hk, hk.Module), (hk.nets, hk.Module)],
}
_FP8 = "its scales are in a collection of their own, not in params"
_NONE = "has no parameters"
_SIZE = "a ResNet of another size"
EXCLUDED: dict[str, dict[str, str]] = {
    "linen": {
        "Module": "a base",
        "RNNCellBase": "a base",
        **dict.fromkeys(("Fp8DirectDotGeneralOp", "Fp8DotGeneral", "Fp8DotGeneralOp", "Fp8Einsum"), _FP8),
        "NANOOFp8DotGeneralOp": _FP8,
    },
    "nnx": {"Module": "a base", "RNNCellBase": "a base", "RoPE": "holds tables of sines, and older releases lack it"},
    "equinox": {
        "StatefulLayer": "a base",
        **dict.fromkeys(("Identity", "RotaryPositionalEmbedding", "Pool", "AdaptivePool"), _NONE),
        **{f"{kind}Pool{n}d": _NONE for kind in ("Avg", "Max", "AdaptiveAvg", "AdaptiveMax") for n in (1, 2, 3)},
    },
    "haiku": {
        "Module": "a base",
        "RNNCore": "a base",
        **dict.fromkeys(("AvgPool", "MaxPool", "Reshape"), _NONE),
        **dict.fromkeys(("EMAParamsTree", "SNParamsTree", "VectorQuantizerEMA"), "has state only"),
        **{f"ResNet{n}": _SIZE for n in (18, 34, 50, 101, 152, 200)},
    },
}
_ZOOS = {"linen": linen_zoo, "nnx": nnx_zoo, "equinox": equinox_zoo_state_inside, "haiku": haiku_zoo}


def public_layers(library: str) -> dict[str, type]:
    """The public module classes of a library, by name."""
    return {
        name: kind
        for namespace, base in NAMESPACES[library]
        for name, kind in inspect.getmembers(namespace, inspect.isclass)
        if issubclass(kind, base)
    }


def not_held(library: str) -> set[str]:
    """The public layers that the zoo of a library does not hold."""
    held = set().union(*_MET[_ZOOS[library]().name].values())
    return {name for name, kind in public_layers(library).items() if kind not in held}


def unused_rows(cases: Iterable[Case]) -> list[str]:
    """The entries of the tables that no leaf of the given cases asked for."""
    met = {built.library for built in cases}
    return [
        f"{library} {kind.__name__}.{name}"
        for library in sorted(met)
        for kind, row in TABLES[library].items()
        for name in row
        if (kind, name) not in _USED
    ]


def main() -> None:
    cases, mistakes = [build() for build in CASES], []
    for built in cases:
        counts = collections.Counter(built.roles.values())
        print(f"{built.name}: {len(built.roles)} leaves,", ", ".join(f"{n} {role}" for role, n in counts.items()))
        if list(built.roles) != wdjax.paths.canonical_paths(built.params) or not counts.keys() <= set(ROLES):
            mistakes.append(f"{built.name}: the roles are not those of the parameters")
    for library, excluded in EXCLUDED.items():
        missing = not_held(library)
        print(f"{library}: {len(public_layers(library)) - len(missing)} layers are held; not held are")
        for name in sorted(missing & excluded.keys()):
            print(f"    {name}: {excluded[name]}")
        mistakes += [f"{library}: {name} is forgotten" for name in missing - excluded.keys()]
        mistakes += [
            f"{library}: {name} is excluded and held" for name in (excluded.keys() & public_layers(library)) - missing
        ]
    mistakes += [f"no leaf asks for {row}" for row in unused_rows(cases)]
    if mistakes:
        raise SystemExit("\n".join(mistakes))


if __name__ == "__main__":
    main()
