"""Published figures beside ours: the right ones in the right place, marked, and never tested."""

from __future__ import annotations

import csv
import io

import pytest
from synthetic_grid import real, result, write

from fedmllm.report import load_results, write_tables
from fedmllm.report.arms import boards
from fedmllm.report.grid_tables import csv_grid, grid_tables, latex_grid, markdown_grid, note
from fedmllm.report.judged import write_judged
from fedmllm.report.loading import result_digest
from fedmllm.report.published import published
from fedmllm.scenarios import SETTINGS


def beside(results, **more):
    """The tables beside published figures."""
    return [t for t in grid_tables(results, **more)[0] if t.about]


def memes(seed: int, hard: float, method: str = "fedyogi", setting: str = "missing-b0.5"):
    metrics = {"auc": 0.9, "auc_se": 0.01, "hard_letter_auc": hard}
    return real("hateful-memes", method, setting, seed, metrics=metrics)


def test_every_figure_is_a_percentage_of_a_known_setting() -> None:
    found = published()
    for task in ("hateful-memes", "crisismmd"):
        assert len(found[task]["values"]) == 5
        for row in found[task]["values"].values():
            assert list(row) == list(SETTINGS)
            assert all(25 < value < 80 for value in row.values())
    for row in found["medical"]["values"].values():
        for values in row.values():
            assert len(values) == len(found["medical"]["columns"]) == 6
            low, high = sorted(values[:2])  # an overall figure lies between open and closed
            assert low < values[2] < high
    assert "2411.14717" in found["source"]


def test_hateful_memes_is_compared_by_hard_letters() -> None:
    (table,) = beside([memes(0, 0.70), memes(1, 0.74)])
    assert table.settings == tuple(SETTINGS)
    ours = table.cells["FedYogi"]
    assert set(ours) == {"missing-b0.5"}
    assert (ours["missing-b0.5"].mean, ours["missing-b0.5"].seeds) == (pytest.approx(0.72), 2)
    assert table.cells["FedYogi, published"]["missing-b0.5"].mean == pytest.approx(0.7512)
    assert table.cells["FedAvgM, published"]["hybrid-p0.6"].mean == pytest.approx(0.5893)
    assert len(table.published) == 5
    assert not any(cell.best for row in table.cells.values() for cell in row.values())
    words = note(table)
    assert "2411.14717" in words
    assert "greatest probability" in words
    assert "MiniCPM-V-2.6" in words


def test_the_headline_table_stays_the_probability_auc() -> None:
    first, _ = grid_tables([memes(0, 0.70), memes(1, 0.74)])[0]
    assert first.metric == "AUC"
    assert first.cells["FedYogi"]["missing-b0.5"].mean == pytest.approx(0.9)
    assert not any("published" in label for label in first.cells)


def test_crisismmd_by_macro_f1() -> None:
    made = real("crisismmd", "fedadam", "cross-i3t7", 0, metrics={"macro_f1": 0.5})
    (table,) = beside([made])
    assert table.cells["FedAdam"]["cross-i3t7"].mean == 0.5
    assert table.cells["FedAdam, published"]["cross-i3t7"].mean == pytest.approx(0.5317)


def test_the_medical_domain_by_group_of_questions() -> None:
    metrics = {"accuracy": 0.5, "accuracy_vqa-rad/open": 0.31, "accuracy_vqa-rad/closed": 0.62}
    metrics |= {"accuracy_vqa-rad": 0.47, "accuracy_slake/en/open": 0.41, "accuracy_slake": 0.52}
    metrics |= {"accuracy_slake/zh/open": 0.22, "accuracy_slake/en/closed": 0.6}
    tables = {
        t.about: t
        for t in beside([real("medical-vqa", "fedyogi", "cross-i3t7", 0, metrics=metrics)])
    }
    assert list(tables) == published()["medical"]["columns"]
    ours = {
        about: {k: c["cross-i3t7"].mean for k, c in t.cells.items() if "published" not in k}
        for about, t in tables.items()
    }
    assert ours["vqa-rad open"] == {"FedYogi": 0.31}
    assert ours["vqa-rad overall"] == {"FedYogi": 0.47}
    assert ours["slake open"] == {"FedYogi, en": 0.41, "FedYogi, zh": 0.22}
    assert ours["slake closed"] == {"FedYogi, en": 0.6}
    assert ours["slake overall"] == {"FedYogi": 0.52}
    given = tables["slake closed"].cells
    assert given["Local, published"]["hybrid-p0.7"].mean == pytest.approx(0.6567)
    assert given["FedYogi, published"]["cross-i5t5"].mean == pytest.approx(0.6304)
    assert "cross-i5t5" not in given["Local, published"]


def test_a_set_alone_is_compared_with_its_own_columns() -> None:
    rad = real(
        "vqa-rad", "fedyogi", "cross-i3t7", 0, metrics={"accuracy": 0.5, "accuracy_open": 0.3}
    )
    tables = {t.about: t for t in beside([rad])}
    assert list(tables) == ["vqa-rad open", "vqa-rad overall"]
    assert tables["vqa-rad overall"].cells["FedYogi"]["cross-i3t7"].mean == 0.5
    assert "were trained on VQA-RAD and flashcards" in note(tables["vqa-rad open"])
    slake = real(
        "slake", "local", "hybrid-p0.7", 0, metrics={"accuracy": 0.5, "accuracy_zh/open": 0.3}
    )
    assert [t.about for t in beside([slake])] == ["slake open", "slake overall"]


def test_a_judges_marks_stand_beside_exact_match(tmp_path) -> None:
    made = real(
        "vqa-rad", "fedyogi", "cross-i3t7", 0, metrics={"accuracy": 0.5, "accuracy_open": 0.3}
    )
    folder = write(tmp_path, [made]) / made["name"]
    marks = {"accuracy": 0.6, "unparsable": 1, "groups": {"open": {"accuracy": 0.45}}}
    loaded = load_results([folder])[0][0]
    write_judged(
        folder,
        {"result_sha256": result_digest(loaded), "judge": "j", "conditions": {"both": marks}},
    )
    tables = {t.about: t for t in beside(load_results([folder])[0])}
    (label,) = (k for k in tables["vqa-rad open"].cells if "judged" in k)
    assert label.startswith("FedYogi, judged by j (")
    assert tables["vqa-rad open"].cells[label]["cross-i3t7"].mean == 0.45
    assert tables["vqa-rad overall"].cells[label]["cross-i3t7"].mean == 0.6


def test_other_tasks_and_conditions_have_none() -> None:
    assert beside([result("fedavg", "aligned-a0.5", 0)]) == []
    assert beside([memes(0, 0.7)], conditions=["image_withheld"]) == []


def test_every_form_marks_them(tmp_path) -> None:
    write(tmp_path / "runs", [memes(s, 0.7, setting=t) for s in (0, 1) for t in SETTINGS])
    found, _ = load_results([tmp_path / "runs"])
    tables = beside(found)
    assert "FedYogi, published" in markdown_grid(tables)
    assert latex_grid(tables).count("published") >= 6
    rows = list(csv.DictReader(io.StringIO(csv_grid(tables))))
    assert sum(row["arm"].endswith(", published") for row in rows) == 5 * 12
    assert all(not row["files"] for row in rows if "published" in row["arm"])
    grid = write_tables(found, tmp_path / "grid.html", title="t").read_text()
    assert grid.count('<tr class="published">') == 5
    assert "Xu et al." in grid
    one = write_tables(found, tmp_path / "one.html", title="t", per_run=True).read_text()
    assert "Beside published figures" in one
    assert "FedAdagrad, published" in one


def test_a_board_of_another_size_has_its_own_table() -> None:
    small = memes(0, 0.7)
    small["config"]["data"]["train"] = 10
    assert len(boards([memes(0, 0.7), small])[0]) == 2
    assert len(beside([memes(0, 0.7), small])) == 2
