"""The examples run from a shell, without a warning, and leave a table and a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slow import slow_but

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = ("no decay", "L2 in Adam", "decoupled decay")
ROWS = {
    "train_digits": METHODS,
    "train_digits_nnx": METHODS,
    "grokking": METHODS,
    "train_digits_pmap": ("pmap", "one device", "Replicas of parameters and optimizer state (8): equal bit by bit."),
    "train_on_processes": (
        "2 processes  ",
        "2 processes, restored",
        "one process",
        "Restored after 10 of 20 steps: ends equal to the uninterrupted run, bit by bit.",
    ),
    "monitor_equilibrium": tuple(
        f"{group}, {run}"
        for group in ("hidden", "head")
        for run in ("learns, small start", "learns, large start", "random gradients")
    ),
    "decoupling": tuple(
        f"{network}, {method}"
        for network in ("plain", "normalized")
        for method in ("L2 in Adam", "independent decay", "decoupled decay")
    ),
    "sweep_weight_decay": ("the book's 3", "best on validation data, all seeds", "each seed's own choice"),
    "tune_weight_decay_by_gradient": ("sweep", "from 0.1", "from 0.0001", "each layer its own"),
    "high_dimensional_regression": tuple(
        f"lambda = {lam}, in the {place}" for lam in (0, 3) for place in ("loss", "gradient", "update")
    ),
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("[!_]*.py")} == set(ROWS)


@pytest.mark.parametrize("name", slow_but(ROWS, "train_digits"))
def test_example(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "x.png"
    script = [str(EXAMPLES / f"{name}.py"), "--quick", "--out", str(picture)]
    # Without the devices that conftest.py emulates: a user has none of them.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-W", "error", *script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    lines = done.stdout.splitlines()
    for row in ROWS[name]:
        assert any(line.startswith(row) for line in lines), done.stdout
    assert picture.stat().st_size > 10_000
    assert picture.read_bytes().startswith(b"\x89PNG")
