"""`nnx.as_pure`, also for Flax 0.12.1, which makes only dictionaries of a State."""

from typing import Any

from flax import nnx


def as_pure(state: Any) -> Any:
    """A State with its Variables replaced by their arrays."""
    return nnx.as_pure(state) if hasattr(nnx, "as_pure") else nnx.State(nnx.to_pure_dict(state))
