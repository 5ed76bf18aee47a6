"""Runs the comparisons and writes their tables.

python -m benchmarks.run [--quick] [--only NAME ...] [--out FOLDER] [--docs]
"""

import argparse
import concurrent.futures
import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._tables import Table

NAMES = ("decay", "groups", "tracing", "dispatch", "step", "sweeps", "at_scale")
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "benchmarks.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def measured(name: str, quick: bool) -> tuple[list[Table], list[str], dict[str, str]]:
    """The tables of a module, its failures, and the machine and versions. It runs in its own process."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    tables, failures = [], []
    for comparison in importlib.import_module(f"benchmarks.{name}").comparisons(quick):
        try:
            tables.append(comparison())
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            failures.append(f"{name}: {type(error).__name__}: {error}")
    return tables, failures, surroundings()


def surroundings() -> dict[str, str]:
    """The machine and the versions."""
    import jax

    device = jax.devices()[0]
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.*)$", info, re.M)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    found = {
        "processor": f"{cores}-core {platform.machine()} ({model[1] if model else platform.processor()})",
        "memory": f"{memory:.0f} GiB",
        "device": f"{len(jax.devices())} × {device.device_kind} ({device.platform})",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "Python": platform.python_version(),
    }
    for package in ("jax", "jaxlib", "optax", "numpy", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    import wdjax

    found["wdjax"] = wdjax.__version__
    return {key: value for key, value in found.items() if value}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparisons, prints and writes the tables, and returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller trees and fewer rounds, for a quick look")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="run only these modules")
    parser.add_argument("--out", type=Path, default=Path("out"), help="the folder for the tables")
    parser.add_argument("--docs", action="store_true", help="also write the tables into the documentation")
    options = parser.parse_args(argv)
    if options.docs and (options.quick or options.only != NAMES):
        parser.error("--docs needs a full run. Leave out --quick and --only.")

    # If this process took all of a GPU's memory, the processes that it starts would have none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start = time.perf_counter()
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    results: dict[str, Any] = {
        "date": date,
        "quick": options.quick,
        "surroundings": {"load before": load},
        "tables": {},
        "failures": [],
    }
    sections = []
    for name in options.only:
        print(f"[{time.perf_counter() - start:4.0f} s] {name}", file=sys.stderr, flush=True)
        # Each module has its own process, so that memory, caches and crashes of one do not affect the next.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                tables, failures, found = pool.submit(measured, name, options.quick).result()
            except Exception as error:
                tables, failures, found = [], [f"{name}: {type(error).__name__}: {error}"], {}
        results["surroundings"] = found | results["surroundings"]
        results["tables"][name] = [table.data() for table in tables]
        results["failures"] += failures
        opening = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").partition("\n")[0]
        sections.append("\n".join([f"## {name}: {opening}\n", *(table.markdown() for table in tables)]))
        print(sections[-1], flush=True)
    text = report(results, sections)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmarks.md").write_text(text)
    (options.out / "benchmarks.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(text.partition("## ")[0])
    print(f"{time.perf_counter() - start:.0f} s. Tables: {options.out}/benchmarks.md, {options.out}/benchmarks.json")
    if options.docs:
        PAGE.write_text(with_figures(PAGE.read_text(), text))
    return len(results["failures"])


def with_figures(page: str, text: str) -> str:
    """The page with this text between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} must contain the marks {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def report(results: dict[str, Any], sections: Sequence[str]) -> str:
    """Everything as one page of Markdown."""
    facts = "; ".join(f"{key} {value}" for key, value in results["surroundings"].items())
    kind = "A quick run" if results["quick"] else "A full run"
    lines = [f"{kind} of {results['date']}: {facts}.\n"]
    lines += [f"Failed: {failure}\n" for failure in results["failures"]]
    return "\n".join([*lines, *sections])


if __name__ == "__main__":
    sys.exit(min(main(), 1))
