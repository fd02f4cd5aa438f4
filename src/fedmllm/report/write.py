"""A report in the form that its file name asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmllm.errors import UserError, unknown
from fedmllm.report import facts
from fedmllm.report.arms import is_grid
from fedmllm.report.grid_page import write_grid_report
from fedmllm.report.grid_tables import (
    csv_grid,
    grid_tables,
    latex_grid,
    markdown_grid,
    worst_tables,
)
from fedmllm.report.loading import Result
from fedmllm.report.page import write_page, write_report
from fedmllm.report.tables import csv_table, escape_markdown, markdown_table

SUFFIXES = (".html", ".md", ".tex", ".csv")


def check_suffix(path: Path, *, per_run: bool = False) -> None:
    """Raise `UserError` for a file name that says no form, or one that has no row a run."""
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    if per_run and path.suffix == ".tex":
        raise UserError("there is no LaTeX table with a row a run: leave out --per-run")


def check_conditions(names: Sequence[str]) -> None:
    """Raise `UserError` for a test condition that there is not."""
    for name in names:
        if name not in facts.CONDITIONS:
            raise UserError(unknown("test condition", name, facts.CONDITIONS))


def write_tables(
    results: Sequence[Result],
    path: Path,
    *,
    title: str,
    problems: Sequence[str] = (),
    conditions: Sequence[str] = ("both",),
    per_run: bool = False,
) -> Path:
    """Write a page (.html) or tables (.md, .tex, .csv) and return the path.

    Tables are means over seeds under each of `conditions`; with `per_run`, and on a page of runs
    that are no grid, a row is a run. problems: what was left out and why; a CSV, which holds rows
    alone, does not say. Raises `UserError` for another suffix, or where the file
    cannot be written.
    """
    check_suffix(path, per_run=per_run)
    if path.suffix == ".html":
        write = write_grid_report if is_grid(results) and not per_run else write_report
        return write(results, path, title=title, problems=problems)
    if per_run:
        text = (csv_table if path.suffix == ".csv" else markdown_table)(results)
        return write_page(path, text + _left_out(problems, path.suffix))
    tables, _ = grid_tables(results, conditions)
    if not tables:
        raise UserError(
            f"no run was tested under {' or '.join(conditions)}: give another --condition"
        )
    if path.suffix != ".csv":  # which has columns for it
        tables += worst_tables(tables)
    form = {".md": markdown_grid, ".tex": latex_grid, ".csv": csv_grid}[path.suffix]
    return write_page(path, form(tables) + _left_out(problems, path.suffix))


def _left_out(problems: Sequence[str], suffix: str) -> str:
    """What is missing from the tables, below them: as a comment in LaTeX. A CSV has rows alone."""
    if not problems or suffix == ".csv":
        return ""
    if suffix == ".tex":
        return "\n" + "".join(f"% left out: {' '.join(line.split())}\n" for line in problems)
    return "\nLeft out:\n\n" + "".join(f"- {escape_markdown(line)}\n" for line in problems)
