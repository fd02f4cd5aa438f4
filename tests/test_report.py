"""The report: every number is the file's number, and no file can break the page.

The results here are synthetic: `synthetic_results` draws plausible numbers and says so in each
title. Nothing in them was measured.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import tried
from rich.console import Console

from fedmllm.errors import UserError
from fedmllm.report import (
    csv_table,
    facts,
    figures,
    load_results,
    markdown_table,
    page,
    summary_table,
    write_report,
)
from fedmllm.report.grid_tables import grid_tables
from fedmllm.report.loading import config_digest, result_digest
from fedmllm.rng import stream

CONDITIONS = ("both", "image_withheld", "text_withheld", "neither")
# name -> topology, algorithm, scenario, prompt, AUC under the four conditions
RUNS: dict[str, tuple[str, str, dict[str, Any], str, tuple[float, ...]]] = {
    "zero-shot": ("zero-shot", "fedavg", {"name": "aligned"}, "plain", (0.52, 0.51, 0.50, 0.50)),
    "local": ("local", "fedavg", {"name": "aligned"}, "plain", (0.71, 0.62, 0.60, 0.50)),
    "fedavg-aligned": ("federated", "fedavg", {"name": "aligned"}, "plain", (0.87, 0.66, 0.7, 0.5)),
    "fedavg-missing": (
        *("federated", "fedavg", {"name": "missing", "beta": 0.3}, "plain"),
        (0.82, 0.70, 0.72, 0.5),
    ),
    "fedyogi-hybrid": (
        *("federated", "fedyogi", {"name": "hybrid", "p": 0.7}, "agnostic"),
        (0.84, 0.73, 0.74, 0.5),
    ),
    "centralised": (
        *("centralised", "fedavg", {"name": "aligned"}, "plain"),
        (0.91, 0.68, 0.72, 0.5),
    ),
}
CLIENTS = [f"client-{k:02d}" for k in range(8)]


# --- synthetic results -------------------------------------------------------------------------


def synthetic_results() -> list[dict[str, Any]]:
    """Six results of the shape that `fedmllm.experiment` writes. The numbers are made up."""
    return [_synthetic(name, *RUNS[name]) for name in RUNS]


def _synthetic(
    name: str, topology: str, algorithm: str, scenario: dict[str, Any], prompt: str, auc: Any
) -> dict[str, Any]:
    rounds = 0 if topology == "zero-shot" else 20
    config = {
        "name": name,
        "title": "",
        "seed": 0,
        "topology": topology,
        "prompt": prompt,
        "threads": 1,
        "model": {"name": "embedded", "dtype": "float32", "device": "cpu"},
        "lora": {"rank": 8, "alpha": 8.0, "dropout": 0.05},
        "data": {"name": "memes", "train": 2000, "test": 1000},
        "partition": {"name": "dirichlet", "clients": 8, "alpha": 0.5},
        "scenario": scenario,
        "algorithm": {"name": algorithm},
        "training": {"rounds": rounds, "clients_per_round": 2, "lr": 0.001},
        "evaluation": {"every": 5, "conditions": list(CONDITIONS)},
    }
    result = {
        "schema": 1,
        "name": name,
        "title": f"{name} (synthetic)",
        "status": "complete",
        "config": config,
        "config_sha256": config_digest(config),
        "seed": 0,
        "task": {
            "name": "memes",
            "kind": "choice",
            "metric": "auc",
            "classes": ["not-hateful", "hateful"],
            "question": "Is the content hateful{modality}?",
        },
        "metrics": _metrics(name, auc),
        "history": _history(name, rounds, auc[0]),
        "bytes": {
            "up": 163840 * 2 * rounds if topology == "federated" else 0,
            "down": 163840 * 2 * rounds if topology == "federated" else 0,
            "per_client_round": {"lora": 163840},
        },
        "parameters": {"total": 3_214_592, "trainable": 40_960},
        "time": {"train_seconds": rounds * 2.1, "evaluate_seconds": 9.0},
        "peak_memory_bytes": 912_345_678,
        "versions": {"python": "3.11.2", "fedmllm": "0.1.0", "torch": "2.9.0"},
        "commit": "0123456789ab",
        "hardware": {"cpu": "Synthetic CPU", "cores": 2, "threads": 1, "gpu": None},
        "started": "2026-01-01T00:00:00+00:00",
        "manifest": _manifest(scenario),
    }
    result["time"]["total_seconds"] = rounds * 2.1 + 9.0 + 14.0 * (topology == "local")
    if topology == "local":
        _add_parties(result, auc)
    return result


def _metrics(name: str, auc: tuple[float, ...]) -> dict[str, dict[str, float]]:
    draw = stream(0, "synthetic", name)
    return {
        condition: {
            "n": 1000,
            "auc": value + float(draw.normal(0, 0.004)),
            "auc_se": 0.5 * math.sqrt(value * (1 - value) / 500),
            "accuracy": value - 0.07,
        }
        for condition, value in zip(CONDITIONS, auc, strict=True)
    }


def _history(name: str, rounds: int, final: float) -> list[dict[str, Any]]:
    draw = stream(0, "synthetic-history", name)
    lines = []
    for number in range(1, rounds + 1):
        rise = 1 - math.exp(-4 * number / rounds)
        measured = {"both": {"auc": 0.5 + (final - 0.5) * rise + float(draw.normal(0, 0.006))}}
        lines.append(
            {
                "round": number,
                "loss": 0.72 - 0.5 * (final - 0.3) * rise + float(draw.normal(0, 0.012)),
                "lr": 0.001,
                "clients": ["client-03", "client-07"],
                "bytes_up": 327680,
                "bytes_down": 327680,
                "seconds": 2.1,
                "metrics": measured if number % 4 == 0 else None,
            }
        )
    return lines


def _manifest(scenario: dict[str, Any]) -> dict[str, Any]:
    draw = stream(0, "synthetic-manifest", json.dumps(scenario))
    shares = stream(0, "synthetic-shares").dirichlet([1.5] * len(CLIENTS), 2)
    clients = []
    for i, client in enumerate(CLIENTS):
        labels = [int(20 + 1000 * share[i]) for share in shares]
        chances = _chances(scenario, bool(draw.random() < 0.7), bool(draw.random() < 0.7))
        parts = [int(n) for n in draw.multinomial(sum(labels), chances)]
        counts = dict(zip(("image_text", "image", "text", "neither"), parts, strict=True))
        named = dict(zip(("not-hateful", "hateful"), labels, strict=True))
        clients.append({"id": client, "samples": sum(labels), **counts, "labels": named})
    digest = config_digest({"clients": clients})
    return {"sha256": digest, "clients": clients, "notes": []}


def _chances(scenario: dict[str, Any], image: bool, text: bool) -> list[float]:
    """Shares of image+text, image, text, neither that a synthetic party holds."""
    if scenario["name"] == "aligned":
        return [1.0, 0.0, 0.0, 0.0]
    if scenario["name"] == "missing":
        b = scenario["beta"]
        return [(1 - b) ** 2, (1 - b) * b, b * (1 - b), b * b]
    if image and text:
        return [1.0, 0.0, 0.0, 0.0]
    return [0.0, 1.0, 0.0, 0.0] if image else [0.0, 0.0, 1.0, 0.0] if text else [0, 0.5, 0.5, 0]


def _add_parties(result: dict[str, Any], auc: tuple[float, ...]) -> None:
    draw = stream(0, "synthetic-parties")
    result["per_client"] = {
        client: {
            condition: {"auc": float(value + draw.normal(0, 0.05 * (value > 0.51)))}
            for condition, value in zip(CONDITIONS, auc, strict=True)
        }
        for client in CLIENTS
    }
    result["spread"] = {}
    for condition in CONDITIONS:
        values = [scores[condition]["auc"] for scores in result["per_client"].values()]
        mean = sum(values) / len(values)
        result["spread"][condition] = {
            "auc": {"mean": mean, "std": 0.05, "min": min(values), "max": max(values)}
        }
        result["metrics"][condition]["auc"] = mean


def write_runs(folder: Path, results: list[dict[str, Any]]) -> Path:
    """One run folder a result, as a run writes them."""
    for i, result in enumerate(results):
        path = folder / f"{i}-{re.sub(r'[^a-z-]', '', result['name'])}" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(sealed(result), indent=1), encoding="utf-8")
    return folder


def sealed(result: dict[str, Any]) -> dict[str, Any]:
    """With its digest, as it is written last."""
    return {**result, "result_sha256": result_digest(result)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_runs(folder / "runs", synthetic_results())
    return folder


@pytest.fixture
def results(folder: Path) -> list[dict[str, Any]]:
    found, problems = load_results([folder / "runs"])
    assert problems == []
    return found


@pytest.fixture(scope="module")
def report(folder: Path) -> str:
    found, _ = load_results([folder / "runs"])
    return write_report(found, folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but not laid out, which takes most of a page's time."""
    monkeypatch.setattr(figures, "svg", lambda figure: "<svg></svg>")


class Page(HTMLParser):
    """Balanced tags, the results table's cells, ids, links and all text."""

    VOID = frozenset(("meta", "link", "br", "img", "hr", "input"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self._in_results = False
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[key] for key in ("href", "src", "xlink:href") if key in given]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self._in_results = "results" in given.get("class", "").split()
        if tag == "tr":
            self.rows += [[]] if self._in_results else []
        elif tag in ("td", "th") and self._in_results:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)
        if self._in_results and "table" in self.open and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def words(text: str) -> str:
    return " ".join(text.split())


# --- numbers ---------------------------------------------------------------------------------


def test_csv_holds_the_files_numbers_to_the_last_digit(results: list[dict[str, Any]]) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(results))))
    assert [row["run"] for row in rows] == list(RUNS)
    for row, result in zip(rows, results, strict=True):
        for condition in CONDITIONS:
            assert float(row[condition]) == result["metrics"][condition]["auc"]
            assert float(row[f"{condition}_se"]) == result["metrics"][condition]["auc_se"]
        assert float(row["total_seconds"]) == result["time"]["total_seconds"]
        assert int(row["bytes_up"]) == result["bytes"]["up"]
        assert row["config_sha256"] == result["config_sha256"]


def test_markdown_holds_the_files_numbers(results: list[dict[str, Any]]) -> None:
    lines = markdown_table(results).splitlines()
    for result, line in zip(results, lines[2:], strict=False):
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        assert cells[0] == result["name"]
        for cell, condition in zip(cells[1:5], CONDITIONS, strict=True):
            metrics = result["metrics"][condition]
            assert cell == f"{metrics['auc']:.3f} ± {metrics['auc_se']:.3f}"
    assert lines[4].endswith("| 20 | 51 s | 6.55 | 6.55 |")


def test_page_table_holds_the_files_numbers(results: list[dict[str, Any]], report: str) -> None:
    rows = Page(report).rows[2:]
    assert len(rows) == len(results)
    for result, row in zip(results, rows, strict=True):
        assert row[0].strip().startswith(result["name"])
        for cell, condition in zip(row[1:5], CONDITIONS, strict=True):
            metrics = result["metrics"][condition]
            assert words(cell).startswith(f"{metrics['auc']:.3f}± {metrics['auc_se']:.3f}")


def test_best_federated_run_is_bold_in_each_column(results: list[dict[str, Any]]) -> None:
    federated = [r for r in results if r["config"]["topology"] == "federated"]
    best = max(r["metrics"]["both"]["auc"] for r in federated)
    bold = re.findall(r"\*\*(.*?)\*\*", markdown_table(results))
    assert f"{best:.3f}" in [cell.split(" ± ")[0] for cell in bold]
    assert len(bold) == 3  # nobody leads where the model sees nothing
    pooled = f"{results[-1]['metrics']['both']['auc']:.3f}"
    assert float(pooled) > best
    assert pooled not in " ".join(bold)


def test_a_lower_metric_can_be_better() -> None:
    results = synthetic_results()
    for result in results:
        result["task"]["higher_is_better"] = False
    best = facts.best(results, "both")
    assert best is not None
    assert best["name"] == "fedavg-missing"


def test_terminal_table_fits_100_columns(results: list[dict[str, Any]]) -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(summary_table(results))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for result in results:
        assert result["name"] in text
        assert f"{result['metrics']['both']['auc']:.3f}±" in text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (facts.format_seconds(None), "–"),
        (facts.format_seconds(0.42), "0.4 s"),
        (facts.format_seconds(59.7), "1m 00s"),
        (facts.format_seconds(3600), "1h 00m"),
        (facts.format_megabytes(0), "0"),
        (facts.format_megabytes(1), "<0.01"),
        (facts.format_megabytes(6_553_600), "6.55"),
        (facts.format_megabytes(1_234_567_890), "1,235"),
        (facts.format_count(40_960), "40,960"),
        (facts.format_count(3_214_592), "3.21 million"),
        (facts.format_pair(0.5, None), "0.500"),
    ],
)
def test_numbers_in_words(call: str, text: str) -> None:
    assert call == text


def test_finding_names_a_difference_within_noise() -> None:
    results = synthetic_results()
    results[-1]["metrics"]["both"]["auc"] = results[2]["metrics"]["both"]["auc"] + 0.004
    finding = page._finding(results)
    assert "within two standard errors (−0.004) of pooling all data" in finding
    assert "above training alone" in finding


# --- the page --------------------------------------------------------------------------------


def test_page_is_whole_and_fetches_nothing(report: str) -> None:
    parsed = Page(report)
    outside = [link for link in parsed.links if re.match(r"(https?:)?//", link)]
    assert outside == [page.PAPER]
    assert set(re.findall(r"https?://[^\s\"'<)]+", report)) == {page.PAPER}
    assert parsed.tags.count("script") == 1
    assert not re.search(r"fetch\(|XMLHttp|import\(", report)
    assert not re.search(r"url\((?!#)|@import", report)
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', report)
    assert {a or b for a, b in targets} <= set(parsed.ids)


def test_every_run_and_its_file_are_on_the_page(
    results: list[dict[str, Any]], report: str, folder: Path
) -> None:
    parsed = Page(report)
    in_table = re.findall(r">(result\.json)</a></td>\s*</tr>", report)
    assert len(in_table) == 2 * len(RUNS)  # of the results, and of where they come from
    files = [link for link in parsed.links if link.endswith("result.json")]
    assert {json.loads((folder / link).read_text())["name"] for link in files} == set(RUNS)
    for link, name in re.findall(r'<a class="quiet" href="([^"]+)">([^<]+)</a>', report):
        assert json.loads((folder / link).read_text())["name"] == name
    assert str(folder) not in report
    for result in results:
        assert result["name"] in "".join(parsed.text)
        assert result["config_sha256"][:12] in report


def test_page_tells_who_held_what_once_for_each_manifest(report: str) -> None:
    assert report.count('<div class="card holding">') == 3  # aligned, missing, hybrid
    assert "Missing (beta 0.3)" in report
    assert "each sample loses its text" in report  # from the scenario registry


def test_page_shows_what_differs_and_what_is_common(report: str) -> None:
    text = words(" ".join(Page(report).text))
    assert "scenario.beta – – – 0.3 – –" in text
    assert "lora.rank 8" in text
    assert "Synthetic CPU" in text


def test_report_is_the_same_on_every_call(
    results: list[dict[str, Any]], report: str, folder: Path
) -> None:
    assert write_report(results, folder / "again.html").read_text(encoding="utf-8") == report


@pytest.mark.usefixtures("plain")
def test_names_with_html_markdown_and_markup_characters_are_just_names(tmp_path: Path) -> None:
    name = "<script>alert('1')</script> $x_1$ |[bold]&"
    results = synthetic_results()[:3]
    for result in results:
        result["name"] = result["title"] = name
        result["manifest"]["clients"][0]["id"] = "<i>&party"
    report = write_report(results, tmp_path / "r.html", title=name, problems=["<b>"]).read_text()
    parsed = Page(report)
    clean = Page(write_clean(tmp_path)).tags
    assert "i" not in parsed.tags
    assert [parsed.tags.count(tag) for tag in ("b", "script")] == [clean.count("b"), 1]
    assert f"{name} (seed 0) #2" in "".join(parsed.text)
    out = io.StringIO()
    Console(file=out, width=200).print(summary_table(results))
    assert f"{name} (seed 0) #3" in out.getvalue()
    line = markdown_table(results).splitlines()[2]
    assert "<" not in line
    assert len(re.findall(r"(?<!\\)\|", line)) == 10


def write_clean(folder: Path) -> str:
    return write_report(synthetic_results()[:3], folder / "clean.html").read_text()


def test_a_run_with_only_what_is_required(tmp_path: Path) -> None:
    task = {"name": "vqa", "metric": "accuracy"}
    metrics = {"both": {"accuracy": 0.25}, "neither": {"accuracy": None}}
    bare = {"schema": 1, "name": "bare", "status": "complete", "config": {}, "task": task}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(sealed({**bare, "metrics": metrics})))
    results, problems = load_results([path])
    assert problems == []
    text = write_report(results, tmp_path / "r.html").read_text()
    assert [words(cell) for cell in Page(text).rows[2][1:]] == ["0.250", *["–"] * 5, "result.json"]
    assert "| bare | **0.250** | – | – | – | – | – |" in markdown_table(results)
    assert figures.learning_curves_svg(results)
    assert figures.holdings_svg(results[0])


@pytest.mark.usefixtures("plain")
def test_a_missing_condition_is_a_dash(tmp_path: Path) -> None:
    results = synthetic_results()
    del results[3]["metrics"]["text_withheld"]
    results[4]["metrics"]["image_withheld"]["auc"] = None
    row = markdown_table(results).splitlines()[5]
    assert row.split(" | ")[3] == "–"
    rows = Page(write_report(results, tmp_path / "r.html").read_text()).rows[2:]
    assert words(rows[3][3]) == "–"
    assert words(rows[4][2]) == "–"


@pytest.mark.usefixtures("plain")
def test_groups_of_questions_are_told_apart(tmp_path: Path) -> None:
    """As of the medical domain: one training, figures of each test set and language."""
    first, second, third = synthetic_results()[:3]
    third["metrics"]["both"]["auc_hard"] = 0.5  # another score, no group
    assert "By group" not in write_report([third], tmp_path / "r.html").read_text()
    for result, zh in ((first, 0.25), (second, 0.75)):
        result["task"] = {**result["task"], "name": "medical-vqa", "metric": "accuracy"}
        result["metrics"]["both"] |= {"accuracy_se": 0.1, "accuracy_slake/zh": zh}
    first["metrics"]["both"]["accuracy_<vqa-rad>"] = 0.5
    text = write_report([first, second], tmp_path / "r.html").read_text()
    table = text.partition("By group of questions")[2].partition("</table>")[0]
    cells = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", table)
    assert cells[:3] == ["Run", "&lt;vqa-rad&gt;", "slake/zh"]
    assert [cells[4:6], cells[7:]] == [["0.500", "0.250"], ["–", "0.750"]]


@pytest.mark.usefixtures("plain")
def test_tasks_are_kept_apart(tmp_path: Path) -> None:
    results = synthetic_results()
    for result in results[3:]:
        result["task"] = {**result["task"], "name": "crisis", "metric": "accuracy"}
    text = write_report(results, tmp_path / "r.html").read_text()
    assert "Results: memes" in text
    assert "Results: crisis" in text
    assert len(re.findall(r"\*\*", markdown_table(results))) == 2 * 2 * 3
    assert len(csv_table(results).splitlines()) == 7


def test_the_report_needs_no_torch_and_is_light_to_import() -> None:
    code = (
        "import sys, fedmllm.report, fedmllm.report.figures as f;"
        "assert not {'torch', 'matplotlib', 'jinja2'} & set(sys.modules);"
        "f.svg(f.draw_panels([(f.draw_loss, ([],))]));"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- figures ---------------------------------------------------------------------------------


def test_svg_is_deterministic_and_well_formed(results: list[dict[str, Any]]) -> None:
    for draw, arguments in (
        (figures.learning_curves_svg, (results,)),
        (figures.conditions_svg, (results,)),
        (figures.holdings_svg, (results[3],)),
        (figures.parties_svg, (results[1], results)),
    ):
        first = draw(*arguments)  # type: ignore[operator]
        assert first == draw(*arguments)  # type: ignore[operator]
        assert "<metadata" not in first
        assert ET.fromstring(first).tag.endswith("svg")


def test_learning_curve_figure_draws_the_files_points(results: list[dict[str, Any]]) -> None:
    figure = figures.learning_curves(results)
    metric, loss = figure.axes
    line = metric.get_lines()[2]
    assert list(zip(*line.get_data(), strict=True)) == facts.curve(results[2], "both")
    assert metric.get_lines()[0].get_ydata()[0] == results[0]["metrics"]["both"]["auc"]
    assert [y for line in loss.get_lines() for y in line.get_ydata()] == [
        entry["loss"] for result in results for entry in result["history"]
    ]


def test_holdings_figure_draws_the_manifest(results: list[dict[str, Any]]) -> None:
    left, right = figures.holdings(results[3]).axes
    clients = results[3]["manifest"]["clients"]
    for ax, counts in (
        (left, [[c[key] for c in clients] for key in figures.HOLDING_STYLES]),
        (right, [[c["labels"][k] for c in clients] for k in ("not-hateful", "hateful")]),
    ):
        drawn = [[bar.get_width() for bar in bars] for bars in ax.containers]
        assert drawn == counts


def test_samples_without_classes_get_no_class_panel(results: list[dict[str, Any]]) -> None:
    for client in results[3]["manifest"]["clients"]:
        client["labels"] = {"all": client["samples"]}
    assert len(figures.holdings(results[3]).axes) == 1


def test_runs_look_different() -> None:
    runs = [{"config": {"topology": "federated"}}] * 40 + [
        {"config": {"topology": kind}} for kind in ("zero-shot", "local", "centralised")
    ]
    assert len(set(figures.run_styles(runs))) == len(runs)


def test_png(results: list[dict[str, Any]], tmp_path: Path) -> None:
    path = figures.save_png(figures.learning_curves(results), tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")


# --- bad files -------------------------------------------------------------------------------


def damaged() -> dict[str, tuple[Any, str]]:
    """A change to a good result, and what the reader must say about it."""

    def change(*keys: Any, value: Any) -> dict[str, Any]:
        result: Any = _synthetic("local", *RUNS["local"])
        part = result
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        return result

    return {
        "foreign": ({"accuracy": 1}, "is not a FedMLLM result"),
        "list": ([1, 2], "is not a FedMLLM result"),
        "schema": (change("schema", value=2), "this version reads schema 1"),
        "unfinished": (change("status", value="running"), "--resume"),
        "name": (change("name", value=" "), "has no name"),
        "task": (change("task", value={"name": "memes"}), "no task with a name and a metric"),
        "config": (change("config", value=None), "has no config"),
        "topology": (change("config", "topology", value="ring"), "topology 'ring'"),
        "tampered": (change("config", "training", "lr", value=9), "does not match its config_sha"),
        "range": (change("metrics", "both", "auc", value=1.2), "outside 0 to 1"),
        "nan": (change("metrics", "both", "auc", value=math.nan), "metrics.both.auc is nan"),
        "text": (change("metrics", "both", "auc", value="0.9"), "is '0.9', not a number"),
        "error": (change("metrics", "both", "auc_se", value=-1), "auc_se is -1"),
        "shape": (change("metrics", "both", value=0.9), "metrics.both is 0.9, not an object"),
        "party": (
            change("per_client", "client-00", "both", "auc", value=2),
            "per_client.client-00",
        ),
        "spread": (change("spread", "both", value=1), "spread.both is not an object"),
        "rounds": (change("history", 3, "round", value=1), "history[3] has round 1 after round 3"),
        "loss": (change("history", 3, "loss", value="x"), "history[3].loss is 'x'"),
        "history": (change("history", value={"a": 1}), "not a list"),
        "bytes": (change("bytes", "up", value=-5), "bytes.up is -5"),
        "time": (change("time", value=[]), "time is a list, not an object"),
        "sum": (change("manifest", "clients", 0, "text", value=7), "modalities add up to"),
        "labels": (
            change("manifest", "clients", 0, "labels", value={"a": 1}),
            "labels add up to 1",
        ),
        "count": (change("manifest", "clients", 1, "samples", value=1.5), "not a whole number"),
        "client": (change("manifest", "clients", value=["a"]), "manifest.clients[0] has no id"),
    }


@pytest.mark.parametrize("fault", damaged())
def test_a_bad_file_is_named_and_left_out(fault: str, tmp_path: Path) -> None:
    content, said = damaged()[fault]
    runs = write_runs(tmp_path / "runs", synthetic_results()[:1])
    bad = runs / "bad" / "result.json"
    bad.parent.mkdir()
    if isinstance(content, dict):
        content = sealed(content)  # nothing else is wrong with it
    bad.write_text(json.dumps(content))
    results, problems = load_results([runs])
    assert [result["name"] for result in results] == ["zero-shot"]
    assert any(str(bad) in line and said in line for line in problems), problems


@pytest.mark.usefixtures("plain")
def test_problems_stand_on_the_page(results: list[dict[str, Any]], tmp_path: Path) -> None:
    problems = ["runs/a/result.json: is <odd>", "runs/b/result.json: is cut off"]
    text = write_report(results, tmp_path / "r.html", problems=problems).read_text()
    for problem in problems:
        assert problem in "".join(Page(text).text)
    assert 'id="problems"' not in write_report(results, tmp_path / "s.html").read_text()


def test_every_prefix_of_a_file_is_refused_without_a_traceback(tmp_path: Path) -> None:
    whole = json.dumps(synthetic_results()[1])
    path = tmp_path / "result.json"
    for cut in range(0, len(whole), 997):
        path.write_text(whole[:cut])
        with pytest.raises(UserError, match="not valid JSON"):
            load_results([path])


@pytest.mark.usefixtures("plain")
def test_any_value_replaced_by_any_kind_is_read_or_named(tmp_path: Path) -> None:
    """A report either leaves a file out or can be made from it; it never crashes."""
    path = tmp_path / "result.json"
    good = synthetic_results()[1]
    good["history"] = good["history"][:2]
    good["manifest"]["clients"] = good["manifest"]["clients"][:1]
    good["per_client"] = {"client-00": good["per_client"]["client-00"]}
    template = page.template("page.html")
    kinds = (None, [], {}, "x", -1, True, [{}], {"a": {"b": []}})
    for i, keys in enumerate(places(good)):
        path.write_text(json.dumps(replaced(good, keys, kinds[i % len(kinds)])))
        try:
            results, _ = load_results([path])
        except UserError:
            continue
        template.render(page._contents(results, tmp_path, "t", []))
        csv_table(results), markdown_table(results), summary_table(results)
        grid_tables(results)


def places(value: Any, keys: tuple[Any, ...] = ()) -> Any:
    """Every key path of a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*keys, key)
        if isinstance(item, dict | list):
            yield from places(item, (*keys, key))


def replaced(value: Any, keys: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    part = copy
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = new
    copy.pop("config_sha256", None)
    return sealed(copy)


def test_nothing_readable_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="run what is wrong again") as caught:
        load_results([tmp_path, tmp_path / "absent.json"])
    assert "absent.json: cannot be read" in str(caught.value)
    with pytest.raises(UserError, match="run an experiment first"):
        load_results([tmp_path / "absent.json"])
    with pytest.raises(UserError):
        write_report([], tmp_path / "r.html")


def test_a_narrow_terminal_keeps_the_names_and_the_scores(results: list[dict]) -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(results, width=80))
    text = out.getvalue()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "…" not in text
    assert "centralised" in text
    assert "rounds" not in text


def test_results_are_read_once_in_reading_order(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", synthetic_results()[::-1])
    results, problems = load_results([runs, runs / "0-centralised", tmp_path / "nowhere"])
    kinds = [result["config"]["topology"] for result in results]
    assert kinds == ["zero-shot", "local", *["federated"] * 3, "centralised"]
    assert len(problems) == 1


# --- a browser -------------------------------------------------------------------------------


TRY = """
  var box = document.querySelector("[data-runs]"), table = box.querySelector("table");
  var head = Array.from(table.tHead.rows).pop();
  function shown() { return Array.from(table.tBodies[0].rows).filter(r => !r.hidden); }
  function names() { return shown().map(r => r.cells[0].dataset.text).join(","); }
  function press(i) { head.cells[i].querySelector("button").click(); }
  say("all", names());
  press(1); say("score", names());
  press(1); say("down", names() + " " + head.cells[1].getAttribute("aria-sort"));
  press(0); say("name", names());
  press(6); press(6); say("time", names());
  var select = box.querySelector("select[data-filter=kind]");
  select.value = "federated"; select.dispatchEvent(new Event("change"));
  say("kind", names());
  var search = box.querySelector("input[type=search]");
  search.value = "YOGI"; search.dispatchEvent(new Event("input"));
  say("words", names() + " " + box.querySelector("[role=status]").textContent);
  box.querySelector(".filters button").click();
  say("clear", shown().length + " " + JSON.stringify(select.value + search.value));
  say("links", box.querySelectorAll("tbody a[href$='result.json']").length);
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_chromium(report: str, folder: Path, tmp_path: Path, width: int) -> None:
    path = folder / "report.html"
    assert path.read_text(encoding="utf-8") == report
    by_score = sorted(
        (json.loads(file.read_text()) for file in folder.glob("runs/*/result.json")),
        key=lambda result: result["metrics"]["both"]["auc"],
    )
    rising = [result["name"] for result in by_score]
    federated = ["fedavg-aligned", "fedavg-missing", "fedyogi-hybrid"]
    said = dict(line.split(" ", 1) for line in tried(path, TRY, tmp_path, width=width))
    assert said == {
        "all": ",".join(RUNS),
        "score": ",".join(rising),
        "down": ",".join(rising[::-1]) + " descending",
        "name": ",".join(sorted(RUNS)),
        "time": said["time"],
        "kind": said["kind"],
        "words": "fedyogi-hybrid 1 of 6 runs",
        "clear": '6 ""',
        "links": "6",
        "wide": "false",
        "errors": "0 ",
    }
    assert said["time"].split(",")[0] == "local"  # 65 s, the longest
    assert said["time"].split(",")[-1] == "zero-shot"
    assert sorted(said["kind"].split(",")) == federated
