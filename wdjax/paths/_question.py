"""The question about parameters that `weights_only` can't tell, with the line to complete and paste."""

import collections
import glob
import re
from collections.abc import Mapping, Sequence

from .._engine.decision import Tree
from .._engine.text import merged_texts
from .._engine.trees import Leaf
from . import _modules, hints
from ._modules import Owner
from ._shell import compiled
from .roles import Role

_OF_KERAS = "{v.path: v.value for v in model.trainable_variables}"


def question(unknown: Sequence[Leaf], tree: Tree, default: str, owners: Mapping[str, Owner | Role] | None) -> str:
    """The message about unknown parameters. The values in its line are left to the person who knows the model."""
    rows = ", ".join(f"{pattern}: ..." for pattern in _patterns(unknown, tree))
    message = (
        f"weights_only can't tell what {'these parameters are' if len(unknown) > 1 else 'this parameter is'}: "
        f"{hints.with_shapes(unknown)}. Write True for each that decays, False for others: "
        f"by_path({{{rows}}}, default={default}). Or exclude all of them: weights_only(unknown=False)."
    )
    if owners is None and all(re.fullmatch(r"[\d/]+", leaf.path) for leaf in tree.leaves):
        return f"{message} Here all names are numbers, which tell nothing. From a Keras model, pass {_OF_KERAS}."
    names = {leaf.path.rpartition("/")[2] for leaf in unknown}
    registered = {name: layer for layer, name in _modules.registered() if name in names}
    if registered and owners is None:
        name, layer = next(iter(registered.items()))
        return f"{message} {layer} is registered with {name!r}, but only the model has types: weights_only(model)."
    found = ((owners or {}).get(leaf.path) for leaf in unknown)
    layer = next((owner.name for owner in found if isinstance(owner, Owner)), "MyLayer")
    message += (
        f" For your own layer class, write register_layer({layer}, weights=('those that decay',)) and "
        "weights_only(model). Linen models also need their inputs."
    )
    if owners is None and any(leaf.path.endswith("weight") for leaf in unknown):
        message += " For layers that are stacked in one array, write stacked_axes={'the layers': 1}."
    return message


def _patterns(unknown: Sequence[Leaf], tree: Tree) -> list[str]:
    """The pattern of each group of unknown parameters, as it is written. It matches the group and nothing else."""
    everywhere = [leaf.path for leaf in tree.leaves]
    paths_with: dict[str, list[str]] = collections.defaultdict(list)
    for path in everywhere:
        for name in dict.fromkeys(path.split("/")):
            paths_with[name].append(path)
    patterns = []
    for group in hints.grouped(unknown):
        paths = [leaf.path for leaf in group]
        segments = [path.split("/") for path in paths]
        # Everything that a path with stars matches has the names in it that have no number.
        fixed = (paths_with[name] for name in segments[0] if len(paths) == 1 or not re.search(r"\d", name))
        near = min(fixed, key=len, default=everywhere)
        names = {parts[-1] for parts in segments}
        name = names.pop() if len(names) == 1 else ""
        shell = []
        if name and not name.isdigit() and len(paths_with[name]) == len(paths):
            shell.append(glob.escape(name))
        if all(map(all, segments)):  # A shell pattern has no empty segment.
            shell.append(re.sub(r"\{[\d.,]+\}", "*", glob.escape(merged_texts(paths))))
        fits = (pattern for pattern in shell if _matched(pattern, near) == set(paths))
        pattern = next(fits, None)
        patterns.append(repr(pattern) if pattern is not None else f"re.compile({_regex(paths)!r})")
    return patterns


def _matched(pattern: str, paths: Sequence[str]) -> set[str]:
    return set(filter(compiled(pattern).search, paths))


def _regex(paths: Sequence[str]) -> str:
    """A regular expression for these paths, which differ in their numbers and have every combination of them."""
    columns = zip(*(re.split(r"(\d+)", path) for path in paths), strict=True)
    parts = [list(dict.fromkeys(column)) for column in columns]
    return "".join(re.escape(part[0]) if len(part) == 1 else f"(?:{'|'.join(part)})" for part in parts)
