"""The structure of the house: imports run one way, docstrings hold their facts, and what README shows runs."""

import ast
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

import pytest
import registry

import wdjax

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "wdjax").rglob("*.py")
}
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
PUBLIC = [name for name in NAMES if inspect.isfunction(vars(wdjax)[name]) or inspect.isclass(vars(wdjax)[name])]


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
            optional = {"testing.py": {"chex"}, "_plan.py": {"rich"}, "table.py": {"rich"}}
            assert foreign <= optional.get(path.name, set()), path


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_docstring_has_the_facts(name: str) -> None:
    value = getattr(wdjax, name)
    doc = inspect.getdoc(value) or ""
    assert doc.partition("\n")[0].endswith((".", ":")) or "." in doc.partition("\n\n")[0], name
    if not inspect.isfunction(value):
        return
    signature = inspect.signature(value)
    facts = [">>>"]
    if not value.__module__.startswith(("wdjax.paths", "wdjax._engine")):  # What chooses parameters is shorter.
        facts += ["Returns", "Raises", *(["Args"] if signature.parameters else [])]
    if getattr(signature.return_annotation, "__name__", "") in ACTING or value.__module__ == "wdjax.in_loss":
        facts += ["Rule:", "Place:", "Units:", "Source:"]
    assert [fact for fact in facts if fact not in doc] == []
    assert "Units:  none" not in doc


@pytest.mark.parametrize("name", PUBLIC)
def test_what_acts_has_a_row_in_the_registry(name: str) -> None:
    value = vars(wdjax)[name]
    rows = {word for row in registry.ROWS for word in re.findall(r"\w+", row.name)}
    module = value.__module__
    is_protocol = getattr(value, "_is_protocol", False)
    is_kind = module.startswith(("wdjax.penalties", "wdjax.constraints")) and not is_protocol
    returned = getattr(inspect.signature(value).return_annotation, "__name__", "")
    is_place = module.startswith(("wdjax.in_gradient", "wdjax.in_update", "wdjax.on_weights")) and returned in ACTING
    # A projection of matrices. It has the tests of tests/on_weights.
    assert name in rows or not (is_kind or is_place) or name == "SpectralBall"


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
