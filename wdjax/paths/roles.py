"""The role of a parameter in its layer, by its name, its owner's name and its shape.

The names are those of Flax Linen, Flax NNX, Equinox, Haiku and well-known models. Some names have several meanings: an
Equinox `weight` is a matrix, a table or a norm's scale. Then the owner's name decides, and after that the bias beside
it: a norm's scale has the shape of its bias, and a matrix does not. If nothing decides, the parameter has no role.
"""

import functools
import math
import re
from typing import NamedTuple

KERNEL, EMBEDDING, ADAPTER = "kernel", "embedding", "adapter"
NORM, BIAS, TOKEN, POSITION = "norm", "bias", "token", "position"


class Role(NamedTuple):
    """What a parameter is, and why.

    Attributes:
        name: "kernel", "embedding" and "adapter" decay. All other roles do not.
        reason: how it was recognized, in a few words.
        or_table: whether this kernel could also be the table of an embedding layer.
    """

    name: str
    reason: str
    or_table: bool = False


class Parameter(NamedTuple):
    """What a role is decided from.

    Attributes:
        name: its own name: the last segment of its path that carries meaning.
        owner: the name of the module that holds it, of the list that this module is in, or of its class; "" if there is
            none.
        shape: its shape, without the axes that are known to stack layers.
        bias: the shape of the bias beside it, also without these axes; None if there is no bias.
        is_library: whether the owner is a library layer. Then its name decides, whatever the shape.
        in_list: whether the owner is a list. Its name doesn't tell which of its layers this is.
        around: the name of the owner's owner.
    """

    name: str
    owner: str
    shape: tuple[int, ...]
    bias: tuple[int, ...] | None = None
    is_library: bool = False
    in_list: bool = False
    around: str = ""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BIAS = _set("bias biases offset offsets intercept beta shift b")
_MATRIX = _set("kernel kernels w weight weights matrix")
_INTO = _set("wq wk wv wo wi wu wd wg wx wh wih whh wxh wqkv wkv")
_LAYER = _INTO | _set(
    "linear dense conv einsum proj projection projector fc qkv kv unembed unembedding head router modulation"
)
_TABLE = _set("embedding embeddings embed embeds emb embs embedder wte wpe vocab")
_PART = _set("reverse enc dec input output hidden down gate gating proj query key value attn feat feature features")
_FACTOR = _set("a b up down")
_NORM = _set("ln lns bn gn grn rms subln preln postln lnf norms normalization normalize")
_POSITION = _set("pos position positions positional posemb posembed posenc wpe pe rope rotary")
_RELATIVE = _set("relative rel relpos")
_BUFFER = _set("freqs freq frequencies sin cos sinusoid timescale mask masks")
_TOKEN = _set("token tokens cls probe probes latent latents prompt prompts prefix queries registers")
_TOKENS_OF = _set("cls mask masked null register reg query prompt latent")
_SCALE = _set(
    "scale scales gamma gammas gain gains alpha lambda lambdas layerscale scaler multiplier temperature temp tau slope "
    "slopes rezero resweight magnitude g std logstd logvar dt sink sinks"
)
_STATISTIC = _set("mean var variance average count counts counter ema amax history sigma running moving zeros")
_STATE = _set("state states carry hidden memory h c")


@functools.lru_cache(maxsize=65536)
def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case, without numbers: "RMSNorm_0" is ("rms", "norm"), "conv2d" is ("conv",)."""
    name = re.sub(r"\d+[dD](?![a-z])", "", name)
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def is_norm(name: str) -> bool:
    """Whether a module of this name is a normalization."""
    # The last word counts: "head_norm" is a norm, and "LayerNormDense" is a layer.
    for word in reversed(words(name)):
        if word in _NORM or word.endswith("norm"):
            return True
        if word in _LAYER:
            return False
    return False


def is_layer(name: str) -> bool:
    """Whether a module of this name multiplies by a matrix."""
    return bool(_LAYER.intersection(words(name)))


@functools.lru_cache(maxsize=65536)
def role(parameter: Parameter) -> Role | None:
    """The role of a parameter, or None if nothing decides it."""
    own = words(parameter.name)
    if own:
        found = _named(parameter, own)
        if found is not None:
            return found
        if own[-1] in _MATRIX or _is_a_part(own):
            is_known = parameter.is_library and len(parameter.shape) >= 2
            return _of_library(parameter) if is_known else _matrix(parameter, own)
        found = _shaped(parameter, own)
        if found is not None:
            return found
    return Role("scalar", "a single number") if math.prod(parameter.shape) == 1 else None


def _named(parameter: Parameter, own: tuple[str, ...]) -> Role | None:
    """The role by the name, whatever the shape."""
    name, first, last, every, rank = parameter.name, own[0], own[-1], frozenset(own), len(parameter.shape)
    owner = words(parameter.owner)
    named, of_owner = f"named {name!r}", f"{name!r} of {parameter.owner!r}"
    is_matrix = last in _MATRIX | _LAYER
    is_made_by_matrix = first == "w" or first in _INTO or "to" in every  # "w_scale" may be the matrix for a scale.
    if rank >= 2 and _is_lora_factor(parameter, own):
        return Role(ADAPTER, f"a LoRA factor, {of_owner}" if parameter.owner else f"a LoRA factor, {named}")
    if name in ("A", "B", "C", "D"):  # State-space models: D is the skip connection.
        return Role("state space", named) if name == "D" else None
    if first == "a" and last in ("re", "im", "param"):
        return Role("dynamics", named)
    if (last in _BIAS and (last in ("bias", "biases") or rank < 2 or not is_made_by_matrix)) or (
        first in ("bias", "b") and all(map(_is_part, own[1:])) and (rank < 2 or not is_matrix)
    ):
        return Role(BIAS, named)
    if every & _RELATIVE and every & (_POSITION | _TABLE | _set("bias table attention")):
        return Role(POSITION, f"relative positions, {named}")
    if _RELATIVE.intersection(owner) and (last in _TABLE | _set("weight table") or ("bias" in owner and not is_matrix)):
        return Role(POSITION, f"relative positions, {of_owner}")
    if every & _POSITION and (last == "matrix" or not is_matrix):
        return Role(POSITION, named)
    if last in _BUFFER or every & _set("freeze frozen"):
        return Role("buffer", named)
    if "ema" in owner or ("spectral" in owner and own == ("u",)):
        return Role("statistic", of_owner)
    if first in ("running", "moving", "cached") or own == ("init",) or (last in _STATISTIC and first not in _TABLE):
        return Role("statistic", named)
    if (every & _set("init initial") and every & _STATE) or re.fullmatch("[hc]0", name):
        return Role("initial state", named)
    if (last in _TOKEN and not is_made_by_matrix) or (first in _TOKENS_OF and last in _TABLE):
        return Role(TOKEN, named)
    if "log" in every or (first == "time" and every & _set("decay mix first maa faaaa") and not is_matrix):
        return Role("dynamics", named)
    if own == ("w", "e"):
        return Role(EMBEDDING, named)
    is_scale = (last in _SCALE and not is_made_by_matrix) or (first in _SCALE and last not in _TABLE)
    # NNX's WeightNorm names its magnitudes by the path of the parameter that they scale.
    if (is_scale and not is_matrix) or (owner == ("scales",) and name.startswith("(")):
        return Role(NORM if is_norm(parameter.owner) else "scale", named)
    return None


def _of_library(parameter: Parameter) -> Role:
    """The role of a parameter that a library layer calls a matrix."""
    is_table = bool(_TABLE.intersection(words(parameter.owner)))
    name = NORM if is_norm(parameter.owner) else EMBEDDING if is_table else KERNEL
    return Role(name, f"{parameter.name!r} of {parameter.owner!r}")


def _matrix(parameter: Parameter, own: tuple[str, ...]) -> Role | None:
    """The role of a parameter that is named as a matrix. It may also be a norm's scale, a table, or one vector."""
    shape, bias, rank = parameter.shape, parameter.bias, len(parameter.shape)
    is_weight, qualifier = own[-1] in ("weight", "weights"), own[:-1]
    # The name of a raw parameter may contain its owner: "attention_norm_weight".
    owner = "_".join(qualifier) if is_norm("_".join(qualifier)) else parameter.owner
    said = words(owner)
    named, of_owner = f"named {parameter.name!r}", f"{parameter.name!r} of {owner!r}"
    has_bias_of_matrix = bias is not None and len(bias) < rank and rank >= 2
    if is_norm(owner) and not has_bias_of_matrix:
        # It may also be a matrix that computes the norm's scale and shift.
        may_be_kernel = rank >= 2 and (own[-1] == "kernel" or "ada" in said)
        return None if may_be_kernel else Role(NORM, of_owner)
    if bias == shape:
        # A scale and its shift. For single numbers, y = w x + b looks the same.
        return Role(NORM, f"{parameter.name!r} of the shape of its bias") if math.prod(shape) > 1 else None
    if rank < 2:
        if bias is not None and math.prod(bias) == 1:
            return Role(KERNEL, named)
        return Role(NORM, f"{parameter.name!r}, one vector") if is_weight else None
    if bias is None and is_weight:
        return _weight_without_bias(parameter, qualifier, said, of_owner)
    return None if _POSITION.intersection(qualifier) else Role(KERNEL, named)


def _weight_without_bias(
    parameter: Parameter, qualifier: tuple[str, ...], owner: tuple[str, ...], of_owner: str
) -> Role | None:
    """The role of a `weight` with two axes or more, which may belong to a linear layer or an embedding."""
    rank, is_vector = len(parameter.shape), math.prod(parameter.shape[:-1]) == 1
    kernel, vector = Role(KERNEL, of_owner), Role(TOKEN, f"one vector, {of_owner}")
    if qualifier:  # "class_weights" is not a matrix, "gate_weight" is one.
        return kernel if any(_is_part(word) or word in _LAYER for word in qualifier) else None
    if is_layer("_".join(owner)) or "patch" in owner:
        return kernel
    if rank <= 3 and _TABLE.intersection(owner):
        if _set("time timestep out output").intersection(owner):
            return kernel._replace(or_table=True)
        return vector if is_vector else Role(EMBEDDING, of_owner)
    if owner[-1:] in (("token",), ("tokens",)) and (is_vector or owner[0] in _TOKENS_OF):
        return vector._replace(reason=of_owner)
    if is_vector and rank > 2:
        return None if parameter.in_list else vector
    is_part = any(map(_is_part, owner)) or "mlp" in owner
    return kernel._replace(or_table=rank <= 3 and not (is_part and not parameter.in_list))


def _shaped(parameter: Parameter, own: tuple[str, ...]) -> Role | None:
    """The role of a parameter that is named as a layer, a table, a token or a norm, if the shape fits."""
    named = f"named {parameter.name!r}"
    every = frozenset(own)
    is_vector = math.prod(parameter.shape[:-1]) == 1
    is_table = own[-1] in _TABLE or (
        own[-1] in ("table", "var") and bool(every.union(words(parameter.owner)) & (_TABLE | _set("lookup")))
    )
    if own[-1] in _LAYER or (is_table and "patch" in every):
        is_kernel = len(parameter.shape) >= 2 and own[0] not in ("b", "bias")
        return Role(KERNEL, f"{named}, as a layer") if is_kernel else None
    if is_table and (parameter.is_library or not is_vector or (own[0] == "embedding" and len(parameter.shape) == 2)):
        return Role(EMBEDDING, named)
    if is_table or (is_vector and own[0] in _TOKENS_OF):
        return Role(TOKEN, f"one vector, {named}")
    return Role(NORM, named) if is_norm(parameter.name) else None


def _is_a_part(own: tuple[str, ...]) -> bool:
    """Whether the name tells which matrix of a layer it is: "weight_ih", "W_Q", "wi_gate"."""
    first, *rest = own
    is_first = first in ("w", "weight", "kernel") or first in _INTO
    return is_first and bool(rest) and all(_is_part(word) and word != "b" for word in rest)


def _is_part(word: str) -> bool:
    return word in _PART or (len(word) <= 2 and word not in _NORM and word not in _POSITION)


def _is_lora_factor(parameter: Parameter, own: tuple[str, ...]) -> bool:
    """Whether the parameter is "lora_a", "a" of "lora", or the kernel of "lora_a"."""
    if _is_lora(parameter.name):
        return own[-1] in _MATRIX | _FACTOR | _set("lora ra")
    if _is_lora(parameter.owner) and own[-1] in _FACTOR and (len(own) == 1 or own[0] in _MATRIX):
        return True
    scopes = (parameter.owner, parameter.around)
    which = any(_FACTOR.intersection(words(scope)[-1:]) for scope in scopes)
    return own[-1] in _MATRIX and which and any(map(_is_lora, scopes))


def _is_lora(name: str) -> bool:
    return re.search(r"(?<![a-zA-Z])lora(?![a-z])|Lora(?![a-z])|LoRA|LORA", name) is not None
