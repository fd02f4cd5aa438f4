"""Checks of hyper-parameters: each error says what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmllm.algorithms.base import WEIGHTINGS
from fedmllm.errors import UserError, unknown

FORMS = ("paper", "reference")
"""``paper``: as the method's own paper has it. ``reference``: as FedMLLM's authors ran it."""


def check_positive(**values: float) -> None:
    """Each value is a finite number > 0."""
    for name, value in values.items():
        _check(name, value, _is_number(value) and value > 0, "a number > 0")


def check_not_negative(**values: float) -> None:
    """Each value is a finite number >= 0."""
    for name, value in values.items():
        _check(name, value, _is_number(value) and value >= 0, "a number >= 0")


def check_decay(**values: float) -> None:
    """Each value is a decay rate: 0 <= value < 1."""
    for name, value in values.items():
        _check(name, value, _is_number(value) and 0 <= value < 1, "a number with 0 <= number < 1")


def check_count(**values: int) -> None:
    """Each value is a whole number >= 1."""
    for name, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        _check(name, value, whole and value >= 1, "a whole number >= 1")


def check_form(algorithm: str, form: str, allowed: Sequence[str]) -> None:
    """`form` is one that the algorithm has; most have ``paper`` only."""
    if form not in allowed:
        raise UserError(unknown(f"form of {algorithm}", form, allowed))


def check_weighting(weighting: str) -> None:
    """`weighting` is ``samples`` or ``uniform``."""
    if weighting not in WEIGHTINGS:
        raise UserError(unknown("weighting", weighting, WEIGHTINGS))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise UserError(f"algorithm option {name} is {value!r}: choose {allowed}")
