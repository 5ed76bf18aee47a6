"""Every cell of the site's pages runs, those of one page one after the other; links lead somewhere."""

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from slow import slow_but
from test_house import EVERYTHING

import wdjax

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CELL = re.compile(r"^```\{code-cell\} python\n((?::[^\n]*\n)*)(.*?)^```$", re.S | re.M)


def name_of(page: Path) -> str:
    """The page's path in docs/, or the file's name beside it: how_to/sweeps, README."""
    return str(page.with_suffix("").relative_to(ROOT)).removeprefix("docs/")


PAGE_OF = {name_of(page): page for page in PAGES if CELL.search(page.read_text())}
# What belongs to one run on one machine: lines of a log, a traceback, an absolute path.
OF_ONE_RUN = re.compile(
    r"^[IWEF]\d{4} \d\d:\d\d|^Traceback \(|^  File \"|\b\w*Warning: |\.py:\d+: |XLA_FLAGS=\S*/"
    r"|(?<![\w./:*)-])/(?:root|home|work|tmp|usr|opt|mnt|var|etc|Users|private)/|\b[A-Z]:\\\\",
    re.M,
)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """What a link may point at within a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_options_of_a_cell_end_where_its_code_begins() -> None:
    page = "```{code-cell} python\n:tags: [a]\nx = 1\n```\n\n```{code-cell} python\ny = {1: 2}\n```\n"
    assert CELL.findall(page) == [(":tags: [a]\n", "x = 1\n"), ("", "y = {1: 2}\n")]


@pytest.fixture
def x64_as_before() -> Iterator[None]:
    """A page may enable x64 for itself."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


# The build of the site runs all pages, too, and computes what they show.
QUICK = ("index", "tutorial/what_is_added_where", "explanations/which_parameters", "explanations/choosing_a_rate")


@pytest.mark.peers
@pytest.mark.usefixtures("x64_as_before")
@pytest.mark.parametrize("name", slow_but(PAGE_OF, *QUICK))
def test_the_cells_of_the_page_run(name: str) -> None:
    page = PAGE_OF[name]
    namespace: dict[str, object] = {"__name__": page.stem}
    for number, (_, cell) in enumerate(CELL.findall(page.read_text())):
        exec(compile(cell, f"{page.name}, cell {number}", "exec"), namespace)


def missing_names(cells: list[str]) -> list[str]:
    """The names that the code of these cells reads and does not set anywhere."""
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    known = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    known |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) and node.name}
    imports = [alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    known |= {alias.asname or alias.name.partition(".")[0] for alias in imports}
    return sorted({node.id for node in names} - known)


def test_missing_names_are_found() -> None:
    assert missing_names(["import a.b as c\nfor x in c: print(x, y)", "def f(z, *, k): return z + k + y2\n"]) == [
        "y",
        "y2",
    ]


def test_each_section_on_symptoms_needs_only_the_first_cell_and_check() -> None:
    page = PAGE_OF["how_to/my_model_does_not_regularize"].read_text()
    cells = [cell for _, cell in CELL.findall(page)]
    always = [cells[0], next(cell for cell in cells if "def check(" in cell)]
    sections = re.split(r"^##+ (.*)$", page.partition("\n## Which parameters")[2], flags=re.M)[1:]
    assert len(sections) > 40
    for title, section in zip(sections[::2], sections[1::2], strict=True):
        assert missing_names([*always, *(cell for _, cell in CELL.findall(section))]) == [], title


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *PAGES]), ids=name_of)
def test_no_page_holds_a_log_line_a_traceback_or_an_absolute_path(page: Path) -> None:
    assert OF_ONE_RUN.findall(page.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "E1121 17:59:05.171442   13829 slow_operation_alarm.cc:73]",
        "[Compiling module jit for CPU] run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.",
        "/root/.pyenv/versions/3.11.7/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: leaked",
        "Traceback (most recent call last):",
        "saved to /home/me/run",
    ],
)
def test_such_lines_are_found(line: str) -> None:
    assert OF_ONE_RUN.search(line)


# Where this repository is on the web, and what is there.
SITE = "https://wdjax.readthedocs.io/en/latest/"
FILES = re.compile(r"https://(?:github\.com/wdjax/wdjax/blob|raw\.githubusercontent\.com/wdjax/wdjax)/main/")


def links(page: Path) -> list[str]:
    text = prose(page)
    return re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$|(?:src|href)=\"([^\"]+)\"", text, re.M)


def file_of(target: str, page: Path) -> Path | None:
    """The file that a link leads to, or None if it leads out of the repository."""
    if target.startswith(SITE):
        return ROOT / "docs" / f"{target.removeprefix(SITE).removesuffix('.html') or 'index'}.md"
    if FILES.match(target):
        return ROOT / FILES.sub("", target)
    if "://" in target:
        return None
    return page.parent / target if target else page


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=name_of)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in map("".join, links(page)):
        name, _, anchor = target.partition("#")
        file = file_of(name, page)
        assert file is None or file.exists(), target
        assert file is None or not anchor or anchor in anchors(file), target


def test_the_links_of_the_readme_are_absolute() -> None:
    # Package indexes show README.md too, without the files beside it.
    found = ["".join(link) for link in links(ROOT / "README.md")]
    assert len(found) > 20
    assert [link for link in found if not link.startswith("https://")] == []


def test_the_page_of_methods_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "explanations" / "methods.md").read_text(), re.M)
    listed = set(re.findall(r"\w+", " ".join(rows)))
    rooms = "in_loss in_gradient in_update on_weights wrappers low_precision low_rank penalties constraints rates"
    public = [name for name in EVERYTHING if not name.endswith("State")]
    methods = {
        name.rpartition(".")[2]
        for name in public
        if EVERYTHING[name].__module__.startswith(tuple(f"wdjax.{room}" for room in rooms.split()))
    }
    # No methods: protocols, bounds of `cpr`, numbers for the rate of a decay, and what they mean.
    others = {"Penalty", "ProximalPenalty", "Constraint", "AtInit", "WarmStart", "InflectionPoint", "apply_updates"}
    others |= {"freeze", "from_timescale", "from_tokens", "from_normalized", "from_prior"}
    others |= {"timescale", "prior_scale", "equilibrium_rms", "equilibrium_angle"}
    assert others <= methods
    assert sorted((methods | {"EMA"}) - listed - others) == []
    assert len(methods) > 50


@pytest.mark.peers
def test_every_call_on_the_page_of_functions_runs() -> None:
    page = (ROOT / "docs" / "start" / "which_function.md").read_text()
    layer = {"kernel": jnp.ones((2, 2))}
    params = {"embedding": jnp.ones((4, 2)), **layer, "encoder": layer, "hidden": layer}
    optimizer = wdjax.monitor(optax.adam(1e-3))
    numbers = {"lr": 1e-3, "λ": 0.1, "r": 1e-4, "s": 2.0, "b": 256, "f": 0.5, "steps": 1000, "tokens": 1e6}
    trees = {"params": params, "optimizer": optimizer, "state": optimizer.init(params), "mask": wdjax.only("kernel")}
    others = {
        "wdjax": wdjax,
        "optax": optax,
        "print": str,
        "scale": 0.1,
        "examples": 1000,
        "train": lambda key, weight_decay: 0.0,
        "model": None,
        "x": None,
    }
    calls = {call for call in re.findall(r"`([^`]*wdjax\.[^`]*)`", page) if call.endswith(")")}
    assert len(calls) > 40
    for call in calls:
        exec(f"_ = dict({call})" if re.match(r"\w+=", call) else call, {**numbers, **trees, **others})


def test_the_page_of_examples_has_an_entry_for_each() -> None:
    page = (ROOT / "docs" / "start" / "examples.md").read_text()
    entries = re.findall(r"^\[(\w+\.py)\]\((\S+)\)\n: (?:.*\n)+?  `python examples/(\S+)`, \d+ s$", page, re.M)
    repository = "https://github.com/wdjax/wdjax/blob/main/examples"
    scripts = sorted(script.name for script in (ROOT / "examples").glob("[!_]*.py"))
    assert sorted(entries) == [(name, f"{repository}/{name}", name) for name in scripts]
