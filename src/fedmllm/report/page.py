"""One HTML file for a newcomer: what was run, how it went, who held what, how to do it again.

The file holds its style and its figures, fetches nothing and opens from a disk. It has no date
of its own: the same results make the same page. This module gathers what the page says;
`page.html` says it.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from fedmllm.errors import UserError
from fedmllm.report import facts, figures, parties, tables
from fedmllm.report.arms import boards
from fedmllm.report.grid_tables import GridTable, note, published_tables
from fedmllm.report.judged import JUDGED_FILE
from fedmllm.report.loading import HOLDINGS, Result
from fedmllm.scenarios import SCENARIOS

PAPER = "https://arxiv.org/abs/2411.14717"
METRIC_HELP = {
    "auc": "AUC is the chance that the model ranks a positive example above a negative one: "
    "0.5 is guessing, 1 is perfect.",
    "macro_f1": "Macro-F1 is the mean over classes of F1, so that a rare class counts as much as "
    "a common one; 1 is perfect.",
    "accuracy": "Accuracy is the share of right answers; 1 is perfect.",
}
CARDS = {
    "zero-shot": "Untrained",
    "local": "Each party alone",
    "federated": "Federated",
    "centralised": "All data pooled",
}
# Keys that name a run and do not make it.
_NAMES = ("name", "title")
# Where a run comes from: keys that every run of a grid has a value of its own for.
_OF_A_RUN = (
    *("seed", "started", "config SHA-256", "manifest SHA-256", "test samples"),
    *("samples a second, trained", "samples a second, tested", "unparsable answers"),
    *("peak memory", "peak GPU memory"),
)


def write_report(
    results: Sequence[Result],
    out_path: str | Path,
    *,
    title: str = "FedMLLM report",
    problems: Sequence[str] = (),
) -> Path:
    """Write the page and return its path. `results` and `problems` come from `load_results`.

    Links to result files are relative to the page. Raises `UserError` if there is no result or
    the page cannot be written.
    """
    if not results:
        raise UserError("there is no result to report: run an experiment first")
    out = Path(out_path)
    contents = _contents(results, out.parent, title, problems)
    return write_page(out, template("page.html").render(contents))


def write_page(out: Path, text: str) -> Path:
    """Write a page's text. Raises `UserError` where that cannot be."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error.strerror}") from error
    return out


def template(name: str) -> Any:
    """A template of this folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = facts.format_score
    return environment.get_template(name)


def _contents(
    results: Sequence[Result], folder: Path, title: str, problems: Sequence[str]
) -> dict[str, Any]:
    """Everything that the template prints."""
    ordered = [result for group in facts.by_task(results) for result in group]
    return {
        "title": title,
        "paper": PAPER,
        "dash": facts.DASH,
        "links": _links(ordered, folder),
        "intro": _intro(ordered),
        "tasks": [
            _task(group, ordered, i, folder) for i, group in enumerate(facts.by_task(results))
        ],
        "holdings": _holdings(ordered),
        "profiles": _profiles(ordered),
        "problems": problems,
        "provenance": provenance(ordered, folder),
        "versions": facts.lookup(ordered[0], "versions") or {},
    }


# --- what was run ----------------------------------------------------------------------------


def _intro(results: Sequence[Result]) -> dict[str, Any]:
    """The facts of the opening sentences."""
    federated = [r for r in results if facts.topology(r) == "federated"]
    sizes = sorted({len(facts.clients(r)) for r in federated if facts.clients(r)})
    trainable, total = _agreed(results, "trainable"), _agreed(results, "total")
    return {
        "runs": len(results),
        "parties": _parties_words(sizes),
        "kinds": facts.topologies(results),
        "tasks": list(dict.fromkeys(result["task"]["name"] for result in results)),
        "total": facts.format_count(total) if total else "",
        "trainable": facts.format_count(trainable) if trainable else "",
        "share": f"{100 * trainable / total:.2g} %" if trainable and total else "",
        "upload": _upload(federated),
    }


def _agreed(results: Sequence[Result], key: str) -> float | None:
    """A count of weights if all runs that state it have the same."""
    found = {facts.lookup(result, "parameters", key) for result in results} - {None}
    return found.pop() if len(found) == 1 else None


def _parties_words(sizes: Sequence[int]) -> str:
    """``Eight``, ``Eight to 60``; ``Several`` if no run says."""
    return (
        " to ".join(dict.fromkeys(map(_number, (*sizes[:1], *sizes[-1:])))).capitalize()
        or "Several"
    )


def _number(count: int) -> str:
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count - 1] if 0 < count <= len(words) else str(count)


def _upload(federated: Sequence[Result]) -> str:
    """What one client sends in one round, if all federated runs agree."""
    parts = [facts.message_parts(result).get("up") for result in federated]
    sums = {sum(part.values()) for part in parts if part is not None}
    return f"{facts.format_megabytes(sums.pop())} MB" if len(sums) == 1 else ""


# --- results of one task ---------------------------------------------------------------------


def _links(results: Sequence[Result], folder: Path) -> dict[str, str]:
    """A run's name -> its file, where that is known."""
    found = zip(facts.labels(results), results, strict=True)
    return {name: address for name, result in found if (address := link(result, folder))}


def _task(
    group: Sequence[Result], results: Sequence[Result], number: int, folder: Path
) -> dict[str, Any]:
    """Table, figures and sentences for runs that may be compared."""
    first = group[0]
    wanted = {id(result) for result in group}
    rows = [row for row in tables.rows(results) if id(row.result) in wanted]
    swatches = [figures.swatch(style) for style in figures.run_styles(group)]
    more = _columns(group, folder)
    return {
        "name": first["task"]["name"],
        "question": str(first["task"].get("question") or "").replace("{modality}", ""),
        "metric": facts.metric_name(first),
        "metric_help": METRIC_HELP.get(facts.metric_key(first), ""),
        "conditions": {c: facts.condition_name(c) for c in facts.conditions(group)},
        "rows": list(zip(rows, swatches, [more[id(row.result)] for row in rows], strict=True)),
        "worst": list(next(iter(more.values()))["worst"]),
        "choices": choices([each["choices"] for each in more.values()]),
        "cards": _cards(group),
        "finding": " ".join(filter(None, [_finding(group), _sure(group)])),
        "groups": _groups(rows, facts.headline(group)),
        "judged": _judged(rows, folder),
        "published": _published(group, folder),
        "overview": _overview(group, f"t{number}"),
        "curves": _curves(group, f"t{number}"),
        "followed": facts.followed_words(group, facts.headline(group)),
        "parties": _parties(group, rows, f"t{number}"),
        "scenarios": _scenarios(group),
    }


def _columns(group: Sequence[Result], folder: Path) -> dict[int, dict[str, Any]]:
    """By run (`id`): what the table sorts and filters by, its files, and its worst party on its own
    samples where some run held any out."""
    condition, key = facts.headline(group), parties.own_key(group)
    tests = [test for test in parties.occurring(group, condition, key) if test == "own"]
    return {
        id(run): {
            "choices": {
                "kind": facts.topology(run),
                "scenario": facts.named(facts.lookup(run, "config", "scenario")) or facts.DASH,
                "seed": str(run.get("seed", facts.DASH)),
            },
            "costs": [
                facts.rounds(run),
                facts.lookup(run, "time", "total_seconds"),
                facts.lookup(run, "bytes", "up"),
                facts.lookup(run, "bytes", "down"),
            ],
            "worst": {
                parties.head(test, key, group): parties.worst(run, test, condition, key)
                for test in tests
            },
            "files": result_files(run, folder),
        }
        for run in group
    }


def choices(rows: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """What the runs can be filtered by: names of more than one value."""
    found = {name: list(dict.fromkeys(row[name] for row in rows)) for name in rows[0]}
    return {name: values for name, values in found.items() if len(values) > 1}


def _groups(rows: Sequence[tables.Row], condition: str) -> dict[str, Any]:
    """Scores of groups of questions (test set, language, open or closed), where there are any."""
    scores = {row.label: facts.group_scores(row.result, condition) for row in rows}
    heads = sorted({name for found in scores.values() for name in found})
    return {
        "condition": facts.condition_name(condition),
        "heads": heads,
        "rows": {
            label: [facts.format_score(found.get(name)) for name in heads]
            for label, found in scores.items()
            if found
        },
    }


def _judged(rows: Sequence[tables.Row], folder: Path) -> list[dict[str, Any]]:
    """A line for each run and condition whose open answers a language model has marked."""
    lines = []
    for row in rows:
        for condition in facts.judged_conditions([row.result]):
            marks = facts.judged(row.result, condition)
            twice = facts.lookup(row.result, "_judged", "second") or {}
            lines.append(
                {
                    "run": row.label,
                    "condition": facts.condition_name(condition),
                    "judge": facts.judge_of(row.result),
                    "exact": facts.format_score(marks.get("exact_match")),
                    "judged": facts.format_pair(marks.get("accuracy"), marks.get("accuracy_se")),
                    "n": facts.format_count(marks.get("n")),
                    "lost": facts.format_count(marks.get("unparsable")),
                    "agree": f"{twice.get('same')} of {twice.get('read')}",
                    "files": result_files(row.result, folder)[1:],
                    "kappa": facts.format_score(twice.get("kappa")),
                }
            )
    return lines


def _published(group: Sequence[Result], folder: Path) -> list[tuple[GridTable, str]]:
    """Published figures beside ours, each table with its note."""
    found = [table for board in boards(group)[0] for table in published_tables(board)]
    return [(_named_files(table, folder), note(table)) for table in found]


def _named_files(table: GridTable, folder: Path) -> GridTable:
    """A table whose files are named as seen from the page."""
    cells = {
        label: {s: replace(cell, files=shown_files(cell.files, folder)) for s, cell in row.items()}
        for label, row in table.cells.items()
    }
    return replace(table, cells=cells)


def _cards(group: Sequence[Result]) -> list[dict[str, Any]]:
    """The headline metric of the best run of each topology."""
    condition = facts.headline(group)
    names = dict(zip(map(id, group), facts.labels(group), strict=True))
    kinds = [facts.topology(run) for run in group]
    cards = []
    for kind, words in CARDS.items():
        run = facts.best(group, condition, kind)
        if run is not None:
            value, error = facts.score(run, condition), facts.score_se(run, condition)
            cards.append(
                {
                    "kind": kind,
                    "words": words + (", best run" if kinds.count(kind) > 1 else ""),
                    "value": facts.format_score(value),
                    "error": "" if error is None else facts.format_score(error),
                    "run": names[id(run)],
                }
            )
    return cards


def _finding(group: Sequence[Result]) -> str:
    """One sentence: how the best federated run compares with its references."""
    condition = facts.headline(group)
    best = facts.best(group, condition)
    if best is None:
        return ""
    names = dict(zip(map(id, group), facts.labels(group), strict=True))
    words = {"zero-shot": "the untrained model", "local": "training alone"}
    words["centralised"] = "pooling all data"
    parts = [
        _difference(best, other, condition) + words[kind]
        for kind in words
        if (other := facts.best(group, condition, kind)) is not None
    ]
    value = facts.format_score(facts.score(best, condition))
    several = sum(facts.topology(run) == "federated" for run in group) > 1
    which = "best federated run" if several else "federated run"
    found = f"The {which}, {names[id(best)]}, reaches {facts.metric_name(best)} {value}"
    return found + (": " + ", ".join(parts) if parts else "") + "."


def _sure(group: Sequence[Result]) -> str:
    """What one seed cannot say."""
    if len(group) < 2 or len({run.get("seed") for run in group}) > 1:
        return ""
    return "All runs have one seed: how much of a difference is luck in training is not known."


def _difference(best: Result, other: Result, condition: str) -> str:
    """``0.120 above ``; says so when it is within two standard errors of the difference."""
    a, b = facts.score(best, condition) or 0.0, facts.score(other, condition) or 0.0
    errors = [facts.score_se(run, condition) for run in (best, other)]
    known = [error for error in errors if error is not None]
    noise = 2 * math.hypot(*known) if len(known) == 2 else 0.0
    if abs(a - b) <= noise:
        return f"within two standard errors ({a - b:+.3f}) of ".replace("-", "−")
    return f"{abs(a - b):.3f} {'above' if a > b else 'below'} "


def _overview(group: Sequence[Result], key: str) -> str:
    height = 1.0 + (0.56 if len(group) <= 8 else 0.36) * len(group)
    figure = figures.draw_panels(
        [(figures.draw_conditions, (group,))], size=(figures.HALF[0], height)
    )
    return figures.inline(figure, f"{key}-overview", "All runs under all test conditions")


def _curves(group: Sequence[Result], key: str) -> list[str]:
    """A panel for each condition that was followed over rounds, and one for the loss."""
    shown = facts.conditions(group)
    followed = [c for c in shown if any(len(facts.curve(r, c)) > 1 for r in group)]
    panels: list[str] = []
    for condition in followed or shown[:1]:
        figure = figures.draw_panels([(figures.draw_metric, (group, condition))])
        label = f"{facts.metric_name(group[0])} over rounds, {facts.condition_name(condition)}"
        panels.append(figures.inline(figure, f"{key}-{len(panels)}", label))
    if any(facts.losses(result) for result in group):
        figure = figures.draw_panels([(figures.draw_loss, (group,))])
        panels.append(figures.inline(figure, f"{key}-loss", "Training loss over rounds"))
    return panels if any(facts.history(result) for result in group) else []


def _parties(group: Sequence[Result], rows: Sequence[tables.Row], key: str) -> list[dict[str, Any]]:
    """Figure and numbers of each local run that names its parties' results."""
    local = [row for row in rows if row.result.get("per_client")]
    return [_party_scores(row, group, f"{key}-parties{i}") for i, row in enumerate(local)]


def _party_scores(row: tables.Row, group: Sequence[Result], key: str) -> dict[str, Any]:
    shown = facts.conditions([row.result])
    size = (figures.HALF[0], 1.0 + 0.5 * len(shown))
    figure = figures.draw_panels([(figures.draw_parties, (row.result, group))], size=size)
    scores = [facts.party_scores(row.result, condition) for condition in shown]
    return {
        "run": row.label,
        "svg": figures.inline(figure, key, f"{row.label}: the result of each party"),
        "heads": [facts.condition_name(condition) for condition in shown],
        "rows": {
            client: [facts.format_score(column.get(client)) for column in scores]
            for client in row.result["per_client"]
        },
    }


def _scenarios(group: Sequence[Result]) -> dict[str, str]:
    """The scenarios that occur, explained by their registry."""
    found = dict.fromkeys(str(facts.lookup(r, "config", "scenario", "name")) for r in group)
    return {name: SCENARIOS[name].summary for name in found if name in SCENARIOS}


# --- who holds what --------------------------------------------------------------------------


def _holdings(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A picture for each distinct manifest of the runs with several parties."""
    names = dict(zip(map(id, results), facts.labels(results), strict=True))
    groups: dict[str, list[Result]] = {}
    for result in results:
        if facts.topology(result) in ("federated", "local") and facts.clients(result):
            groups.setdefault(_manifest_key(result), []).append(result)
    return [_holding(runs, names, f"h{i}") for i, runs in enumerate(groups.values())]


def _manifest_key(result: Result) -> str:
    return str(facts.lookup(result, "manifest", "sha256") or facts.clients(result))


def _holding(runs: Sequence[Result], names: Mapping[int, str], key: str) -> dict[str, Any]:
    first = runs[0]
    draws = {"modality": (figures.draw_modalities, figures.holdings_height(first))}
    if figures.has_classes(first):
        draws["class"] = (figures.draw_classes, figures.class_height(first))
    classes = dict.fromkeys(k for c in facts.clients(first) for k in facts.class_counts(c))
    return {
        "scenario": facts.named(facts.lookup(first, "config", "scenario")) or "holdings",
        "partition": facts.named(facts.lookup(first, "config", "partition")),
        "runs": [names[id(run)] for run in runs],
        "notes": facts.lookup(first, "manifest", "notes") or [],
        "panels": [
            _holding_panel(draw, first, height, f"{key}-{what}")
            for what, (draw, height) in draws.items()
        ],
        "heads": [figures.HOLDING_STYLES[k][0] for k in HOLDINGS] + list(classes),
        "parties": [_party_row(client, list(classes)) for client in facts.clients(first)],
    }


def _holding_panel(draw: Callable[..., None], result: Result, height: float, key: str) -> str:
    figure = figures.draw_panels([(draw, (result,))], size=(figures.HALF[0], height))
    return figures.inline(figure, key, f"Samples of each party by {key.split('-')[1]}")


def _party_row(client: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    counts = [client.get(key, 0) for key in HOLDINGS]
    counts += [facts.class_counts(client).get(name, 0) for name in classes]
    return [client["id"], *(facts.format_count(n) for n in [client["samples"], *counts])]


def _profiles(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What each run's server made of the parties' profiles, where they sent any."""
    names = dict(zip(map(id, results), facts.labels(results), strict=True))
    panels: dict[str, dict[str, Any]] = {}
    for result in results:
        found = result.get("heterogeneity") or {}
        rows = found.get("clients") or []
        if not rows:
            continue
        key = json.dumps(found, sort_keys=True)
        if key not in panels:
            size = (figures.HALF[0], figures.holdings_height(result))
            figure = figures.draw_panels([(figures.draw_profiles, (rows,))], size=size)
            title = "Shares of each party's samples, and its weights"
            svg = figures.inline(figure, f"p{len(panels)}", title)
            panels[key] = {"runs": [], "svg": svg, "epsilon": found.get("epsilon"), "rows": rows}
        panels[key]["runs"].append(names[id(result)])
    return list(panels.values())


# --- provenance ------------------------------------------------------------------------------


def provenance(results: Sequence[Result], folder: Path) -> dict[str, Any]:
    """What all runs share, what each has of its own, and where each result lies."""
    names = facts.labels(results)
    shared, own = _split([_origin(result) for result in results])
    same, differ = _split([_settings(result) for result in results])
    return {
        "varied": _varied(own),
        "names": names,
        "files": [result_files(result, folder) for result in results],
        "shared": shared,
        "own": own,
        "same": same,
        "differ": differ,
    }


def _varied(own: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What differs between runs but is not of each run alone: its values with their numbers of
    runs, the most frequent first."""
    counts = {key: Counter(values) for key, values in own.items() if key not in _OF_A_RUN}
    return {
        key: ", ".join(
            f"{value} ({number} of {found.total()})" for value, number in found.most_common()
        )
        for key, found in counts.items()
    }


def _split(
    tables_: Sequence[Mapping[str, str]],
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Keys with one value everywhere, and the others with a value a run."""
    keys = dict.fromkeys(key for table in tables_ for key in table)
    columns = {key: [table.get(key, facts.DASH) for table in tables_] for key in keys}
    same = {key: values[0] for key, values in columns.items() if len(set(values)) == 1}
    return same, {key: values for key, values in columns.items() if key not in same}


def _settings(result: Result) -> dict[str, str]:
    return {k: v for k, v in facts.flatten(result["config"]).items() if k not in _NAMES}


def _origin(result: Result) -> dict[str, str]:
    """Where a result was made and from what; hashes by their first twelve digits."""
    gpu = result.get("peak_accelerator_bytes")
    found = {
        "seed": result.get("seed"),
        "commit": result.get("commit"),
        "started": result.get("started"),
        "config SHA-256": _short(result.get("config_sha256")),
        "manifest SHA-256": _short(facts.lookup(result, "manifest", "sha256")),
        "base SHA-256": _short(result.get("base_sha256")),
        "data SHA-256": _short(result.get("data_sha256")),
        "test samples": _test_samples(result),
        "samples a second, trained": _speed(result, "trained_per_second"),
        "samples a second, tested": _speed(result, "tested_per_second"),
        "unparsable answers": _unparsable(result),
        "peak memory": _megabytes(result.get("peak_memory_bytes")),
        **({"peak GPU memory": _megabytes(gpu)} if gpu is not None else {}),
        **{f"{k}": v for k, v in (result.get("hardware") or {}).items()},
        **{f"{k}": v for k, v in (result.get("versions") or {}).items()},
    }
    return {key: facts.DASH if value is None else str(value) for key, value in found.items()}


def _megabytes(count: float | None) -> str | None:
    return None if count is None else f"{facts.format_megabytes(count)} MB"


def _short(digest: object) -> str | None:
    return str(digest)[:12] if digest else None


def _speed(result: Result, key: str) -> str | None:
    value = facts.lookup(result, "samples", key)
    return None if value is None else f"{value:.1f}"


def _unparsable(result: Result) -> str | None:
    """Of all test conditions; None for a task of choices, where each answer is a letter."""
    total = facts.unparsable(result)
    return None if total is None else facts.format_count(total)


def _test_samples(result: Result) -> str | None:
    counts: Iterable[Any] = (values.get("n") for values in result["metrics"].values())
    known = sorted({facts.format_count(n) for n in counts if isinstance(n, int | float)})
    return " to ".join(known) or None


def link(result: Result, folder: Path) -> str:
    """The result file, relative to the page; empty if its place is not known."""
    return relative(result.get("_path"), folder)


def relative(path: object, folder: Path) -> str:
    """The address of a file, relative to the page; empty for none."""
    if not path:
        return ""
    try:
        return quote(Path(os.path.relpath(str(path), folder)).as_posix())
    except ValueError:  # another drive
        return Path(str(path)).resolve().as_uri()


def shown_files(files: Iterable[str], folder: Path) -> tuple[str, ...]:
    """The files of a number, as seen from the page."""
    return tuple(unquote(relative(file, folder)) for file in files if file)


def result_files(result: Result, folder: Path) -> list[tuple[str, str]]:
    """(name, address) of a run's result file and of its judge's marks, where they are known."""
    files = [("result.json", link(result, folder))]
    files.append((JUDGED_FILE, relative(facts.judged_file(result), folder)))
    return [(name, target) for name, target in files if target]
