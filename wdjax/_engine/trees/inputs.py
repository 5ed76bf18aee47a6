"""What users give as parameters: errors for what is no tree of parameters or does not broadcast, and tied arrays."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .. import checks
from ..text import shown
from .flattening import classes, flatten_with_paths, is_array, is_module, key_text

PyTree = Any


def parameters(
    where: str, params: PyTree, name: str = "params", *, may_hold: Sequence[str] = ()
) -> list[tuple[str, Any]]:
    """`flatten_with_paths`, with an error for what is not a tree of parameters, such as a training state.

    It `may_hold` "functions" as a whole Equinox model does, "variables" that are not parameters as an NNX model does,
    and "names" as the variables of Keras do.
    """

    def has(name: str) -> bool:
        return name in params if isinstance(params, Mapping) else hasattr(params, name)

    variables = () if "variables" in may_hold else ("BatchStat", "Cache", "Intermediate", "OptState", "RngState")
    of_nnx = classes(*(f"flax.nnx.{kind}" for kind in ("Optimizer", *variables)))

    # `init` would see their paths, and `update`, which gets their values, would not. JAX differentiates values only.
    of_keras = () if "names" in may_hold else classes("keras.Variable")

    def is_state(node: Any) -> bool:
        return type(node).__name__.endswith("State") and _package(node) in ("optax", "wdjax")

    is_whole = has("params") and (has("opt_state") or has("tx"))
    nodes: list[tuple[Any, Any]] = [((), params)]
    if not (is_whole or isinstance(params, Iterator)):
        stops = (*of_nnx, *of_keras)
        nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, stops) or is_state(x))[0]
    # A model holds arrays beside its functions; `hk.transform` makes a pair of functions.
    is_model = "functions" in may_hold and any(is_array(node) for _, node in nodes)
    for keys, node in nodes:
        if is_whole:
            remedy = "Pass state['params']." if isinstance(params, Mapping) else "Pass state.params."
        elif isinstance(node, of_nnx):
            remedy = "Pass nnx.state(model, nnx.Param)."
        elif is_state(node):
            remedy = "Pass the parameters that optimizer.init got, not its state."
        elif _package(node) == "torch":
            remedy = "Convert them: {name: jnp.asarray(x.detach().numpy()) for name, x in model.state_dict().items()}."
        elif getattr(node, "dtype", None) == jax.dtypes.float0:
            remedy = "It is the gradient of an integer. Pass the parameters, not their gradients."
        elif isinstance(node, of_keras):
            remedy = "Pass {v.path: v.value for v in model.trainable_variables}."
        elif _holds_numbers(node) or (is_model and keys):
            continue
        else:
            remedy = (
                "Pass the arrays of a model: model.init(key, inputs)['params'] in Linen, nnx.state(model, nnx.Param) "
                "in NNX, eqx.filter(model, eqx.is_inexact_array) in Equinox."
            )
        path = "/".join(map(key_text, keys))
        at = f" at {path!r}" if path else ""
        raise TypeError(f"{where}: {name} must be a tree of parameters, got {shown(node)}{at}. {remedy}")
    return flatten_with_paths(params)


def _holds_numbers(leaf: Any) -> bool:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, bool, int, float, complex)):
        return True
    dtype = None if is_module(leaf) else getattr(leaf, "dtype", None)
    return dtype.kind not in "OSUMm" if isinstance(dtype, np.dtype) else isinstance(dtype, type)


def _package(node: Any) -> str:
    return type(node).__module__.partition(".")[0]


def check_broadcasts(where: str, what: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raises an error if an array does not broadcast against a parameter of this shape."""
    sizes = np.shape(array)
    pairs = zip(reversed(sizes), reversed(shape), strict=False)
    if len(sizes) > len(shape) or any(size not in (1, of_param) for size, of_param in pairs):
        raise ValueError(
            f"{where}: {what} is an array of shape {sizes}, which does not broadcast against the parameter's shape "
            f"{shape}. Give an array of shape {shape}, where axes may have size 1, or one number."
        )


def warn_of_aliases(where: str, leaves: Sequence[tuple[str, Any]]) -> None:
    """Warns if one array occurs twice in a tree: each occurrence would get its own update and its own decay."""
    paths: dict[int, list[str]] = {}
    for path, leaf in leaves:
        if isinstance(leaf, (jax.Array, np.ndarray)):
            paths.setdefault(id(leaf), []).append(path)
    tied = [" and ".join(map(repr, same[:3])) for same in paths.values() if len(same) > 1]
    if tied:
        more = f" (and {len(tied) - 1} more such arrays)" if len(tied) > 1 else ""
        checks.warn(
            f"{where}: {tied[0]} are one array{more}. As separate parameters, each gets its own update and decay, and "
            "they differ after the first step. To keep them tied, put the array into params once: in NNX share the "
            "Variable and take nnx.state(model, nnx.Param), in Equinox use eqx.nn.Shared. To let them only start "
            "equal, copy it."
        )
