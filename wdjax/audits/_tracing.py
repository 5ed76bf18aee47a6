"""The error of an optimizer that looks at the values of parameters, which the audit traces."""

import contextlib
import pathlib
import traceback
from collections.abc import Iterator

from .._engine.masks import NEEDS_VALUES

_LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "wdjax", "contextlib")


@contextlib.contextmanager
def values_are_unknown() -> Iterator[None]:
    """Says which function looks at values, in a sentence, instead of JAX's error.

    The audit could run such an optimizer without tracing, but a mask from the values of probes is not the user's.
    """
    try:
        yield
    except NEEDS_VALUES as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        codes = [frame.f_code for frame in frames if frame.f_globals["__name__"].split(".")[0] not in _LIBRARIES]
        who = f"{codes[-1].co_qualname} in {pathlib.Path(codes[-1].co_filename).name}" if codes else "it"
        raise TypeError(
            f"audit: the optimizer does not run under jax.jit: {who} looks at the values of arrays. A mask function "
            "may look at paths, shapes and dtypes. Or call it once and pass on its result: mask=mask(params)."
        ) from error
