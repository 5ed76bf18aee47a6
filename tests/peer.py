"""The import of a library whose own code the tests run beside wdjax: the extra `peers` of pyproject.toml."""

import importlib
import os
import warnings
from typing import Any

import pytest


def peer(name: str) -> Any:
    """The module of this name. If it does not import, the tests of the file are skipped.

    With PEERS=required in the environment it must import, so that a run that is meant to have it skips nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of libraries that nobody maintains any more, and of their own imports.
        try:
            return importlib.import_module(name)
        except Exception as error:  # Such a library may miss anything in the newest JAX, not only a module.
            if os.environ.get("PEERS") == "required":
                raise
            pytest.skip(f"{name} does not import: {type(error).__name__}: {error}", allow_module_level=True)


def peer_timm() -> Any:
    """timm, also beside a PyTorch without CUDA, where PyPI's torchvision can't load its operators. timm needs none."""
    torch = peer("torch")
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass  # timm then does not import either.
    except RuntimeError:
        _OPERATORS.append(library := torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return peer("timm")


_OPERATORS: list[Any] = []  # They are defined as long as their library exists.
