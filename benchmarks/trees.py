"""Parameter trees to measure on: the shapes and names of real models, and many small arrays.

Values do not matter here, only the bytes to read and write. All arrays are float32.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Tree(NamedTuple):
    """The shapes of a model's parameters.

    Attributes:
        name: its name in the tables.
        shapes: nested dicts of `jax.ShapeDtypeStruct`.
        layer: a format for the pattern of layers whose number ends with a digit. It splits the tree into ten groups.
    """

    name: str
    shapes: Any
    layer: str

    def __str__(self) -> str:
        return self.name

    @property
    def arrays(self) -> int:
        return len(jax.tree.leaves(self.shapes))

    @property
    def parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    def full(self, value: float) -> Any:
        """The tree with one value everywhere."""
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), self.shapes)


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _norm(width: int) -> dict[str, Any]:
    return {"scale": _shape(width), "bias": _shape(width)}


def _dense(inputs: int, outputs: int) -> dict[str, Any]:
    return {"kernel": _shape(inputs, outputs), "bias": _shape(outputs)}


def _conv(size: int, inputs: int, outputs: int) -> dict[str, Any]:
    return {"kernel": _shape(size, size, inputs, outputs)}


def resnet50() -> Tree:
    """ResNet-50, named as in Flax's ImageNet example. Its batch statistics are not parameters."""
    params: dict[str, Any] = {"conv_init": _conv(7, 3, 64), "bn_init": _norm(64)}
    inputs, number = 64, 0
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            layers = {
                "Conv_0": _conv(1, inputs, width),
                "BatchNorm_0": _norm(width),
                "Conv_1": _conv(3, width, width),
                "BatchNorm_1": _norm(width),
                "Conv_2": _conv(1, width, 4 * width),
                "BatchNorm_2": _norm(4 * width),
            }
            if block == 0:
                layers |= {"conv_proj": _conv(1, inputs, 4 * width), "norm_proj": _norm(4 * width)}
            params[f"BottleneckResNetBlock_{number}"] = layers
            inputs, number = 4 * width, number + 1
    params["Dense_0"] = _dense(inputs, 1000)
    tree = Tree("ResNet-50", params, "BottleneckResNetBlock_*{}")
    assert (tree.arrays, tree.parameters) == (161, 25_557_032)
    return tree


def gpt2() -> Tree:
    """GPT-2 small, named as in the original. The head shares the token embedding."""
    width = 768

    def block() -> dict[str, Any]:
        return {
            "ln_1": _norm(width),
            "attn": {"c_attn": _dense(width, 3 * width), "c_proj": _dense(width, width)},
            "ln_2": _norm(width),
            "mlp": {"c_fc": _dense(width, 4 * width), "c_proj": _dense(4 * width, width)},
        }

    embeddings = {"wte": {"embedding": _shape(50257, width)}, "wpe": {"embedding": _shape(1024, width)}}
    params = {**embeddings, "h": {str(i): block() for i in range(12)}, "ln_f": _norm(width)}
    tree = Tree("GPT-2 small", params, "h/*{}")
    assert (tree.arrays, tree.parameters) == (148, 124_439_808)
    return tree


def small_arrays(arrays: int, widths: tuple[int, ...] = (8, 16, 24)) -> Tree:
    """Many small arrays, which show the cost of work per array: layers of a kernel, a bias and a norm.

    Real models have many layers with few shapes, and so does this one. The widths alternate, which makes two shapes for
    each (a kernel maps its layer's width to that of the next layer).
    """

    def layer(i: int) -> dict[str, Any]:
        inputs, outputs = widths[i % len(widths)], widths[(i + 1) % len(widths)]
        return {"Dense_0": _dense(inputs, outputs), "LayerNorm_0": _norm(outputs)}

    assert arrays % 4 == 0
    name = f"{arrays:,} small" + (f", {2 * len(widths)} shapes" if widths != (8, 16, 24) else "")
    return Tree(name, {f"Layer_{i}": layer(i) for i in range(arrays // 4)}, "Layer_*{}")
