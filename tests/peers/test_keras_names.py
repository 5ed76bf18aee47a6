"""The names of Keras models, on its JAX backend: a list of variables is a tree of parameters with Keras' own paths."""

import os
from typing import Any

import jax
import numpy as np
import pytest
from peer import peer

import wdjax
from wdjax import by_path, weights_only
from wdjax.paths import canonical_paths

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported.
keras = peer("keras")
if keras.backend.backend() != "jax":
    pytest.skip("KERAS_BACKEND is another one", allow_module_level=True)

pytestmark = pytest.mark.peers

DECAYS = {"net/dense/kernel": True, "net/dense/bias": False, "net/norm/gamma": False, "net/norm/beta": False}


def model(*layers: Any) -> Any:
    return keras.Sequential([keras.Input((8,)), *layers], name="net")


def variables() -> list[Any]:
    return model(keras.layers.Dense(4, name="dense"), keras.layers.LayerNormalization(name="norm")).trainable_variables


def test_variables_in_a_list_have_their_own_paths() -> None:
    found = variables()
    assert canonical_paths(found) == list(DECAYS)
    assert canonical_paths({"net": [found[0]]}) == ["net/net/dense/kernel"]
    # A key of a dictionary is a name already.
    assert canonical_paths({"a": found[0]}) == ["a"]
    assert weights_only().mask(found) == list(DECAYS.values())
    assert by_path({"kernel": 0.1, "norm": 0.2}, default=0.0).values(found) == [0.1, 0.0, 0.2, 0.2]
    plan = wdjax.plan(found, 0.1, weights_only())
    assert {row.path: row.decays for row in plan} == DECAYS
    by_mask = wdjax.plan(found, 0.1, weights_only().mask(found))  # A list of booleans, which has no paths.
    assert {row.path: row.decays for row in by_mask} == DECAYS


def test_the_mask_of_the_variables_is_that_of_their_values() -> None:
    found = variables()
    optimizer = wdjax.decoupled_decay(0.5, weights_only().mask(found))
    by_name = wdjax.decoupled_decay(0.5, weights_only())
    values, named = [v.value for v in found], {v.path: v.value for v in found}
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, values), optimizer.init(values), values)
    same, _ = by_name.update(jax.tree.map(np.zeros_like, named), by_name.init(named), named)
    expected = [0.5 * np.asarray(v) * decays for v, decays in zip(found, DECAYS.values(), strict=True)]
    for update, of_name, right in zip(updates, [same[v.path] for v in found], expected, strict=True):
        np.testing.assert_array_equal(update, right)
        np.testing.assert_array_equal(of_name, right)


def test_what_to_pass_instead() -> None:
    remedy = r"{v\.path: v\.value for v in model\.trainable_variables}"
    with pytest.raises(TypeError, match=rf"adamw: params must be .*got a keras\.Variable.*Pass {remedy}"):
        wdjax.adamw(0.1, 0.1).init(variables())
    with pytest.raises(TypeError, match=rf"l2_penalty: params must be .*got a keras\.Variable.*Pass {remedy}"):
        wdjax.l2_penalty(variables(), 0.1)
    with pytest.raises(ValueError, match=rf"all names are numbers.*From a Keras model, pass {remedy}"):
        weights_only().mask([v.value for v in variables()])


def test_a_path_that_keras_repeats() -> None:
    def block(units: int) -> Any:
        return keras.layers.Dense(units, name="same")

    found = [*model(block(4)).trainable_variables, *model(block(4)).trainable_variables]
    with pytest.raises(
        ValueError, match=r"path 'net/same/kernel': those at \[0\] and \[2\]\. 1 more .*name the layers"
    ):
        weights_only().mask(found)
