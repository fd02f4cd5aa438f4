"""The one exception that means "the user can mend this".

The command line prints its message without a traceback and exits with code 2.
A message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

MOST_LINES = 20


class UserError(Exception):
    """Bad input: a wrong config, file, path or name. Carries a message for a person."""


class MemoryRanOutError(UserError):
    """Too little memory for a run. Another time there may be more: what asked may ask again."""


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


def needs_package(what: str, package: str, extra: str) -> str:
    """One line for a package that is not installed. No index has FedMLLM, so pip is sent to the
    clone.

    >>> needs_package("4 bit", "bitsandbytes", "4bit")
    "4 bit needs bitsandbytes: in a clone, pip install -c constraints.txt -e '.[4bit]'"
    """
    return f"{what} needs {package}: in a clone, pip install -c constraints.txt -e '.[{extra}]'"


class HasOptions(Protocol):
    """What a registry holds: something that names its options."""

    @property
    def options(self) -> Iterable[str]: ...


_Spec = TypeVar("_Spec", bound=HasOptions)


def chosen(
    kind: str, name: str, registry: Mapping[str, _Spec], options: Iterable[str], *, of: str
) -> _Spec:
    """The registry's entry of that name, which has all these options.

    of: what an unknown option is said to be an option of. Raises `UserError` for an unknown name
    or option.
    """
    if name not in registry:
        raise UserError(unknown(kind, name, registry))
    spec = registry[name]
    for option in options:
        if option not in spec.options:
            raise UserError(unknown(f"option of {of}", option, spec.options))
    return spec


def problem_list(problems: Sequence[object], *, most: int = MOST_LINES) -> str:
    """Problems of data files as one text, the first `most` of them in full.

    >>> print(problem_list(["a.json, line 3: no id"]))
    1 problem in the data:
      a.json, line 3: no id
    """
    shown = "\n".join(f"  {problem}" for problem in problems[:most])
    rest = len(problems) - most
    more = f"\n  … and {rest} more" if rest > 0 else ""
    return f"{len(problems)} problem{'s' * (len(problems) != 1)} in the data:\n{shown}{more}"
