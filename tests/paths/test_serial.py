"""Rule sets in JSON and TOML: what comes back decides as what went in, and what can't be written is refused."""

import functools
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import wdjax
from wdjax import Rules, all_but, by_depth, by_path, by_width, only, weights_only

NET = {
    "embed": {"embedding": jnp.ones((9, 4))},
    "Block_0": {"Dense_0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "LayerNorm_0": {"scale": jnp.ones(4)}},
    "Block_1": {"Dense_0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "LayerNorm_0": {"scale": jnp.ones(4)}},
    "blocks": {"kernel": jnp.ones((3, 4, 4)), "gain": jnp.ones((3, 4))},
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}

RULES: dict[str, Rules] = {
    "only": only("kernel"),
    "several patterns": all_but("bias", "LayerNorm_*", re.compile(".*/gain")),
    "rates": by_path({"bias": 0.0, "embed/**": 1e-5, "head": 3}, default=0.1),
    "no default": by_path({"embed": "a", "Block_*": "b", "**": "c"}),
    "default alone": by_path({}, default=0.3),
    "texts that need escapes": by_path(
        {re.compile(r"(?:\w+/)+k\w{3}el"): 'say "decay"\n', "head": "über"}, default="\\"
    ),
    "flags": only(re.compile(".*KERNEL", re.IGNORECASE | re.DOTALL), re.compile("(?i)HEAD/.*")),
    "verbose": only(re.compile(".* / kernel  # the matrices", re.VERBOSE)),
    "regex": by_path([(r".*/kernel", 1.0), (r".*", 0.5)], syntax="regex"),
    "search": all_but("(?i)layernorm", "bias$", syntax="search"),
    "contains": all_but("bias", "LayerNorm_0.scale", syntax="contains"),
    "arrays": by_path({"head": jnp.array(0.5), "embed": np.float32(0.25)}, default=np.float64(1.0)),
    "booleans of NumPy": by_path({"head": np.bool_(True)}, default=np.bool_(False)),
    "times": 0.1 * by_path({"bias": 0.0}, default=2.0) * jnp.array(0.5) * 3,
    "depth": by_depth("Block_*", 0.75, first=("embed", re.compile("blocks/.*")), last="head"),
    "depth by a regular expression": by_depth(
        (re.compile(r"Block_(\d+)/.*", re.IGNORECASE), "Block_*/LayerNorm_*"), 0.5, last="**"
    ),
    "depth of a stack": by_depth("blocks", 0.5, first=only("embed"), last=("head", "Block_*"), axis=-0),
    "width": by_path({"blocks": 1.0}, default=by_width(2)),
    "width of a stack": by_path({"blocks": by_width(2, power=0.5, stacked_axes=1)}, default=1.0),
    "products": 0.1
    * by_depth("Block_*", 0.75, last="**")
    * by_path({"bias": 0.0}, default=1.0)
    * by_path({"blocks": 1.0}, default=by_width(2)),
    "weights": weights_only(stacked_axes={"blocks": 1}),
    "weights, said otherwise": weights_only(embeddings=False, unknown=False),
    "a rule set as a pattern": by_path({"gain": 0.0, (weights_only(), "head/bias"): 0.1}, default=0.0),
    "a rule set as a value": by_path(
        {"Block_*": by_path({"bias": 0.0}, default=0.25) * 2.0, "head": 0.0},
        default=by_depth("Block_*", 0.5, last="**"),
    ),
    "a rule set as a default": by_path({"gain": False}, default=weights_only()),
}
every_rules = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


def toml(value: Any) -> str:
    """A value as TOML writes it within a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def through_json(data: Any) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


def through_toml(data: Any) -> Any:
    return tomllib.loads(f"weight_decay = {toml(data)}")["weight_decay"]


def assert_plain(data: Any) -> None:
    assert type(data) in (bool, int, float, str, list, dict), data
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        assert_plain(item)
    assert not isinstance(data, dict) or all(type(key) is str for key in data)


def decisions(rules: Rules, params: Any = NET) -> list[Any]:
    return jax.tree.leaves(jax.tree.map(np.asarray, rules.values(params)))


@every_rules
@pytest.mark.parametrize("through", [through_json, through_toml])
def test_what_comes_back_decides_alike(rules: Rules, through: Any) -> None:
    data = rules.to_dict()
    assert_plain(data)
    assert through(data) == data
    twin = Rules.from_dict(through(data))
    assert type(twin) is type(rules)
    assert twin.to_dict() == data
    for one, other in zip(decisions(twin), decisions(rules), strict=True):
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=1e-7)
        else:
            np.testing.assert_array_equal(one, other)


@every_rules
def test_what_comes_back_is_written_alike(rules: Rules) -> None:
    written = repr(rules)
    if "Array(" not in written:  # An array comes back as a number.
        assert repr(Rules.from_dict(rules.to_dict())) == written


@pytest.mark.parametrize(
    "of",
    [
        lambda count: by_depth("blocks", 0.5, axis=count, last="**"),
        lambda count: by_width(2, stacked_axes=count),
        lambda count: weights_only(stacked_axes=count),
        lambda count: weights_only(stacked_axes={"blocks": count}),
    ],
)
def test_integers_of_numpy_are_written_as_integers(of: Callable[[Any], Rules]) -> None:
    assert_plain(of(np.int64(1)).to_dict())
    assert of(np.uint8(1)).to_dict() == of(1).to_dict()
    assert repr(of(np.int64(1))) == repr(of(1))


def test_the_cases_differ() -> None:
    assert len({json.dumps(rules.to_dict()) for rules in RULES.values()}) == len(RULES)


def test_what_is_written() -> None:
    rules = 0.1 * by_path(
        {"bias": 0, ("scale", re.compile(".*/w")): 0.5}, default=by_depth("Block_*", 0.75, last=("head", "norm"))
    )
    assert rules.to_dict() == {
        "by_path": {
            "rules": [
                {"match": "bias", "value": 0.0},
                {"match": ["scale", {"regex": ".*/w"}], "value": 0.5},
            ],
            "default": {"by_depth": {"blocks": "Block_*", "factor": 0.75, "last": ["head", "norm"]}},
        },
        "times": [0.1],
    }
    assert only(weights_only(), "gain").to_dict() == {
        "by_path": {
            "rules": [
                {
                    "match": [{"weights_only": {"embeddings": True, "unknown": "error", "stacked_axes": {}}}, "gain"],
                    "value": True,
                }
            ],
            "default": False,
        }
    }
    assert only("a", syntax="contains").to_dict()["by_path"]["rules"][0]["match"] == {"contains": "a"}
    assert by_width(2).to_dict() == {"by_width": {"base": 2.0, "power": 1.0, "stacked_axes": 0}}
    assert by_depth("b", 0.5, axis=-1).to_dict() == {"by_depth": {"blocks": "b", "factor": 0.5, "axis": -1}}


@pytest.mark.parametrize(
    ("text", "flags", "written"),
    [
        ("k", re.IGNORECASE, "(?i)k"),
        ("(?s)k", re.NOFLAG, "(?s)k"),
        ("(?s)k", re.IGNORECASE, "(?is)(?s)k"),
        ("k", re.DEBUG, "k"),  # It prints how it is compiled.
        ("k", re.DEBUG | re.MULTILINE, "(?m)k"),
        ("", re.NOFLAG, "(?:)"),  # The path of a bare array.
        ("", re.ASCII, "(?a)(?:)"),
    ],
)
def test_regular_expressions_are_written_with_their_flags(text: str, flags: re.RegexFlag, written: str) -> None:
    rules = only(re.compile(text, flags))
    assert rules.to_dict()["by_path"]["rules"][0]["match"] == {"regex": written}
    assert Rules.from_dict(rules.to_dict()).to_dict() == rules.to_dict()
    assert repr(rules) == f"by_path({{re.compile({written!r}): True}}, default=False)"


def test_a_person_may_write_it() -> None:
    text = """
    [weight_decay]
    times = [0.1, { by_depth = { blocks = "Block_*", factor = 0.5, last = "**" } }]

    [weight_decay.by_path]
    default = 1

    [[weight_decay.by_path.rules]]
    match = ["bias", { shell = "LayerNorm_*" }, { search = "^blocks" }]
    value = 0

    [[weight_decay.by_path.rules]]
    match = { regex = "head/.*" }
    value = { by_path = { rules = [], default = 2 } }
    """
    rules = Rules.from_dict(tomllib.loads(text)["weight_decay"])
    params = {name: branch for name, branch in NET.items() if name != "embed"}
    wanted = {"Block_0": 0.025, "Block_1": 0.05, "head": 0.2}
    values = rules.values(params)
    assert {name: round(values[name].get("Dense_0", values[name])["kernel"], 12) for name in wanted} == wanted
    assert values["blocks"] == {"kernel": 0.0, "gain": 0.0}
    update, _ = (decay := wdjax.decoupled_decay(rules)).update(params, decay.init(params), params)
    np.testing.assert_allclose(update["head"]["kernel"], 1.2, rtol=1e-6)


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        thing = self.param("thing", nn.initializers.ones, (4, 4))
        return nn.LayerNorm()(nn.Dense(4)(x @ thing))


def test_what_a_model_said_survives_without_the_model() -> None:
    x = jnp.ones((1, 4))
    params = Odd().init(jax.random.key(0), x)["params"]
    wdjax.paths.register_layer(Odd, weights=("thing",))
    rules = weights_only(Odd(), x)
    assert rules.mask(params)["thing"] is True
    fails("weights_only can't tell", lambda: weights_only().mask(params))  # Its name alone says nothing.
    for through in (through_json, through_toml):
        data = rules.to_dict()
        assert_plain(data)
        assert Rules.from_dict(through(data)).mask(params) == rules.mask(params)
    mixed = by_path({"Dense_0/bias": 0.2, rules: 0.1}, default=0.0)
    assert Rules.from_dict(through_toml(mixed.to_dict())).values(params) == mixed.values(params)
    model = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    of_equinox = weights_only(model)
    twin = Rules.from_dict(through_json(of_equinox.to_dict()))
    arrays = eqx.filter(model, eqx.is_array)
    assert jax.tree.leaves(twin.mask(arrays)) == jax.tree.leaves(of_equinox.mask(arrays))


# What can't be written.


def fails(message: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "rules",
    [
        by_path({"a": optax.constant_schedule(0.1)}, default=0.0),
        by_path({"a": 0.1}, default=lambda count: 0.1),
        optax.linear_schedule(0.1, 0.0, 3) * by_path({"a": 0.1}, default=0.0),
        by_path({"a": by_path({"b": lambda count: 0.1})}, default=0.0),
        by_depth("a_*", 0.5) * (lambda count: 0.1),
    ],
)
def test_schedules_are_refused(rules: Rules) -> None:
    fails(
        r"Rules\.to_dict: <function .*> can't be written to a file\. Write .* multipliers instead of schedules, to "
        r"multiply them in code: weight_decay=schedule \* rules\.",
        rules.to_dict,
        TypeError,
    )


def test_tracers_are_refused() -> None:
    message = r"Rules\.to_dict: .*Tracer.* can't be written to a file"
    for table in (lambda rate: by_path({"a": rate}, default=0.0), lambda rate: rate * by_path({"a": 1.0}, default=0.0)):
        fails(message, lambda: jax.jit(lambda rate: table(rate).to_dict())(0.1), TypeError)  # noqa: B023


def is_wide(leaf: Any) -> bool:
    return leaf.shape[0] > 9


@pytest.mark.parametrize(
    "rules",
    [
        only(is_wide),
        by_path({("a", is_wide): 0.1}, default=0.0),
        by_path({only(is_wide): 0.1}, default=0.0),
        by_depth("a_*", 0.5, first=is_wide),
    ],
)
def test_predicates_are_refused(rules: Rules) -> None:
    fails(
        r"Rules\.to_dict: <function is_wide .* can't be written to a file\. Write patterns instead of functions",
        rules.to_dict,
        TypeError,
    )


def test_a_fan_in_of_ones_own_is_refused() -> None:
    rules = by_width(2, fan_in=is_wide)
    fails(
        r"Rules\.to_dict: <function is_wide .* can't be written to a file\. Write patterns instead of functions",
        rules.to_dict,
        TypeError,
    )


# What can't be read.

TABLE: dict[str, Any] = {"rules": [{"match": "bias", "value": 0.0}], "default": 0.1}


@pytest.mark.parametrize(
    "data", [{}, 3, "bias", None, [], {"by_paths": TABLE}, {"by_path": TABLE, "by_width": {}}, TABLE]
)
def test_what_is_no_rule_set(data: Any) -> None:
    fails(
        r"Rules\.from_dict: expected one of the keys .*'by_path'.*, and optionally 'times', got .*\. "
        r"Write \{'by_path': \{'rules': \[\{'match': 'bias', 'value': 0\.0\}\], 'default': 0\.1\}\}\.",
        lambda: Rules.from_dict(data),
    )


def nested(depth: int, around: Callable[[Any], Any], data: Any = 0.1) -> Any:
    for _ in range(depth):
        data = around(data)
    return data


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)

MALFORMED: dict[str, tuple[Any, type[Exception], str]] = {
    "another key": ({"by_path": TABLE, "mask": True}, ValueError, r"got \['by_path', 'mask'\]"),
    "no arguments": ({"by_path": None}, TypeError, "by_path must be a dictionary, got None"),
    "arguments in a list": (
        {"by_depth": ["a_*", 0.5]},
        TypeError,
        r"by_depth must be a dictionary, got \['a_\*', 0",
    ),
    "one factor": ({"by_path": TABLE, "times": 0.1}, TypeError, r"'times' must be a list of factors, got 0\.1\."),
    "times a text": ({"by_path": TABLE, "times": ["0.1"]}, TypeError, "the factor of a table must be a number"),
    "times a negative": ({"by_path": TABLE, "times": [-1.0]}, ValueError, "finite and not negative, got -1.0"),
    "times nothing": ({"by_path": TABLE, "times": [{}]}, ValueError, r"one of the keys .*got \[\]"),
    "times a mask": ({"by_path": {"rules": [], "default": True}, "times": [0.1]}, TypeError, "holds True"),
    "no rules": (
        {"by_path": {"default": 0.1}},
        ValueError,
        r"by_path lacks \['rules'\]: it needs \['rules'\], and may have",
    ),
    "a misspelt default": (
        {"by_path": {**TABLE, "defualt": 0.1}},
        ValueError,
        r"by_path has the unknown entries \['defualt'\]: it needs \['rules'\], and may have \['default'\], "
        r"got \{'rules'",
    ),
    "rules in a text": ({"by_path": {"rules": "bias"}}, TypeError, "the rules of by_path must be a list, got 'bias'"),
    "rules in a table": ({"by_path": {"rules": {"bias": 0.0}}}, TypeError, r"must be a list, got \{'bias': 0\.0\}"),
    "a rule that is a text": (
        {"by_path": {"rules": ["bias"]}},
        TypeError,
        "a rule of by_path must be a dictionary, got",
    ),
    "no value": ({"by_path": {"rules": [{"match": "a"}]}}, ValueError, r"a rule of by_path lacks \['value'\]"),
    "no match": ({"by_path": {"rules": [{"pattern": "a", "value": 0.1}]}}, ValueError, r"lacks \['match'\]"),
    "more in a rule": (
        {"by_path": {"rules": [{"match": "a", "value": 0.1, 3: 4}]}},
        ValueError,
        r"a rule of by_path has the unknown entries \[3\]",
    ),
    "no rules at all": ({"by_path": {"rules": []}}, ValueError, "no rules and no default were given"),
    "nothing to match": ({"by_path": {"rules": [{"match": {}, "value": 0.1}]}}, ValueError, r"got \[\]"),
    "a number to match": (
        {"by_path": {"rules": [{"match": 3, "value": 0.1}]}},
        TypeError,
        "a pattern must be a string, .*got 3",
    ),
    "an empty list": ({"by_path": {"rules": [{"match": [], "value": 0.1}]}}, ValueError, "no pattern was given"),
    "an unknown language": (
        {"by_path": {"rules": [{"match": {"glob": "a"}, "value": 0.1}]}},
        ValueError,
        r"one of the keys .*got \['glob'\]",
    ),
    "two languages": (
        {"by_path": {"rules": [{"match": {"regex": "a", "search": "b"}, "value": 0.1}]}},
        ValueError,
        r"got \['regex', 'search'\]",
    ),
    "a malformed regex": (
        {"by_path": {"rules": [{"match": {"regex": "(a"}, "value": 0.1}]}},
        ValueError,
        r"Rules\.from_dict: the regular expression '\(a' is malformed: missing \)",
    ),
    "a huge count": (
        {"by_path": {"rules": [{"match": {"regex": "a{1,99999999999}"}, "value": 0.1}]}},
        ValueError,
        r"the regular expression 'a\{1,99999999999\}' is malformed: the repetition number is too large\.",
    ),
    "thousands of brackets": (
        {"by_path": {"rules": [{"match": {"search": "(" * 5000 + ")" * 5000}, "value": 0.1}]}},
        ValueError,
        r"^Rules\.from_dict: the regular expression '\({79}\.\.\. is malformed: maximum recursion depth",
    ),
    "thousands of tables": (
        nested(2000, lambda inner: {"by_path": {"rules": [], "default": inner}}),
        ValueError,
        r"^Rules\.from_dict: data is nested more than 400 levels deep\. Write the rules in one list",
    ),
    "thousands of lists": (
        {"by_path": {"rules": [{"match": nested(5000, lambda inner: [inner]), "value": 0.1}]}},
        ValueError,
        "data is nested more than 400 levels deep",
    ),
    "a table too many": (
        nested(65, lambda inner: {"by_path": {"rules": [], "default": inner}}),
        ValueError,
        "^by_path: rule sets are nested more than 64 deep",
    ),
    "tables that share tables": (  # As YAML's anchors make them. They would be read 2**40 times.
        nested(40, lambda inner: {"by_path": {"rules": [{"match": "a", "value": inner}], "default": inner}}),
        ValueError,
        r"^Rules\.from_dict: data has more than 100,000 entries at one depth\. .* Write the rules in one list",
    ),
    "a list in itself": (
        {"by_path": {"rules": ENDLESS}},
        ValueError,
        "data is nested more than 400 levels deep",
    ),
    "tables in a value": (
        {"by_path": {"rules": nested(5000, lambda inner: {"a": inner})}},
        ValueError,
        "data is nested more than 400 levels deep",
    ),
    "a huge power": (
        {"by_width": {"base": 2, "power": 10**400}},
        TypeError,
        "by_width: power must be a finite number, got 1000",
    ),
    "a regex that is none": (
        {"by_path": {"rules": [{"match": {"search": ["a"]}, "value": 0.1}]}},
        TypeError,
        r"Rules\.from_dict: a pattern must be a string, .*got \['a'\]",
    ),
    "rates as a pattern": (
        {"by_path": {"rules": [{"match": {"by_path": TABLE}, "value": 0.1}]}},
        TypeError,
        "a mask says True or False, but by_path",
    ),
    "no number": ({"by_path": {"rules": [], "default": None}}, TypeError, "a value of the table must be a number"),
    "a list of numbers": (
        {"by_path": {"rules": [], "default": [0.1]}},
        TypeError,
        "a value of the table must be a number",
    ),
    "a negative": (
        {"by_path": {"rules": [], "default": -0.1}},
        ValueError,
        "must be finite and not negative, got -0.1",
    ),
    "a nested fault": (
        {"by_path": {"rules": [], "default": {"by_width": {}}}},
        ValueError,
        r"by_width lacks \['base'\]: it needs \['base'\], and may have \['power', 'stacked_axes'\], got \{\}",
    ),
    "no factor": ({"by_depth": {"blocks": "a_*"}}, ValueError, r"by_depth lacks \['factor'\]"),
    "no blocks": ({"by_depth": {"factor": 0.5}}, ValueError, r"by_depth lacks \['blocks'\]"),
    "a misspelt axis": (
        {"by_depth": {"blocks": "a", "factor": 0.5, "axes": 0}},
        ValueError,
        r"by_depth has the unknown entries \['axes'\]: it needs \['blocks', 'factor'\], "
        r"and may have \['axis', 'first', 'last'\]",
    ),
    "a factor of 0": (
        {"by_depth": {"blocks": "a_*", "factor": 0.0}},
        ValueError,
        r"factor must be a number > 0, got 0\.0",
    ),
    "blocks without a number": (
        {"by_depth": {"blocks": "a", "factor": 0.5}},
        ValueError,
        "'a' has no '\\*' for the number",
    ),
    "blocks to search": (
        {"by_depth": {"blocks": {"search": "a_"}, "factor": 0.5}},
        TypeError,
        r"blocks must be a string with '\*' for the number, .* got 'a_' \(search\)",
    ),
    "a function of the leaf": (
        {"by_width": {"base": 2, "fan_in": "f"}},
        ValueError,
        r"by_width has the unknown entries \['fan_in'\]",
    ),
    "owners in a list": (
        {"weights_only": {"owners": ["Dense"]}},
        TypeError,
        r"^Rules\.from_dict: the owners of weights_only must be a dictionary by path, got \['Dense'\]\. Pass what",
    ),
    "owners by number": ({"weights_only": {"owners": {1: {}}}}, TypeError, r"must be a dictionary by path, got \{1: "),
    "an owner that is a number": (
        {"weights_only": {"owners": {"w": 3}}},
        TypeError,
        r"^Rules\.from_dict: the owner of 'w' must be a dictionary, got 3\.",
    ),
    "an owner without a name": (
        {"weights_only": {"owners": {"w": {"name": None, "is_library": True}}}},
        TypeError,
        r"^Rules\.from_dict: 'name' of the owner of 'w' must be a str, got None\.",
    ),
    "a role in words": (
        {"weights_only": {"owners": {"w": {"name": "kernel", "reason": "", "or_table": "yes"}}}},
        TypeError,
        r"'or_table' of the owner of 'w' must be a bool, got 'yes'\.",
    ),
    "a list of lists as a factor": (
        {"by_path": TABLE, "times": [["a", [{}]]]},
        TypeError,
        "^by_path: the factor of a table must be a number",
    ),
    "an axis in words": (
        {"by_width": {"base": 2, "stacked_axes": "1"}},
        ValueError,
        "stacked_axes must be a number of leading axes >= 0, got '1'",
    ),
}


@pytest.mark.parametrize(("data", "error", "message"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed(data: Any, error: type[Exception], message: str) -> None:
    fails(message, functools.partial(Rules.from_dict, data), error)


WITHIN: dict[str, tuple[Any, Callable[[Any], Rules]]] = {
    "defaults": (0.1, lambda inner: by_path({}, default=inner)),
    "values": (0.1, lambda inner: by_path({"**": inner})),
    "factors": (0.1, lambda inner: by_path({"**": 1.0}) * inner),
    "patterns": ("**", only),
    "one of several patterns": ("**", lambda inner: only(inner, re.compile(".*"))),
}


@pytest.mark.parametrize(("innermost", "around"), WITHIN.values(), ids=WITHIN)
def test_rule_sets_in_rule_sets_work_up_to_the_limit(innermost: Any, around: Callable[[Any], Rules]) -> None:
    rules = nested(64, around, innermost)
    is_mask = isinstance(innermost, str)
    assert rules.values({"a": 1.0}) == {"a": True if is_mask else 0.1}
    assert repr(Rules.from_dict(through_json(rules.to_dict()))) == repr(rules)
    decay = wdjax.decoupled_decay(0.1, rules) if is_mask else wdjax.decoupled_decay(rules)
    params = {"a": jnp.ones(2)}
    updates, _ = decay.update(params, decay.init(params), params)
    np.testing.assert_allclose(updates["a"], 1.1)
    assert wdjax.plan(params, 1.0 if is_mask else rules, rules if is_mask else None)["a"].decays
    fails(
        r"^by_path: rule sets are nested more than 64 deep\. Write the rules in one table, where the first",
        lambda: nested(2000, around, innermost),
    )


def test_the_deepest_rule_set_counts() -> None:
    deep, flat = nested(64, only, "**"), only("**")
    by_depth("b_*", 0.5, first=(flat, nested(63, only, "**"), flat))
    for build in (
        lambda: by_depth("b_*", 0.5, first=(flat, deep, flat)),
        lambda: by_path([("a", 0.1), (deep, 0.2), ("b", flat)], default=0.1),
        lambda: by_path({"a": flat}, default=deep),
    ):
        fails("rule sets are nested more than 64 deep", build)
    factors = [by_path({}, default=0.9)] * 99
    assert len(functools.reduce(lambda product, factor: product * factor, factors).factors) == 98


def replaced(data: Any, new: Any) -> Iterator[Any]:
    """The data with each of the values in them replaced, one at a time."""
    yield new
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        for inner in replaced(value, new):
            changed = data.copy()
            changed[key] = inner
            yield changed


OF_A_MODEL = weights_only(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)))


@pytest.mark.parametrize("rules", [*RULES.values(), OF_A_MODEL], ids=[*RULES, "of a model"])
def test_each_value_replaced_by_another(rules: Rules) -> None:
    """What is read can be printed and written. Everything else is an error that names a function of ours."""
    refused = []
    for new in (None, 1, "x", [], {}, True, 1e308, ["a", [{}]], {"a": 1}, {1: 2}):
        for data in replaced(rules.to_dict(), new):
            try:
                read = Rules.from_dict(data)
            except (TypeError, ValueError) as error:
                refused.append(str(error))
            else:
                assert repr(Rules.from_dict(read.to_dict())) == repr(read)
    ours = re.compile(r"(Rules\.from_dict|by_path|by_depth|by_width|weights_only): ")
    assert refused
    assert [message for message in refused if not ours.match(message)] == []


def test_what_is_read_is_not_changed() -> None:
    data = {"by_depth": {"blocks": ["a_*"], "factor": 0.5, "first": "b"}, "times": [0.1]}
    before = json.dumps(data)
    Rules.from_dict(data)
    assert json.dumps(data) == before
    assert Rules.from_dict(data).to_dict() == {**data, "by_depth": {**data["by_depth"], "blocks": "a_*"}}


def test_what_is_no_standard_rule() -> None:
    for arguments, message in (
        (
            {"embedding": False},
            r"weights_only has the unknown entries \['embedding'\]: it needs \[\], and may have \['embeddings'",
        ),
        ({"owners": {"w": {"name": "Dense"}}}, r"the owner of 'w' lacks \['is_library'\]"),
        ({"unknown": "maybe"}, "unknown must be 'error', True"),
        ({"stacked_axes": {"layers": -1}}, "stacked_axes must be a number of leading axes >= 0, got -1"),
    ):
        fails(message, lambda: Rules.from_dict({"weights_only": arguments}))  # noqa: B023
    wrong = {re.compile("a"): 1}
    fails("a pattern of stacked_axes must be a string", lambda: weights_only(stacked_axes=wrong), TypeError)
