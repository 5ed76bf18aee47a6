"""Bad input: each mistake gets an error that names the function, the value and the call to write instead."""

import dataclasses
import functools
import inspect
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import Row, every_anchored, every_rated, every_row

import wdjax
from wdjax import testing

PARAMS = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


def where(row: Row) -> str:
    """The function that an error of this row must name."""
    name = row.name.removeprefix("cautious[").rstrip("]") if row.name.startswith("cautious") else row.name
    return name.partition("[")[0]


IN_LOSS: dict[str, Callable[..., Any]] = {
    "l2_penalty": lambda rate, mask=None, toward=None: wdjax.l2_penalty(PARAMS, rate, mask, toward=toward),
    "penalty": lambda rate, mask=None, toward=None: wdjax.penalty(PARAMS, wdjax.L2(), rate, mask, toward=toward),
}
RECIPES = [wdjax.sgd_l2, wdjax.sgdw, wdjax.adam_l2, wdjax.adamw]

BAD_RATES = [
    (-0.1, ValueError, "must be finite and not negative, got -0.1"),
    (float("nan"), ValueError, "must be finite and not negative, got nan"),
    (float("inf"), ValueError, "must be finite and not negative, got inf"),
    (np.float32(-1), ValueError, "must be finite and not negative, got -1.0"),
    (jnp.array(-2.0), ValueError, "must be finite and not negative, got -2.0"),
    (jnp.ones(3), ValueError, "must be a scalar, got an array of shape (3,)"),
    (np.ones((2, 1)), ValueError, "must be a scalar, got an array of shape (2, 1)"),
    (
        "0.1",
        TypeError,
        "must be a number, a 0-d array, a schedule (a function of the step) or a by_path table of these",
    ),
    (None, TypeError, "got None"),
    (True, TypeError, "must be a rate, got True"),
    (1j, TypeError, "got 1j"),
    (np.complex64(1), TypeError, "must be a real number"),
    (jnp.array(True), TypeError, "must be a real number"),
    (np.array("a"), TypeError, "must be a real number, got array('a', dtype='<U1')"),
    (np.array(0.1, object), TypeError, "must be a real number, got array(0.1, dtype=object)"),
    (10**400, ValueError, "must be finite and not negative, got inf"),
    (float, TypeError, "must be a number, a 0-d array, a schedule"),
    (wdjax.only("bias"), TypeError, " a mask"),
]


@every_rated
@pytest.mark.parametrize(("rate", "error", "words"), BAD_RATES, ids=[repr(rate) for rate, *_ in BAD_RATES])
def test_rates_are_refused_where_they_are_given(row: Row, rate: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)) as caught:
        row.build(rate)
    assert str(caught.value).startswith(f"{where(row)}: ")
    assert "Write " in str(caught.value)


@pytest.mark.parametrize("name", IN_LOSS)
@pytest.mark.parametrize(("rate", "error", "words"), BAD_RATES, ids=[repr(rate) for rate, *_ in BAD_RATES])
def test_rates_are_refused_in_the_loss(name: str, rate: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)) as caught:
        IN_LOSS[name](rate)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("array", "shown"),
    [
        (np.array(["a"]), "an array of shape (1,) and dtype <U1"),
        (np.array([b"a"]), "an array of shape (1,) and dtype |S1"),
        (np.array([[0.1, None]]), "an array of shape (1, 2) and dtype object"),
        (np.array("2026", "datetime64"), "array('2026', dtype='datetime64[Y]')"),
        (jnp.ones(3, complex), "an array of shape (3,) and dtype complex64"),
        (jax.random.split(jax.random.key(0)), "an array of shape (2,) and dtype key<fry>"),
    ],
)
def test_arrays_that_hold_no_rates(array: Any, shown: str) -> None:
    at = {"Dense_0": {"kernel": array, "bias": 0.1}}
    for name, build in (
        ("by_path: a value of the table", lambda: wdjax.by_path({"kernel": array}, default=0.1)),
        ("add_l2_to_grads: weight_decay at 'Dense_0/kernel'", lambda: wdjax.add_l2_to_grads(at)),
        ("plan: weight_decay at 'Dense_0/kernel'", lambda: wdjax.plan(PARAMS, at)),
    ):
        with pytest.raises(TypeError, match=rf"^{re.escape(f'{name} must be a real number, got {shown}.')} Write "):
            build()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_recipes_refuse_what_their_decay_refuses(recipe: Any) -> None:
    with pytest.raises(ValueError, match=r"must be finite and not negative, got -0\.1"):
        recipe(0.1, -0.1)
    with pytest.raises(ValueError, match="'bais' matches no parameter"):
        recipe(0.1, 0.1, wdjax.only("bais")).init(PARAMS)
    with pytest.raises(TypeError, match=rf"{recipe.__name__}\(\) has no argument 'wd' \(given 0\.1\)"):
        recipe(0.1, wd=0.1)


@pytest.mark.parametrize("learning_rate", [-0.1, float("nan"), jnp.ones(2)])
def test_learning_rates_are_refused_too(learning_rate: Any) -> None:
    for build in (
        lambda: wdjax.proximal_step(wdjax.L2(), 0.1, learning_rate=learning_rate),
        lambda: wdjax.with_decoupled_decay(optax.adam(0.1), 0.1, learning_rate=learning_rate),
    ):
        with pytest.raises(ValueError, match="learning_rate must be"):
            build()
    with pytest.raises(TypeError, match=r"missing .*learning_rate"):
        wdjax.with_decoupled_decay(optax.adam(0.1), 0.1)  # pyright: ignore[reportCallIssue]


def test_a_traced_rate_is_checked_for_its_shape() -> None:
    with pytest.raises(ValueError, match=r"must be a scalar, got an array of shape \(3,\)"):
        jax.jit(lambda rate: wdjax.decoupled_decay(rate).init(PARAMS))(jnp.ones(3))


ARRAY_AS_A_FACTOR = (
    r"Let the schedule return one number, and multiply it by the array: "
    r"weight_decay=schedule \* by_path\(\{'embedding': array\}, default=1\.0\)\."
)
A_SCHEDULE = r"Write weight_decay=lambda count: 0\.1 / \(1 \+ count\)"


@pytest.mark.parametrize(
    ("schedule", "error", "words"),
    [
        (
            lambda count: jnp.ones(2),
            ValueError,
            rf"must be a scalar, got .* shape \(2,\)\. {ARRAY_AS_A_FACTOR}",
        ),
        (lambda count: np.ones((2, 1)), ValueError, rf"must be a scalar, .* \(2, 1\)\. {ARRAY_AS_A_FACTOR}"),
        (lambda count: -0.1, ValueError, rf"must be finite and not negative, got -0\.1\. {A_SCHEDULE}"),
        (
            lambda count: optax.constant_schedule(0.1),
            TypeError,
            rf"must be a number or a 0-d array, got <function .*>\. {A_SCHEDULE}",
        ),
        (lambda count: "fast", TypeError, rf"must be a number or a 0-d array, got 'fast'\. {A_SCHEDULE}"),
    ],
)
def test_a_schedule_that_gives_no_rate(schedule: Any, error: type[Exception], words: str) -> None:
    optimizer = wdjax.decoupled_decay(schedule)
    with pytest.raises(error, match=rf"^decoupled_decay: the value of the schedule weight_decay {words}"):
        jax.jit(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_an_array_as_a_factor_of_a_schedule() -> None:
    """What the error says to write."""
    optimizer = wdjax.add_l2_to_grads(
        optax.constant_schedule(0.1) * wdjax.by_path({"bias": jnp.arange(3.0)}, default=1.0)
    )
    updates, _ = jax.jit(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["Dense_0"]["bias"], 1 + 0.1 * np.arange(3), rtol=1e-6)


MASKS_AS_NUMBERS = (wdjax.weights_only(), wdjax.only("kernel"), {"Dense_0": {"kernel": True, "bias": False}})


@pytest.mark.parametrize("mask", MASKS_AS_NUMBERS, ids=["weights_only", "only", "a tree"])
def test_a_mask_in_the_place_of_a_radius_or_a_strength(mask: Any) -> None:
    """Both orders are easily mixed up: the error shows the call with the mask by name."""
    ball, l1 = wdjax.L2Ball(per=-1), wdjax.L1()
    for build, words in (
        (
            lambda: wdjax.constrain(ball, mask),
            "constrain: a mask was given as radius. Write constrain(L2Ball(per=-1), radius=1.0, mask=...).",
        ),
        (
            lambda: wdjax.constrain(ball, mask, 2.0),
            "constrain: a mask was given as radius. Write constrain(L2Ball(per=-1), radius=1.0, mask=...).",
        ),
        (
            lambda: wdjax.proximal_step(l1, mask, learning_rate=0.1),
            "proximal_step: a mask was given as strength. "
            "Write proximal_step(L1(), strength=0.1, mask=..., learning_rate=...).",
        ),
        (
            lambda: wdjax.add_penalty_to_grads(l1, mask),
            "add_penalty_to_grads: a mask was given as strength. "
            "Write add_penalty_to_grads(L1(), strength=0.1, mask=...).",
        ),
        (
            lambda: wdjax.penalty(PARAMS, l1, mask),
            "penalty: a mask was given as strength. Write penalty(params, L1(), strength=0.1, mask=...).",
        ),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(words)}$"):
            build()


def test_a_schedule_in_the_loss() -> None:
    with pytest.raises(
        TypeError, match=r"l2_penalty: weight_decay is a function, .*l2_penalty\(params, schedule\(step\)\)"
    ):
        wdjax.l2_penalty(PARAMS, optax.constant_schedule(0.1))


BAD_MASKS = [
    ("no_decay", TypeError, "the mask is 'no_decay', which is not a boolean. For a mask by name write mask=only("),
    (
        {"Dense_0": {"kernel": 0.5, "bias": 0.0}},
        TypeError,
        "which is not a boolean. Put multipliers in the rate: weight_decay=",
    ),
    ({"Dense_0": {"kernel": 1, "bias": 0}}, TypeError, "the mask at 'Dense_0/bias' is 0, which is not a boolean"),
    ({"Dense_0": "decay"}, TypeError, "the mask at 'Dense_0' is 'decay', which is not a boolean"),
    (0.5, TypeError, "the mask is 0.5, which is not a boolean"),
    ({"Dense_0": {"kernel": True}}, ValueError, "It lacks 'Dense_0/bias'."),
    ({"Dense_1": True}, ValueError, "It lacks 'Dense_0/bias', 'Dense_0/kernel', and params lack 'Dense_1'."),
    ({"Dense_0": True, "Dense_1": True}, ValueError, "Params lack 'Dense_1'."),
    (
        {"Dense_0": {"kernel": {"w": True}, "bias": True}},
        ValueError,
        "It lacks 'Dense_0/kernel', and params lack 'Dense_0/kernel/w'.",
    ),
    (
        {"Dense_0": {"kernel": np.ones((3, 2), bool), "bias": True}},
        ValueError,
        "the mask at 'Dense_0/kernel' is an array of shape (3, 2), which does not broadcast against the parameter's",
    ),
    (lambda params: "no_decay", TypeError, "the mask is 'no_decay'"),
    (True, TypeError, "the mask is True, one boolean for the whole tree. Leave it out to decay all"),
    (False, TypeError, "optax.inject_hyperparams takes a mask function for a schedule"),
    (lambda leaf: leaf.ndim > 1, TypeError, "It gets the whole tree: write lambda params: jax.tree.map("),
    (lambda params: {"Dense_0": {"kernel": True}}, ValueError, "It lacks 'Dense_0/bias'."),
    (wdjax.only("kernal"), ValueError, "the pattern 'kernal' matches no parameter. Did you mean 'kernel'?"),
]


@every_row
@pytest.mark.parametrize(("mask", "error", "words"), BAD_MASKS, ids=[str(i) for i in range(len(BAD_MASKS))])
def test_masks_are_refused_at_init_and_at_update(row: Row, mask: Any, error: type[Exception], words: str) -> None:
    state = row.build(0.1).init(PARAMS)
    for call in (
        lambda: row.build(0.1, mask).init(PARAMS),
        lambda: row.build(0.1, mask).update(PARAMS, state, PARAMS),
    ):
        with pytest.raises(error, match=re.escape(words)) as caught:
            call()
        assert str(caught.value).startswith(f"{where(row)}: ")


@pytest.mark.parametrize("name", IN_LOSS)
@pytest.mark.parametrize(("mask", "error", "words"), BAD_MASKS, ids=[str(i) for i in range(len(BAD_MASKS))])
def test_masks_are_refused_in_the_loss(name: str, mask: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        IN_LOSS[name](0.1, mask)


def test_a_traced_mask() -> None:
    def init(flag: Any) -> Any:
        return wdjax.decoupled_decay(0.1, {"Dense_0": flag}).init(PARAMS)

    with pytest.raises(TypeError, match=r"the mask at 'Dense_0' is traced\. A mask must be known during tracing"):
        jax.jit(init)(jnp.array(True))


BAD_ANCHORS = [
    (
        "start",
        "toward must be None (zero), a tree like params, 'init', EMA(...), or a table by path of these and 0.0, got ",
    ),
    (
        {"Dense_0": {"kernel": jnp.ones((2, 3))}},
        "toward must be a tree like params. It lacks 'Dense_0/bias'. For zero write 0.0: toward={..., 'Dense_0': {",
    ),
    ({"Dense_0": {**PARAMS["Dense_0"], "scale": jnp.ones(1)}}, "Params lack 'Dense_0/scale'. Write"),
    ({"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}}, "toward has shape (3, 2) at 'Dense_0/kernel'"),
    (
        {"Dense_0": 0.5},
        "toward is 0.5 at 'Dense_0', where params have more. Give an array for each parameter, or 0.0 for zeros.",
    ),
    ({"Dense_0": {"kernel": 0.0, "bias": -1}}, "toward is -1 at 'Dense_0/bias', where params have an array."),
    (0.5, "toward is 0.5 alone, where params have more."),
    ({"Dense_0": 0.0, "Dense_1": 0.0}, "Params lack 'Dense_1'"),
    ({"Dense_1": 0.0}, "It lacks 'Dense_0/bias', 'Dense_0/kernel', and params lack 'Dense_1'. Write"),
    ({"Dense_0": None}, "It lacks 'Dense_0/bias', 'Dense_0/kernel'"),
    ({"Dense_0": False}, "toward is False at 'Dense_0', where params have more."),
    (jnp.ones(3), "toward is an array of shape (3,) alone, where params have more."),
    ({"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": False}}, "toward has shape () at 'Dense_0/bias'"),
    (
        {"Dense_0": {"kernel": jnp.ones((2, 3), jnp.int8), "bias": 0.0}},
        "toward is int8 at 'Dense_0/kernel', but the parameter is float32. Convert it: a.astype(p.dtype).",
    ),
    ({"Dense_0": {"kernel": jnp.ones((2, 3), jnp.complex64), "bias": 0.0}}, "toward is complex64 at 'Dense_0/kernel'"),
]


@every_anchored
@pytest.mark.parametrize(("toward", "words"), BAD_ANCHORS, ids=[str(i) for i in range(len(BAD_ANCHORS))])
def test_anchors_of_another_structure_or_shape(row: Row, toward: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        row.build(0.1, toward=toward).init(PARAMS)
    assert str(caught.value).startswith(f"{where(row)}: ")
    assert "toward='init'" in str(caught.value)


def test_a_state_without_the_anchor() -> None:
    state = wdjax.decoupled_decay(0.1).init(PARAMS)
    with pytest.raises(ValueError, match=r"toward='init', but the state holds no anchor.*optimizer\.init\(params\)"):
        wdjax.decoupled_decay(0.1, toward="init").update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("name", IN_LOSS)
def test_a_loss_has_no_init(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: toward='init' needs a state.*toward=initial_params"):
        IN_LOSS[name](0.1, toward="init")


FUNCTIONS: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (wdjax.l2_penalty, (PARAMS, 0.1)),
    (wdjax.penalty, (PARAMS, wdjax.L2(), 0.1)),
    (wdjax.add_l2_to_grads, (0.1,)),
    (wdjax.add_penalty_to_grads, (wdjax.L2(), 0.1)),
    (wdjax.decoupled_decay, (0.1,)),
    (wdjax.independent_decay, (0.1,)),
    (wdjax.cautious, (wdjax.decoupled_decay(0.1),)),
    (wdjax.proximal_step, (wdjax.L2(), 0.1)),
    (wdjax.with_decoupled_decay, (optax.adam(0.1), 0.1)),
    *((recipe, (0.1, 0.1)) for recipe in RECIPES),
]


@pytest.mark.parametrize(("function", "args"), FUNCTIONS, ids=[f.__name__ for f, _ in FUNCTIONS])
def test_an_unknown_keyword(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError) as caught:
        function(*args, masks="bias")
    message = str(caught.value)
    assert message.startswith(f"{function.__name__}() has no argument 'masks' (given 'bias').")
    assert f"Write {function.__name__}(" in message
    if function is not wdjax.cautious:
        assert "Did you mean mask=...?" in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("wd", "weight_decay"),
        ("l2", "weight_decay"),
        ("lr", "learning_rate"),
        ("weight_decay_mask", "mask"),
        ("anchor", "toward"),
    ],
)
def test_what_people_call_it_elsewhere(wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=rf"adamw\(\) has no argument '{wrong}' .*Did you mean {right}=\.\.\.\?"):
        wdjax.adamw(**{wrong: 0.1})  # pyright: ignore[reportCallIssue]


def test_a_missing_argument() -> None:
    with pytest.raises(TypeError, match=r"adamw\(\): missing a required argument: 'weight_decay'\. Write adamw\(learn"):
        wdjax.adamw(1e-3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"sgdw\(\): too many positional arguments\. Write sgdw\(learning_rate, weight"):
        wdjax.sgdw(0.1, 0.1, None, 0.9)  # pyright: ignore[reportCallIssue]


def test_unknown_keywords_of_rules_and_assertions() -> None:
    with pytest.raises(TypeError, match=r"by_path\(\) has no argument 'defualt' .*Did you mean default="):
        wdjax.by_path({"a": 0.1}, defualt=0.0)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"only\(\) has no argument 'pattern'"):
        wdjax.only(pattern="a")  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"assert_only_decays\(\) has no argument 'masks' .*Did you mean mask="):
        testing.assert_only_decays(optax.sgd(0.1), PARAMS, 0.1, masks=None)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("optimizer", [optax.adamw(0.1), wdjax.adamw(0.1, 0.1), optax.sgd(0.1)])
def test_cautious_of_a_whole_optimizer(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"cautious: decay must be a wdjax decay, not an optimizer.*optax\.chain\("):
        wdjax.cautious(optimizer).init(PARAMS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    """Leaves with the names of those in a dictionary, and something that is no leaf."""

    a: Any
    b: Any
    name: str = dataclasses.field(default="one", metadata={"static": True})


class Named(NamedTuple):
    a: Any
    b: Any


SGD = optax.sgd(0.1)
ONE, TWO = np.ones(1), np.ones(2)  # NumPy arrays of their own in each tree, which would be aliases otherwise.
AB: dict[str, Any] = {"a": ONE, "b": TWO}
CONTAINERS = [
    ([ONE, TWO], (ONE, TWO), "at the root, updates have a list and params a tuple."),
    ({"x": [ONE, TWO]}, {"x": (ONE, TWO)}, "at 'x', updates have a list and params a tuple."),
    ([[ONE, [TWO]]], [[ONE, (TWO,)]], "at '0/1', updates have a list and params a tuple."),
    (OrderedDict(AB), AB, "at the root, updates have a collections.OrderedDict and params a dict."),
    (defaultdict(list, AB), AB, "at the root, updates have a collections.defaultdict and params a dict."),
    ({"x": Pair(**AB)}, {"x": AB}, "at 'x', updates have a test_bad_input.Pair and params a dict."),
    ({"x": AB}, {"x": Named(**AB)}, "at 'x', updates have a dict and params a test_bad_input.Named."),
    (
        {"x": OrderedDict(b=TWO, a=ONE)},
        {"x": OrderedDict(a=ONE, b=TWO)},
        "at 'x', updates have the keys in the order ['b', 'a'] and params in the order ['a', 'b'] (JAX sorts a plain",
    ),
    (
        [Pair(**AB, name="two")],
        [Pair(**AB)],
        "at '0', the static fields ['name'] of a test_bad_input.Pair differ. Make both from one tree",
    ),
]


@pytest.mark.parametrize(("updates", "params", "words"), CONTAINERS, ids=[str(i) for i in range(len(CONTAINERS))])
def test_updates_in_other_containers(updates: Any, params: Any, words: str) -> None:
    nothing = wdjax.by_path({}, default=False)
    for where, optimizer in (("decoupled_decay", wdjax.decoupled_decay(0.1)), ("freeze", wdjax.freeze(SGD, nothing))):
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            optimizer.update(updates, optimizer.init(params), params)
        assert str(caught.value).startswith(f"{where}: updates and params have the same paths in different containers")


def test_updates_with_other_paths() -> None:
    blocks = {f"block_{i}": {"kernel": np.ones(i + 1), "bias": np.ones(i + 1)} for i in range(12)}
    optimizer = wdjax.decoupled_decay(0.1)
    state = optimizer.init(blocks)
    with pytest.raises(
        ValueError, match=re.escape("structure. Only in params: 'block_11/bias', 'block_11/kernel'. Pass")
    ):
        optimizer.update({name: block for name, block in blocks.items() if name != "block_11"}, state, blocks)
    words = "Only in updates: 'w'. Only in params: 'block_{0..11}/bias', 'block_{0..11}/kernel'. Pass"
    with pytest.raises(ValueError, match=re.escape(words)):
        optimizer.update({"w": np.ones(1)}, state, blocks)
    words = "It lacks 'block_{0..11}/bias', 'block_{0..11}/kernel', and params lack 'w'. Build"
    with pytest.raises(ValueError, match=re.escape(words)):
        wdjax.decoupled_decay(0.1, {"w": True}).init(blocks)
    letters = {letter: np.ones(1) for letter in "abcdefgh"}
    words = "It lacks 'a', 'b', 'c', 'd', 'e' and 3 more, and params lack 'w'. Build"
    with pytest.raises(ValueError, match=re.escape(words)):
        wdjax.decoupled_decay(0.1, {"w": True}).init(letters)


@pytest.mark.parametrize("decay", [0.1, None, wdjax.decoupled_decay, optax.sgd])
def test_cautious_of_what_is_no_decay(decay: Any) -> None:
    with pytest.raises(
        TypeError, match=r"cautious: decay must be a gradient transformation, got .*decoupled_decay\(0\.1"
    ):
        wdjax.cautious(decay)


def test_the_learning_rate_of_a_recipe_is_one_number() -> None:
    for recipe in (wdjax.adamw, wdjax.sgdw):
        with pytest.raises(TypeError, match=rf"^{recipe.__name__}: learning_rate must be a number"):
            recipe({"kernel": 0.1}, 0.1)


# What newcomers hand in as params. What the libraries hand out is in test_frameworks.py.


@dataclasses.dataclass
class State:
    """A training state of one's own."""

    params: Any
    opt_state: Any


class Tensor:
    """What is refused is known by its package."""

    __module__ = "torch"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TreeState(State):
    """A training state that is a tree."""


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "decoupled_decay": lambda params: wdjax.decoupled_decay(0.1).init(params),
    "add_l2_to_grads": lambda params: wdjax.adam_l2(0.1, 0.1).init(params),
    "adamw": lambda params: wdjax.adamw(0.1, 0.1).init(params),
    "sgdw": lambda params: wdjax.sgdw(0.1, 0.1).init(params),
    "with_decoupled_decay": lambda params: wdjax.with_decoupled_decay(optax.adam(0.1), 0.1, learning_rate=0.1).init(
        params
    ),
    "monitor": lambda params: wdjax.monitor(optax.adam(0.1)).init(params),
    "freeze": lambda params: wdjax.freeze(optax.adam(0.1), wdjax.only("kernel")).init(params),
    "in_float32": lambda params: wdjax.in_float32(optax.adam(0.1)).init(params),
    "compensated": lambda params: wdjax.compensated().init(params),
    "decoupled_lora_decay": lambda params: wdjax.decoupled_lora_decay(0.1).init(params),
    "l2_penalty": lambda params: wdjax.l2_penalty(params, 0.1),
    "penalty": lambda params: wdjax.penalty(params, wdjax.L2(), 0.1),
    "plan": wdjax.plan,
    "audit": lambda params: wdjax.audit(wdjax.adamw(0.1, 0.1), params),
    "assert_only_decays": lambda params: testing.assert_only_decays(optax.sgd(0.1), params, 0.0),
    "Rules.mask": lambda params: wdjax.weights_only(unknown=True).mask(params),
    "Rules.values": lambda params: wdjax.by_path({}, default=0.1).values(params),
}
ARRAYS = (
    "Pass the arrays of a model: model.init(key, inputs)['params'] in Linen, nnx.state(model, nnx.Param) in NNX, eqx"
)
NO_PARAMS: dict[str, tuple[Callable[[], Any], str]] = {
    "a state": (lambda: State(PARAMS, None), "got a test_bad_input.State. Pass state.params."),
    "a tree state": (lambda: TreeState(PARAMS, 1.0), "got a test_bad_input.TreeState of 2 arrays. Pass state.params."),
    "a saved state": (lambda: {"params": PARAMS, "opt_state": 1}, "got a dict of 2 arrays. Pass state['params']."),
    "an optimizer's state": (
        lambda: optax.adam(0.1).init(PARAMS),
        "got an optax.ScaleByAdamState of 5 arrays at '0'. Pass the parameters that optimizer.init got, not its state.",
    ),
    "a decay's state": (
        lambda: wdjax.decoupled_decay(0.1).init(PARAMS),
        "got a wdjax.DecayState of 1 array. Pass the parameters that optimizer.init got, not its state.",
    ),
    "tensors": (
        lambda: {"weight": Tensor()},
        "got a torch.Tensor at 'weight'. Convert them: {name: jnp.asarray(x.detach().numpy()) for name, x in model.sta",
    ),
    "a list of tensors": (lambda: [Tensor()], "got a torch.Tensor at '0'. Convert them:"),
    "a gradient of an integer": (
        lambda: {"w": np.zeros(2, jax.dtypes.float0)},
        "got an array of shape (2,) at 'w'. It is the gradient of an integer. Pass the parameters, not their",
    ),
    "a generator": (lambda: (x for x in [1.0]), f"got a generator. {ARRAYS}"),
    "a text": (lambda: "params", f"got 'params'. {ARRAYS}"),
    "a function": (lambda: np.tanh, f"got <ufunc 'tanh'>. {ARRAYS}"),
    "a class": (lambda: State, f"got <class 'test_bad_input.State'>. {ARRAYS}"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("given", NO_PARAMS)
def test_what_is_no_tree_of_parameters(entry: str, given: str) -> None:
    make, words = NO_PARAMS[given]
    with pytest.raises(TypeError) as caught:
        ENTRIES[entry](make())
    message = str(caught.value)
    assert message.startswith(f"{entry}: params must be a tree of parameters, got ")
    assert words in message


WHOLE = {"kernel": np.ones((2, 2)), "activation": np.tanh, "name": "x", "size": 3}


@pytest.mark.parametrize("entry", ENTRIES)
def test_functions_and_names_in_a_model(entry: str) -> None:
    if entry in ("l2_penalty", "penalty", "plan", "Rules.mask"):  # A gradient and a rule may be of a whole model.
        assert ENTRIES[entry](WHOLE) is not None
    elif entry == "Rules.values":
        assert ENTRIES[entry](WHOLE)["kernel"] == 0.1
    else:
        with pytest.raises(
            TypeError, match=rf"{entry}: params must be .*, got <ufunc 'tanh'> at 'activation'\. Pass the"
        ):
            ENTRIES[entry](WHOLE)


def test_toward_is_a_tree_of_parameters_too() -> None:
    for toward, words in ((State(PARAMS, None), "got a test_bad_input.State. Pass state.params."), (np.tanh, ARRAYS)):
        for build in (
            wdjax.decoupled_decay,
            functools.partial(wdjax.adamw, 0.1),
            functools.partial(wdjax.l2_penalty, PARAMS),
        ):
            with pytest.raises(TypeError, match=f"toward must be a tree of parameters, .*{re.escape(words)}"):
                build(0.1, toward=toward)
    shapes = wdjax.decoupled_decay(0.1, toward=jax.eval_shape(lambda: PARAMS))
    state = jax.eval_shape(shapes.init, PARAMS)  # The shapes of a state may be asked of shapes.
    with pytest.raises(TypeError, match="toward holds shapes without values"):
        shapes.update(PARAMS, state, PARAMS)


# No error prints the numbers of arrays.

LARGE = {f"layer_{i}": {"kernel": np.full((40, 40), 1.2345678, np.float32), "bias": np.ones(3)} for i in range(12)}
GIVEN = {
    "params": PARAMS,
    "updates": PARAMS,
    "weight_decay": 0.1,
    "strength": 0.1,
    "learning_rate": 0.1,
    "kind": wdjax.L2(),
    "optimizer": optax.sgd(0.1),
    "decay": wdjax.decoupled_decay(0.1),
    "mask": wdjax.only("kernel"),
    "opt_state": wdjax.monitor(optax.sgd(0.1)).init(PARAMS),
    "rules": {"kernel": 0.1},
    "expected": 0.0,
}
OF_TESTING = (testing.assert_only_decays, testing.assert_audit)
EVERY = [f for f in vars(wdjax).values() if inspect.isfunction(f)]
ARGUMENTS = [(f, name) for f in (*EVERY, *OF_TESTING) for name in inspect.signature(f).parameters if name != "options"]
# Where such a tree may be meant, where all that counts is whether it is empty, and what is not looked at here.
TAKEN = {"params", "nesterov", "full_size", "extra_args", "call_kwargs", "steps"}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:plan")
@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=[f"{f.__name__}-{name}" for f, name in ARGUMENTS])
def test_no_error_prints_arrays(function: Any, name: str) -> None:
    parameters = inspect.signature(function).parameters
    is_variadic = parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
    needed = [n for n, p in parameters.items() if p.default is p.empty and n in GIVEN and n != name]
    for large in (LARGE, list(LARGE.values()), LARGE["layer_0"]["kernel"], jnp.asarray(LARGE["layer_0"]["kernel"])):
        given, message = {n: GIVEN[n] for n in needed} | ({} if is_variadic else {name: large}), ""
        try:
            made = function(*([large] * is_variadic), **given)
            if isinstance(made, optax.GradientTransformation):
                made.update(PARAMS, made.init(PARAMS), PARAMS)
            if isinstance(made, wdjax.Rules):
                assert "1.23" not in repr(made)
                made.values(PARAMS)
        except (TypeError, ValueError) as error:
            message = str(error)
        assert len(message) < 1000
        assert "1.23" not in message
        assert message or name in TAKEN or (function is wdjax.by_path and name == "default")
