"""The structure of the house: imports run one way, docstrings hold their facts, and what README shows runs."""

import ast
import dataclasses
import doctest
import graphlib
import importlib
import inspect
import itertools
import pkgutil
import re
import runpy
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import registry

import wdjax
from wdjax.audits import findings

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "wdjax").rglob("*.py")
}
# How the site reads names and messages.
REFERENCE, MESSAGES = (runpy.run_path(str(ROOT / "docs" / "_ext" / f"{name}.py")) for name in ("names", "messages"))
# From the ground up; a module may import only from floors below its own.
FLOORS = [
    {"_engine"},
    {"constraints", "penalties", "paths", "rates", "states"},
    {"in_loss", "in_gradient", "in_update", "on_weights", "low_rank", "low_precision", "plans"},
    {"audits"},
    {"recipes", "wrappers", "telemetry", "testing", "sweeps"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}
# What acts on parameters has the four facts that people get wrong: a transformation, or a term of the loss.
ACTING = ("GradientTransformation", "GradientTransformationExtraArgs")
MODULES = sorted(module.name for module in pkgutil.iter_modules(wdjax.__path__))
NAMES = sorted(name for name, value in vars(wdjax).items() if not name.startswith("_") and not inspect.ismodule(value))
# The types of arguments are aliases: neither functions nor classes, except that Any is a class.
PUBLIC = [
    name
    for name in NAMES
    if inspect.isfunction(vars(wdjax)[name]) or (inspect.isclass(vars(wdjax)[name]) and vars(wdjax)[name] is not Any)
]


def imported(path: Path) -> set[str]:
    """The modules of wdjax that a file imports."""
    found, package = set(), ".".join(path.parent.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("wdjax")):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
            found |= {name if name in FILES else base for name in names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    files = [path for name, path in FILES.items() if name.split(".")[1:2] == [module]]
    used = {name.split(".")[1] for path in files for name in imported(path)} - {module}
    assert files
    assert all(FLOOR[name] < FLOOR[module] for name in used), (module, used)


def test_no_imports_are_circular() -> None:
    graphlib.TopologicalSorter({name: imported(path) for name, path in FILES.items()}).prepare()


def test_no_file_is_longer_than_three_hundred_lines() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_importing_wdjax_needs_no_extra() -> None:
    allowed = {"jax", "numpy", "scipy", "optax", "wdjax"}
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            tops = {name.partition(".")[0] for name in names}
            foreign = {
                name
                for name in tops
                if name not in allowed and name not in importlib.import_module("sys").stdlib_module_names
            }
            optional = {"testing": {"chex"}, "plans": {"rich"}}
            assert foreign <= optional.get(path.parent.name, set()), path


def exported(room: str) -> dict[str, Any]:
    """What a room exports: what its `__init__` imports by `as`, or the classes and functions of a module."""
    module = importlib.import_module(f"wdjax.{room}")
    tree = ast.parse(Path(module.__file__ or "").read_text())
    names = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    names |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found = {name: getattr(module, name) for name in sorted(filter(None, names)) if not name.startswith("_")}
    return {name: value for name, value in found.items() if inspect.isfunction(value) or inspect.isclass(value)}


# What rooms export to each other.
INTERNAL = {
    "constraints": {"is_ours"},
    "paths": {"stacks"},
    "penalties": {
        *("check_kind", "check_strength", "gradient", "is_elementwise", "is_ours", "prox", "rule_of"),
        *("value", "weighted_value"),
    },
    "plans": {"asked", "row_of"},
}
# Everything that people may use, by its shortest name.
EVERYTHING: dict[str, Any] = {
    **{name: getattr(wdjax, name) for name in PUBLIC},
    **{
        f"{room}.{name}": value
        for room in MODULES
        if room != "_engine"
        for name, value in exported(room).items()
        if name not in INTERNAL.get(room, set()) | set(PUBLIC)
    },
}
# These compute closed forms from any numbers.
NEVER_RAISE = {"testing.heavy_ball_weights", "testing.soft_threshold"}


def test_what_is_left_out_of_the_reference_exists() -> None:
    for room, names in INTERNAL.items():
        assert names <= exported(room).keys() - set(PUBLIC), room
    assert EVERYTHING.keys() > NEVER_RAISE


def sections(doc: str) -> dict[str, str]:
    """The facts of a docstring by their heads, and what they say."""
    pieces = re.split(r"^([A-Z][a-z]+(?:, [A-Z][a-z]+)*):(?= |$)", doc, flags=re.M)
    pairs = zip(pieces[1::2], pieces[2::2], strict=True)
    return {head: text.strip() for heads, text in pairs for head in heads.split(", ")}


def fields_of(kind: type) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(getattr(kind, "_fields", ()))


def is_kind(value: Any) -> bool:
    """Whether it is a penalty or a constraint."""
    is_protocol = getattr(value, "_is_protocol", False)
    is_there = value.__module__.startswith(("wdjax.penalties", "wdjax.constraints"))
    return inspect.isclass(value) and is_there and not is_protocol


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_public_docstring_has_the_facts(name: str) -> None:
    value = EVERYTHING[name]
    doc = inspect.getdoc(value) or ""
    said, facts = sections(doc), ["Example"]
    assert doc.partition("\n")[0].endswith((".", ":")) or "." in doc.partition("\n\n")[0], name
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        result = getattr(signature.return_annotation, "__name__", str(signature.return_annotation))
        facts += ["Args"] * bool(signature.parameters) + ["Returns"] * (result != "None")
        facts += ["Raises"] * (name not in NEVER_RAISE)
        if result in ACTING or value.__module__ == "wdjax.in_loss":
            facts += ["Rule", "Place", "Units", "Source"]
        elif name.startswith("rates."):
            facts += ["Rule", "Units", "Source"]
    elif is_kind(value) or value is wdjax.constraints.Constraint:
        facts += ["Rule", "Place", "Units", "Source"] if is_kind(value) else ["Place"]
        facts += ["Args", "Raises"] if fields_of(value) else []
    elif fields_of(value) and value not in (wdjax.EMA, wdjax.Rules):
        told = re.findall(r"^ *((?:\w+, )*\w+): ", said["Attributes"], re.M)
        assert set(fields_of(value)) <= set(", ".join(told).split(", "))
    assert [fact for fact in facts if not said.get(fact)] == []
    assert ">>>" in said["Example"]
    assert not said.get("Units", "").startswith("none")


def test_every_public_name_is_in_the_reference() -> None:
    documented = {name.removeprefix("wdjax."): entry.kind for name, entry in REFERENCE["documented"]().items()}
    kinds = {name: "autofunction" if inspect.isfunction(value) else "autoclass" for name, value in EVERYTHING.items()}
    kinds |= {name: "py:type" for name in NAMES if name not in EVERYTHING}
    assert {name: kind for name, kind in documented.items() if kind != "py:module"} == kinds


def test_the_examples_of_the_types_run() -> None:
    page = ROOT / "docs" / "reference" / "types.md"
    outcome = doctest.testfile(str(page), module_relative=False)
    assert outcome.failed == 0
    for text in (entry.text for entry in REFERENCE["documented"]().values() if entry.kind == "py:type"):
        assert ">>>" in text


def test_every_page_of_the_reference_is_in_the_contents() -> None:
    pages = {f"reference/{page.stem}" for page in (ROOT / "docs" / "reference").glob("*.md")}
    assert pages == set(re.findall(r"^reference/\w+$", (ROOT / "docs" / "index.md").read_text(), re.M))


def literal(text: str) -> list[str]:
    """What a message says whatever its placeholders hold: parts of sentences of three words or more."""
    return [piece.strip(" :.,") for piece in re.split(r"\{[^{}]*\}|[.:;?] ", text) if len(piece.split()) > 2]


def test_the_messages_that_are_explained_exist_and_all_warnings_are_explained() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text().partition("\n## Findings")[0]
    texts = [message.text for message in MESSAGES["messages"](1)]
    headings = re.findall(r"^### (.*)$", page, re.M)
    assert len(headings) > 25
    for heading in headings:
        assert any(heading.partition(" what this")[0] in text for text in texts), heading
    for quoted in re.findall(r"^`([^`]+)`$", page, re.M):
        said = " ".join(quoted.split())
        assert any(piece in said for text in texts for piece in literal(text)), said
    for message in MESSAGES["messages"]():
        if message.kind == "UserWarning":
            assert any(piece in " ".join(page.split()) for piece in literal(message.text)), message.text


def test_every_finding_is_explained_once_and_links_to_its_section_on_symptoms() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    parts = re.findall(r"^### (Wrong|Suspect|Note).*\n((?:(?!##).*\n)*)", page, re.M)
    entries = {
        name: (harm.lower(), text)
        for harm, part in parts
        for name, text in re.findall(r"^(.+)\n: ((?:.+\n)+)", part, re.M)
    }
    harms = {name: harm for name, (harm, _) in entries.items()}
    assert set(harms) == set(findings.NAMES)
    assert {check.name: check.harm for check in findings.CHECKS}.items() <= harms.items()
    symptoms = (ROOT / "docs" / "how_to" / "my_model_does_not_regularize.md").read_text()
    rows = re.findall(r"^\| (.*\".*) \| .*\]\((#.*)\) \|$", symptoms, re.M)
    named = [(name, anchor) for said, anchor in rows for name in re.findall(r'"(.+?)"', said) if name in harms]
    assert len(named) > 12
    for name, anchor in named:
        assert f"(../how_to/my_model_does_not_regularize.md{anchor})" in entries[name][1], name
    audit = (ROOT / "docs" / "explanations" / "audit.md").read_text()
    listed = re.findall(r"^\| \[(Wrong|Suspect|Note)\]\(.*?\): .* \| (.*) \|$", audit, re.M)
    assert {name: harm.lower() for harm, names in listed for name in names.split(", ")} == harms


def test_every_text_of_an_error_is_listed() -> None:
    source = """
class Kind:
    "A docstring of more than five words."
    def check(self, x):
        hint = f" Did you mean to write {x} here?" if x else ""
        raise (ValueError if x else TypeError)(f"kind: {shown(x)} is wrong, got {x.shape!r}." + hint)

def warn_of(where):
    checks.warn(f"{where}: the weights are all zero.")
    raise KeyError(key) from None
"""
    found = [tuple(message)[1:] for message in MESSAGES["messages_of"](source, ROOT / "wdjax" / "kind.py")]
    assert found == [
        ("Kind.check", "", "Did you mean to write {x} here?"),
        ("Kind.check", "ValueError or TypeError", "kind: {x} is wrong, got '{shape}'.{…}"),
        ("warn_of", "UserWarning", "{where}: the weights are all zero."),
    ]
    kinds = [message.kind for message in MESSAGES["messages"]()]
    assert kinds.count("ValueError") > 100
    assert kinds.count("UserWarning") >= 8


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_acts_has_a_row_in_the_registry(name: str) -> None:
    value = EVERYTHING[name]
    rows = {word for row in registry.ROWS for word in re.findall(r"\w+", row.name)}
    returned = getattr(inspect.signature(value).return_annotation, "__name__", "")
    rooms = ("wdjax.in_gradient", "wdjax.in_update", "wdjax.on_weights", "wdjax.wrappers")
    is_place = value.__module__.startswith(rooms) and returned in ACTING and name != "freeze"
    # A projection of matrices. It has the tests of tests/on_weights.
    assert name.split(".")[-1] in rows or not (is_kind(value) or is_place) or name == "SpectralBall"


def test_the_top_has_no_states_and_no_more_than_sixty_five_names() -> None:
    assert len(NAMES) <= 65
    assert [name for name in NAMES if name.endswith("State")] == []


@pytest.mark.peers
def test_the_program_that_is_checked_in_strict_mode_runs() -> None:
    importlib.import_module("typed_program")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.peers
def test_the_code_in_the_readme_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    blocks = readme_blocks("python")
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    tables = re.findall(r"^    path  (?:.*\n(?:    .*\n|\n(?=    ))*)", (ROOT / "README.md").read_text(), re.M)
    assert len(tables) == 2
    for table in tables:
        assert textwrap.dedent(table).strip() in printed
    for said in re.findall(r"^ *print\(.*\)  # (.+)$", "\n".join(blocks), re.M):
        assert said.removesuffix(" ...") in printed


def test_names_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"`wdjax\.(\w+)", text)):
        assert hasattr(wdjax, name) or name in MODULES, name


def test_ci_runs_the_two_commands_of_the_readme_whatever_python3_is() -> None:
    commands = [block.strip() for block in readme_blocks("sh")]
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)
    for versions in ("newest", "oldest"):
        assert f"bash tests/versions.sh {versions}" in (ROOT / ".ci" / "run").read_text()


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    del extras["docs"], extras["dev"]  # These run with the newest only.
    requirements = [*project["dependencies"], *itertools.chain(*extras.values())]
    assert not any("<" in requirement or "==" in requirement for requirement in requirements)  # No upper bounds.
    bounds = dict(requirement.split(">=") for requirement in requirements if ">=" in requirement)
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert set(pinned) == set(bounds)
    for name, version in pinned.items():
        assert f"{version}.".startswith(f"{bounds[name]}."), name


def test_version_is_in_the_changelog() -> None:
    assert f"## {wdjax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["name"] == "wdjax"


def test_every_fault_of_the_mutation_run_can_be_put_in() -> None:
    listed = runpy.run_path(str(ROOT / "tests" / "mutations" / "mutations.py"))["MUTATIONS"]
    assert len(listed) >= 60
    assert len({mutation.name for mutation in listed}) == len(listed)
    for mutation in listed:
        assert (ROOT / "wdjax" / mutation.file).read_text().count(mutation.old) == 1, mutation.name
        assert all((ROOT / "tests" / name).exists() for name in mutation.tests), mutation.name
