"""Every text of an error or a warning that wdjax has, read from its source: what a person pastes into the search.

A message may be put together from several texts: those that are passed to an exception, and those that other functions
make for it. All are listed, by room and by function, so no message can be missing.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

ROOT = Path(__file__).parent.parent.parent
FEWEST_WORDS = 5  # Of a text that is only a part of a message.
_SMALL_WORDS = frozenset(("the", "of", "in", "is", "it", "to", "they", "that", "do", "at"))


class Message(NamedTuple):
    """A text, with {placeholders}; the file and the function that make it; and what raises or warns with it.

    The last is "" for a part of a message.
    """

    file: Path
    function: str
    kind: str
    text: str

    @property
    def room(self) -> str:
        return self.file.relative_to(ROOT).with_suffix("").parts[1]


def messages(fewest: int = FEWEST_WORDS) -> list[Message]:
    """Those of wdjax, in the order of its files. A part of a message has at least so many words."""
    files = sorted((ROOT / "wdjax").rglob("*.py"))
    return [found for file in files for found in messages_of(file.read_text(encoding="utf-8"), file, fewest)]


def messages_of(source: str, file: Path, fewest: int = FEWEST_WORDS) -> Iterator[Message]:
    """Those of one file."""
    tree = ast.parse(source)
    documentation = {
        id(cast(ast.Expr, node.body[0]).value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    yield from _found(tree, file, "", "", documentation, fewest)


def _found(node: ast.AST, file: Path, function: str, kind: str, skipped: set[int], fewest: int) -> Iterator[Message]:
    if id(node) in skipped:
        return
    text = _text(node)
    if text is not None:
        if kind or (function and _is_a_text(text, fewest)):
            yield Message(file, function, kind, " ".join(text.split()))
        # A placeholder may hold a text of its own.
        for part in _placeholders(node):
            yield from _found(part, file, function, "", skipped, fewest)
        return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not function:
        function = "" if isinstance(node, ast.ClassDef) else node.name
        if isinstance(node, ast.ClassDef):
            for child in ast.iter_child_nodes(node):
                name = f"{node.name}.{child.name}" if isinstance(child, ast.FunctionDef) else node.name
                yield from _found(child, file, name, "", skipped, fewest)
            return
    if isinstance(node, ast.Assign) and not function and isinstance(node.targets[0], ast.Name):
        function = node.targets[0].id
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        kind = " or ".join(_names(node.exc.func))
        for argument in node.exc.args:
            yield from _found(argument, file, function, kind, skipped, fewest)
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "warn":
        kind = "UserWarning"
    elif isinstance(node, ast.Call) and kind:
        kind = ""  # An argument of another function.
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.arg) or child in getattr(node, "decorator_list", ())):
            yield from _found(child, file, function, kind, skipped, fewest)


def _is_a_text(text: str, fewest: int) -> bool:
    """Whether a string may be a part of a message: not a regular expression, a list of words, or HTML."""
    words = re.findall(r"[A-Za-z']{2,}", re.sub(r"\{.*?\}", "", text))
    is_code = re.search(r"\(\?|\\[dw]|\.\*[()]|</?\w+|margin", text)
    is_a_list = len(words) > 4 and re.fullmatch(r"[\w ]+", text) and not _SMALL_WORDS.intersection(words)
    return len(words) >= fewest and not is_code and not is_a_list


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.IfExp):
        return [*_names(node.body), *_names(node.orelse)]
    return [ast.unparse(node).rpartition(".")[2]]


def _text(node: ast.AST) -> str | None:
    """The text of a string expression, with its placeholders; None for other expressions."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _text(part) or "" if isinstance(part, ast.Constant) else _placeholder(part.value, part.conversion)
            for part in node.values
            if isinstance(part, (ast.Constant, ast.FormattedValue))
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        if left is None and right is None:
            return None
        return (left if left is not None else "{…}") + (right if right is not None else "{…}")
    return None


def _placeholder(value: ast.AST, conversion: int) -> str:
    if isinstance(value, ast.Call) and len(value.args) == 1 and isinstance(value.func, (ast.Name, ast.Attribute)):
        inner = ast.unparse(value.args[0])
        if re.fullmatch(r"[\w.]+", inner):
            return "{" + inner.rpartition(".")[2].strip("_") + "}"
    written = ast.unparse(value)
    simple = re.fullmatch(r"[\w.]+(?:\[\w+\])?", written)
    shown = "{" + (written.rpartition(".")[2].strip("_") if simple else "…") + "}"
    return f"'{shown}'" if conversion == ord("r") and simple else shown


def _placeholders(node: ast.AST) -> list[ast.AST]:
    return [child.value for child in ast.walk(node) if isinstance(child, ast.FormattedValue)]
