"""A peer that does not import skips its tests, unless the run is meant to have it."""

import sys
from pathlib import Path

import pytest
from peer import peer


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calls_what_jax_removed.py").write_text("import jax\n\njax.no_longer_there()\n")
    (tmp_path / "imports_what_jax_removed.py").write_text("from jax import no_longer_there\n")
    (tmp_path / "is_not_maintained.py").write_text("import warnings\n\nwarnings.warn('no', DeprecationWarning)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("PEERS", raising=False)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", ["calls_what_jax_removed", "imports_what_jax_removed", "is_not_there"])
def test_what_does_not_import_is_skipped_or_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.skip.Exception, match=f"{name} does not import: .*Error: "):
        peer(name)
    monkeypatch.setenv("PEERS", "required")
    with pytest.raises((ImportError, AttributeError)):
        peer(name)


@pytest.mark.usefixtures("broken")
def test_a_warning_at_the_import_is_no_error() -> None:
    assert peer("is_not_maintained") is sys.modules["is_not_maintained"]
