"""Many problems in one message: a user mends a file once and not once a line."""

from __future__ import annotations

MOST_LINES = 20


def report(problems: list[str]) -> str:
    """How many problems there are, and the first `MOST_LINES` of them, a line each."""
    shown = "\n".join(f"  {problem}" for problem in problems[:MOST_LINES])
    rest = len(problems) - MOST_LINES
    more = f"\n  … and {rest} more" if rest > 0 else ""
    return f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data:\n{shown}{more}"
