"""The words that tell what a parameter is, by the names of Flax, Equinox, Haiku, Keras and well-known models."""

import functools
import re

Words = tuple[str, ...]


@functools.lru_cache(maxsize=65536)
def words(name: str) -> Words:
    """The words of a name in lower case, without numbers: "RMSNorm_0" is ("rms", "norm"), "conv2d" is ("conv",)."""
    name = re.sub(r"\d+[dD](?![a-z])", "", name)
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def some(text: str) -> frozenset[str]:
    """A set of words."""
    return frozenset(text.split())


# Matrices.
MATRIX = some("kernel kernels w weight weights matrix")
INTO = some("wq wk wv wo wi wu wd wg wx wh wih whh wxh wqkv wkv")
LAYER = INTO | some(
    "linear dense conv einsum proj projection projector fc qkv kv unembed unembedding head router modulation"
)
TABLE = some("embedding embeddings embed embeds emb embs embedder wte wpe vocab")
FACTOR = some("a b up down")
# Which matrix of a layer it is, or which part of a complex one.
PART = some(
    "orig bar reverse enc dec input output hidden down gate gating proj query key value attn feat feature features "
    "real imag"
)
# Kernels of these are computed from a few numbers, such as a frequency and a width for each filter.
FILTER = some("gabor sinc wavelet morlet rbf mel dct stft fir blur sobel filterbank")
FOURIER_OF = TABLE | some("feat feats feature features encoding enc proj projection")

# Bayesian layers and noisy layers have one of these for each weight.
DEVIATION = some("sigma rho")

# Vectors: these words decide only if the shape is that of a vector, or if the owner says it too.
BIAS = some("bias biases offset offsets intercept beta shift b")
NORM = some("ln lns bn gn grn rms subln preln postln lnf norms normalization normalize")
SCALE = some(
    "scale scales gamma gammas gain gains alpha lambda lambdas layerscale scaler multiplier temperature temp tau slope "
    "slopes rezero resweight magnitude g std logstd logvar dt sink sinks"
)
# Together, these are never the name of a matrix.
SAID_TWICE = tuple(map(some, ("layer scale", "scale shift", "per scale", "negative slope", "sinks")))
BUFFER = some("freqs freq frequencies sin cos sinusoid timescale")
TOKEN = some("token tokens cls probe probes const constant")

# Of any rank: learned inputs, tables of positions, statistics and states.
TOKENS = some("latent latents prompt prompts prefix queries registers")
TOKENS_OF = some("cls mask masked null register reg query prompt latent")
POSITION = some(
    "pos position positions positional posemb posembed posembedding posenc wpe pe ape rpe rpb rope rotary sinusoidal"
)
RELATIVE = some("relative rel relpos distance")
# The last word of what holds a table of positions: "pos_embed", "PositionalEncoding", but not "RotaryAttention".
OF_POSITION = TABLE | POSITION | some("encoding encodings enc table bias")
# Embedding layers of well-known models that are indexed by position.
LOOKED_UP = some("position_embedding position_embeddings embed_positions position_embedder wpe")
# What holds an array named as a table, but looks nothing up.
NOT_LOOKED_UP = TOKENS | some("attention attn codebook")
OF_BUFFER = BUFFER | POSITION | some("inv cis cached table mask masks")
STATISTIC = some("mean means var variance average avg count counts counter ema amax history sigma running moving zeros")
STATE = some("state states carry hidden memory h c")
# What a module that is a moving average holds itself.
OF_AVERAGE = some("hidden average counter embeddings codebook")
COMPLEX = some("re im real imag")
