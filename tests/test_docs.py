"""Every cell of the site's pages runs, those of one page one after the other; links lead somewhere."""

import re
from pathlib import Path

import pytest
from slow import slow_but

import wdjax

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CELL = re.compile(r"^```\{code-cell\} python\n((?::.*\n)*)(.*?)^```$", re.S | re.M)
PAGE_OF = {page.stem: page for page in PAGES if CELL.search(page.read_text())}
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


def test_the_pages_have_different_names() -> None:
    assert len({page.stem for page in PAGES}) == len(PAGES)


# What the cells print is computed anew by the build of the site, so there is nothing to compare it with.
@pytest.mark.peers
@pytest.mark.parametrize("name", slow_but(PAGE_OF, *(PAGE_OF.keys() - {"many_devices", "wrappers_and_faults"})))
def test_the_cells_of_the_page_run(name: str) -> None:
    page = PAGE_OF[name]
    namespace: dict[str, object] = {"__name__": page.stem}
    for number, (options, cell) in enumerate(CELL.findall(page.read_text())):
        code = compile(cell, f"{page.name}, cell {number}", "exec")
        if "raises-exception" in options:
            with pytest.raises(Exception):  # noqa: B017, PT011  # The page shows which.
                exec(code, namespace)
        else:
            exec(code, namespace)


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *PAGES]), ids=lambda page: page.stem)
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


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_page_of_methods_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "explanations" / "methods.md").read_text(), re.M)
    listed = set(re.findall(r"\w+", " ".join(rows)))
    rooms = "in_loss in_gradient in_update on_weights low_precision low_rank penalties constraints"
    modules = tuple(f"wdjax.{room}" for room in rooms.split())
    methods = {name for name, value in vars(wdjax).items() if getattr(value, "__module__", "").startswith(modules)}
    methods |= {"with_decoupled_decay", "with_sparse_decay", "with_lazy_decay", "relative", "corrected", "EMA"}
    assert sorted(methods - listed - {"Penalty", "ProximalPenalty", "apply_updates"}) == []
    assert len(methods) > 30
