"""The pattern language, the order of rules, and what each mistake in them is told."""

import copy
import fnmatch
import functools
import itertools
import pickle
import random
import re
import time
import timeit
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax import all_but, by_depth, by_path, by_width, only
from wdjax.paths import canonical_paths
from wdjax.paths._shell import compiled

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


BIASES = ["encoder/Block_0/bias", "encoder/Block_1/bias", "head/bias"]
KERNELS = ["encoder/Block_0/kernel", "encoder/Block_1/kernel", "head/kernel"]
SCALES = ["encoder/Block_0/LayerNorm_0/scale", "encoder/Block_1/LayerNorm_0/scale"]


@pytest.mark.parametrize(
    ("syntax", "pattern", "expected"),
    [
        ("shell", "bias", BIASES),
        ("regex", ".*/kernel", KERNELS),
        ("regex", "(?i).*/KERNEL", KERNELS),
        ("regex", "head/bias|head/kernel", ["head/bias", "head/kernel"]),
        ("search", "kern", KERNELS),
        ("search", "^head", ["head/bias", "head/kernel"]),
        ("search", "(?:l|s)$", [*KERNELS, *BIASES]),
        ("search", "0/bias|head/k", ["encoder/Block_0/bias", "head/kernel"]),
        ("search", "(?i)layernorm", SCALES),
        ("search", "(?i)(?s)layer.*LE$", SCALES),
        ("search", r"(?x) LAYER | scale $  # the norms", SCALES),
        ("search", r"(k)er.*\1|(e)l$", KERNELS),
        ("contains", "Norm", SCALES),
        ("contains", "LayerNorm_0.scale", SCALES),
        ("contains", "Block_0/b", ["encoder/Block_0/bias"]),
        ("contains", "er.Block_1", [p for p in PATHS if "Block_1" in p]),
        ("contains", "~", ["mlp/~/linear_0/w"]),
    ],
)
def test_each_syntax(syntax: str, pattern: str, expected: list[str]) -> None:
    yes, no = only(pattern, syntax=syntax), all_but(pattern, syntax=syntax)
    table = by_path({pattern: True}, default=False, syntax=syntax)
    assert flagged(yes) == flagged(table) == set(expected)
    assert flagged(no) == set(PATHS[:-1]) - set(expected)


def flagged(rules: Any, params: Any = PARAMS) -> set[str]:
    return {
        path for path, flag in zip(canonical_paths(params), jax.tree.leaves(rules.mask(params)), strict=True) if flag
    }


def test_no_character_is_special_to_contains_but_the_dot() -> None:
    params = {name: jnp.ones(1) for name in ("a+b", "aab", "(x)", "w[0]", "p.q/r", "p/q.r", "pxq", "a*b")}
    for piece, expected in {
        "a+b": {"a+b"},
        "(x": {"(x)"},
        "[0]": {"w[0]"},
        "*": {"a*b"},
        "p.q": {"p.q/r", "p/q.r"},
        "p/q/r": {"p.q/r", "p/q.r"},
    }.items():
        assert flagged(only(piece, syntax="contains"), params) == expected, piece


@pytest.mark.parametrize("text", ["bias", "^enc", "a.$", r"\d", "Block_(?!0)", "[bh].*l", "k|w$", "(?i)NORM", ".", "/"])
def test_search_is_that_of_re(text: str) -> None:
    assert flagged(only(text, syntax="search")) == {path for path in PATHS[:-1] if re.search(text, path)}


def test_a_syntax_is_for_texts_alone() -> None:
    for syntax in ("regex", "search", "contains"):
        rules = only(re.compile(".*/bias"), lambda leaf: leaf.ndim == 2, only("LayerNorm_*"), syntax=syntax)
        assert flagged(rules) == {p for p in PATHS if p.endswith(("bias", "kernel", "/w", "scale"))}
    assert by_path([("bias", 0.0), ("head", 1.0)], default=2.0, syntax="contains").values(PARAMS)["head"] == {
        "bias": 0.0,
        "kernel": 1.0,
    }


def test_how_a_pattern_of_each_syntax_is_written() -> None:
    for pattern, syntax, shown in (
        (".*/w", "regex", r"re\.compile\('\.\*/w'\)"),
        ("w$", "search", r"'w\$' \(search\)"),
        ("y.w", "contains", r"'y\.w' \(contains\)"),
    ):
        rules = by_path({("a", pattern): 0.0}, default=1.0, syntax=syntax)
        assert re.search(shown, repr(rules))
        fails(rf"the pattern {shown} matches no parameter", functools.partial(rules.values, {"a": jnp.ones(1)}))
    # Without its flag, the comment is a count that is too large.
    assert repr(only(re.compile("a #{1,99999999999}", re.VERBOSE))).startswith("by_path({re.compile('(?x)a #{1,9")
    assert repr(only(re.compile("a", re.IGNORECASE))) == "by_path({re.compile('(?i)a'): True}, default=False)"


def test_a_text_in_no_syntax() -> None:
    for call in (only, all_but, lambda text, syntax: by_path({text: 0.1}, syntax=syntax)):
        fails(
            "syntax must be one of 'shell', 'regex', 'search', 'contains', got 'glob'",
            functools.partial(call, "bias", syntax="glob"),
        )
        for syntax in ("regex", "search"):
            fails(
                r": the regular expression '\(bias' is malformed: missing \), unterminated subpattern at position 0\.",
                functools.partial(call, "(bias", syntax=syntax),
            )
            fails("is malformed: the repetition number", functools.partial(call, "a{1,99999999999}", syntax=syntax))
            fails("is malformed: maximum recursion", functools.partial(call, "(" * 5000 + ")" * 5000, syntax=syntax))
        for syntax in ("regex", "search", "contains"):
            fails("the pattern is an empty string", functools.partial(call, "", syntax=syntax))
    fails(r"only\(\) has no argument 'syntx'.*Did you mean syntax=", lambda: only("a", syntx="regex"), TypeError)  # pyright: ignore[reportCallIssue]
    fails(r"a pattern must be a string, .*got re\.compile\(b'a'\)", lambda: only(re.compile(b"a")), TypeError)  # pyright: ignore[reportArgumentType]
    fails("a pattern must be a string, .*got 3", lambda: only(3, syntax="search"), TypeError)  # pyright: ignore[reportArgumentType]


def test_rule_sets_are_patterns() -> None:
    inner = all_but("bias", "scale")
    assert flagged(only(inner)) == flagged(inner)
    assert flagged(all_but(inner)) == set(PATHS[:-1]) - flagged(inner)
    assert flagged(only(inner, "scale")) == set(PATHS[:-1]) - set(BIASES)
    assert by_path({"head": 1.0, only("bias"): 2.0, only("**/kernel"): 3.0}, default=4.0).values(PARAMS) == {
        "encoder": {f"Block_{i}": {"kernel": 3.0, "bias": 2.0, "LayerNorm_0": {"scale": 4.0}} for i in range(2)},
        "head": {"kernel": 1.0, "bias": 1.0},
        "mlp/~/linear_0": {"w": 4.0},
        "step": 4.0,
    }
    fails(
        r"the rule by_path\(\{'bias': True\}, default=False\) never decides: '\*' comes first and matches the same",
        lambda: by_path({"*": 1.0, only("bias"): 2.0}).values(PARAMS),
    )
    hidden = {"a": {"kernel": jnp.ones(2)}, "b": None}
    assert by_path({"kernel": 1.0, only(lambda leaf: leaf.ndim == 5): 2.0}, default=3.0).values(hidden) == {
        "a": {"kernel": 1.0},
        "b": None,
    }


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
    flags = {name: np.ones(1) for name in names}
    compared = 0
    for _ in range(1500):
        pattern = "".join(rng.choices(alphabet, k=rng.randint(1, 5)))
        if "**" in pattern:
            continue
        try:
            expected = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
            rules = only(pattern)
        except (re.error, ValueError):
            continue  # An empty range such as [b-a].
        try:
            found = {name for name, flag in rules.mask(flags).items() if flag}
        except ValueError:
            found = set()
        assert found == expected, pattern
        compared += len(expected) > 0
    assert compared > 150


def matches(pattern: list[str], path: list[str]) -> bool:
    """The definition of a pattern with "/", by enumeration."""
    if not pattern:
        return True  # An inner node takes all below it.
    if pattern[0] == "**":
        rest = pattern[1:]
        return bool(path) if not rest else any(matches(rest, path[i:]) for i in range(len(path)))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and matches(pattern[1:], path[1:])


def test_patterns_of_many_stars_against_the_definition() -> None:
    rng = random.Random(0)
    compared = 0
    for _ in range(5_000):
        names = [
            "a",
            "b",
            "ab",
            "a*",
            "*b",
            "*a*",
            "a*b*a",
            "*a*a",
            "*ab*b*a",
            "*a?b*",
            "?",
            "[ab]*",
            "*[!a]*",
            "*",
            "**",
            "**",
            "**",
        ]
        pattern = rng.choices(names, k=rng.randint(2, 7))
        path = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 8))]
        expected = matches(pattern, path)
        assert bool(compiled("/".join(pattern)).search("/".join(path))) == expected, (pattern, path)
        compared += expected
    assert 300 < compared < 4_700


def test_many_stars_take_no_long_time() -> None:
    path, segment = "/".join("a" * 100), "a" * 2000
    for pattern, name in (
        ("/".join(["**"] * 20 + ["b"]), path),
        ("/".join(["**", "a"] * 20 + ["b"]), path),
        ("/".join(["**", "*"] * 20 + ["b"]), path),
        ("/".join(["**", "*a*"] * 20 + ["b"]), path),
        ("*a" * 20 + "*b", segment),
        ("*?" * 20 + "*[!a]", segment),
        ("/".join(["**", "*a*a*a*a*b"] * 10), f"{path}/{segment}"),
        ("/".join(["**", "*1*1*1*1*b"] * 10), f"{path}/{segment}"),
    ):
        for regex in (compiled(pattern), compiled(pattern, is_numbered=True)):
            assert regex.search(name) is None
            search = functools.partial(regex.search, name.replace("a", "1"))
            assert min(timeit.repeat(search, number=1)) < 0.05, pattern
    fails("matches no parameter", lambda: only("/".join(["**"] * 20 + ["b"])).mask({path: np.ones(1)}))


def test_wildcards_against_a_definition_by_enumeration() -> None:
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


def test_tables_in_tables_against_a_definition() -> None:
    """Random tables, nested and multiplied: the values are those of the definition, or both refuse."""
    rng = random.Random(0)
    paths = [*map("/".join, itertools.product("xy", ("p_0", "p_1"), "kb")), "k", "z/b"]
    params = {path: jnp.ones(1) for path in paths}

    def table(depth: int) -> Any:
        rows = [(rng.choice(["x", "y", "p_0", "p_1", "p_*", "k", "b"]), value(depth)) for _ in range(rng.randint(0, 3))]
        default = None if rows and rng.random() < 0.15 else value(depth)
        return rows, default, [value(depth) for _ in range(2) if rng.random() < 0.2]

    def value(depth: int) -> Any:
        return table(depth - 1) if depth and rng.random() < 0.3 else rng.choice([0.5, 3.0, 7.0])

    def built(spec: Any) -> Any:
        if isinstance(spec, float):
            return spec
        rows, default, factors = spec
        kwargs = {} if default is None else {"default": built(default)}
        rules = by_path([(pattern, built(one)) for pattern, one in rows], **kwargs)
        return functools.reduce(lambda one, other: one * built(other), factors, rules)

    def defined(spec: Any, asked: list[str]) -> dict[str, float]:
        if isinstance(spec, float) or not asked:
            return dict.fromkeys(asked, spec)
        rows, default, factors = spec
        left, values = asked, {}
        for pattern, one in rows:
            taken = [path for path in left if any(fnmatch.fnmatchcase(name, pattern) for name in path.split("/"))]
            if not taken:
                raise ValueError
            left = [path for path in left if path not in taken]
            values |= defined(one, taken)
        if left and default is None:
            raise ValueError
        values |= defined(default, left)
        for factor in factors:
            more = defined(factor, asked)
            values = {path: values[path] * more[path] for path in values}
        return values

    outcomes = []
    for _ in range(1000):
        spec = table(2)
        try:
            want = defined(spec, paths)
        except ValueError:
            want = None
        try:
            got = built(spec).values(params)
        except ValueError:
            got = None
        assert got == pytest.approx(want), spec
        outcomes.append(want is None)
    assert 200 < sum(outcomes) < 800


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
    fails(
        r"two parameters have the path 'a/b': those at \['a'\]\['b'\] and \['a/b'\]\. Rename one",
        lambda: wdjax.decoupled_decay(0.1).init(params),
    )
    many = {**{f"w{i}": np.ones(1) for i in range(10_000)}, **{f"w{i}/x": np.ones(1) for i in range(10_000)}, **params}
    all_nested = {**many, **{f"w{i}": {"x": np.ones(1)} for i in range(10_000)}}
    start = time.perf_counter()
    fails("two parameters have the path 'a/b'", lambda: canonical_paths(many))
    fails(r"'w0/x': those at .* and .*\. 9999 more paths are repeated|10000 more", lambda: canonical_paths(all_nested))
    assert time.perf_counter() - start < 3


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
    fails(r"Did you mean 'Block_\*'\? It matches 6 parameters\.", lambda: matched("block"))
    fails(r"Did you mean 'Block_1'\? It matches 3 parameters\.", lambda: matched("Blok_1"))
    fails(r"Did you mean 'encoder/Block_\*/bias'\? It matches 2", lambda: matched("encoder/Block/bias"))
    fails(
        r"Did you mean 'LayerNorm_0'\? It matches 2 parameters\. 'LayerNorm' is part of 'LayerNorm_0', not "
        r"a whole name\. '\*LayerNorm\*' matches 2\. The nearest",
        lambda: matched("LayerNorm"),
    )
    fails(r"'norm' is part of 'LayerNorm_0', .*\. '\*Norm\*' matches 2\.", lambda: matched("norm"))
    fails(r"matches no parameter\. The nearest of 10 paths", lambda: matched("x"))
    fails(r"re\.compile\('\.\*/kernal'\) matches no parameter.*head/kernel", lambda: matched(re.compile(".*/kernal")))
    fails(r"<lambda> matches no parameter", lambda: matched(lambda leaf: leaf.ndim == 7))


KERAS_NAMES = {
    "gamma": "'gamma' is a norm's scale in Keras. Here it is 'scale', which matches 2 parameters.",
    "**/beta": "'beta' is a norm's shift in Keras. Here it is 'bias', which matches 3 parameters.",
    "encoder/*/gamma": "'gamma' is a norm's scale in Keras. Here it is 'scale', which matches 2 parameters.",
    "weight": "'weight' is a norm's scale in PyTorch and Equinox. Here it is 'scale', which matches 2 parameters. "
    "'weight' is a layer's matrix in PyTorch and Equinox. Here it is 'kernel', which matches 3 parameters. "
    "'weight' is a layer's matrix in PyTorch and Equinox. Here it is 'w', which matches 1 parameter.",
    "offset": "'offset' is a norm's shift in Haiku. Here it is 'bias', which matches 3 parameters.",
    "b": "'b' is a layer's bias in Haiku. Here it is 'bias', which matches 3 parameters.",
}


@pytest.mark.parametrize("pattern", KERAS_NAMES)
def test_a_name_of_another_library_shows_the_name_here(pattern: str) -> None:
    fails(rf"matches no parameter\. {re.escape(KERAS_NAMES[pattern])} ", lambda: matched(pattern))


def test_names_of_other_libraries_in_each_syntax_and_tree() -> None:
    fails("'gamma' is a norm's scale", lambda: only(".*/gamma", syntax="regex").mask(PARAMS))
    fails("'gamma' is a norm's scale", lambda: only("LayerNorm.*gamma$", syntax="search").mask(PARAMS))
    fails("'weight' is a norm's scale", lambda: only("LayerNorm.weight", syntax="contains").mask(PARAMS))
    torch = {
        "norm": {"weight": np.ones(2)},
        "self_attn": {"in_proj_weight": np.ones((2, 2)), "running_mean": np.ones(2)},
    }
    for pattern, here in {
        "scale": "a norm's scale in Flax and Haiku. Here it is 'weight', which matches 1 parameter",
        "kernel": "a layer's matrix in Flax and Keras. Here it is 'weight'",
        "query": "an attention's query projection in Flax, Keras and Haiku. Here it is 'in_proj_weight'",
        "moving_mean": "the mean of a batch norm in Keras. Here it is 'running_mean'",
    }.items():
        fails(f"'{pattern}' is {here}", lambda: only(pattern).mask(torch))  # noqa: B023
    flax = {"attn": {name: {"kernel": np.ones((2, 2))} for name in ("query", "key", "value", "out")}}
    fails("Here it is 'query', .*Here it is 'key', .*Here it is 'value', ", lambda: only("in_proj_weight").mask(flax))
    fails("Here it is 'out', ", lambda: only("out_proj").mask(flax))
    fails("'moving_mean' is the mean of a batch norm. These params hold none", lambda: only("moving_mean").mask(flax))
    # Where the tree has the name, something else is wrong with the pattern.
    with pytest.raises(ValueError, match="matches no parameter") as caught:
        only("encodr/bias").mask(PARAMS)
    assert "Here it is" not in str(caught.value)


def test_a_hint_leaves_out_names_that_are_no_patterns() -> None:
    params = {"a": {"": jnp.ones(1)}, "w[0]": jnp.ones(1), "b**": jnp.ones(1), "kernel": jnp.ones(1)}
    for pattern in ("a/x", "w[1]", "b*c", "w0"):
        fails(
            rf"the pattern {re.escape(repr(pattern))} matches no parameter\. The nearest of 4 paths",
            functools.partial(matched, pattern, params=params),
        )


def test_each_pattern_of_a_rule_must_match() -> None:
    fails("'bais' matches no parameter", lambda: matched("bias", "bais"))
    fails("'bais' matches no parameter", lambda: by_path({("bias", "bais"): 0.0}, default=1.0).values(PARAMS))


def test_a_rule_that_never_decides() -> None:
    fails(
        r"the rule 'head/bias' never decides: 'bias' comes first and matches the same parameters\. "
        r"Put the narrower rule first",
        lambda: by_path({"bias": 0.0, "head/bias": 1.0}, default=1.0).values(PARAMS),
    )
    fails(
        r"the rule 'head' never decides: 'bias' or 'kernel' comes first",
        lambda: by_path({"bias": 0.0, "kernel": 1.0, "head": 2.0}, default=1.0).values(PARAMS),
    )


def test_a_parameter_that_no_rule_covers() -> None:
    fails(
        r"no rule covers the parameter 'encoder/Block_0/LayerNorm_0/scale' \(and 2 more: .*\)\. "
        r"Add a rule such as \{'scale': \.\.\.\}, or a value for all others: "
        r"by_path\(\{\.\.\.\}, default=\.\.\.\)",
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
        r"a pattern must be a string, .*got \['bias', 'scale'\]\. Write only\('kernel', 'embedding'\), or several as a",
        lambda: all_but(["bias", "scale"]),
        TypeError,
    )  # pyright: ignore[reportArgumentType]
    fails(r"a pattern must be a string, .*got <class 'str'>", lambda: only(str), TypeError)


def test_malformed_tables() -> None:
    fails(r"the rules must be a table, got 'bias'\. Write only\('bias'\)", lambda: by_path("bias"), TypeError)
    fails(r"a rule must be a pair \(pattern, value\), got 'bias'", lambda: by_path(["bias"]), TypeError)  # pyright: ignore[reportArgumentType]
    fails("no rules and no default", lambda: by_path({}))
    fails("a value of the table must be finite and not negative, got -0.1", lambda: by_path({"a": -0.1}))
    fails("a value of the table must be a number", lambda: by_path({"a": None}), TypeError)
    fails(r"must be finite and not negative, got an array with -1\.0", lambda: by_path({"a": -np.ones(2)}))
    fails("the factor of a table must be finite and not negative, got -1", lambda: -1 * by_path({"a": 0.1}))
    fails("holds True", lambda: 0.1 * only("bias"), TypeError)
    fails(r"the rules must be a table, got by_path\(.*Write it as it is", lambda: by_path(only("bias")), TypeError)
    fails(
        r"the predicate .*<lambda> must return True or False, but for '.*' it returned 1",
        lambda: matched(lambda leaf: 1),
        TypeError,
    )


def test_rates_and_masks_are_not_mixed_up() -> None:
    fails(
        r"decoupled_decay: a mask says True or False, but by_path\(\{'bias': 0\.5\}, default=1\.0\) holds 0\.5\..*"
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
        fails(r"has no truth value\. Give Optax its method.*mask=rules\.mask", init, TypeError)


def test_under_optax_flatten_there_are_no_paths() -> None:
    optimizer = optax.flatten(wdjax.decoupled_decay(0.1, only("bias")))
    fails(
        r"The params are a single array, so they have no paths.*outside optax\.flatten",
        lambda: optimizer.init({"bias": jnp.ones(2)}),
    )


def test_ten_thousand_parameters_and_twenty_rules_are_decided_in_a_moment() -> None:
    params = {f"Block_{i}": {f"p{j}": np.ones(1, np.float32) for j in range(10)} for i in range(1000)}
    rules = by_path({f"Block_{i}/p{j}": 0.1 for i in range(10) for j in range(2)}, default=0.0)
    assert sum(value > 0 for value in jax.tree.leaves(rules.values(params))) == 20


def test_what_else_may_be_meant() -> None:
    fails(
        r"It is compared from the root\. At any depth, '\*\*/Block_0/kernel' matches 1\.",
        lambda: matched("Block_0/kernel"),
    )
    fails(
        r"As a regular expression it matches 3\. Write syntax='regex', or re\.compile\('\.\*/kernel'\)",
        lambda: by_path([(".*/kernel", 1.0)], default=0.0).values(PARAMS),
    )
    for call in (
        lambda: only("bias") & only("head"),
        lambda: ~only("bias"),
        lambda: only("bias") | wdjax.weights_only(),
        lambda: wdjax.weights_only() - only("head"),
    ):
        fails(r"masks do not support &, \|, ~ or -.*by_path\(\{'head': False\}, default=weights_only", call, TypeError)
    fails(
        r"the factor of a table must be a scalar, got an array of shape \(2, 3\)"
        r".*Optax accepts no table as weight_decay",
        lambda: np.ones((2, 3)) * by_path({"bias": 0.0}, default=0.1),
        TypeError,
    )
    fails(
        r"decoupled_decay: the mask is the function weights_only\. Call it: mask=weights_only\(\.\.\.\)",
        lambda: wdjax.decoupled_decay(0.1, wdjax.weights_only).init(PARAMS),
        TypeError,
    )


ODD_NAMES: dict[str, Any] = {
    "a bare array": jnp.ones((2, 3)),
    "no name": {"": jnp.ones((2, 3))},
    "no name, nested": {"": {"": jnp.ones((2, 3))}},
    **{name: {name: {"a": jnp.ones((2, 3)), name: jnp.ones((2, 3))}} for name in (".", "..", "/", "a//b", "a/")},
}


@pytest.mark.filterwarnings("ignore:plan. everything decays")
@pytest.mark.parametrize("params", ODD_NAMES.values(), ids=ODD_NAMES)
def test_odd_names_and_no_names(params: Any) -> None:
    everywhere = {re.compile(".*"): 0.5}
    ones, leaves = jax.tree.map(jnp.ones_like, params), jax.tree.leaves(params)
    assert len(wdjax.paths.canonical_paths(params)) == len(leaves)
    assert jax.tree.leaves(by_path(everywhere).values(params)) == [0.5] * len(leaves)
    assert jax.tree.leaves(by_path({}, default=0.5).values(params)) == [0.5] * len(leaves)
    for rate in (0.5, by_path(everywhere), jax.tree.map(lambda p: 0.5, params)):
        decay = wdjax.decoupled_decay(rate, toward="init")
        updates, _ = decay.update(ones, decay.init(params), jax.tree.map(lambda p: p + 1, params))
        assert all(np.all(update == 1.5) for update in jax.tree.leaves(updates))
        assert [row.rate for row in wdjax.plan(params, rate).parameters] == [0.5] * len(leaves)
    audit = wdjax.audit(wdjax.sgdw(0.1, by_path(everywhere)), params, 0.1 * by_path(everywhere))
    assert not audit.findings, audit


@pytest.mark.parametrize("path", ["/", "a/", "/a", "a//x", "[a]*", "params/[0]"])
def test_errors_advise_patterns_that_match(path: str) -> None:
    params = {path: jnp.ones((2, 3, 4)), "block_0": jnp.ones(3)}

    def advised(rules: Any, message: str) -> Any:
        with pytest.raises(ValueError, match=message) as caught:
            rules.values(params)
        return eval(re.findall(message, str(caught.value))[0], {"by_depth": by_depth, "re": re})

    pattern = advised(by_path({"block_0": 1.0}), r"Add a rule such as \{(.+?): \.\.\.\}, or")
    assert by_path({"block_0": 1.0, pattern: 0.5}).values(params) == {path: 0.5, "block_0": 1.0}
    no_width = by_path({"block_0": 0.5}, default=by_width(2))
    pattern = advised(no_width, r"exclude the parameter: by_path\(\{(.+): 1\.0\}")
    assert by_path({pattern: 1.0}, default=no_width).values(params) == {path: 1.0, "block_0": 0.5}
    pattern = advised(by_depth("**", 0.5, axis=2), r"exclude it: by_path\(\{(.+): 1\.0\}")
    assert pattern == "block_0"
    rules = advised(by_depth("block_*", 0.5), r"Write (by_depth\(.+\)), or last")
    assert rules.values(params) == {path: 1.0, "block_0": 0.5}
