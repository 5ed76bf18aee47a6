"""A sign of life for what takes longer than two seconds."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

_PATIENCE = 2.0  # Seconds before the first sign.


@contextlib.contextmanager
def progress(message: str) -> Iterator[None]:
    """Shows the message and the seconds so far on a terminal's stderr, from the third second on."""
    if not sys.stderr.isatty():
        yield
        return
    start, ended = time.monotonic(), threading.Event()

    def show() -> None:
        wait = _PATIENCE
        while not ended.wait(wait):
            print(f"\r{message}: {time.monotonic() - start:.0f} s", end="", file=sys.stderr, flush=True)
            wait = 1.0
        if wait < _PATIENCE:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # Clears the line.

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
