"""Shows the docstrings of wdjax on the site: the facts as sections of their own, signatures with the names of types.

A docstring is plain text: one sentence, then sections like `Rule:   u <- u + ...` and `Args:`, then an example. In it,
`name` is code, and stars are stars. In a signature, `Rate` is called Rate, and links to what a rate may be.
"""

import ast
import inspect
import re
import textwrap
from typing import Any

from names import full_name
from sphinx.application import Sphinx

from wdjax._engine.types import Number

WORDS = "Rule Place Units Source Args Returns Raises Warns Attributes Example"
HEAD = re.compile(rf"((?:{'|'.join(WORDS.split())})(?:, (?:Args|Returns|Raises|Warns))*):(?: +|$)(.*)")
ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")
ROW = re.compile(r"(?<!.)(\w+)  +")
CODE = re.compile(r"(`[^`]+`)")
# What people make: their signatures have the arguments. All other classes are results, protocols and states.
MADE = ("wdjax._engine.anchors", "wdjax.constraints", "wdjax.penalties.", "wdjax.on_weights.bounds")


def inline(text: str) -> str:
    """Plain text as reStructuredText: `name` becomes a link or code, and everything else stays as it is."""
    pieces = CODE.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            code = piece.strip("`")
            named = re.fullmatch(r"([A-Za-z_][\w.]*)(\(\))?", code)
            full = named and full_name(named[1])
            pieces[number] = f":py:obj:`{code} <{full}>`" if full else f"``{code}``"
            # Code must end before a letter or a digit.
            if number + 1 < len(pieces) and re.match(r"\w", pieces[number + 1]):
                pieces[number] += "\\ "
        else:
            pieces[number] = re.sub(r"([*|\\])|(?<=\w)(_)(?!\w)", r"\\\1\2", piece)
    return "".join(pieces)


def inlined(lines: list[str]) -> list[str]:
    """The lines of a paragraph. Code may go over the end of one."""
    return inline(" ".join(line.strip() for line in lines)).split("\n")


def indented(lines: list[str]) -> list[str]:
    return [f"    {line}" if line else "" for line in lines]


def dedented(first: str, rest: list[str]) -> list[str]:
    body = textwrap.dedent("\n".join(rest)).rstrip()
    return [first, *body.split("\n")] if first and body else [first] if first else body.strip("\n").split("\n")


def prose(lines: list[str]) -> list[str]:
    """Paragraphs; an indented block, as a diagram or a formula, stays as it is."""
    said: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        if block.lstrip().startswith(">>>"):
            said += ["", *textwrap.dedent(block).split("\n")]
        elif block.startswith("    "):
            said += ["", "::", "", *indented(textwrap.dedent(block).split("\n"))]
        else:
            said += ["", *inlined(block.split("\n"))]
    return [*said, ""]


def entries(lines: list[str]) -> list[str]:
    """`name: text` with indented continuation, one below the other, as a definition list."""
    said: list[str] = []
    at = 0
    while at < len(lines):
        end = at + 1
        while end < len(lines) and (not lines[end] or lines[end].startswith(" ")):
            end += 1
        entry = ENTRY.fullmatch(lines[at])
        assert entry, lines[at]
        said += ["", f"``{entry[1]}``", *indented(inlined([entry[2], *filter(None, lines[at + 1 : end])]))]
        at = end
    return said


def section(head: str, body: list[str]) -> list[str]:
    if head == "Example":
        return ["", f":{head}:", "", *indented(body), ""]
    if head == "Rule":
        # A line for each statement; a remark in brackets has one already.
        text = re.sub(r"\n(?!\(\w+:)", " ", "\n".join(body)).replace("`", "")
        body = re.sub(r";\s+(?=\w+(?:\([\w, ]*\))? (?:<-|=) )", "\n", text).split("\n")
        return ["", ":Rule:", "    .. code-block:: text", "        :class: rule", "", *indented(indented(body)), ""]
    if head in ("Args", "Attributes", "Raises", "Warns") and body and ENTRY.fullmatch(body[0]):
        return ["", f":{head}:", *indented(entries(body)), ""]
    # A text may go on with a table of its own: names, two or more spaces, what they are.
    gap = body.index("") if "" in body else len(body)
    table = [ROW.sub(r"\1: ", line) for line in textwrap.dedent("\n".join(body[gap + 1 :])).split("\n")]
    return ["", f":{head}:", *indented([*inlined(body[:gap]), *(entries(table) if any(table) else [])]), ""]


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
    app.env.note_dependency(__file__)
    lines[:] = restructured(lines)


def on_signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """The signature as it is written in the source, where `Rate` is called Rate."""
    if what == "class":
        is_made = obj.__module__.startswith(MADE) and not getattr(obj, "_is_protocol", False)
        shown = str(inspect.signature(obj)).removesuffix(" -> None") if is_made else ""
        return shown.replace(inspect.formatannotation(Number), "Number").replace("typing.", ""), None
    if what not in ("function", "method"):
        return None
    written = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]
    assert isinstance(written, ast.FunctionDef)
    for argument in ast.walk(written.args):
        if isinstance(argument, ast.arg) and isinstance(argument.annotation, ast.Constant):
            argument.annotation = ast.Name(str(argument.annotation.value))  # "Plan" within the class itself.
    arguments = ast.unparse(written.args).replace("MISSING", "...")
    if what == "method":
        arguments = re.sub(r"^self(, )?", "", arguments)
    result = ast.unparse(written.returns).strip("'\"") if written.returns else None
    return f"({arguments})", {"Converted": "float | jax.Array", "None": None}.get(str(result), result)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", on_docstring)
    app.connect("autodoc-process-signature", on_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
