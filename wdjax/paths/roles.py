"""The role of a parameter in its layer, by its name, its owner's name and its shape.

The names are those of Flax Linen, Flax NNX, Equinox, Haiku and well-known models. If a name has several meanings, as an
Equinox `weight`, the owner's name decides, and after that the bias: a norm's scale has its shape, and a matrix has not.
"""

import functools
import math
import re
from typing import NamedTuple

from .parameters import Parameter

Words = tuple[str, ...]
KERNEL, EMBEDDING, ADAPTER = "kernel", "embedding", "adapter"
NORM, BIAS, TOKEN, POSITION = "norm", "bias", "token", "position"


class Role(NamedTuple):
    """What a parameter is, and why. Only kernels, embeddings and adapters decay."""

    name: str
    reason: str  # How it was recognized, in a few words.
    or_table: bool = False  # Whether this kernel could also be the table of an embedding layer.


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BIAS = _set("bias biases offset offsets intercept beta shift b")
_MATRIX = _set("kernel kernels w weight weights matrix")
_INTO = _set("wq wk wv wo wi wu wd wg wx wh wih whh wxh wqkv wkv")
_LAYER = _INTO | _set(
    "linear dense conv einsum proj projection projector fc qkv kv unembed unembedding head router modulation"
)
_TABLE = _set("embedding embeddings embed embeds emb embs embedder wte wpe vocab")
_PART = _set(
    "orig bar reverse enc dec input output hidden down gate gating proj query key value attn feat feature features"
)
_FACTOR = _set("a b up down")
_NORM = _set("ln lns bn gn grn rms subln preln postln lnf norms normalization normalize")
_POSITION = _set(
    "pos position positions positional posemb posembed posembedding posenc wpe pe ape rpe rpb rope rotary sinusoidal"
)
_RELATIVE = _set("relative rel relpos distance")
# The last word of what holds a table of positions: "pos_embed", "PositionalEncoding", but not "RotaryAttention".
_OF_POSITION = _TABLE | _POSITION | _set("encoding encodings enc table bias")
# Embedding layers of well-known models that are indexed by position.
_LOOKED_UP = _set("position_embedding position_embeddings embed_positions position_embedder wpe")
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
def words(name: str) -> Words:
    """The words of a name in lower case, without numbers: "RMSNorm_0" is ("rms", "norm"), "conv2d" is ("conv",)."""
    name = re.sub(r"\d+[dD](?![a-z])", "", name)
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def is_norm(name: str) -> bool:
    """Whether a module of this name is a normalization."""
    # The last word counts: "head_norm" is a norm, and "LayerNormDense" is a layer.
    known = [word for word in words(name) if word.endswith("norm") or word in _NORM | _LAYER]
    return bool(known) and known[-1] not in _LAYER


def is_layer(name: str) -> bool:
    """Whether a module of this name multiplies by a matrix."""
    return bool(_LAYER.intersection(words(name)))


@functools.lru_cache(maxsize=65536)
def role(parameter: Parameter) -> Role | None:
    """The role of a parameter, or None if nothing decides it."""
    own = words(parameter.name)
    if own:
        is_matrix = own[-1] in _MATRIX or _is_a_part(own)
        found = _named(parameter, own)
        if found is None and is_matrix and parameter.is_library and len(parameter.shape) >= 2:
            is_table = bool(_TABLE.intersection(words(parameter.owner)))
            name = NORM if is_norm(parameter.owner) else EMBEDDING if is_table else KERNEL
            return Role(name, f"{parameter.name!r} of {parameter.owner!r}")
        if found is None and is_matrix:
            return _matrix(parameter, own)
        found = found or _shaped(parameter, own)
        if found is not None:
            return found
    return Role("scalar", "a single number") if math.prod(parameter.shape) == 1 else None


def _named(parameter: Parameter, own: Words) -> Role | None:
    """The role by the name, whatever the shape."""
    name, first, last, every, rank = parameter.name, own[0], own[-1], frozenset(own), len(parameter.shape)
    owner = words(parameter.owner)
    named, of_owner = f"named {name!r}", f"{name!r} of {parameter.owner!r}"
    is_matrix = last in _MATRIX | _LAYER
    is_made_by_matrix = first == "w" or first in _INTO or "to" in every  # "w_scale" may be the matrix for a scale.
    if rank >= 2 and _is_lora_factor(parameter, own):
        return Role(ADAPTER, f"a LoRA factor, {of_owner if parameter.owner else named}")
    if name in ("A", "B", "C"):  # Of a state-space model, in which D is the skip connection.
        return None
    is_bias = last in ("bias", "biases") or (last in _BIAS and (rank < 2 or not is_made_by_matrix))
    is_of_bias = first in ("bias", "b") and all(map(_is_part, own[1:])) and (rank < 2 or not is_matrix)
    is_relative = every & _RELATIVE and every & (_POSITION | _TABLE | _set("bias table attention"))
    is_in_relative = last in _TABLE | _set("weight table") or ("bias" in owner and not is_matrix)
    is_initial = every & _set("init initial") and every & _STATE
    is_time = first == "time" and every & _set("decay mix first maa faaaa") and not is_matrix
    is_scale = (last in _SCALE and not is_made_by_matrix) or (first in _SCALE and last not in _TABLE)
    # NNX's WeightNorm names its magnitudes by the path of the parameter that they scale.
    is_magnitude = owner == ("scales",) and name.startswith("(")
    found = (
        (name == "D", "state space", named),
        (first == "a" and last in ("re", "im", "param"), "dynamics", named),
        (is_bias or is_of_bias, BIAS, named),
        (is_relative, POSITION, f"relative positions, {named}"),
        (_RELATIVE.intersection(owner) and is_in_relative, POSITION, f"relative positions, {of_owner}"),
        (_is_in_table_of_positions(parameter, last), POSITION, of_owner),
        (every & _POSITION and (last == "matrix" or not is_matrix), POSITION, named),
        (_is_of_power_iteration(parameter, own), "buffer", f"{named}, a vector of a power iteration"),
        (last in _BUFFER or every & _set("freeze frozen"), "buffer", named),
        ("ema" in owner or ("spectral" in owner and own == ("u",)), "statistic", of_owner),
        (first in ("running", "moving", "cached") or own == ("init",), "statistic", named),
        (last in _STATISTIC and first not in _TABLE, "statistic", named),
        (is_initial or re.fullmatch("[hc]0", name), "initial state", named),
        (last in _TOKEN and not is_made_by_matrix, TOKEN, named),
        (first in _TOKENS_OF and last in _TABLE, TOKEN, named),
        ("log" in every or is_time, "dynamics", named),
        (own == ("w", "e"), EMBEDDING, named),
        (is_magnitude or (is_scale and not is_matrix), NORM if is_norm(parameter.owner) else "scale", named),
    )
    return next((Role(what, reason) for holds, what, reason in found if holds), None)


def _matrix(parameter: Parameter, own: Words) -> Role | None:
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
    if bias is None and _is_one_vector(parameter, own) and own[-1] not in ("kernel", "kernels"):
        # Along the last axis, it broadcasts. Otherwise, it may be a convolution to or from one channel.
        return Role(TOKEN, f"one vector, {named}") if shape[-1] > 1 and not parameter.in_list else None
    if bias is None and is_weight:
        return _weight_without_bias(parameter, qualifier, said, of_owner)
    return None if _POSITION.intersection(qualifier) else Role(KERNEL, named)


def _weight_without_bias(parameter: Parameter, qualifier: Words, owner: Words, of_owner: str) -> Role | None:
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
    is_part = any(map(_is_part, owner)) or "mlp" in owner
    return kernel._replace(or_table=rank <= 3 and not (is_part and not parameter.in_list))


def _shaped(parameter: Parameter, own: Words) -> Role | None:
    """The role of a parameter that is named as a layer, a table, a token or a norm, if the shape fits."""
    named = f"named {parameter.name!r}"
    every = frozenset(own)
    is_vector = math.prod(parameter.shape[:-1]) == 1
    is_named_after_table = every.union(words(parameter.owner)) & (_TABLE | _set("lookup"))
    is_table = own[-1] in _TABLE or (own[-1] in ("table", "var") and bool(is_named_after_table))
    if own[-1] in _LAYER or (is_table and "patch" in every):
        if _is_one_vector(parameter, own):
            return Role(TOKEN, f"one vector, {named}")
        is_kernel = len(parameter.shape) >= 2 and own[0] not in ("b", "bias")
        return Role(KERNEL, f"{named}, as a layer") if is_kernel else None
    if is_table and (parameter.is_library or not is_vector or (own[0] == "embedding" and len(parameter.shape) == 2)):
        return Role(EMBEDDING, named)
    if is_table or (is_vector and own[0] in _TOKENS_OF):
        return Role(TOKEN, f"one vector, {named}")
    return Role(NORM, named) if is_norm(parameter.name) else None


def is_input(name: str) -> bool:
    """Whether a module of this name is likely before the first block: an embedding, a class token, the stem."""
    return not (_TABLE | _POSITION | _TOKEN | _set("patch patchify stem")).isdisjoint(words(name))


def says_position(name: str) -> bool:
    """Whether a name speaks of positions, absolute or relative."""
    return not (_POSITION | _RELATIVE).isdisjoint(words(name))


def _is_in_table_of_positions(parameter: Parameter, last: str) -> bool:
    """Whether its owner is named or typed as a table of positions that is added as it is."""
    owner = [word for word in words(parameter.owner) if word not in ("module", "layer", "block")]
    if not says_position(parameter.owner) or is_layer(parameter.owner) or owner[-1] not in _OF_POSITION:
        return False
    # By names alone, `embedding` is taken for the parameter of a library layer.
    is_looked_up = parameter.owner in _LOOKED_UP or last in ("embedding", "embeddings")
    is_table = last in _TABLE | _set("weight weights w table encoding encodings value values array")
    return is_table and (parameter.is_own or not is_looked_up)


def _is_one_vector(parameter: Parameter, own: Words) -> bool:
    """Whether three axes or more hold one vector, as in (1, 1, C), outside a convolution of one channel and window."""
    shape = parameter.shape
    is_vector = len(shape) > 2 and math.prod(shape) == max(shape) > 1
    return (
        is_vector
        and not is_layer(parameter.owner)
        and not {"conv", "patch"}.intersection((*own, *words(parameter.owner)))
    )


def _is_of_power_iteration(parameter: Parameter, own: Words) -> bool:
    """Whether the parameter is the `u` or `v` that spectral normalization keeps beside a weight."""
    if own[-1] not in ("u", "v") or math.prod(parameter.shape) != max(parameter.shape, default=0):
        return False
    if len(own) == 1:
        owner = words(parameter.owner)
        return parameter.is_beside_weight or "parametrizations" in owner or bool(_MATRIX.intersection(owner[-1:]))
    return own[0] == "vector" or (own[0] in ("weight", "kernel") and len(parameter.shape) == 1)


def _is_a_part(own: Words) -> bool:
    """Whether the name tells which matrix of a layer it is: "weight_ih", "W_Q", "wi_gate"."""
    first, *rest = own
    is_first = first in ("w", "weight", "kernel") or first in _INTO
    return is_first and bool(rest) and all(_is_part(word) and word != "b" for word in rest)


def _is_part(word: str) -> bool:
    return word in _PART or (len(word) <= 2 and word not in _NORM and word not in _POSITION)


def _is_lora_factor(parameter: Parameter, own: Words) -> bool:
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
