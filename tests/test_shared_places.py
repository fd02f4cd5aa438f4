"""Runs that stand in other places of a grid: what the benchmark writes of them, and what the
report makes of it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from synthetic_grid import result, write
from test_bench import grid as make_grid

from fedmllm.bench.grid import Cell
from fedmllm.bench.run import run_grid, shared_entries
from fedmllm.config import make_config
from fedmllm.report import load_results, write_grid_report
from fedmllm.report.arms import boards, is_shared
from fedmllm.report.glance import sure
from fedmllm.report.grid_figures import common_settings
from fedmllm.report.grid_page import _parties, _payload
from fedmllm.report.grid_tables import csv_grid, grid_tables, latex_grid, markdown_grid, note
from fedmllm.report.shared import SHARED_FILE, applied, difference, read_shared, write_shared

TWO = ("aligned-a0.5", "missing-b0.5")
PROMPT = "FedAvg + prompt"


def test_a_difference_is_small_and_undone_by_applying_it() -> None:
    own = {"name": "a", "scenario": {"name": "aligned"}, "strategy": {"mu": 0.0, "w": 0.1}}
    other = {
        "name": "a",
        "scenario": {"name": "missing", "beta": 0.5},
        "strategy": {"mu": 0.01, "w": 0.1},
    }
    found = difference(own, other)
    assert found == {"scenario": {"name": "missing", "beta": 0.5}, "strategy.mu": 0.01}
    assert applied(own, found) == other
    assert difference(own, own) == {}
    assert own["strategy"] == {"mu": 0.0, "w": 0.1}  # untouched


# -- what the benchmark writes -----------------------------------------------------------------


def shared_grid(tmp_path: Path, **more):
    """Plain and with the prompt strategy, which is said to be the same where all is whole."""
    return make_grid(
        tmp_path,
        {"setting": list(TWO), "prompt": ["plain", "agnostic"], "seed": [0]},
        share=[{"when": {"setting": TWO[0], "prompt": "agnostic"}, "as": {"prompt": "plain"}}],
        **more,
    )


def test_a_cell_knows_the_configs_that_it_stands_for(tmp_path) -> None:
    cells = {cell.name: cell for cell in shared_grid(tmp_path).cells}
    assert len(cells) == 3
    (other,) = cells["aligned-a0.5-plain-s0"].stands_for
    assert (other.prompt, other.scenario["name"], other.seed) == ("agnostic", "aligned", 0)
    assert [c.name for c in cells.values() if not c.stands_for] == [
        "missing-b0.5-plain-s0",
        "missing-b0.5-agnostic-s0",
    ]


def test_a_place_whose_own_config_is_refused_may_still_take_a_run(tmp_path) -> None:
    """As `w` without `mu`, which would do nothing."""
    found = make_grid(
        tmp_path,
        {"part": {"plain": {}, "none": {"strategy": {"w": 1.0}}}, "seed": [0]},
        share=[{"when": {"part": "none"}, "as": {"part": "plain"}}],
    )
    (cell,) = found.cells
    assert len(cell.places) == 2
    assert cell.stands_for == ()


def test_the_same_run_by_its_config_needs_no_word(tmp_path) -> None:
    """Zero-shot is one cell in all settings, by its config alone."""
    found = make_grid(
        tmp_path, {"setting": list(TWO), "method": {"zero-shot": {"topology": "zero-shot"}}}
    )
    assert [cell.stands_for for cell in found.cells] == [()]


def test_the_benchmark_writes_it_beside_the_runs(tmp_path, monkeypatch) -> None:
    """Piece by piece: a part of a grid changes what is said of its own cells only."""
    monkeypatch.setattr("fedmllm.bench.run._run", lambda *_: ([], {}))
    out = tmp_path / "out"
    found = shared_grid(tmp_path)
    other = {"config_sha256": "0", "stands_for": [{"seed": 9}]}
    out.mkdir()
    write_shared(out, {"another": other, "missing-b0.5-plain-s0": other}, [])
    run_grid(found, out=out, processes=1)
    entries, fault = read_shared(out)
    assert fault == ""
    plain = next(cell.config for cell in found.cells if cell.stands_for)
    assert entries == {"another": other, **shared_entries(found.cells)}  # what was said is gone
    assert entries["aligned-a0.5-plain-s0"]["stands_for"] == [{"prompt": "agnostic"}]
    assert plain.name == "aligned-a0.5-plain-s0"


def test_nothing_to_say_makes_no_file(tmp_path) -> None:
    write_shared(tmp_path / "out", {}, ["a"])
    assert not (tmp_path / "out").exists()


def test_its_digest_is_that_of_results() -> None:
    """The report compares it with the config of the result that lies there."""
    own = make_config({"name": "a", "data": "memes"})
    other = make_config({"name": "a", "data": "memes", "prompt": "agnostic"})
    (entry,) = shared_entries([Cell("a", own, ({},), (other,))]).values()
    from fedmllm.config import config_hash

    assert entry == {"config_sha256": config_hash(own), "stands_for": [{"prompt": "agnostic"}]}


# -- what the report makes of it ---------------------------------------------------------------


PLAIN = {"aligned-a0.5": [0.80, 0.82, 0.84, 0.86, 0.88], "missing-b0.5": [0.6] * 5}
AGNOSTIC = [0.70, 0.71, 0.72, 0.71, 0.70]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """FedAvg in two settings, and with the prompt strategy in one; the other is said to be the
    same. Five seeds."""
    runs = [
        result("fedavg", setting, seed, value=value)
        for setting, values in PLAIN.items()
        for seed, value in enumerate(values)
    ]
    runs += [
        result("fedavg", TWO[1], seed, prompt="agnostic", value=value)
        for seed, value in enumerate(AGNOSTIC)
    ]
    write(tmp_path, runs)
    say(tmp_path, runs[:5])
    return tmp_path


def say(folder: Path, runs) -> None:
    entries = {
        run["name"]: {
            "config_sha256": run["config_sha256"],
            "stands_for": [{"prompt": "agnostic"}],
        }
        for run in runs
    }
    write_shared(folder, entries, list(entries))


def read(folder: Path):
    found, problems = load_results([folder])
    assert problems == []
    return found


def test_an_arm_takes_the_runs_of_another_where_the_grid_says_so(folder) -> None:
    (table,), problems = grid_tables(read(folder))
    assert problems == []
    whole, missing = (table.cells[PROMPT][setting] for setting in TWO)
    assert (whole.mean, whole.seeds, whole.shared) == (pytest.approx(0.84), 5, True)
    assert (missing.mean, missing.shared) == (pytest.approx(0.708), False)
    assert not table.cells["FedAvg"][TWO[0]].shared
    assert whole.files == table.cells["FedAvg"][TWO[0]].files


def test_the_same_runs_are_not_compared_and_lead_together(folder) -> None:
    """One comparison is left: of the two arms where half is missing."""
    (table,), _ = grid_tables(read(folder))
    assert table.comparisons == 1
    both = [table.cells[arm][TWO[0]] for arm in ("FedAvg", PROMPT)]
    assert [(cell.best, cell.p) for cell in both] == [(True, None), (True, None)]
    assert table.cells[PROMPT][TWO[1]].significant


def test_against_a_third_arm_both_have_the_star(folder) -> None:
    more = [result("fedadam", TWO[0], i, value=v - 0.2) for i, v in enumerate(PLAIN[TWO[0]])]
    write(folder, more)
    (table,), _ = grid_tables(read(folder))
    assert table.comparisons == 2
    assert table.cells["FedAvg"][TWO[0]].significant
    assert table.cells[PROMPT][TWO[0]].significant
    assert sure(table).startswith("In 2 of 2 settings")  # two stars in one of them


def test_every_form_marks_it(folder) -> None:
    tables, _ = grid_tables(read(folder))
    (line,) = [row for row in markdown_grid(tables).splitlines() if row.startswith(f"| {PROMPT}")]
    assert line.split("|")[2].strip() == "**0.840 ± 0.039**†"
    assert "†" not in line.split("|")[3]
    assert r"\textbf{0.840}$^{\dagger}$" in latex_grid(tables)
    assert "†: with runs of another arm, which the grid says are the same there" in note(tables[0])
    lines = [row.split(",") for row in csv_grid(tables).splitlines()]
    at = lines[0].index("shared")
    assert {(row[3], row[4]): row[at] for row in lines[1:]} == {
        ("aligned-a0.5", "FedAvg"): "0",
        ("missing-b0.5", "FedAvg"): "0",
        ("aligned-a0.5", PROMPT): "1",
        ("missing-b0.5", PROMPT): "0",
    }
    page = write_grid_report(read(folder), folder / "page.html").read_text(encoding="utf-8")
    assert page.count("0.840†") == 1


def test_without_it_nothing_is_marked_and_there_is_a_gap(folder) -> None:
    (folder / SHARED_FILE).unlink()
    (table,), _ = grid_tables(read(folder))
    assert TWO[0] not in table.cells[PROMPT]
    assert "†" not in markdown_grid([table])


def test_what_was_spent_and_measured_is_counted_where_it_was_run(folder) -> None:
    ((board,), _) = boards(read(folder))
    assert len(board.results) == 15
    arms = {arm.label: arm for arm in board.arms}
    assert len(arms[PROMPT].runs[TWO[0]]) == 5
    assert all(map(is_shared, arms[PROMPT].runs[TWO[0]].values()))
    assert arms[PROMPT].own(TWO[0]) == {}
    assert common_settings(board, board.arms) == [TWO[1]]  # of the figure of communication
    assert len(_payload(board, folder)["rows"][PROMPT]["files"]) == 5
    rows = csv.DictReader(io.StringIO(csv_grid(grid_tables(read(folder))[0])))
    spent = {(row["setting"], row["arm"]): row["total_seconds"] for row in rows}
    assert [spent[setting, PROMPT] for setting in TWO] == ["", "26.0"]
    assert {row["setting"] for row in _parties(board, folder) if row["arm"] == PROMPT} <= {TWO[1]}


def test_an_arm_that_is_another_everywhere_is_no_arm(tmp_path) -> None:
    runs = [result("fedavg", TWO[0], seed, value=0.7) for seed in range(5)]
    write(tmp_path, runs)
    say(tmp_path, runs)
    (table,), _ = grid_tables(read(tmp_path))
    assert list(table.cells) == ["FedAvg"]


def test_a_run_of_its_own_goes_first(folder) -> None:
    """It was run after all: then that is what counts, and nothing is called repeated."""
    write(folder, [result("fedavg", TWO[0], 0, prompt="agnostic", value=0.5)])
    (table,), problems = grid_tables(read(folder))
    assert problems == []
    assert table.cells[PROMPT][TWO[0]].mean == pytest.approx((0.5 + 0.82 + 0.84 + 0.86 + 0.88) / 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ('{"schema": 2, "runs": {}}', "is not a shared.json that this version reads"),
        ('{"schema": 1, "runs": []}', "is not a shared.json that this version reads"),
        (
            '{"schema": 1, "runs": {"a": {"config_sha256": "0", "stands_for": [3]}}}',
            "is not a shared.json that this version reads",
        ),
        (
            '{"schema": 1, "runs": {"a": {"stands_for": []}}}',
            "is not a shared.json that this version reads",
        ),
    ],
)
def test_a_file_that_is_no_shared_json_is_named_and_ignored(folder, text, words) -> None:
    (folder / SHARED_FILE).write_text(text)
    found, problems = load_results([folder])
    assert len(found) == 15
    (problem,) = problems  # once, though fifteen runs lie beside it
    assert words in problem
    assert str(folder / SHARED_FILE) in problem


def test_what_it_says_of_another_run_is_left_out(folder) -> None:
    file = folder / SHARED_FILE
    data = json.loads(file.read_text())
    name = next(iter(data["runs"]))
    data["runs"][name]["config_sha256"] = "0" * 64
    file.write_text(json.dumps(data))
    found, problems = load_results([folder])
    assert len(problems) == 1
    assert f"what it says of {name} is of a run with another config" in problems[0]
    (table,), _ = grid_tables(found)
    assert table.cells[PROMPT][TWO[0]].seeds == 4


def test_a_config_that_cannot_be_is_left_out(folder) -> None:
    file = folder / SHARED_FILE
    data = json.loads(file.read_text())
    for entry in data["runs"].values():
        entry["stands_for"] = [
            {"topology": "nowhere"},
            {"partition": 3},
            {"prompt": "agnostic", "seed": "x"},
            {"prompt": "agnostic", "title.x": 1, "topology": "nowhere"},
        ]
    file.write_text(json.dumps(data))
    (table,), _ = grid_tables(read(folder))
    assert TWO[0] not in table.cells[PROMPT]
