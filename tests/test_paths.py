"""The pattern language, the order of rules, and what each mistake in them is told."""

import copy
import fnmatch
import functools
import itertools
import pickle
import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax import all_but, by_path, canonical_paths, only

PARAMS = {
    "encoder": {
        "Block_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "LayerNorm_0": {"scale": jnp.ones(3)}},
        "Block_1": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "LayerNorm_0": {"scale": jnp.ones(3)}},
    },
    "head": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)},
    "mlp/~/linear_0": {"w": jnp.ones((2, 2))},
    "step": jnp.array(0),
}
PATHS = canonical_paths(PARAMS)


def matched(*patterns: Any, params: Any = PARAMS) -> set[str]:
    flags = jax.tree.leaves(only(*patterns).mask(params))
    return {path for path, flag in zip(canonical_paths(params), flags, strict=True) if flag}


def test_canonical_paths() -> None:
    assert PATHS == [
        "encoder/Block_0/LayerNorm_0/scale",
        "encoder/Block_0/bias",
        "encoder/Block_0/kernel",
        "encoder/Block_1/LayerNorm_0/scale",
        "encoder/Block_1/bias",
        "encoder/Block_1/kernel",
        "head/bias",
        "head/kernel",
        "mlp/~/linear_0/w",
        "step",
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("bias", ["encoder/Block_0/bias", "encoder/Block_1/bias", "head/bias"]),
        ("head", ["head/bias", "head/kernel"]),
        ("LayerNorm_*", ["encoder/Block_0/LayerNorm_0/scale", "encoder/Block_1/LayerNorm_0/scale"]),
        ("Block_[!0]", [p for p in PATHS if "Block_1" in p]),
        ("Block_?", [p for p in PATHS if "Block_" in p]),
        ("encoder/Block_0", [p for p in PATHS if "Block_0" in p]),
        ("encoder/*/kernel", ["encoder/Block_0/kernel", "encoder/Block_1/kernel"]),
        ("encoder/**/scale", ["encoder/Block_0/LayerNorm_0/scale", "encoder/Block_1/LayerNorm_0/scale"]),
        ("**/bias", ["encoder/Block_0/bias", "encoder/Block_1/bias", "head/bias"]),
        ("head/**/bias", ["head/bias"]),
        ("encoder/**", [p for p in PATHS if p.startswith("encoder/")]),
        ("**", PATHS[:-1]),
        ("*", PATHS[:-1]),
        ("linear_0", ["mlp/~/linear_0/w"]),
        ("mlp/~/*", ["mlp/~/linear_0/w"]),
        (re.compile(r".*/kernel"), ["encoder/Block_0/kernel", "encoder/Block_1/kernel", "head/kernel"]),
        (lambda leaf: leaf.ndim >= 2, [p for p in PATHS if p.endswith(("kernel", "/w"))]),
        (lambda leaf: leaf.shape == (1,) and leaf.dtype == jnp.float32, ["head/bias"]),
    ],
)
def test_what_a_pattern_matches(pattern: Any, expected: list[str]) -> None:
    assert matched(pattern) == set(expected)


def test_integers_are_matched_but_never_decayed() -> None:
    assert only("step", "head/kernel").mask(PARAMS)["step"] is False
    assert by_path({"step": "s"}, default="r").values(PARAMS)["step"] == "s"


@pytest.mark.parametrize(
    "pattern", ["Bias", "bia", "ias", "encoder/kernel", "encoder/*/scale", "head/*/bias", "kernel/*"]
)
def test_what_a_pattern_does_not_match(pattern: str) -> None:
    with pytest.raises(ValueError, match="matches no parameter"):
        matched(pattern)
    with pytest.raises(ValueError, match="matches no parameter"):
        matched(re.compile("kernel"))  # A regular expression must match the whole path.


def test_a_segment_is_read_as_fnmatch_reads_it() -> None:
    rng = random.Random(0)
    alphabet = "ab[]!-*?.^\\&|~1"
    names = ["".join(rng.choices("ab[]!-.^\\&|~1", k=rng.randint(1, 4))) for _ in range(60)]
    compared = 0
    for _ in range(4000):
        pattern = "".join(rng.choices(alphabet, k=rng.randint(1, 5)))
        if "**" in pattern:
            continue
        try:
            expected = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
            rules = only(pattern)
        except (re.error, ValueError):
            continue  # An empty range such as [b-a].
        flags = {name: jnp.ones(1) for name in names}
        try:
            found = {name for name, flag in rules.mask(flags).items() if flag}
        except ValueError:
            found = set()
        assert found == expected, pattern
        compared += len(expected) > 0
    assert compared > 500


def test_wildcards_against_a_definition_by_enumeration() -> None:
    def matches(pattern: list[str], path: list[str]) -> bool:
        if not pattern:
            return True  # An inner node takes all below it.
        if pattern[0] == "**":
            rest = pattern[1:]
            return bool(path) if not rest else any(matches(rest, path[i:]) for i in range(len(path)))
        return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and matches(pattern[1:], path[1:])

    paths = ["/".join(p) for n in (1, 2, 3) for p in itertools.product("ab", repeat=n)]
    for n in (2, 3):
        for parts in itertools.product(["a", "b", "*", "**"], repeat=n):
            pattern = "/".join(parts)
            for path in paths:
                params = {path: jnp.ones(1), "other": jnp.ones(1)}
                expected = matches(list(parts), path.split("/"))
                others = matches(list(parts), ["other"])
                try:
                    got = only(pattern).mask(params)
                except ValueError:
                    got = {path: False, "other": False}
                assert (got[path], got["other"]) == (expected, others), (pattern, path)


def test_the_first_match_wins() -> None:
    values = by_path([("head/bias", "a"), ("bias", "b"), (("head", "step"), "c")], default="d").values(PARAMS)
    assert values["head"] == {"bias": "a", "kernel": "c"}
    assert values["encoder"]["Block_0"] == {"bias": "b", "kernel": "d", "LayerNorm_0": {"scale": "d"}}
    assert values["step"] == "c"


def test_only_and_all_but_are_complements() -> None:
    yes, no = only("bias", "scale").mask(PARAMS), all_but("bias", "scale").mask(PARAMS)
    assert [a != b for a, b in zip(jax.tree.leaves(yes), jax.tree.leaves(no), strict=True)][:-1] == [True] * 9
    assert yes["step"] is no["step"] is False


def test_overlapping_patterns_of_one_rule_are_fine() -> None:
    assert matched("bias", "head/bias") == matched("bias")


def test_labels_for_optax_partition() -> None:
    rules = by_path({"encoder": "frozen"}, default="trained")
    optimizer = optax.partition({"frozen": optax.set_to_zero(), "trained": optax.sgd(0.1)}, rules.values)
    params = {k: v for k, v in PARAMS.items() if k != "step"}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert float(updates["encoder"]["Block_0"]["kernel"].sum()) == 0
    np.testing.assert_allclose(updates["head"]["bias"], -0.1)


def test_none_and_masked_places_count_as_matched() -> None:
    params = {"a": {"kernel": jnp.ones(2), "bias": None}, "b": {"kernel": jnp.ones(2), "bias": optax.MaskedNode()}}
    mask = all_but("bias").mask(params)
    assert mask == {"a": {"kernel": True, "bias": None}, "b": {"kernel": True, "bias": optax.MaskedNode()}}
    with pytest.raises(
        ValueError, match=r"'bais' matches no parameter.*2 of them are empty here.*rules\.mask\(params\)"
    ):
        all_but("bais").mask(params)
    # What a predicate is for may be what is hidden.
    assert all_but(lambda leaf: leaf.ndim == 5).mask(params)["a"]["kernel"] is True


def test_rules_are_no_function_and_have_a_readable_form() -> None:
    rules = 0.1 * by_path({"bias": 0, re.compile(".*/w"): 1.0, ("a", "b"): 2.0}, default=0.5)
    assert not callable(rules)
    assert repr(rules) == "0.1 * by_path({'bias': 0.0, re.compile('.*/w'): 1.0, ('a', 'b'): 2.0}, default=0.5)"


@pytest.mark.parametrize("factor", [0.5, np.float64(0.5), np.array(0.5), jnp.array(0.5)])
def test_a_factor_on_either_side(factor: Any) -> None:
    table = by_path({"bias": 0.2}, default=0.0)
    for rules in (factor * table, table * factor):
        assert isinstance(rules, wdjax.Rules)
        penalty = wdjax.l2_penalty({"bias": jnp.ones(2), "w": jnp.ones(2)}, rules)
        np.testing.assert_allclose(penalty, 0.1, rtol=1e-6)


def test_rules_survive_copy_and_pickle() -> None:
    rules = 0.5 * by_path({re.compile(".*/bias"): 0.0, ("kernel", "scale"): 0.1})
    for twin in (copy.deepcopy(rules), pickle.loads(pickle.dumps(rules))):
        assert repr(twin) == repr(rules)
        with pytest.raises(ValueError, match="no rule covers the parameter 'mlp/~/linear_0/w'"):
            wdjax.decoupled_decay(twin).init(PARAMS)


def test_leaves_that_are_functions_are_no_parameters() -> None:
    params = {"w": jnp.ones(2), "activation": jnp.tanh}
    assert all_but(lambda leaf: leaf.ndim == 2, "activation").mask({**params, "m": jnp.ones((2, 2))}) == {
        "w": True,
        "m": False,
        "activation": False,
    }


# Mistakes.


def test_two_parameters_of_one_path() -> None:
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    fails(r"two parameters have the path 'a/b'.*Rename one", lambda: wdjax.decoupled_decay(0.1).init(params))


def fails(message: str, call: Any, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_typo_shows_the_nearest_name_and_paths() -> None:
    fails(
        r"decoupled_decay: the pattern 'bais' matches no parameter\. Did you mean 'bias'\? It matches 3 parameters\. "
        r"The nearest of 10 paths: '.*'\.",
        lambda: wdjax.decoupled_decay(0.1, all_but("bais")).init(PARAMS),
    )
    fails(r"Did you mean 'LayerNorm_0'\?", lambda: matched("layernorm_0"))
    fails(r"Did you mean 'head/kernel'\? It matches 1 parameter\.", lambda: matched("heads/kernel"))
    fails(r"re\.compile\('\.\*/kernal'\) matches no parameter.*head/kernel", lambda: matched(re.compile(".*/kernal")))
    fails(r"<lambda> matches no parameter", lambda: matched(lambda leaf: leaf.ndim == 7))


def test_each_pattern_of_a_rule_must_match() -> None:
    fails("'bais' matches no parameter", lambda: matched("bias", "bais"))
    fails("'bais' matches no parameter", lambda: by_path({("bias", "bais"): 0.0}, default=1.0).values(PARAMS))


def test_a_rule_that_never_decides() -> None:
    fails(
        r"the rule 'head/bias' never decides: every parameter that it matches is taken by 'bias' before it\. "
        r"The first match wins: put the narrower rule first",
        lambda: by_path({"bias": 0.0, "head/bias": 1.0}, default=1.0).values(PARAMS),
    )
    fails(
        r"the rule 'head' never decides.*by 'bias' or 'kernel' before it",
        lambda: by_path({"bias": 0.0, "kernel": 1.0, "head": 2.0}, default=1.0).values(PARAMS),
    )


def test_a_parameter_that_no_rule_covers() -> None:
    fails(
        r"no rule covers the parameter 'encoder/Block_0/LayerNorm_0/scale' \(and 2 more: .*\)\. "
        r"Add a rule, such as \{'scale': \.\.\.\}, or a value for all the rest: by_path\(\{\.\.\.\}, default=\.\.\.\)",
        lambda: wdjax.decoupled_decay(by_path({"bias": 0.0, "kernel": 0.1})).init(PARAMS),
    )


def test_integers_need_no_rule_for_a_rate_but_a_label() -> None:
    rules = by_path({"w": 0.1})
    params = {"w": jnp.ones(2), "count": jnp.array(0)}
    wdjax.decoupled_decay(rules).init(params)
    fails("no rule covers the parameter 'count'", lambda: rules.values(params))


def test_malformed_patterns() -> None:
    for pattern in ("/bias", "bias/", "a//b", ""):
        fails("has an empty segment", lambda: only(pattern))  # noqa: B023
    fails(r"'\*\*' must stand alone in its segment", lambda: only("encoder**/kernel"))
    fails(r"the pattern '\[b-a\]' is malformed", lambda: only("[b-a]"))
    fails(r"only: no pattern was given\. Write only\('kernel'\)", lambda: only())
    fails(
        r"a pattern is a text, .*got \['bias', 'scale'\].*separate arguments",
        lambda: all_but(["bias", "scale"]),
        TypeError,
    )  # pyright: ignore[reportArgumentType]
    fails(r"a pattern is a text, .*got <class 'str'>", lambda: only(str), TypeError)


def test_malformed_tables() -> None:
    fails(r"the rules are a table, got the text 'bias'\. Write only\('bias'\)", lambda: by_path("bias"), TypeError)
    fails(r"a rule is a pair \(pattern, value\), got 'bias'", lambda: by_path(["bias"]), TypeError)  # pyright: ignore[reportArgumentType]
    fails("no rules and no default", lambda: by_path({}))
    fails("a value of the table must be finite and not negative, got -0.1", lambda: by_path({"a": -0.1}))
    fails("a value of the table must be a number", lambda: by_path({"a": None}), TypeError)
    fails(r"must be a scalar, got an array of shape \(2,\)", lambda: by_path({"a": np.ones(2)}))
    fails("the factor of a table must be finite and not negative, got -1", lambda: -1 * by_path({"a": 0.1}))
    fails("holds True", lambda: 0.1 * only("bias"), TypeError)
    fails("the rules are a table, got by_path.*a rule set already", lambda: by_path(only("bias")), TypeError)
    fails(
        r"the predicate .*<lambda> must answer True or False, and for '.*' it answered 1",
        lambda: matched(lambda leaf: 1),
        TypeError,
    )


def test_rates_and_masks_are_not_mixed_up() -> None:
    fails(
        r"decoupled_decay: a mask says True or False, and by_path\(\{'bias': 0\.5\}, default=1\.0\) holds 0\.5\..*"
        r"weight_decay=0\.1 \* by_path",
        lambda: wdjax.decoupled_decay(0.1, by_path({"bias": 0.5}, default=1.0)).init(PARAMS),
        TypeError,
    )
    fails(
        r"decoupled_decay: a table of rates holds numbers.*holds True",
        lambda: wdjax.decoupled_decay(only("bias")).init(PARAMS),
        TypeError,
    )
    fails(r"holds 'no_decay'", lambda: wdjax.decoupled_decay(by_path({"**": "no_decay"})).init(PARAMS), TypeError)


def test_forgetting_dot_mask_before_optax_is_told() -> None:
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    for optimizer in (optax.adamw(0.1, mask=only("kernel")), optax.masked(optax.sgd(0.1), only("kernel"))):
        init = functools.partial(optimizer.init, params)
        fails(r"has no truth value\. Optax takes its method.*mask=rules\.mask", init, TypeError)


def test_under_optax_flatten_there_are_no_paths() -> None:
    optimizer = optax.flatten(wdjax.decoupled_decay(0.1, only("bias")))
    fails(
        r"The params are one array and have no paths.*outside optax\.flatten",
        lambda: optimizer.init({"bias": jnp.ones(2)}),
    )


def test_ten_thousand_parameters_and_twenty_rules_are_decided_in_a_moment() -> None:
    params = {f"Block_{i}": {f"p{j}": np.ones(1, np.float32) for j in range(10)} for i in range(1000)}
    rules = by_path({f"Block_{i}/p{j}": 0.1 for i in range(10) for j in range(2)}, default=0.0)
    assert sum(value > 0 for value in jax.tree.leaves(rules.values(params))) == 20
