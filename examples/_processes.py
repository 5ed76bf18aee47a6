"""Starts the processes of one program on this machine, and ends them all when one of them fails."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

DEVICES_EACH = 2


def run_together(script: Path, count: int, arguments: Sequence[str], limit: float) -> None:
    """Runs `script --worker INDEX COUNT COORDINATOR *arguments` once for each index, and waits for all of them.

    Each sees two emulated CPU devices and no GPU. `COORDINATOR` is a free address of this machine, for
    `jax.distributed.initialize`.

    Args:
        script: the Python file that plays the worker.
        count: how many processes.
        arguments: further arguments for all of them.
        limit: seconds after which they are ended.

    Raises:
        RuntimeError: if one of them fails, with its last lines. The others are ended, because they would wait forever.
        TimeoutError: if they are not done in time, with the last lines of each.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    # XLA_FLAGS may set another number of devices, and connections to the coordinator would go through a proxy.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.lower().endswith("_proxy")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES_EACH)}
    warnings = [option for action in sys.warnoptions for option in ("-W", action)]
    with tempfile.TemporaryDirectory() as folder:
        # Files, not pipes: a pipe that nobody reads fills up and stops its writer.
        outputs = [Path(folder) / f"{index}.txt" for index in range(count)]
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for index, output in enumerate(outputs):
                command = [sys.executable, *warnings, str(script), "--worker", str(index), str(count), coordinator]
                with output.open("wb") as file:
                    worker = subprocess.Popen(
                        [*command, *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                workers.append(worker)
            _wait(workers, outputs, time.monotonic() + limit)
        finally:
            for worker in workers:
                worker.kill()  # Not terminate(), because JAX treats SIGTERM as a notice and goes on.
                worker.wait()


def _wait(workers: Sequence[subprocess.Popen[bytes]], outputs: Sequence[Path], deadline: float) -> None:
    while True:
        codes = [worker.poll() for worker in workers]
        for index, (code, output) in enumerate(zip(codes, outputs, strict=True)):
            if code:
                raise RuntimeError(f"process {index} of {len(codes)} failed (exit code {code}):\n{_last_lines(output)}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            tails = (f"process {i}:\n{_last_lines(output)}" for i, output in enumerate(outputs))
            raise TimeoutError("the processes are not done in time.\n" + "\n".join(tails))
        time.sleep(0.05)


def _last_lines(output: Path) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-20:])
