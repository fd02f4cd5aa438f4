"""The one exception that means "the user can mend this".

The command line prints its message without a traceback and exits with code 2.
A message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: a wrong config, file, path or name. Carries a message for a person."""


def unknown(kind: str, given: object, allowed: Iterable[str]) -> str:
    """One line for a name that is not in a set, with the nearest match when there is one.

    >>> unknown("scenario", "mising", ["aligned", "missing"])
    "unknown scenario 'mising': choose aligned or missing (did you mean 'missing'?)"
    """
    names = sorted(allowed)
    listed = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "(none)"
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {kind} {str(given)!r}: choose {listed}{hint}"
