"""Shows the docstrings of wdjax on the site: the facts as sections of their own, signatures with the names of types.

A docstring is plain text: one sentence, then sections like `Rule:   u <- u + ...` and `Args:`, then an example. In it,
`name` is code, and stars are stars.
"""

import ast
import inspect
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

import wdjax

WORDS = "Rule Place Units Source Args Returns Raises Warns Attributes Example"
HEAD = re.compile(rf"((?:{'|'.join(WORDS.split())})(?:, (?:Args|Returns|Raises|Warns))*):(?: +|$)(.*)")
ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")
PUBLIC = {name for name in vars(wdjax) if not name.startswith("_")}


def inline(text: str) -> str:
    """Plain text as reStructuredText: `name` becomes a link or code, and everything else stays as it is."""
    pieces = re.split(r"(`[^`]+`)", text)
    for number, piece in enumerate(pieces):
        if number % 2:
            name = piece.strip("`")
            public = name.removeprefix("wdjax.").split(".")[0] in PUBLIC and re.fullmatch(r"[\w.]+", name)
            pieces[number] = f":py:obj:`~wdjax.{name.removeprefix('wdjax.')}`" if public else f"``{name}``"
            # Code must end before a letter or a digit.
            if number + 1 < len(pieces) and re.match(r"\w", pieces[number + 1]):
                pieces[number] += "\\ "
        else:
            pieces[number] = re.sub(r"([*|\\])|(?<=\w)(_)(?!\w)", r"\\\1\2", piece)
    return "".join(pieces)


def indented(lines: list[str]) -> list[str]:
    return [f"    {line}" if line else "" for line in lines]


def dedented(first: str, rest: list[str]) -> list[str]:
    body = textwrap.dedent("\n".join(rest)).strip("\n").split("\n") if any(rest) else []
    return ([first] if first else []) + body


def prose(lines: list[str]) -> list[str]:
    """Paragraphs; an indented block, as a diagram or a formula, stays as it is."""
    said: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        if block.lstrip().startswith(">>>"):
            said += ["", *textwrap.dedent(block).split("\n")]
        elif block.startswith("    "):
            said += ["", "::", "", *indented(textwrap.dedent(block).split("\n"))]
        else:
            said += ["", *(inline(line.strip()) for line in block.split("\n"))]
    return [*said, ""]


def entries(lines: list[str]) -> list[str]:
    """`name: text` with indented continuation, one below the other, as a definition list."""
    said: list[str] = []
    for line in lines:
        entry = ENTRY.fullmatch(line)
        if entry and not line.startswith(" "):
            said += ["", f"``{entry[1]}``", f"    {inline(entry[2])}"]
        else:
            said.append(f"    {inline(line.strip())}" if said else inline(line.strip()))
    return said


def section(head: str, body: list[str]) -> list[str]:
    if head == "Example":
        return ["", f":{head}:", "", *indented(body), ""]
    if head == "Rule":
        return ["", ":Rule:", "    .. code-block:: text", "        :class: rule", "", *indented(indented(body)), ""]
    are_entries = head in ("Args", "Attributes") and body and ENTRY.fullmatch(body[0])
    text = entries(body) if are_entries else [inline(line.strip()) for line in body]
    return ["", f":{head}:", *indented(text), ""]


def restructured(lines: list[str]) -> list[str]:
    said: list[str] = []
    at = 0
    while at < len(lines):
        head = HEAD.fullmatch(lines[at])
        end = at + 1
        if head:
            # A section goes on to the next head, or to a paragraph at the margin after an empty line.
            while end < len(lines) and not HEAD.fullmatch(lines[end]):
                if lines[end] and not lines[end].startswith(" ") and not lines[end - 1]:
                    break
                end += 1
            said += section(head[1], dedented(head[2], lines[at + 1 : end]))
        else:
            while end < len(lines) and not HEAD.fullmatch(lines[end]):
                end += 1
            said += prose(lines[at:end])
        at = end
    return said


def on_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(lines)


def on_signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """The signature as it is written in the source, where `Rate` is called Rate."""
    if what != "function":
        return None
    written = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]
    assert isinstance(written, ast.FunctionDef)
    return f"({ast.unparse(written.args)})", ast.unparse(written.returns) if written.returns else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", on_docstring)
    app.connect("autodoc-process-signature", on_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
