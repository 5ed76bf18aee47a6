"""What surrounds the code: one version everywhere, configuration that parses, and a guide that names what exists."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import wdjax

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()
PARTS = re.findall(r"^(\w+)\(\) \{", CI, re.M)
CONFIGURATION = sorted(
    [*(ROOT / ".github").rglob("*.yml"), *ROOT.glob(".*.yaml"), ROOT / "CITATION.cff"], key=lambda path: path.name
)


def read(*path: str) -> Any:
    return yaml.safe_load(ROOT.joinpath(*path).read_text())


@pytest.mark.parametrize("path", CONFIGURATION, ids=lambda path: path.name)
def test_configuration_is_a_mapping(path: Path) -> None:
    assert len(CONFIGURATION) == 7
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_there_is_one_version() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "wdjax/__init__.py"
    assert read("CITATION.cff")["version"] == wdjax.__version__
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    assert newest == wdjax.__version__


def test_the_citation_agrees_with_the_metadata() -> None:
    citation, project = read("CITATION.cff"), PYPROJECT["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert citation["url"] == project["urls"]["Documentation"]
    assert citation["repository-code"] == project["urls"]["Source"]


def test_what_the_source_distribution_includes_exists() -> None:
    for name in PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert list(ROOT.glob(name.lstrip("/"))), name


def quoted() -> list[str]:
    """The words of all code in the guide, within a line and in blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, re.S)
    within: list[str] = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", GUIDE, flags=re.S))
    return [word for code in [*within, *blocks] for word in code.split()]


def test_each_path_in_the_guide_exists() -> None:
    made = ("out/", "build/", "dist/", ".venv/", "(", ".venv'", "'", "wheel/")  # By the commands themselves.
    paths = {word.rstrip(".,;)") for word in quoted() if "/" in word or re.search(r"\.(py|md|toml|txt|cff)$", word)}
    paths = {path for path in paths if not path.startswith(made)} - {"vq/codebook"}
    assert len(paths) > 50
    missing = {path for path in paths if not (ROOT / path).exists() and not (ROOT / "wdjax" / path).exists()}
    assert missing == set()


def test_each_name_in_the_guide_exists() -> None:
    tops = ("wdjax", "tests", "benchmarks", "examples")
    files = [path for top in tops for path in (ROOT / top).rglob("*.py") if path != Path(__file__)]
    source = " ".join(path.read_text() for path in [*files, ROOT / "pyproject.toml"])
    names = set(re.findall(r"`(_?[A-Za-z]\w*)(?:\(\w*\)|=\w+)?`", re.sub(r"```.*?```", "", GUIDE, flags=re.S)))
    assert {"KINDS", "ROWS", "_named", "LeafRule", "is_per_step"} <= names
    assert {name for name in names if not re.search(rf"\b{name}\b", source)} == set()


def test_each_command_of_the_guide_is_one_that_ci_or_the_guide_explains() -> None:
    assert set(re.findall(r"bash \.ci/run((?: \w+)*)", GUIDE)) == {"", " style", " newest oldest style site slow"}
    assert {"newest", "slow", "oldest", "style", "site"} <= set(PARTS)
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[(\w+)\]'", GUIDE)) <= set(extras)
    assert any("pre-commit" in requirement for requirement in extras["dev"])
    assert [extra["extra_requirements"] for extra in read(".readthedocs.yaml")["python"]["install"]] == [["docs"]]


def test_hosted_ci_runs_each_part_of_ci_and_nothing_else() -> None:
    workflow = read(".github", "workflows", "ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    (job,) = workflow["jobs"].values()
    runs = {step["part"]: step["python"] for step in job["strategy"]["matrix"]["include"]}
    parts = {name for part in runs for name in re.findall(r"\w+", part.rpartition("&&")[2])}
    default = re.search(r"set -- (.*)$", CI, re.M)
    assert default
    assert parts == {"slow", *default[1].split()} <= set(PARTS)
    uses, commands = [step.get("uses") for step in job["steps"]], [step.get("run") for step in job["steps"]]
    assert [command for command in commands if command] == ['bash .ci/run "$PART"']
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in uses if action)
    oldest, *_, newest = sorted(re.findall(r":: (3\.\d+)", " ".join(PYPROJECT["project"]["classifiers"])))
    assert runs["oldest"] == oldest == PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert {python for part, python in runs.items() if part != "oldest"} == {newest}


def test_the_hooks_are_the_checks_of_ci() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    entries = " ".join(hook["entry"] for hook in repository["hooks"])
    checks = re.findall(r"^  \$bin/((?:ruff \w+)|pyright)", CI, re.M)
    assert checks == ["ruff check", "ruff format", "pyright"]
    assert all(check in entries for check in checks)


def template(name: str) -> dict[str, dict[str, Any]]:
    """The fields of an issue form, by id."""
    form = read(".github", "ISSUE_TEMPLATE", f"{name}.yml")
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"])
    return fields


@pytest.mark.peers  # Adam of Optax.
def test_a_bug_report_asks_for_the_plan_the_audit_and_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    fields = template("bug_report")
    assert {"plan", "audit", "versions"} <= {name for name, field in fields.items() if field["validations"]["required"]}
    given = {
        "wdjax": wdjax,
        "params": {"kernel": 1.0},
        "weight_decay": 0.1,
        "mask": wdjax.only("kernel"),
        "optimizer": wdjax.adamw(0.1, 0.1),
        "make_optimizer": lambda lr: wdjax.adamw(lr, 0.1),
    }
    for name in ("plan", "audit"):
        calls = re.findall(r"`(print\(wdjax\..*?)`", fields[name]["attributes"]["description"])
        assert len(calls) == {"plan": 1, "audit": 2}[name]
        for call in calls:
            exec(call, given)
    (command,) = re.findall(r'`python -c "(.*?)"`', fields["versions"]["attributes"]["description"])
    exec(command, {})
    assert f"wdjax {wdjax.__version__} optax" in capsys.readouterr().out


def test_a_method_request_asks_for_paper_formula_and_code() -> None:
    fields = template("method_request")
    assert {"paper", "formula", "place", "code"} <= {
        name for name, field in fields.items() if field.get("validations", {}).get("required")
    }


def test_short_pages_stay_short() -> None:
    for name, lines in ((".github/pull_request_template.md", 5), ("SECURITY.md", 3)):
        assert len((ROOT / name).read_text().splitlines()) == lines
