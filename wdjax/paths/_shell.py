"""Shell patterns of paths as regular expressions, which match in polynomial time."""

import functools
import re

from .._engine.text import shown


def compiled_regex(where: str, what: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:  # The last two: a huge count, a thousand brackets.
        raise ValueError(f"{where}: {what} is malformed: {error}.") from error


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str, *, is_numbered: bool = False) -> re.Pattern[str]:
    """A shell pattern as a regular expression, to `search` a canonical path with.

    If `is_numbered`, each "*" is a group for a whole number. The time is polynomial, because no step after a star is
    taken back: if what follows a star matches anywhere, its leftmost place leaves the most for the rest.
    """
    segments = pattern.split("/")
    if not all(segments):
        raise ValueError(
            f"by_path: the pattern {pattern!r} has an empty segment. Remove the extra '/'. 'encoder/kernel' is "
            "compared from the root, and 'kernel' at any depth. A node includes everything below it."
        )
    if any("**" in segment and segment != "**" for segment in segments):
        raise ValueError(f"by_path: in {pattern!r}, '**' must stand alone in its segment, as in 'encoder/**/kernel'.")
    runs = [""]  # The segments between one "**" and the next.
    for k, segment in enumerate(segments, 1):
        # A pattern that matches an inner node matches everything below it.
        end = r"(?:/|\Z)" if k == len(segments) else "/"
        runs = [*runs, ""] if segment == "**" else [*runs[:-1], runs[-1] + _segment(segment, is_numbered) + end]
    start = r"\A" if len(segments) > 1 else r"(?:\A|/)"
    regex = start + runs[0] + "".join(f"(?>(?:[^/]*/)*?{run})" for run in runs[1:])
    return compiled_regex("by_path", f"the pattern {shown(pattern)}", regex)


def _segment(pattern: str, is_numbered: bool) -> str:
    """One segment of a shell pattern as a regular expression. It is read as by `fnmatch`, but never crosses a "/"."""
    pieces = [""]  # The parts between one star and the next.
    for token in re.finditer(r"\[(?P<negated>!?+)(?P<inside>.[^\]]*)\]|.", pattern, flags=re.DOTALL):
        if token[0] == "*":
            pieces.append("")
        elif token["inside"]:
            inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", token["inside"])
            pieces[-1] += f"(?!/)[{'^' if token['negated'] else ''}{inside}]"
        else:
            pieces[-1] += "[^/]" if token[0] == "?" else re.escape(token[0])
    if is_numbered or len(pieces) == 1:
        return r"(\d++)".join(pieces)
    first, *middle, last = pieces
    return first + "".join(f"(?>[^/]*?{piece})" for piece in middle) + "[^/]*" + last
