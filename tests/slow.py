"""Parametrizes a test so that only a few representative values run by default. The others are marked slow."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(value: Any, **kwargs: Any) -> Any:
    """One value, marked slow."""
    return pytest.param(value, marks=pytest.mark.slow, **kwargs)


def slow_but(names: Iterable[str], *fast: str) -> list[Any]:
    """The names as parameters of a test, all marked slow except those in `fast`."""
    names = list(names)
    assert set(fast) <= set(names), fast
    return [name if name in fast else slow(name) for name in names]
