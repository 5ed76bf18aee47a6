"""The role of a parameter in its layer, by its name, its owner's name and its shape.

The names are those of Flax Linen, Flax NNX, Equinox, Haiku and well-known models. If a name has several meanings, as an
Equinox `weight`, the owner's name decides, and after that the bias: a norm's scale has its shape, and a matrix has not.
A word for a vector decides for a vector. With two axes or more, the same word may name a matrix, and nothing decides.
"""

import functools
import math
import re
from typing import NamedTuple

from . import _words as w
from ._words import Words, some, words
from .parameters import Parameter

KERNEL, EMBEDDING, ADAPTER = "kernel", "embedding", "adapter"
NORM, BIAS, TOKEN, POSITION = "norm", "bias", "token", "position"


class Role(NamedTuple):
    """What a parameter is, and why. Only kernels, embeddings and adapters decay."""

    name: str
    reason: str  # How it was recognized, in a few words.
    or_table: bool = False  # Whether this kernel could also be the table of an embedding layer.


def is_norm(name: str) -> bool:
    """Whether a module of this name is a normalization."""
    # The last word counts: "head_norm" is a norm, and "LayerNormDense" is a layer.
    known = [word for word in words(name) if word.endswith("norm") or word in w.NORM | w.LAYER]
    return bool(known) and known[-1] not in w.LAYER


def is_layer(name: str) -> bool:
    """Whether a module of this name multiplies by a matrix."""
    return bool(w.LAYER.intersection(words(name)))


@functools.lru_cache(maxsize=65536)
def role(parameter: Parameter) -> Role | None:
    """The role of a parameter, or None if nothing decides it."""
    own = words(parameter.name)
    if own:
        is_matrix = own[-1] in w.MATRIX or _is_a_part(own)
        found = _named(parameter, own)
        if found is None and is_matrix and parameter.is_library and len(parameter.shape) >= 2:
            is_table = bool(w.TABLE.intersection(words(parameter.owner)))
            name = NORM if is_norm(parameter.owner) else EMBEDDING if is_table else KERNEL
            return Role(name, f"{parameter.name!r} of {parameter.owner!r}")
        if found is None and is_matrix:
            return None if _is_no_weight(parameter, own) else _matrix(parameter, own)
        found = found or _shaped(parameter, own)
        if found is not None:
            return found
    return Role("scalar", "a single number") if math.prod(parameter.shape) == 1 else None


def _named(parameter: Parameter, own: Words) -> Role | None:
    """The role by a name that decides whatever the shape, or for the shape of a vector."""
    name, first, last, every, rank = parameter.name, own[0], own[-1], frozenset(own), len(parameter.shape)
    owner = words(parameter.owner)
    named, of_owner = f"named {name!r}", f"{name!r} of {parameter.owner!r}"
    is_matrix = last in w.MATRIX | w.LAYER
    is_made_by_matrix = first == "w" or first in w.INTO or "to" in every  # "w_scale" may be the matrix for a scale.
    # "kernel_mean" may be a matrix too.
    is_of_matrix = parameter.is_wide and not every.isdisjoint(w.MATRIX | w.LAYER)
    if rank >= 2 and _is_lora_factor(parameter, own):
        return Role(ADAPTER, f"a LoRA factor, {of_owner if parameter.owner else named}")
    if name in ("A", "B", "C"):  # Of a state-space model, in which D is the skip connection.
        return None
    is_bias = last == "b" and not (rank >= 2 and (is_made_by_matrix or parameter.is_beside_a))
    is_part = all(map(_is_part, own[1:])) and not (parameter.is_wide and last in w.COMPLEX)
    is_of_bias = len(own) > 1 and first in ("bias", "b") and is_part and (rank < 2 or not is_matrix)
    is_relative = every & w.RELATIVE and every & (w.POSITION | w.TABLE | some("bias table attention"))
    is_in_relative = last in w.TABLE | some("weight table") or ("bias" in owner and not is_matrix)
    is_layer_of_position = is_matrix or (parameter.is_wide and last in some("gate gating mlp mix"))
    is_initial = every & some("init initial") and every & w.STATE
    is_time = first == "time" and every & some("decay mix first maa faaaa") and not is_matrix
    is_part_of_dynamics = last in w.COMPLEX and first in ("a", "lambda")
    # NNX's WeightNorm names its magnitudes by the path of the parameter that they scale.
    is_magnitude = owner == ("scales",) and name.startswith("(")
    found = (
        (name == "D", "state space", named),
        (is_part_of_dynamics or (first == "a" and last in ("param", "diag")), "dynamics", named),
        (last in ("bias", "biases") or is_bias or is_of_bias, BIAS, named),
        (is_relative, POSITION, f"relative positions, {named}"),
        (w.RELATIVE.intersection(owner) and is_in_relative, POSITION, f"relative positions, {of_owner}"),
        (_is_in_table_of_positions(parameter, last), POSITION, of_owner),
        (every & w.POSITION and (last == "matrix" or not is_layer_of_position), POSITION, named),
        (_is_of_power_iteration(parameter, own), "buffer", f"{named}, a vector of a power iteration"),
        (_is_buffer(parameter, own), "buffer", named),
        (_is_average(parameter, own), "statistic", of_owner),
        ("spectral" in owner and own == ("u",), "statistic", of_owner),
        (first in ("running", "moving", "cached") or own == ("init",), "statistic", named),
        (last in w.STATISTIC and first not in w.TABLE and not is_of_matrix, "statistic", named),
        (is_initial or re.fullmatch("[hc]0", name), "initial state", named),
        (last in w.TOKENS and not is_made_by_matrix, TOKEN, named),
        (("log" in every and not is_of_matrix) or is_time or own == ("raw", "decay"), "dynamics", named),
        (own == ("w", "e"), EMBEDDING, named),
        (is_magnitude, "scale", named),
    )
    first_found = next((Role(what, reason) for holds, what, reason in found if holds), None)
    return first_found or (None if is_made_by_matrix and rank >= 2 else _vector(parameter, own))


def _vector(parameter: Parameter, own: Words) -> Role | None:
    """The role by a word for vectors. With two axes or more, it decides if the name or the owner says it again."""
    first, last, every, owner = own[0], own[-1], frozenset(own), words(parameter.owner)
    named, is_matrix = f"named {parameter.name!r}", last in w.MATRIX | w.LAYER
    is_normed = is_norm(parameter.owner) or is_norm(parameter.name) or parameter.bias == parameter.shape
    fits, leads = not parameter.is_wide, parameter.shape[:1] == (1,)
    is_said_twice = any(said <= every for said in w.SAID_TWICE)
    is_scaled = fits or is_normed or is_said_twice or bool(w.SCALE.intersection(owner[-1:]))
    is_token = fits or leads or (last in ("token", "tokens") and len(own) > 1)
    is_table_of_tokens = first in w.TOKENS_OF and last in w.TABLE and (fits or leads or first != "cls")
    is_scale = (last in w.SCALE or (first in w.SCALE and last not in w.TABLE)) and not is_matrix
    found = (
        (last in w.BIAS and (fits or is_normed), BIAS),
        (last in w.BUFFER and fits, "buffer"),
        ((last in w.TOKEN and is_token) or is_table_of_tokens, TOKEN),
        (is_scale and is_scaled, NORM if is_norm(parameter.owner) else "scale"),
    )
    return next((Role(what, named) for holds, what in found if holds), None)


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
        # A scale and its shift. For single numbers, y = w x + b looks the same, and two matrices may have one shape.
        is_told = math.prod(shape) > 1 and (parameter.in_list or not parameter.is_wide)
        return Role(NORM, f"{parameter.name!r} of the shape of its bias") if is_told else None
    if rank < 2:
        if bias is not None and math.prod(bias) == 1:
            return Role(KERNEL, named)
        return Role(NORM, f"{parameter.name!r}, one vector") if is_weight else None
    if bias is None and _is_one_vector(parameter, own) and own[-1] not in ("kernel", "kernels"):
        # Along the last axis, it broadcasts. Otherwise, it may be a convolution to or from one channel.
        return Role(TOKEN, f"one vector, {named}") if shape[-1] > 1 and not parameter.in_list else None
    if bias is None and is_weight:
        return _weight_without_bias(parameter, qualifier, said, of_owner)
    return None if w.POSITION.intersection(qualifier) else Role(KERNEL, named)


def _weight_without_bias(parameter: Parameter, qualifier: Words, owner: Words, of_owner: str) -> Role | None:
    """The role of a `weight` with two axes or more, which may belong to a linear layer or an embedding."""
    rank, is_vector = len(parameter.shape), math.prod(parameter.shape[:-1]) == 1
    kernel, vector = Role(KERNEL, of_owner), Role(TOKEN, f"one vector, {of_owner}")
    if qualifier:  # "class_weights" is not a matrix, "gate_weight" is one.
        return kernel if any(_is_part(word) or word in w.LAYER for word in qualifier) else None
    if is_layer("_".join(owner)) or "patch" in owner:
        return kernel
    if is_norm(parameter.around) and not (w.SCALE | w.BIAS).isdisjoint(owner[-1:]):  # Perhaps in a stack of layers.
        return None
    if rank <= 3 and w.TABLE.intersection(owner):
        if some("time timestep out output").intersection(owner):
            return kernel._replace(or_table=True)
        if is_vector or parameter.is_added:
            return vector if is_vector else vector._replace(reason=f"added as it is, {of_owner}")
        return Role(EMBEDDING, of_owner)
    if owner[-1:] in (("token",), ("tokens",)) and (is_vector or owner[0] in w.TOKENS_OF):
        return vector._replace(reason=of_owner)
    is_part = any(map(_is_part, owner)) or "mlp" in owner
    return kernel._replace(or_table=rank <= 3 and not (is_part and not parameter.in_list))


def _shaped(parameter: Parameter, own: Words) -> Role | None:
    """The role of a parameter that is named as a layer, a table, a token or a norm, if the shape fits."""
    named = f"named {parameter.name!r}"
    every = frozenset(own)
    is_vector = math.prod(parameter.shape[:-1]) == 1
    is_named_after_table = every.union(words(parameter.owner)) & (w.TABLE | some("lookup"))
    is_table = own[-1] in w.TABLE or (own[-1] in ("table", "var") and bool(is_named_after_table))
    if own[-1] in w.LAYER or (is_table and "patch" in every):
        if _is_one_vector(parameter, own):
            return Role(TOKEN, f"one vector, {named}")
        is_kernel = len(parameter.shape) >= 2 and own[0] not in ("b", "bias")
        return Role(KERNEL, f"{named}, as a layer") if is_kernel else None
    if is_table and parameter.is_library:
        return Role(EMBEDDING, named)
    if is_table and parameter.is_added:
        return Role(TOKEN, f"added as it is, {named}") if len(own) > 1 else None
    if is_table and (not is_vector or (own[0] == "embedding" and len(parameter.shape) == 2)):
        # Attention may hold the relative positions of a T5, and queries are learned inputs.
        is_of_other = len(own) == 1 and not w.NOT_LOOKED_UP.isdisjoint(words(parameter.owner)[-1:])
        return None if is_of_other else Role(EMBEDDING, named)
    if is_table or (is_vector and own[0] in w.TOKENS_OF):
        return Role(TOKEN, f"one vector, {named}")
    if is_norm(parameter.name):
        return Role(NORM, named)
    is_broadcast = _is_one_vector(parameter, own) and parameter.shape[-1] > 1 and not parameter.in_list
    return Role(TOKEN, f"one vector, {named}") if is_broadcast and not parameter.is_library else None


def is_input(name: str) -> bool:
    """Whether a module of this name is likely before the first block: an embedding, a class token, the stem."""
    return not (w.TABLE | w.POSITION | w.TOKEN | some("patch patchify stem")).isdisjoint(words(name))


def says_position(name: str) -> bool:
    """Whether a name speaks of positions, absolute or relative."""
    return not (w.POSITION | w.RELATIVE).isdisjoint(words(name))


def _is_in_table_of_positions(parameter: Parameter, last: str) -> bool:
    """Whether its owner is named or typed as a table of positions that is added as it is."""
    owner = [word for word in words(parameter.owner) if word not in ("module", "layer", "block")]
    if not says_position(parameter.owner) or is_layer(parameter.owner) or owner[-1] not in w.OF_POSITION:
        return False
    # By names alone, `embedding` is taken for the parameter of a library layer.
    is_looked_up = parameter.owner in w.LOOKED_UP or last in ("embedding", "embeddings")
    is_table = last in w.TABLE | some("weight weights w table encoding encodings value values array var")
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


def _is_no_weight(parameter: Parameter, own: Words) -> bool:
    """Whether a matrix may be no weight: a few numbers for each filter, Fourier features, a state, or a deviation."""
    owner = () if is_layer(parameter.owner) and "conv" not in words(parameter.owner) else words(parameter.owner)
    said = {*own, *owner}
    is_fourier = "fourier" in said and not w.FOURIER_OF.isdisjoint({*own, *words(parameter.owner)})
    is_other = is_fourier or bool(w.DEVIATION.intersection(own)) or owner[-1:] in (("state",), ("states",))
    return parameter.is_wide and (is_other or not w.FILTER.isdisjoint(said))


def _is_buffer(parameter: Parameter, own: Words) -> bool:
    """Whether it is a mask, is frozen, or is a table of sines that is named as nothing else."""
    is_of_positions = set(own) <= w.OF_BUFFER and (len(own) > 1 or says_position(parameter.owner))
    is_table = is_of_positions and not w.BUFFER.isdisjoint(own)
    return is_table or not {"mask", "masks"}.isdisjoint(own[-1:]) or not {"freeze", "frozen"}.isdisjoint(own)


def _is_average(parameter: Parameter, own: Words) -> bool:
    """Whether it is what a moving average holds, or the state of an Equinox layer."""
    owner = words(parameter.owner)
    is_hidden = own[-1] in ("hidden", "average", "counter") and "ema" in owner
    return (
        is_hidden
        or (owner[-1:] == ("ema",) and not w.OF_AVERAGE.isdisjoint(own[-1:]))
        or owner[:2] == ("state", "index")
    )


def _is_of_power_iteration(parameter: Parameter, own: Words) -> bool:
    """Whether the parameter is the `u` or `v` that spectral normalization keeps beside a weight."""
    if own[-1] not in ("u", "v") or math.prod(parameter.shape) != max(parameter.shape, default=0):
        return False
    if len(own) == 1:
        owner = words(parameter.owner)
        return parameter.is_beside_weight or "parametrizations" in owner or bool(w.MATRIX.intersection(owner[-1:]))
    return own[0] == "vector" or (own[0] in ("weight", "kernel") and len(parameter.shape) == 1)


def _is_a_part(own: Words) -> bool:
    """Whether the name tells which matrix of a layer it is: "weight_ih", "W_Q", "wi_gate"."""
    first, *rest = own
    is_first = first in w.MATRIX - {"matrix"} or first in w.INTO
    is_magnitude = own == ("weight", "g")  # Of PyTorch's weight_norm.
    return is_first and bool(rest) and not is_magnitude and all(_is_part(word) and word != "b" for word in rest)


def _is_part(word: str) -> bool:
    return word in w.PART or (len(word) <= 2 and word not in w.NORM and word not in w.POSITION)


def _is_lora_factor(parameter: Parameter, own: Words) -> bool:
    """Whether the parameter is "lora_a", "a" of "lora", or the kernel of "lora_a"."""
    if _is_lora(parameter.name):
        return own[-1] in w.MATRIX | w.FACTOR | some("lora ra")
    if _is_lora(parameter.owner) and own[-1] in w.FACTOR and (len(own) == 1 or own[0] in w.MATRIX):
        return True
    scopes = (parameter.owner, parameter.around)
    which = any(w.FACTOR.intersection(words(scope)[-1:]) for scope in scopes)
    return own[-1] in w.MATRIX and which and any(map(_is_lora, scopes))


def _is_lora(name: str) -> bool:
    return re.search(r"(?<![a-zA-Z])lora(?![a-z])|Lora(?![a-z])|LoRA|LORA", name) is not None
