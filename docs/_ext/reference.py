"""The lists of the reference: every name, and every message; and the links of the names in signatures."""

import itertools
import pkgutil
import re
from typing import Any

from docstrings import inline
from docutils import nodes
from messages import Message, messages
from names import ELSEWHERE, PLAIN, documented, full_name
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

# The rooms whose functions have the names of what a person calls. Those of the engine serve all of them.
ENGINE = "_engine"


def on_missing_reference(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Names in signatures: those of wdjax by their last part, those of others as plain links."""
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    full = full_name(name)
    objects = env.get_domain("py").objects
    if full in objects:
        found = objects[full]
        return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content, full)
    if ELSEWHERE.get(name):
        return nodes.reference("", "", content, refuri=ELSEWHERE[name], internal=False)
    return content if name in ELSEWHERE or name in PLAIN else None


class PublicNames(SphinxDirective):
    """An alphabetical table of every documented name: the name, what it is in one sentence, and its page."""

    def run(self) -> list[nodes.Node]:
        lines = [".. list-table::", "    :header-rows: 1", "    :class: names", ""]
        lines += ["    * - name", "      - what it is", "      - page"]
        for name, entry in sorted(documented().items(), key=lambda one: one[0].rpartition(".")[2].lower()):
            if entry.kind != "py:module":
                self.env.note_dependency(str(entry.file))
                lines += [
                    f"    * - :py:obj:`{name.removeprefix('wdjax.')} <{name}>`",
                    f"      - {_first(name, entry.text)}",
                ]
                lines += [f"      - :doc:`{entry.file.stem}`"]
        return self.parse_text_to_nodes("\n".join(lines) + "\n")


def _first(name: str, text: str) -> str:
    """The first sentence of a docstring, or of the text that the page itself has."""
    if not text:
        text = inline(" ".join((pkgutil.resolve_name(name).__doc__ or "").partition("\n\n")[0].split()))
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0].rstrip(":.") + "."


class Messages(SphinxDirective):
    """Every text of an error or a warning: a section for each room, and an entry for each function."""

    def run(self) -> list[nodes.Node]:
        found = sorted(messages(), key=lambda one: (one.room == ENGINE, one.room))
        for file in {one.file for one in found}:
            self.env.note_dependency(str(file))
        sections: list[nodes.Node] = []
        for room, those in itertools.groupby(found, lambda one: one.room):
            title = "Any function" if room == ENGINE else f"wdjax.{room}"
            section = nodes.section("", nodes.title(title, title), names=[nodes.fully_normalize_name(title)])
            self.state.document.note_implicit_target(section, section)
            functions = nodes.definition_list(classes=["messages"])
            for name, of_one in itertools.groupby(those, lambda one: one.function):
                texts = nodes.bullet_list("", *(nodes.list_item("", _paragraph(one)) for one in dict.fromkeys(of_one)))
                term = nodes.term("", "", nodes.literal("", name or "import"))
                functions += nodes.definition_list_item("", term, nodes.definition("", texts))
            section += functions
            sections.append(section)
        return sections


def _paragraph(message: Message) -> nodes.paragraph:
    paragraph = nodes.paragraph()
    if message.kind:
        paragraph += [nodes.strong("", message.kind), nodes.Text(": ")]
    for number, piece in enumerate(re.split(r"(\{[^{}: ]*\})", message.text)):
        paragraph += nodes.emphasis("", piece) if number % 2 else nodes.Text(piece)
    return paragraph


def setup(app: Sphinx) -> dict[str, bool]:
    documented.cache_clear()
    full_name.cache_clear()
    app.connect("missing-reference", on_missing_reference)
    app.add_directive("public-names", PublicNames)
    app.add_directive("all-messages", Messages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
