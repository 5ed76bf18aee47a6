"""Puts one fault after another into a copy of wdjax and reports which faults the tests catch.

    python tests/mutations/run.py                        # with the default set of tests
    python tests/mutations/run.py --whole                # with the slow tests too
    python tests/mutations/run.py --only "sign" "half"   # only faults whose names contain one of these words

For each fault, the tests that should catch it run first. The others run only if these pass. Two faults run at a time.
"""

import argparse
import concurrent.futures
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
WORKERS = 2


def copied(folder: Path) -> Path:
    """Copies the files of this checkout into a folder."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def failing(folder: Path, tests: list[str], marks: str) -> str:
    """The first test that fails; "" if none does."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", marks, *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1, 2):  # 2: a test file can't be imported, which also counts as a failure.
        raise RuntimeError(result.stdout[-2000:] + result.stderr[-2000:])
    found = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", result.stdout, re.M)
    return found[0] if found else "" if result.returncode == 0 else "not even imported"


def is_seen(mutation: Mutation, folder: Path, marks: str) -> str:
    """The test that sees a fault; "" if none does."""
    file = folder / "wdjax" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, mutation
    file.write_text(text.replace(mutation.old, mutation.new))
    try:
        return failing(folder, [f"tests/{name}" for name in mutation.tests], marks) or failing(folder, [], marks)
    finally:
        file.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="run the slow tests too")
    parser.add_argument("--only", nargs="*", default=[""], help="only faults whose names contain one of these words")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if any(word in m.name for word in arguments.only)]
    marks = "" if arguments.whole else "not slow"
    with tempfile.TemporaryDirectory() as base, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        folders: queue.Queue[Path] = queue.Queue()
        for worker in range(WORKERS):
            folders.put(copied(Path(base, str(worker))))

        def run(mutation: Mutation) -> str:
            folder, start = folders.get(), time.monotonic()
            try:
                where = is_seen(mutation, folder, marks)
            finally:
                folders.put(folder)
            print(f"{time.monotonic() - start:5.0f} s  {mutation.name}: {where or 'MISSED'}", flush=True)
            return where

        found = list(pool.map(run, chosen))
    print(f"{sum(map(bool, found))} of {len(found)} faults are caught")
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
