"""Arrays of which no process has all, and the example that trains on several processes."""

import os
import pickle
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from load_example import load_example

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def run_together() -> Callable[..., None]:
    return load_example("_processes").run_together


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example("train_on_processes")


@pytest.mark.slow
def test_nothing_fetches_what_is_on_another_process(run_together: Callable[..., None]) -> None:
    run_together(TESTS / "several_processes.py", 2, [], limit=250)


def script(folder: Path, body: str) -> Path:
    path = folder / "worker.py"
    start = "import os, pathlib, sys, time\n_, _, index, count, address, folder = sys.argv\n"
    note = "(pathlib.Path(folder) / index).write_text(str(os.getpid()))\n"
    path.write_text(start + note + textwrap.dedent(body))
    return path


def assert_ended(folder: Path, count: int = 2) -> None:
    for index in range(count):
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / str(index)).read_text()), 0)


def test_when_one_process_fails_the_others_are_ended_and_it_is_shown(
    run_together: Callable[..., None], tmp_path: Path
) -> None:
    body = """
        while not all((pathlib.Path(folder) / i).exists() for i in "01"):
            time.sleep(0.01)
        if index == "1":
            print("\\n".join(f"line {i}" for i in range(100)))
            sys.exit("this is why")
        time.sleep(1000)
    """
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^process 1 of 2 failed \(exit code 1\):\nline") as raised:
        run_together(script(tmp_path, body), 2, [str(tmp_path)], limit=500)
    assert time.monotonic() - start < 100
    assert "this is why" in str(raised.value)
    assert "line 99" in str(raised.value)
    assert "line 50" not in str(raised.value)
    assert_ended(tmp_path)


@pytest.mark.slow
def test_processes_that_take_too_long_are_ended(run_together: Callable[..., None], tmp_path: Path) -> None:
    # As JAX does, they take a plain request to end for a notice.
    body = """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(index, count, os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"], flush=True)
        time.sleep(1000)
    """
    path = script(tmp_path, body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cuda")
        with pytest.raises(TimeoutError, match=r"not done in time.\nprocess 0:\n0 2 cpu 2\nprocess 1:\n1 2 cpu 2"):
            run_together(path, 2, [str(tmp_path)], limit=6)
    assert_ended(tmp_path)


def test_each_process_gets_the_same_free_address(run_together: Callable[..., None], tmp_path: Path) -> None:
    run_together(script(tmp_path, "(pathlib.Path(folder) / f'of {index}').write_text(address)"), 2, [str(tmp_path)], 60)
    addresses = {(tmp_path / f"of {index}").read_text() for index in range(2)}
    assert len(addresses) == 1
    host, _, port = addresses.pop().partition(":")
    assert host == "127.0.0.1"
    assert int(port) > 1023


def fake_runs(example: Any, patch: pytest.MonkeyPatch, change: Callable[[Any, Any, Any], None]) -> None:
    """Lets the example compare results that are made up: on the processes 2^-20 more than on one, then `change`."""
    start = example.MLP().init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    start = jax.tree.map(lambda x: np.asarray(x) + np.float32(1.0), start)

    def result(factor: float, first: int) -> dict[str, Any]:
        params = jax.tree.map(lambda x: x * np.float32(factor), start)
        state = (params, {"count": np.int32(20), "mu": params})
        return {
            "first": first,
            "losses": list(np.linspace(2.0, 1.0, 20)[first:]),
            "on the way": {step: params for step in (10, 20) if step > first},
            "state": jax.tree.map(np.copy, state),
            "bytes": 1024,
        }

    single, whole, resumed = result(1.0, 0), result(1.0 + 2.0**-20, 0), result(1.0 + 2.0**-20, 10)
    change(single, whole, resumed)
    left = [whole, resumed]

    def run_together(script: Path, count: int, arguments: Sequence[str], limit: float) -> None:
        run = left.pop(0)
        (Path(arguments[1]) / f"from_{run['first']}.pickle").write_bytes(pickle.dumps(run))

    patch.setattr(example, "train", lambda mesh, epochs, directory: single)
    patch.setattr(example, "run_together", run_together)


def test_the_example_returns_what_it_checked(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_runs(example, monkeypatch, lambda single, whole, resumed: None)
    rows = example.main(["--quick", "--out", str(tmp_path / "x.png")])
    assert rows["checks"]["first"] == 10
    assert rows["checks"]["arrays that differ"] == 0
    np.testing.assert_allclose(rows["checks"]["difference"], 2.0**-20, rtol=0.2)  # Of weights rounded at 2^-24.
    assert rows["one process"]["KiB a device"] == 1.0


def last_bit(array: np.ndarray) -> None:
    array.view(np.uint32).flat[-1] ^= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda single, whole, resumed: last_bit(resumed["state"][0]["Dense_1"]["kernel"]),
            "^1 arrays of the restored",
        ),
        (lambda single, whole, resumed: last_bit(whole["state"][1]["mu"]["Dense_0"]["bias"]), "^1 arrays of the rest"),
        (lambda single, whole, resumed: resumed["losses"].__setitem__(3, 1.5), "^1 arrays of the restored"),
        (lambda single, whole, resumed: single["state"][0]["Dense_1"]["bias"].__imul__(1.001), "differ by 1.0e-03 of"),
        (lambda single, whole, resumed: single["state"][0]["Dense_1"]["bias"].fill(np.nan), "differ by nan of"),
    ],
)
def test_the_example_raises_where_the_runs_part(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any, words: str
) -> None:
    fake_runs(example, monkeypatch, change)
    with pytest.raises(AssertionError, match=words):
        example.main(["--quick", "--out", str(tmp_path / "x.png")])
