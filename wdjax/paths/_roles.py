"""What a parameter is to its layer, told from its name, its owner's name and its shape.

The names are those that Flax Linen, Flax NNX, Equinox and Haiku give, and those of well-known models. Where one name
is used for several things (an Equinox `weight` is a matrix, a table or a norm's scale), the owner's name decides, then
the bias beside it: a norm's scale has the shape of its bias, a matrix has not. What none of this tells has no role.
"""

import functools
import math
import re
from typing import NamedTuple

KERNEL, EMBEDDING, ADAPTER = "kernel", "embedding", "adapter"
NORM, BIAS, TOKEN, POSITION = "norm", "bias", "token", "position"


class Role(NamedTuple):
    """What a parameter is, and how one can tell.

    Attributes:
        name: "kernel", "embedding" and "adapter" decay; any other is a word for what doesn't.
        reason: in a few words.
    """

    name: str
    reason: str


class Parameter(NamedTuple):
    """What a role is told from.

    Attributes:
        name: its own name, the last segment of its path that says anything.
        owner: the name of the module that holds it, or of its class; "" if there is none.
        shape: its shape, without the axes that are known to stack layers.
        bias: the shape of the bias beside it, likewise; None if there is none.
        is_library: whether the owner is a layer of a library, which is what its name says whatever the shape.
        in_lora: whether it belongs to a LoRA module.
    """

    name: str
    owner: str
    shape: tuple[int, ...]
    bias: tuple[int, ...] | None = None
    is_library: bool = False
    in_lora: bool = False


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BIAS = _set("bias biases offset offsets beta shift b")
_MATRIX = _set("kernel kernels w weight weights matrix")
LAYER = _set("linear dense conv einsum proj projection projector fc qkv kv wq wk wv wo wi wu wd wg wqkv wkv unembed")
_TABLE = _set("embedding embeddings embed embeds emb embs embedder wte vocab")
_PART = _set("i f g o z r n h x q k v ih hh in out input output hidden up down gate proj l u d e xi hi reverse")
_NORM = _set("ln lns bn gn grn rms subln preln postln lnf norms normalization normalize")
_POSITION = _set("pos position positions positional posemb posembed posenc wpe pe rope rotary")
_RELATIVE = _set("relative rel relpos")
_WAVE = _set("freqs freq frequencies sin cos sinusoid timescale")
_TOKEN = _set("token tokens cls probe probes latent latents prompt prompts prefix queries registers")
_TOKENS_OF = _set("cls mask masked null register reg query prompt latent")
_SCALE = _set(
    "scale scales gamma gammas gain gains alpha lambda lambdas layerscale scaler multiplier temperature temp tau slope "
    "rezero resweight magnitude g std logstd logvar dt"
)
_STATISTIC = _set("mean var variance average count counter ema amax history sigma running moving zeros")
_STATE = _set("state states carry hidden memory h c")


@functools.lru_cache(maxsize=65536)
def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case, numbers left out: "RMSNorm_0" is ("rms", "norm")."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def is_norm(name: str) -> bool:
    """Whether a module of this name is a normalization."""
    own = words(name)
    return any(word in _NORM or word.endswith("norm") for word in own) and own[-1] not in LAYER


@functools.lru_cache(maxsize=65536)
def role(parameter: Parameter) -> Role | None:
    """The role of a parameter, or None if nothing tells."""
    own = words(parameter.name)
    if not own:
        return _scalar(parameter)
    return _named(parameter, own, frozenset(own)) or _shaped(parameter, own) or _scalar(parameter)


def _named(parameter: Parameter, own: tuple[str, ...], every: frozenset[str]) -> Role | None:
    """The role that the name gives, whatever the shape."""
    name, first, last = parameter.name, own[0], own[-1]
    owner = frozenset(words(parameter.owner))
    named = f"named {name!r}"
    if (parameter.in_lora or "lora" in every) and last in _MATRIX | _set("a b up down lora"):
        return Role(ADAPTER, f"a LoRA factor, {named}")
    if name in ("A", "B", "C", "D"):  # Of a state-space model: D is its skip connection.
        return Role("state space", named) if name == "D" else None
    if last in _BIAS or (first in ("bias", "b") and every <= _PART | _BIAS):
        return Role(BIAS, named)
    if every & _RELATIVE and every & (_POSITION | _TABLE | _set("bias table attention")):
        return Role(POSITION, f"relative positions, {named}")
    if owner & _RELATIVE and last in _TABLE | _set("weight table"):
        return Role(POSITION, f"relative positions, in {parameter.owner!r}")
    if every & _POSITION and last not in ("kernel", "weight"):
        return Role(POSITION, named)
    if last in _WAVE:
        return Role("buffer", named)
    if last in _STATISTIC or first in ("running", "moving", "cached") or every == {"init"}:
        return Role("statistic", named)
    if (every & _set("init initial") and every & _STATE) or re.fullmatch("[hc]0", name):
        return Role("initial state", named)
    if last in _TOKEN or (first in _TOKENS_OF and last in _TABLE):
        return Role(TOKEN, named)
    if "log" in every or (first == "time" and last not in _MATRIX | LAYER | _TABLE):
        return Role("dynamics", named)
    if own == ("w", "e"):
        return Role(EMBEDDING, named)
    if (
        "scales" in owner
        or (last in _SCALE and first != "w")
        or (first in _SCALE and last not in _MATRIX | LAYER | _TABLE)
    ):
        return Role(NORM if is_norm(parameter.owner) else "scale", named)
    return None


def _shaped(parameter: Parameter, own: tuple[str, ...]) -> Role | None:
    """The role of what a name calls a matrix, a table or a norm: the owner and the shape have a say in it."""
    first, last, rank = own[0], own[-1], len(parameter.shape)
    named = f"named {parameter.name!r}"
    is_part = len(own) > 1 and first in ("w", "weight", "kernel") and frozenset(own[1:]) <= _PART
    if last in _MATRIX or is_part:
        # A raw parameter may be its own owner: "attention_norm_weight".
        owner = "_".join(own[:-1]) if len(own) > 1 and is_norm("_".join(own[:-1])) else parameter.owner
        return _matrix(parameter, owner, is_weight=last in ("weight", "weights") and not is_part)
    if last in _TABLE or (last == "table" and frozenset(own) & (_TABLE | _set("lookup"))):
        if parameter.is_library or (rank >= 2 and math.prod(parameter.shape[:-1]) > 1):
            return Role(EMBEDDING, named)
        return Role(TOKEN, f"one vector, {named}")
    if last in LAYER and rank >= 2:
        return Role(KERNEL, f"{named}, as a layer")
    if is_norm(parameter.name):
        return Role(NORM, named)
    return None


def _matrix(parameter: Parameter, owner: str, *, is_weight: bool) -> Role:
    shape, bias, rank = parameter.shape, parameter.bias, len(parameter.shape)
    of_owner = f"{parameter.name!r} of {owner!r}"
    has_bias_of_a_matrix = bias is not None and rank >= 2 and len(bias) < rank
    if is_norm(owner) and (parameter.is_library or not has_bias_of_a_matrix):
        return Role(NORM, of_owner)
    is_table = bool(frozenset(words(owner)) & _TABLE) and not frozenset(words(owner)) & _set("patch proj linear")
    if is_weight and is_table and (parameter.is_library or (bias is None and rank in (2, 3))):
        return Role(EMBEDDING, of_owner)
    if parameter.is_library:
        return Role(KERNEL, of_owner)
    if bias is not None and bias == shape and rank > 0:
        return Role(NORM, f"{parameter.name!r} of the shape of its bias")
    if is_weight and (rank < 2 or (rank > 2 and math.prod(shape[:-1]) == 1)) and not (rank == 1 and bias == ()):
        return Role(NORM, f"{parameter.name!r}, one vector")
    return Role(KERNEL, f"named {parameter.name!r}")


def _scalar(parameter: Parameter) -> Role | None:
    return Role("scalar", "a single number") if math.prod(parameter.shape) == 1 else None
