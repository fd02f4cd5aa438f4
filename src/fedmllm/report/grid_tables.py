"""Tables over seeds: a row an arm, a column a setting, in Markdown, LaTeX and CSV.

A cell is the mean over seeds ± half of its 95 % confidence interval (Student's t), which fewer than
five seeds do not have. The best federated arm of a column, by the seeds that all of its federated
arms have, is bold. A star: it is better than the next best, by a paired t-test over seeds at the
5 % level, with Holm's correction for all comparisons of a best arm with another in the table. With
fewer than five seeds nothing is called significant. A dagger: runs of another arm, which the grid
says are the same there. Where runs state what each of their parties reaches, another table has the
worst party.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedmllm.report import facts, parties, published
from fedmllm.report.arms import Arm, Board, boards, is_shared
from fedmllm.report.loading import Result
from fedmllm.report.parties import Parties
from fedmllm.report.statistics import ENOUGH, LEVEL, holm, interval, paired_p
from fedmllm.scenarios import SETTINGS

STAR = "*"
DAGGER = "†"
NARROW = 6  # columns of a LaTeX table that leave room for the intervals beside the means


@dataclass(frozen=True)
class Mean:
    """One cell. half: of the 95 % interval, None of few seeds. p: of the difference to the
    next best, corrected; only for the best, and None where there are too few seeds. shared: some
    of its runs are another arm's, which the grid says are the same here. files: the results that
    were averaged. parties: what is known of the parties, by test (`parties.TESTS`). spent: what a
    run took (`facts.spent`), the mean over those that state it."""

    mean: float
    half: float | None
    seeds: int
    best: bool = False
    p: float | None = None
    shared: bool = False
    files: tuple[str, ...] = ()
    parties: Mapping[str, Parties] = field(default_factory=dict)
    spent: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def significant(self) -> bool:
        """Whether it may be called better than the next best."""
        return self.p is not None and self.p < LEVEL


@dataclass(frozen=True)
class GridTable:
    """A board under one test condition. cells: arm's label -> setting -> mean. seedless: arms
    that train nothing, so that a seed changes nothing. judge: whose marks the cells are, empty for
    the task's own metric; lost: how many of its verdicts could not be read. about: what a table
    beside published figures compares; published: the labels of their rows; worst: of what a table
    of the worst party is; words: a note of its own. rivals: federated arms in it."""

    board: str
    metric: str
    condition: str
    settings: tuple[str, ...]
    cells: Mapping[str, Mapping[str, Mean]]
    comparisons: int
    seedless: tuple[str, ...] = ()
    judge: str = ""
    lost: int = 0
    about: str = ""
    published: tuple[str, ...] = ()
    worst: str = ""
    words: str = ""
    rivals: int = 0

    @property
    def title(self) -> str:
        """``memes, image + text``."""
        if self.worst:
            return f"{self.board}, {self.worst}"
        words = f"{self.board}, {facts.condition_name(self.condition)}"
        if self.about:
            return f"{words}, {self.about}: published figures and ours"
        return f"{words}, judged by {self.judge}" if self.judge else words

    @property
    def caption(self) -> str:
        """What a table in print is called; its note says the rest."""
        return self.title if self.about else self.board

    @property
    def seeds(self) -> tuple[int, int]:
        """The least and the greatest number of seeds of a cell; of arms that train, if any do."""
        counts = {label: [cell.seeds for cell in row.values()] for label, row in self.cells.items()}
        trained = [n for label, ns in counts.items() if label not in self.seedless for n in ns]
        every = trained or [n for ns in counts.values() for n in ns] or [0]
        return min(every), max(every)


def grid_tables(
    results: Sequence[Result], conditions: Sequence[str] = ("both",)
) -> tuple[list[GridTable], list[str]]:
    """A table for each board and condition that was measured, one more for each judge of its
    answers, and for the real datasets those beside published figures; and what was left out and
    why."""
    found, problems = boards(results)
    tables = []
    for board in found:
        judges = sorted({name for run in board.results if (name := facts.judge_of(run))})
        for condition in conditions:
            if condition in facts.conditions(board.results):
                tables.append(_table(board, condition))
            if condition in facts.judged_conditions(board.results):
                tables += [_table(board, condition, judge) for judge in judges]
        if "both" in conditions:
            tables += published_tables(board)
    return tables, problems


def published_tables(board: Board) -> list[GridTable]:
    """Published figures beside ours, for a board of a real dataset; nothing is marked as best."""
    tables = []
    for about, given, ours in published.comparisons(board):
        settings = [s for s in SETTINGS if any(s in row for row in given.values())]
        settings = [*settings, *(s for s in board.settings if s not in settings)]
        cells = {label: _cells_of(row) for label, row in ours.items()}
        labels = {method: f"{method}, published" for method in given}
        for method, row in given.items():
            cells[labels[method]] = {s: Mean(value, None, 1) for s, value in row.items()}
        tables.append(
            GridTable(
                board=board.label,
                metric=about,
                condition="both",
                settings=tuple(settings),
                cells=cells,
                comparisons=0,
                about=about,
                published=tuple(labels.values()),
                words=published.note(board),
            )
        )
    return tables


def worst_tables(tables: Sequence[GridTable]) -> list[GridTable]:
    """The worst party, of each table whose runs state it, by what the parties were tested on."""
    found = [_worst_table(table, test) for table in tables for test in parties.TESTS]
    return [table for table in found if table.cells]


def _worst_table(table: GridTable, test: str) -> GridTable:
    stated = {
        label: {s: cell.parties[test] for s, cell in row.items() if test in cell.parties}
        for label, row in table.cells.items()
    }
    cells = {
        label: {s: Mean(p.worst, p.half, p.seeds, files=p.files) for s, p in row.items()}
        for label, row in stated.items()
        if row
    }
    key = next((p.metric for row in stated.values() for p in row.values()), "")
    metric = facts.METRICS.get(key, key)
    where = f"worst party on {parties.TESTS[test]}"
    if test == "common":
        where += f", {facts.condition_name(table.condition)}"
    return replace(table, cells=cells, metric=metric, comparisons=0, worst=where)


def _cells_of(row: published.Row) -> dict[str, Mean]:
    return {
        setting: Mean(*interval(values), len(values), files=files)
        for setting, (values, files) in row.items()
    }


def _table(board: Board, condition: str, judge: str = "") -> GridTable:
    cells = {
        arm.label: {s: cell for s in board.settings if (cell := _mean(arm, s, condition, judge))}
        for arm in board.arms
    }
    if not judge:
        _add_parties(board, condition, cells)
    comparisons = _mark(board, condition, cells, judge)
    shown = {label: row for label, row in cells.items() if row}
    still = tuple(arm.label for arm in board.arms if arm.topology == "zero-shot")
    place = (board.label, board.metric, condition, board.settings)
    marked = [facts.judged(run, condition) for run in board.results if facts.judge_of(run) == judge]
    lost = sum(marks.get("unparsable", 0) for marks in marked) if judge else 0
    rivals = sum(arm.topology == "federated" and arm.label in shown for arm in board.arms)
    return GridTable(*place, shown, comparisons, still, judge, lost, rivals=rivals)


def _mean(arm: Arm, setting: str, condition: str, judge: str = "") -> Mean | None:
    scores = arm.scores(setting, condition, judge)
    if not scores:
        return None
    mean, half = interval(list(scores.values()))
    runs = [arm.runs[setting][seed] for seed in scores]
    files = [facts.judged_file(run) if judge else str(run.get("_path", "")) for run in runs]
    spent = {} if judge else _spent([run for run in runs if not is_shared(run)])
    shared = any(map(is_shared, runs))
    return Mean(mean, half, len(scores), shared=shared, files=tuple(files), spent=spent)


def _spent(runs: Sequence[Result]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for key, values in ((key, [facts.spent(run)[key] for run in runs]) for key in SPENT_HEADS):
        known = [value for value in values if value is not None]
        found[key] = math.fsum(known) / len(known) if known else None
    return found


def _add_parties(board: Board, condition: str, cells: dict[str, dict[str, Mean]]) -> None:
    """What is known of the parties. Own samples are tested as held, under no condition: they stand
    with the headline's."""
    key = parties.own_key(board.results)
    tests = parties.TESTS if condition == facts.headline(board.results) else ("common",)
    for arm in board.arms:
        for setting, cell in cells[arm.label].items():
            runs = list(arm.runs[setting].values())
            found = {t: p for t in tests if (p := parties.over_seeds(runs, t, condition, key))}
            cells[arm.label][setting] = replace(cell, parties=found)


def _mark(board: Board, condition: str, cells: dict[str, dict[str, Mean]], judge: str = "") -> int:
    """Mark the best federated arm of each column and test it; how many comparisons were made. The
    same runs in two columns are compared once."""
    rivals = [arm for arm in board.arms if arm.topology == "federated" and cells[arm.label]]
    if condition == "neither" or len(rivals) < 2:
        return 0  # shown nothing, no arm can lead; and one alone does not
    found: dict[tuple[str, ...], float] = {}  # the runs that were compared, p
    to_next: list[tuple[str, str, tuple[str, ...]]] = []  # a best arm, its setting, the runs
    for setting in board.settings:
        ranked = _ranked(board, setting, condition, judge)
        leaders = [arm for arm, mean in ranked if mean == ranked[0][1]]  # equal in print is equal
        for arm in leaders:
            cells[arm.label][setting] = replace(cells[arm.label][setting], best=True)
        files = {arm.label: _files(arm, setting) for arm, _ in ranked}
        alike = [arm for arm, _ in ranked if files[arm.label] == files[leaders[0].label]]
        others = [arm for arm, _ in ranked if arm not in alike]
        for i, other in enumerate(others):
            one, two = (arm.scores(setting, condition, judge) for arm in (leaders[0], other))
            p = paired_p(one, two)
            if p is None:
                continue
            key = (*files[leaders[0].label], "", *files[other.label])
            found[key] = p
            if i == 0:
                to_next += [(arm.label, setting, key) for arm in alike]
    adjusted = dict(zip(found, holm(list(found.values())), strict=True))
    for label, setting, key in to_next:
        cells[label][setting] = replace(cells[label][setting], p=adjusted[key])
    return len(found)


def _files(arm: Arm, setting: str) -> tuple[str, ...]:
    """The runs that an arm stands on: arms of the same, by a grid's word, are not compared."""
    runs = arm.runs.get(setting, {})
    return tuple(str(runs[seed].get("_path") or id(runs[seed])) for seed in sorted(runs))


def _ranked(board: Board, setting: str, condition: str, judge: str) -> list[tuple[Arm, str]]:
    """The federated arms of a setting, the best first, with their means as they are printed: over
    the seeds that all of them have, since seeds differ more than arms do. None where they have no
    seed in common."""
    arms = [arm for arm in board.arms if arm.topology == "federated"]
    scores = [(arm, arm.scores(setting, condition, judge)) for arm in arms]
    there = [(arm, found) for arm, found in scores if found]
    seeds = set.intersection(*(set(found) for _, found in there)) if there else set()
    if not seeds:
        return []
    means = [(arm, math.fsum(found[s] for s in seeds) / len(seeds)) for arm, found in there]
    means.sort(key=lambda pair: pair[1], reverse=facts.higher_is_better(board.results[0]))
    return [(arm, facts.format_score(mean)) for arm, mean in means]


def note(table: GridTable) -> str:
    """What the numbers are and what the marks claim."""
    if table.words:
        return table.words
    low, high = table.seeds
    seeds = f"{high} seed{'s' * (high > 1)}" if low == high else f"{low} to {high} seeds"
    words = f"Test {table.metric}, {facts.condition_name(table.condition)}: mean over {seeds}"
    if table.judge:
        words = f"Accuracy judged by {table.judge}, {facts.condition_name(table.condition)}: "
        words += f"mean over {seeds}"
    words += _interval_words(low, high)
    if table.worst:
        words = (
            f"{table.metric[0].upper()}{table.metric[1:]} of the {table.worst}: mean over {seeds}"
        )
        return f"{words}{_interval_words(low, high)}."
    words += " (what trains nothing has no seed)." if table.seedless and high > 1 else "."
    if table.judge:
        words += f" Verdicts that could not be read, and do not count: {table.lost:,}."
    if table.condition == "neither":
        return f"{words} Shown nothing, no arm can lead."
    if table.rivals < 2:
        return words + _shared_words(table)
    words += " Bold: best federated"
    words += ", by the seeds that all federated arms of the column have." if low < high else "."
    words += _shared_words(table)
    if not table.comparisons:
        common = " in common" * (high >= ENOUGH)
        return f"{words} Fewer than {ENOUGH} seeds{common}: no difference is called significant."
    return (
        f"{words} {STAR}: better than the next best, paired t-test over seeds, 5 % level, Holm's "
        f"correction for {table.comparisons} comparisons."
    )


def _shared_words(table: GridTable) -> str:
    if not any(cell.shared for row in table.cells.values() for cell in row.values()):
        return ""
    return f" {DAGGER}: with runs of another arm, which the grid says are the same there."


def _interval_words(low: int, high: int) -> str:
    """What stands behind the means of so many seeds."""
    if high < ENOUGH:
        return f" (no interval of fewer than {ENOUGH})" if high > 1 else ""
    return " ± half of the 95 % interval" + (f", from {ENOUGH} seeds up" if low < ENOUGH else "")


# -- Markdown ----------------------------------------------------------------------------------


def markdown_grid(tables: Sequence[GridTable]) -> str:
    """All tables, each under a heading."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: GridTable) -> str:
    from fedmllm.report.tables import escape_markdown as escape

    heads = ["arm", *table.settings]
    lines = [f"### {escape(table.title)}", ""]
    lines += [_row(heads), _row(["---"] + ["---:"] * len(table.settings))]
    for label, row in table.cells.items():
        lines.append(_row([escape(label), *(_markdown_cell(row.get(s)) for s in table.settings)]))
    return "\n".join([*lines, "", escape(note(table)), ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: Mean | None) -> str:
    if cell is None:
        return facts.DASH
    text = facts.format_pair(cell.mean, cell.half)
    text = f"**{text}**" if cell.best else text
    return text + ("\\" + STAR if cell.significant else "") + (DAGGER if cell.shared else "")


# -- LaTeX -------------------------------------------------------------------------------------

_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "±": r"$\pm$",
    "–": "--",
    "†": r"$\dagger$",
}


def latex_grid(tables: Sequence[GridTable]) -> str:
    """Tables for a paper: needs the packages booktabs and graphicx."""
    head = "% \\usepackage{booktabs,graphicx}\n"
    return head + "\n".join(map(_latex, tables))


def tex(text: str) -> str:
    """A text as LaTeX prints it."""
    return "".join(_TEX.get(c, c) for c in text).replace(r" \%", r"~\%")


def _latex(table: GridTable) -> str:
    groups = [
        (name, len(list(members)))
        for name, members in itertools.groupby(table.settings, key=lambda s: s.split("-")[0])
    ]
    spans, rules, column = [], [], 2
    for name, width in groups:
        spans.append(rf"\multicolumn{{{width}}}{{c}}{{{tex(name)}}}")
        rules.append(rf"\cmidrule(lr){{{column}-{column + width - 1}}}")
        column += width
    heads = [tex(s.partition("-")[2] or s) for s in table.settings]
    wide = len(table.settings) > NARROW
    body = [
        line
        for label, row in table.cells.items()
        for line in _latex_rows(tex(label), [row.get(s) for s in table.settings], wide=wide)
    ]
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{tex(f'{table.caption}. {note(table)}')}}}",
            rf"\label{{tab:{re.sub('[^a-z0-9]+', '-', table.title.lower()).strip('-')}}}",
            *([r"\setlength{\tabcolsep}{3pt}"] if wide else []),
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(table.settings)}}}",
            r"\toprule",
            " & ".join(["", *spans]) + r" \\",
            " ".join(rules),
            " & ".join(["", *heads]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table*}",
            "",
        ]
    )


def _latex_rows(label: str, cells: Sequence[Mean | None], *, wide: bool) -> list[str]:
    """An arm's row; in a wide table the intervals have a row of their own, else they would make
    its letters too small to be read."""
    means, halves = [_latex_mean(cell) for cell in cells], [_latex_half(cell) for cell in cells]
    if not wide:
        both = [a + b for a, b in zip(means, halves, strict=True)]
        return [" & ".join([label, *both]) + r" \\"]
    if not any(halves):
        return [" & ".join([label, *means]) + r" \\"]
    return [" & ".join([label, *means]) + r" \\[-3pt]", " & ".join(["", *halves]) + r" \\[1pt]"]


def _latex_mean(cell: Mean | None) -> str:
    if cell is None:
        return "--"
    text = facts.format_score(cell.mean)
    text = rf"\textbf{{{text}}}" if cell.best else text
    return text + (r"$^{*}$" if cell.significant else "") + (r"$^{\dagger}$" if cell.shared else "")


def _latex_half(cell: Mean | None) -> str:
    if cell is None or cell.half is None:
        return ""
    return rf"{{\scriptsize$\,\pm\,${facts.format_score(cell.half)}}}"


# -- CSV ---------------------------------------------------------------------------------------


def csv_grid(tables: Sequence[GridTable]) -> str:
    """One row a cell, numbers in full precision; which files it is the mean of. party_…: over the
    parties of a local run on the test set; own_…: over all parties on their own samples. Then what
    a run of the cell took, on average."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = ["task", "metric", "condition", "setting", "arm", "seeds", "mean", "ci95_half"]
    heads += ["best", "p_to_next_holm", "comparisons", "shared", "files", "judge"]
    writer.writerow([*heads, *PARTY_HEADS, *SPENT_HEADS])
    for table in tables:
        for label, row in table.cells.items():
            for setting, cell in row.items():
                place = [table.board, table.metric, table.condition, setting, label]
                numbers = [cell.seeds, cell.mean, cell.half, int(cell.best), cell.p]
                files = " ".join(cell.files)
                end = [table.comparisons, int(cell.shared), files, table.judge]
                spent = [cell.spent.get(key) for key in SPENT_HEADS]
                writer.writerow([*place, *numbers, *end, *_party_cells(cell), *spent])
    return out.getvalue()


PARTY_HEADS = (
    *("party_mean", "party_std", "party_worst"),
    *("own_metric", "own_mean", "own_std", "own_worst"),
)

SPENT_HEADS = (
    *("bytes_up", "bytes_down", "total_seconds", "trained_per_second", "tested_per_second"),
    *("peak_memory_bytes", "peak_accelerator_bytes", "unparsable"),
)


def _party_cells(cell: Mean) -> list[object]:
    common, own = (cell.parties.get(test) for test in ("common", "own"))
    first: list[object] = [common.mean, common.std, common.worst] if common else [None] * 3
    return first + ([own.metric, own.mean, own.std, own.worst] if own else [None] * 4)
