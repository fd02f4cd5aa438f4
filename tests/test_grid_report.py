"""Tables over seeds: worked by hand and against scipy; figures and page; what is left out."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import tried
from matplotlib.collections import PolyCollection
from scipy import stats
from synthetic_grid import METHODS, auc, grid, result, write

from fedmllm.errors import UserError
from fedmllm.report import (
    facts,
    figures,
    is_grid,
    load_results,
    write_figures,
    write_grid_report,
    write_tables,
)
from fedmllm.report.arms import boards, setting_of, stands_for
from fedmllm.report.grid_figures import (
    _mean_by_round,
    _over_bytes,
    _rings,
    band,
    draw_bands,
    draw_cost,
    drops,
    shown,
)
from fedmllm.report.grid_page import _drift, _parties, _payload, _profiles
from fedmllm.report.grid_tables import (
    csv_grid,
    grid_tables,
    latex_grid,
    markdown_grid,
    note,
    tex,
    worst_tables,
)
from fedmllm.report.loading import result_digest
from fedmllm.report.parties import over_seeds, own_key, worst
from fedmllm.report.split import summaries_of
from fedmllm.report.statistics import holm, interval, mean_and_half, paired_p
from fedmllm.scenarios import SETTINGS

TWO = ("aligned-a0.5", "missing-b0.5")


def seeds(method: str, values, setting: str = "aligned-a0.5", prompt: str = "plain"):
    """One arm in one setting, a value a seed."""
    return [
        result(method, setting, i, prompt=prompt, value=value) for i, value in enumerate(values)
    ]


def table(results):
    (found,), problems = grid_tables(results)
    assert problems == []
    return found


# -- statistics --------------------------------------------------------------------------------


def test_the_interval_by_hand() -> None:
    """Mean of 1, 2, 3 is 2, deviation 1; Student's t for two degrees at .975 is 4.303."""
    mean, half = mean_and_half([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean_and_half([0.5]) == (0.5, None)
    assert interval([1.0, 2.0, 3.0, 4.0]) == (2.5, None)  # four: too few to print one
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, mean_and_half([1.0, 2.0, 3.0, 4.0, 5.0])[1])


def test_the_paired_test_against_scipy_and_its_edges() -> None:
    a = dict(enumerate([0.71, 0.74, 0.69, 0.77, 0.73]))
    b = dict(enumerate([0.70, 0.71, 0.70, 0.72, 0.71]))
    assert paired_p(a, b) == pytest.approx(
        stats.ttest_rel(list(a.values()), list(b.values())).pvalue
    )
    shuffled = {seed: b[seed] for seed in (3, 1, 4, 0, 2)}
    assert paired_p(a, shuffled) == paired_p(a, b)  # by seed, not by order
    del b[2]
    assert paired_p(a, b) is None  # four pairs
    assert paired_p(a, {seed: value - 0.1 for seed, value in a.items()}) == 0.0
    assert paired_p(a, a) == 1.0


def test_holm_by_hand() -> None:
    """.01 × 4 = .04; .02 × 3 = .06; .03 × 2 = .06; .5 × 1 = .5: never below an earlier one."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# -- tables ------------------------------------------------------------------------------------


def test_means_best_and_the_star() -> None:
    better = [0.80, 0.82, 0.81, 0.83, 0.80]
    found = table([*seeds("fedavg", [v - 0.05 for v in better]), *seeds("fedyogi", better)])
    cell = found.cells["FedYogi"]["aligned-a0.5"]
    assert cell.mean == pytest.approx(0.812)
    assert cell.half == pytest.approx(mean_and_half(better)[1])
    assert (cell.seeds, cell.best, cell.significant) == (5, True, True)
    assert not found.cells["FedAvg"]["aligned-a0.5"].best
    assert found.comparisons == 1
    assert "for 1 comparisons" in note(found)


def test_no_claim_with_fewer_than_five_seeds() -> None:
    found = table([*seeds("fedavg", [0.5] * 4), *seeds("fedyogi", [0.9, 0.91, 0.9, 0.91])])
    cell = found.cells["FedYogi"]["aligned-a0.5"]
    assert cell.best
    assert cell.half is None
    assert cell.p is None
    assert not cell.significant
    assert "mean over 4 seeds (no interval of fewer than 5)" in note(found)
    assert "Fewer than 5 seeds: no difference is called significant" in note(found)
    assert "\\*" not in markdown_grid([found])
    assert "±" not in markdown_grid([found])
    assert "pm" not in latex_grid([found])
    (row, *_) = csv.DictReader(io.StringIO(csv_grid([found])))
    assert (row["seeds"], row["ci95_half"]) == ("4", "")


def test_only_means_of_enough_seeds_have_an_interval() -> None:
    found = table([*seeds("fedavg", [0.5, 0.6] * 2), *seeds("fedyogi", [0.9, 0.91] * 3)])
    assert [row["aligned-a0.5"].half is None for row in found.cells.values()] == [True, False]
    assert "over 4 to 6 seeds ± half of the 95 % interval, from 5 seeds up." in note(found)
    whole = table([*seeds("fedyogi", [0.9, 0.91] * 3), *seeds("fedavg", [0.5, 0.6] * 3)])
    assert "over 6 seeds ± half of the 95 % interval. Bold" in note(whole)


def test_one_federated_arm_is_not_called_the_best_nor_untested() -> None:
    """Of five seeds: there is nothing to compare it with, and nothing is said of too few seeds."""
    found = table([*seeds("fedavg", [0.7] * 5), *seeds("local", [0.6] * 5)])
    assert not found.cells["FedAvg"]["aligned-a0.5"].best
    assert note(found) == "Test AUC, image + text: mean over 5 seeds ± half of the 95 % interval."
    apart = [result("fedyogi", "aligned-a0.5", seed, value=0.8) for seed in range(4, 9)]
    assert "Fewer than 5 seeds in common" in note(table([*seeds("fedavg", [0.7] * 5), *apart]))


def test_many_comparisons_take_a_star_away() -> None:
    """p of one comparison is below 5 %; with eleven more that are not, it is not."""
    a, b = [0.72, 0.75, 0.71, 0.74, 0.76], [0.70, 0.71, 0.70, 0.73, 0.71]
    p = stats.ttest_rel(a, b).pvalue
    assert 0.05 / 12 < p < 0.05
    alone = [*seeds("fedyogi", a), *seeds("fedavg", b)]
    assert table(alone).cells["FedYogi"]["aligned-a0.5"].significant
    noise = [0.70, 0.72, 0.71, 0.73, 0.70]
    for setting in set(SETTINGS) - {"aligned-a0.5"}:
        alone += seeds("fedyogi", noise, setting) + seeds("fedavg", noise[::-1], setting)
    cell = table(alone).cells["FedYogi"]["aligned-a0.5"]
    assert cell.p == pytest.approx(12 * p)
    assert not cell.significant


def test_a_centralised_run_is_never_the_best_federated() -> None:
    federated = [*seeds("fedavg", [0.7] * 5), *seeds("fedyogi", [0.6] * 5)]
    found = table([*seeds("centralised", [0.99] * 5), *federated])
    assert not found.cells["Centralised"]["aligned-a0.5"].best
    assert found.cells["FedAvg"]["aligned-a0.5"].best


def test_shown_nothing_no_arm_leads_and_none_is_called_untested() -> None:
    results = [*seeds("fedavg", [0.7] * 5), *seeds("fedyogi", [0.8, 0.81, 0.8, 0.82, 0.8])]
    (found,), _ = grid_tables(results, ["neither"])
    assert not any(cell.best for row in found.cells.values() for cell in row.values())
    assert note(found).endswith("Shown nothing, no arm can lead.")


def test_equal_in_print_is_equally_best() -> None:
    found = table([*seeds("fedavg", [0.7001] * 2), *seeds("fedadam", [0.70012] * 2)])
    assert [row["aligned-a0.5"].best for row in found.cells.values()] == [True, True]


def test_the_best_is_the_best_by_the_seeds_that_all_have() -> None:
    """FedAvg has five hard seeds more, which FedYogi was spared: .9 to .8 by seeds 0 to 4, though
    its mean is .7."""
    spared = seeds("fedyogi", [0.80, 0.81, 0.80, 0.81, 0.80])
    found = table([*seeds("fedavg", [0.9] * 5 + [0.5] * 5), *spared])
    cells = {label: row["aligned-a0.5"] for label, row in found.cells.items()}
    assert cells["FedAvg"].mean == pytest.approx(0.7)
    assert (cells["FedAvg"].best, cells["FedAvg"].significant) == (True, True)
    assert not cells["FedYogi"].best
    assert "Bold: best federated, by the seeds that all federated arms of the column have" in note(
        found
    )
    assert note(table(spared)).count("by the seeds") == 0


def test_without_a_seed_in_common_nothing_is_the_best() -> None:
    found = table([*seeds("fedavg", [0.9]), result("fedyogi", "aligned-a0.5", 1, value=0.8)])
    assert [row["aligned-a0.5"].best for row in found.cells.values()] == [False, False]


def test_the_same_runs_in_two_columns_are_compared_once() -> None:
    """Evenly split samples are the same in all aligned settings."""
    runs = [*seeds("fedavg", [0.7] * 5), *seeds("fedyogi", [0.9] * 5)]
    runs += [result("local", "aligned-a5.0", 0, value=0.5)]
    for run in runs:
        run["config"]["partition"]["name"] = "even"
    found = table(runs)
    assert found.comparisons == 1
    both = [found.cells["FedYogi"][setting] for setting in ("aligned-a5.0", "aligned-a0.5")]
    assert [cell.p for cell in both] == [0.0, 0.0]


def test_zero_shot_stands_in_every_column() -> None:
    found = table([result("zero-shot", "hybrid-p0.6", 0), *grid(seeds=2, settings=TWO)[1:]])
    assert found.settings == TWO
    assert {s: c.mean for s, c in found.cells["Zero-shot"].items()} == dict.fromkeys(TWO, 0.52)
    assert found.seeds == (2, 2)
    assert next(iter(found.cells)) == "Zero-shot"
    assert list(found.cells)[-1] == "Centralised + prompt"


def test_what_a_run_stands_for() -> None:
    pooled, apart = result("centralised", "aligned-a5.0", 0), result("fedavg", "aligned-a5.0", 0)
    assert stands_for(pooled, "aligned-a0.5")
    assert not stands_for(apart, "aligned-a0.5")
    assert not stands_for(pooled, "missing-b0.5")
    apart["config"]["partition"]["name"] = "even"
    assert stands_for(apart, "aligned-a0.5")
    assert [setting_of(result("fedavg", s, 0)) for s in SETTINGS] == list(SETTINGS)


def holding_out(share: float, runs):
    """The runs with this share of each party's samples kept from training."""
    for run in runs:
        run["config"]["evaluation"]["held_out"] = share
    return runs


def test_what_is_held_out_of_training_makes_another_arm() -> None:
    """But not of zero-shot, which mini runs once without it; and no arm is named after what all
    have."""
    every = [*seeds("fedavg", [0.6, 0.6]), *holding_out(0.1, seeds("fedavg", [0.7, 0.7]))]
    found = table(every)
    assert list(found.cells) == ["FedAvg (held_out none)", "FedAvg (held_out 0.1)"]
    assert [row["aligned-a0.5"].mean for row in found.cells.values()] == pytest.approx([0.6, 0.7])
    held = holding_out(0.1, [*seeds("local", [0.6]), *seeds("fedavg", [0.7])])
    still = [*holding_out(0.0, [result("zero-shot", "aligned-a0.5", 0)])]
    still += holding_out(0.1, [result("zero-shot", "aligned-a0.5", 1)])
    assert list(table([*still, *held]).cells) == ["Zero-shot", "Local", "FedAvg"]
    stated = holding_out(0.0, seeds("fedavg", [0.6], "missing-b0.5"))  # as is one that says nothing
    assert list(table([*seeds("fedavg", [0.6]), *stated]).cells) == ["FedAvg"]


def test_pooled_samples_of_which_parties_held_some_out_stand_for_no_other_setting() -> None:
    (pooled,) = holding_out(0.1, [result("centralised", "aligned-a5.0", 0)])
    assert stands_for(pooled, "aligned-a5.0")
    assert not stands_for(pooled, "aligned-a0.5")
    pooled["config"]["partition"]["name"] = "even"  # then alpha is not read
    assert stands_for(pooled, "aligned-a0.5")


def test_a_share_that_is_no_number_is_a_fault(tmp_path) -> None:
    (made,) = holding_out("much", seeds("fedavg", [0.6]))
    made["config_sha256"] = None
    made["result_sha256"] = result_digest(made)
    with pytest.raises(UserError, match="held_out is 'much', not a number from zero up"):
        load_results([write(tmp_path, [made])])


def test_few_runs_are_read_one_by_one() -> None:
    demo = load_results([Path(__file__).resolve().parent.parent / "results" / "demo"])[0]
    assert not is_grid(demo)
    assert is_grid(seeds("fedavg", [0.6, 0.7]))
    assert is_grid([result("fedavg", setting, 0) for setting in list(SETTINGS)[:4]])
    assert not is_grid([result("fedavg", setting, 0) for setting in list(SETTINGS)[:3]])


def test_a_repeated_run_counts_once(tmp_path) -> None:
    write(tmp_path / "a", seeds("fedavg", [0.6, 0.7]))
    write(tmp_path / "b", seeds("fedavg", [0.9]))
    found, _ = load_results([tmp_path])
    (made,), problems = grid_tables(found)
    assert made.cells["FedAvg"]["aligned-a0.5"].mean == pytest.approx(0.65)
    assert len(problems) == 1
    assert "repeats" in problems[0]
    assert str(tmp_path / "b") in problems[0]


def test_a_tampered_result_is_named_and_left_out(tmp_path) -> None:
    write(tmp_path, seeds("fedavg", [0.6, 0.7, 0.8]))
    file = next(tmp_path.glob("*-s2/result.json"))
    changed = json.loads(file.read_text())
    changed["metrics"]["both"]["auc"] = 0.99
    file.write_text(json.dumps(changed))
    found, problems = load_results([tmp_path])
    assert table(found).cells["FedAvg"]["aligned-a0.5"].mean == pytest.approx(0.65)
    assert problems == [
        f"{file}: was changed after it was written: it does not match its result_sha256"
    ]


def test_a_result_without_a_digest_is_named_and_left_out(tmp_path) -> None:
    """Else who changes a number would only have to take out that line as well."""
    write(tmp_path, seeds("fedavg", [0.6, 0.7, 0.8]))
    file = next(tmp_path.glob("*-s2/result.json"))
    changed = json.loads(file.read_text())
    changed["metrics"]["both"]["auc"] = 0.99
    del changed["result_sha256"]
    for none in ({}, {"result_sha256": None}):
        file.write_text(json.dumps(changed | none))
        found, (problem,) = load_results([tmp_path])
        assert table(found).cells["FedAvg"]["aligned-a0.5"].mean == pytest.approx(0.65)
        assert problem.startswith(f"{file}: states no digest (result_sha256)")


def test_arms_of_one_name_are_told_apart() -> None:
    slow, fast = seeds("fedavg", [0.6, 0.6]), seeds("fedavg", [0.7, 0.7])
    for one in fast:
        one["config"]["training"]["lr"] = 0.01
    found = table(slow + fast)
    assert list(found.cells) == ["FedAvg (lr 0.001)", "FedAvg (lr 0.01)"]


def test_arms_told_apart_by_config_are_not_by_the_parts_of_the_code_as_well() -> None:
    """A part that only one of them passes through follows from the config."""
    slow, fast = seeds("fedavg", [0.6, 0.6]), seeds("fedavg", [0.7, 0.7])
    for one in fast:
        one["config"]["training"]["lr"] = 0.01
    fast = changed(fast, revisions={"core": 1, "strategy:profiles": 1})
    found = table(changed(slow, revisions={"core": 1}) + fast)
    assert list(found.cells) == ["FedAvg (lr 0.001)", "FedAvg (lr 0.01)"]


def test_sizes_of_data_do_not_mix() -> None:
    small, large = seeds("fedavg", [0.6]), seeds("fedavg", [0.7])
    large[0]["config"]["data"]["train"] = 4000
    made, problems = boards(small + large)
    assert [board.label for board in made] == ["memes (train 400)", "memes (train 4000)"]
    assert problems == []


def changed(runs, **more):
    """The runs with other facts, as if they had been written so."""
    made = []
    for run in runs:
        run = {**run, **more}
        run["result_sha256"] = result_digest(run)
        made.append(run)
    return made


def configured(runs, section: str, **more):
    """The runs with other keys in a section of their config."""
    return [
        {**run, "config": {**run["config"], section: {**run["config"][section], **more}}}
        for run in runs
    ]


@pytest.mark.parametrize("key", ["base_sha256", "data_sha256"])
def test_runs_of_another_base_or_other_data_are_another_board(key) -> None:
    """The same config, as where a folder's contents were replaced."""
    runs = seeds("fedavg", [0.5, 0.5, 0.9])
    runs = changed(runs[:2], **{key: "a" * 64}) + changed(runs[2:], **{key: "b" * 64})
    tables, problems = grid_tables(runs)
    name = key.split("_")[0]
    assert [t.board for t in tables] == [f"memes ({name} {'a' * 8})", f"memes ({name} {'b' * 8})"]
    assert [t.cells["FedAvg"]["aligned-a0.5"].mean for t in tables] == [0.5, 0.9]
    assert problems == []


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"revisions": {"core": 1}}, {"revisions": {"core": 2}}, "revision of core"),
        ({"versions": {"torch": "2.9.0"}}, {"versions": {"torch": "2.10.1"}}, "torch"),
        ({"hardware": {"dtype": "float32"}}, {"hardware": {"dtype": "bfloat16"}}, "dtype"),
    ],
)
def test_runs_of_another_state_of_the_code_are_another_arm(first, second, words) -> None:
    runs = seeds("fedavg", [0.5, 0.5, 0.9])
    found = table(changed(runs[:2], **first) + changed(runs[2:], **second))
    assert len(found.cells) == 2
    assert all(words in label for label in found.cells)
    assert sorted(row["aligned-a0.5"].mean for row in found.cells.values()) == [0.5, 0.9]


def test_a_patch_release_and_what_is_not_stated_part_nothing() -> None:
    runs = seeds("fedavg", [0.5, 0.5, 0.9])
    first, last = {"versions": {"torch": "2.9.0"}}, {"versions": {"torch": "2.9.1"}}
    found = table(changed(runs[:2], **first) + changed(runs[2:], base_sha256="a" * 64, **last))
    assert found.cells["FedAvg"]["aligned-a0.5"].seeds == 3


def test_what_changes_no_number_parts_nothing() -> None:
    """Where features are kept; and where the same data and base lay."""
    same = {"base_sha256": "a" * 64, "data_sha256": "b" * 64}
    runs = changed(seeds("fedavg", [0.5, 0.5, 0.9]), **same)
    other = configured(runs[2:], "model", path="elsewhere/base", feature_cache="disk")
    other = configured(other, "data", root="elsewhere/memes")
    assert table(runs[:2] + other).cells["FedAvg"]["aligned-a0.5"].seeds == 3


def test_data_without_a_digest_are_told_by_their_place() -> None:
    runs = seeds("fedavg", [0.5, 0.9])
    runs = configured(runs[:1], "data", root="a") + configured(runs[1:], "data", root="b")
    assert [t.board for t in grid_tables(runs)[0]] == ["memes (data a)", "memes (data b)"]


def test_every_form_but_csv_names_what_was_left_out(tmp_path) -> None:
    write(tmp_path, seeds("fedavg", [0.6, 0.7, 0.8]))
    (tmp_path / "memes-aligned-a0.5-fedavg-plain-s2" / "result.json").write_text("{")
    found, problems = load_results([tmp_path])
    for suffix in (".html", ".md", ".tex"):
        out = tmp_path / f"out{suffix}"
        write_tables(found, out, title="", problems=problems)
        assert "is not valid JSON" in out.read_text(encoding="utf-8"), suffix
    last = (tmp_path / "out.tex").read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith("% left out: ")
    write_tables(found, tmp_path / "runs.md", title="", problems=problems, per_run=True)
    assert "Left out:" in (tmp_path / "runs.md").read_text(encoding="utf-8")
    write_tables(found, tmp_path / "out.csv", title="", problems=problems)
    rows = list(csv.reader((tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()))
    assert {len(row) for row in rows} == {len(rows[0])}


def test_what_a_run_took_stands_in_a_csv(tmp_path) -> None:
    """26 s each, 2.4 MB either way; of two peaks the mean."""
    one, two = seeds("fedavg", [0.6, 0.7])
    runs = [*changed([one], peak_accelerator_bytes=10), *changed([two], peak_accelerator_bytes=30)]
    (row, *_) = csv.DictReader(io.StringIO(csv_grid(grid_tables(runs)[0])))
    wanted = {
        "bytes_up": "2400000.0",
        "bytes_down": "2400000.0",
        "total_seconds": "26.0",
        "trained_per_second": "24.0",
        "tested_per_second": "",
        "peak_memory_bytes": "700000000.0",
        "peak_accelerator_bytes": "20.0",
    }
    assert {key: row[key] for key in wanted} == wanted
    write(tmp_path, runs)
    write_tables(load_results([tmp_path])[0], tmp_path / "a.csv", title="", per_run=True)
    (row, other) = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert (row["peak_accelerator_bytes"], other["peak_accelerator_bytes"]) == ("10", "30")
    assert row["trained_per_second"] == "24.0"


def test_boards_of_other_conditions_share_a_page(tmp_path) -> None:
    """One task was tested under all conditions, another under one."""
    some = seeds("fedavg", [0.6, 0.7])
    few = [result("fedavg", "aligned-a0.5", seed, task="crisis") for seed in range(2)]
    few = [{**run, "metrics": {"both": run["metrics"]["both"]}} for run in few]
    page = write_grid_report([*some, *changed(few)], tmp_path / "page.html")
    assert "text withheld" in page.read_text(encoding="utf-8")


def test_where_runs_were_made_differently_the_page_says_how(tmp_path) -> None:
    one, two, three = seeds("fedavg", [0.6, 0.7, 0.8])
    other = {**three["hardware"], "cpu": "another"}
    page = write_grid_report([one, two, *changed([three], hardware=other)], tmp_path / "page.html")
    assert "synthetic (2 of 3), another (1 of 3)" in page.read_text(encoding="utf-8")


def test_markdown_latex_and_csv_say_the_same() -> None:
    results = grid(seeds=5, settings=TWO)
    found = table(results)
    lines = [line for line in markdown_grid([found]).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(found.cells)
    assert {line.count("|") for line in lines} == {2 + len(TWO)}
    mean = sum(auc("fedyogi", "missing-b0.5", "agnostic", s) for s in range(5)) / 5
    text = f"{mean:.3f}"
    assert re.search(rf"FedYogi \+ prompt .*\*\*{text} ± ", markdown_grid([found]))
    latex = latex_grid([found])
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == len(found.cells)
    assert {line.count(" & ") for line in body} == {len(TWO)}
    assert rf"\textbf{{{text}}}" in latex
    assert latex.count("{") == latex.count("}")
    rows = list(csv.DictReader(io.StringIO(csv_grid([found]))))
    row = next(r for r in rows if (r["arm"], r["setting"]) == ("FedYogi + prompt", "missing-b0.5"))
    assert float(row["mean"]) == pytest.approx(mean, abs=1e-15)
    assert row["best"] == "1"
    assert len(rows) == len(found.cells) * len(TWO)


def test_a_wide_latex_table_has_its_intervals_below_its_means() -> None:
    """Beside them twelve columns would be shrunk until nobody can read them."""
    made = grid(seeds=5)
    ((wide,), _), ((narrow,), _) = grid_tables(made), grid_tables(grid(seeds=5, settings=TWO))
    text = latex_grid([wide, narrow])
    first, second = text.split(r"\begin{tabular}")[1:]
    body = first.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 1 + 2 * (len(wide.cells) - 1)  # zero-shot has no interval
    assert {line.count(" & ") for line in body} == {12}
    assert {line.count(r"$\,\pm\,$") for line in body} == {0, 12}
    assert all(re.search(r"\\\\(\[-?\d+pt\])?$", line) for line in body)
    assert text.count(r"\setlength{\tabcolsep}") == 1
    assert second.count(r"$\,\pm\,$") == 2 * (len(narrow.cells) - 1)
    for pair in (("begin{table*}", "end{table*}"), ("begin{tabular}", "end{tabular}")):
        assert [text.count("\\" + word) for word in pair] == [2, 2]
    assert text.count("{") == text.count("}")
    assert re.findall(r"\\label\{(.*?)\}", text)[0] == "tab:memes-image-text"


def test_latex_specials_are_printed_as_themselves() -> None:
    assert tex("a_b & 5 % {x} ~ ^ \\ #$ ±") == (
        r"a\_b \& 5~\% \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \#\$ $\pm$"
    )


# -- figures and page --------------------------------------------------------------------------


def test_rings_are_round_and_hold_all() -> None:
    assert _rings(0.54, 0.87) == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert _rings(0.52, 0.87) == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]  # 0.52 would lie on the middle
    assert _rings(0.5, 0.5)[0] == 0.49
    assert _rings(0.0, 0.01)[0] == 0.0


def test_the_drop_is_paired_by_seed() -> None:
    whole = seeds("fedavg", [0.80, 0.84])
    less = seeds("fedavg", [0.70, 0.78], "missing-b0.5")
    lesser = seeds("fedavg", [0.60, 0.70], "missing-b0.3")
    ((board,), _) = boards(whole + less + lesser)
    found = drops(board, "both")["FedAvg"]["missing"]
    assert found == pytest.approx((-0.125, -0.15, -0.10))  # two seeds: their range


def test_a_band_is_the_range_of_few_seeds_and_the_interval_of_many() -> None:
    assert band([0.5]) == (0.5, 0.5, 0.5)
    assert band([0.5, 0.9, 0.7, 0.6]) == pytest.approx((0.675, 0.5, 0.9))
    values = [0.5, 0.9, 0.7, 0.6, 0.8]
    half = mean_and_half(values)[1]
    assert band(values) == pytest.approx((0.7, 0.7 - half, 0.7 + half))


def test_a_strategy_is_drawn_beside_the_baselines() -> None:
    ((board,), _) = boards(grid(seeds=1, settings=TWO, keep=lambda name: name == "fedavg"))
    labels = [arm.label for arm in shown(board, "prompt")]
    assert "Zero-shot" in labels  # which was not run with the strategy
    assert "Local + prompt" in labels
    assert not {"Local", "Centralised"} & set(labels)
    assert "FedAvg" in labels  # few methods: there is room for what they are without the strategy
    many = boards(grid(seeds=1, settings=TWO))[0][0]
    assert "FedAvg" not in [arm.label for arm in shown(many, "prompt")]
    assert [arm.label for arm in shown(board, "")] == [
        "Zero-shot",
        "Local",
        "FedAvg",
        "Centralised",
    ]


def test_the_test_at_the_end_is_a_mark_of_its_own() -> None:
    """On the way 100 samples, at the end 300: no line joins the two. One seed reached .6, one .8:
    .5 + .1 or .3 times (1 - .6^4) / (1 - .6^6) after four rounds, the means of which are drawn."""
    made = seeds("fedavg", [0.6, 0.8])
    way = {n: (1 - 0.6**n) / (1 - 0.6**6) for n in (2, 4)}
    points, last = facts.followed(made[0], "both")
    assert points == [(n, pytest.approx(0.5 + 0.1 * part)) for n, part in way.items()]
    assert last == [(6, pytest.approx(0.6))]
    ((board,), _) = boards(made)
    figure = figures.draw_panels([(draw_bands, (board, "aligned-a0.5", "both", ""))])
    line, mark, *_ = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [2, 4]
    assert line.get_ydata()[1] == pytest.approx(0.5 + 0.2 * way[4])
    assert (mark.get_xdata(), mark.get_ydata()) == ([6], [pytest.approx(0.7)])
    assert (mark.get_linestyle(), mark.get_markerfacecolor()) == ("None", figures.PAPER)
    words = facts.followed_words(made, "both")
    assert "the first 100 test samples; the open mark" in words
    assert words.endswith("on all 300.")


def test_tests_on_the_same_samples_are_one_line() -> None:
    made = seeds("fedavg", [0.6])
    for line in made[0]["history"]:
        line["metrics"] = line["metrics"] and {"both": {**line["metrics"]["both"], "n": 300}}
    points, last = facts.followed(made[0], "both")
    assert (points, last) == (facts.curve(made[0], "both"), [])
    assert facts.followed_words(made, "both") == ""
    del made[0]["history"][5]["metrics"]["both"]["n"]  # one that does not say is not told apart
    assert facts.followed(made[0], "both")[1] == []


def test_centralised_runs_have_curves_with_bands() -> None:
    ((board,), _) = boards(seeds("centralised", [0.8, 0.9]))
    figure = figures.draw_panels([(draw_bands, (board, "aligned-a0.5", "both", ""))])
    (shade,) = [each for each in figure.axes[0].collections if isinstance(each, PolyCollection)]
    heights = shade.get_paths()[0].vertices[:, 1]
    reached = (1 - 0.6**4) / (1 - 0.6**6)
    assert heights.max() == pytest.approx(0.5 + 0.4 * reached)  # the range of two seeds
    assert len(figure.axes[0].get_lines()[0].get_xdata()) == 2


def test_the_cost_curve_is_bytes_so_far_by_round() -> None:
    run = result("fedavg", "aligned-a0.5", 0, value=0.9)
    way, end = _over_bytes(run, "both")  # 0.4 MB up and down a round, measured every second one
    assert {n: x for n, (x, _) in way.items()} == pytest.approx({2: 1.6, 4: 3.2})
    assert end == {6: (pytest.approx(4.8), pytest.approx(0.9))}  # of other samples
    found = way | end
    other = {2: (2.6, 0.5), 6: (5.8, 0.7)}
    assert _mean_by_round([found, other]) == [
        (pytest.approx(2.1), pytest.approx(((found[2][1] + 0.5) / 2,) * 3)),
        (pytest.approx(5.3), pytest.approx((0.8,) * 3)),
    ]


def test_the_cost_curve_of_a_run_that_was_measured_only_at_its_end() -> None:
    run = result("fedavg", "aligned-a0.5", 0, value=0.9)
    for line in run["history"]:
        line["metrics"] = None
    assert _over_bytes(run, "both") == ({6: (pytest.approx(4.8), 0.9)}, {})


ONCE = {"up": {"profiles": 100_000, "mixtures": 200_000}, "down": {"mixtures": 700_000}}


@pytest.mark.parametrize(
    "stated",
    [
        {"bytes": {"up": 2_700_000, "down": 3_100_000, "once": ONCE}},
        {  # of before
            "heterogeneity": {"bytes": {"up": 100_000, "down": 0}},
            "mixtures": {"bytes": {"up": 200_000, "down": 700_000}},
        },
    ],
)
def test_what_crossed_before_the_first_round_is_a_cost(stated) -> None:
    """1 MB."""
    run = result("fedavg", "aligned-a0.5", 0, value=0.9) | stated
    way, end = _over_bytes(run, "both")
    assert {n: x for n, (x, _) in (way | end).items()} == pytest.approx({2: 2.6, 4: 4.2, 6: 5.8})
    ((board,), _) = boards([run])
    run["bytes"]["per_client_round"] = {"up": {"lora": 200_000}, "down": {"lora": 200_000}}
    payload = _payload(board, Path())
    assert payload["heads"][-1] == "once, all parties"
    assert payload["rows"]["FedAvg"]["numbers"][-1] == "1.00"


def test_the_test_at_the_end_is_no_point_of_the_cost_line() -> None:
    ((board,), _) = boards(seeds("fedavg", [0.6, 0.8]))
    figure = figures.draw_panels([(draw_cost, (board, "both", ""))])
    line, mark, *_ = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == pytest.approx([1.6, 3.2])
    assert (mark.get_xdata(), mark.get_ydata()) == ([pytest.approx(4.8)], [pytest.approx(0.7)])
    assert (mark.get_linestyle(), mark.get_markerfacecolor()) == ("None", figures.PAPER)


def test_bytes_of_a_party_where_some_did_not_deliver() -> None:
    """Nobody in the first round; one of four in the second: all four received."""
    run = result("fedavg", "aligned-a0.5", 0)
    names = [f"client-{i:02d}" for i in range(4)]
    run["history"][0] |= {"clients": [], "missing": names, "bytes_up": 0, "bytes_down": 800_000}
    run["history"][1] |= {"clients": names[:1], "missing": names[1:]}
    run["history"][1] |= {"bytes_up": 200_000, "bytes_down": 800_000}
    assert facts.per_party(run, "bytes_up") == 200_000
    assert facts.per_party(run, "bytes_down") == 200_000
    assert facts.per_party({**run, "history": run["history"][:1]}, "bytes_down") is None


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of a grid with a result that was cut off."""
    folder = tmp_path_factory.mktemp("grid")
    write(folder / "runs", grid(seeds=2, settings=("aligned-a0.5", "missing-b0.5", "cross-i5t5")))
    (folder / "runs" / "cut").mkdir()
    (folder / "runs" / "cut" / "result.json").write_text('{"schema": 1,')
    found, problems = load_results([folder / "runs"])
    assert is_grid(found)
    return write_grid_report(found, folder / "report.html", problems=problems)


class Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loads: list[str] = []
        self.rows = 0
        self.means: list[dict] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        self.rows += tag == "tr" and "data-seed" in given
        self.means += [given] if tag == "a" and "data-arm" in given else []
        if tag == "a":
            self.targets.append(given["href"])
        self.loads += [given[k] for k in ("src",) if k in given]
        self.loads += [given["href"] for _ in [0] if tag == "link"]


def test_the_page_traces_every_run_to_its_file_and_loads_nothing(page) -> None:
    text = page.read_text()
    found = Links(text)
    files = {target for target in found.targets if target.endswith("result.json")}
    assert found.rows == len(files) == 1 + (len(METHODS) - 1) * 3 * 2 * 2
    assert all((page.parent / file).is_file() for file in files)
    assert found.loads == ["data:,"]
    assert "is not valid JSON" in text  # the cut file is named
    assert text.count("<svg") > 10
    assert not re.search(r"url\(\s*['\"]?https?:|@import|fetch\(|XMLHttp", text)


def test_every_number_of_the_page_leads_to_its_runs(page) -> None:
    """Means, parties and payload alike, each with the files that it comes from."""
    text = page.read_text()
    found = Links(text)
    numbers = r">(\d[\d.]*\*?|[\d.]+ to [\d.]+)(?:<small>[^<]*</small>)?</td>"
    tables = text[text.index("<table") : text.index('id="runs"')]
    assert re.findall(rf"<td[^>]*{numbers}", tables) == []  # no number without a link
    assert len(found.means) > 100
    assert "By party: mean, spread, worst" in tables
    assert "What one party sends and receives" in tables
    for mean in found.means:
        assert mean["href"] == "#runs"
        if "title" not in mean:  # a card
            continue
        files = mean["title"].split("\n")[1:]
        assert files
        for file in files:
            run = json.loads((page.parent / file).read_text())
            everywhere = run["config"]["topology"] == "zero-shot"
            assert everywhere or setting_of(run) == mean.get("data-setting", setting_of(run))
            assert arm_of(run) == mean["data-arm"]


def arm_of(run) -> str:
    ((board,), _) = boards([run])
    return board.arms[0].label


def held_out(run, per_client: dict) -> dict:
    """The run with its parties' own results, the spread as `fedmllm.experiment` makes it."""
    keys = {key for scores in per_client.values() for key in scores}
    run["held_out"] = {"per_client": per_client, "spread": {}}
    for key in keys:
        values = [s[key] for s in per_client.values() if s.get(key) is not None]
        mean = sum(values) / len(values)
        std = (sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)) ** 0.5
        found = {"mean": mean, "std": std, "min": min(values), "max": max(values)}
        run["held_out"]["spread"][key] = found
    run["result_sha256"] = result_digest(run)
    return run


def test_parties_by_what_they_were_tested_on(tmp_path) -> None:
    """The AUC has no value for party b: all are compared by accuracy."""
    (local,), (fed,) = seeds("local", [0.7]), seeds("fedavg", [0.8])
    held_out(fed, {"a": {"auc": 0.99, "accuracy": 0.9}, "b": {"auc": None, "accuracy": 0.4}})
    ((board,), _) = boards([local, fed])
    found = [
        (row["arm"], row["setting"], *row["words"], *row["numbers"])
        for row in _parties(board, tmp_path)
    ]
    own = ("its own held-out samples", "accuracy", "0.650", "0.354", "0.400")
    assert found == [
        ("Local", "aligned-a0.5", "the test set", "AUC", "0.700", "0.040", "0.640"),
        ("FedAvg", "aligned-a0.5", *own),
    ]


def test_own_samples_of_all_runs_are_measured_alike() -> None:
    """One run has the AUC of every party, the other has not: both count by accuracy."""
    one, two = seeds("fedavg", [0.8, 0.7])
    held_out(one, {"a": {"auc": 1.0, "accuracy": 0.6}, "b": {"auc": 0.9, "accuracy": 0.4}})
    assert own_key([one]) == "auc"
    assert worst(one, "own", "both", "auc") == 0.9
    held_out(two, {"a": {"auc": None, "accuracy": 0.7}, "b": {"auc": 0.9, "accuracy": 0.8}})
    assert own_key([one, two]) == "accuracy"
    found = over_seeds([one, two], "own", "both", "accuracy")
    assert (found.metric, found.mean, found.worst) == (
        "accuracy",
        pytest.approx(0.625),
        pytest.approx(0.55),  # of .4 and .7
    )
    assert found.half is None  # of two seeds
    assert over_seeds([one, two], "common", "both", "accuracy") is None
    one["task"]["higher_is_better"] = False
    assert worst(one, "own", "both", "auc") == 1.0
    assert worst(one, "own", "both", "accuracy") == 0.4


@pytest.mark.parametrize(
    "broken", [[], {"per_client": 3}, {"per_client": {"a": 1}}, {"spread": {"auc": {"min": "x"}}}]
)
def test_a_strange_held_out_is_none(broken) -> None:
    (run,) = seeds("fedavg", [0.8])
    run["held_out"] = broken
    assert over_seeds([run], "own", "both", own_key([run])) is None


@pytest.fixture
def with_parties():
    runs = seeds("local", [0.7, 0.72]) + seeds("fedavg", [0.8, 0.82])
    for i, run in enumerate(runs):
        own = {"a": {"auc": 0.9, "accuracy": 0.8}, "b": {"auc": 0.5 + i / 100, "accuracy": 0.6}}
        held_out(run, own)
    return runs


def test_the_worst_party_in_every_form(with_parties, tmp_path) -> None:
    write(tmp_path / "runs", with_parties)
    found, problems = load_results([tmp_path / "runs"])
    assert problems == []
    rows = {row["arm"]: row for row in csv.DictReader(io.StringIO(csv_grid([table(found)])))}
    assert float(rows["Local"]["party_worst"]) == pytest.approx(0.65)  # .64 and .66
    assert float(rows["Local"]["party_mean"]) == pytest.approx(0.71)
    assert rows["FedAvg"]["party_worst"] == ""
    assert rows["FedAvg"]["own_metric"] == "auc"
    assert float(rows["FedAvg"]["own_worst"]) == pytest.approx(0.525)  # .52 and .53
    assert float(rows["FedAvg"]["own_mean"]) == pytest.approx((0.9 + 0.525) / 2)
    assert float(rows["FedAvg"]["own_std"]) == pytest.approx(0.375 / 2**0.5)

    common, own = worst_tables([table(found)])
    assert list(common.cells) == ["Local"]
    assert list(own.cells) == ["Local", "FedAvg"]
    assert own.title == "memes, worst party on its own held-out samples"
    assert "| FedAvg | 0.525 |" in markdown_grid([own])
    assert "worst party on the test set, image + text: mean over 2 seeds" in note(common)
    for name in ("t.md", "t.tex"):
        text = write_tables(found, tmp_path / name, title="t").read_text()
        assert text.count("worst party on its own held-out samples") >= 1
        assert "0.525" in text

    per_run = write_tables(found, tmp_path / "r.csv", title="t", per_run=True).read_text()
    lines = {line["run"]: line for line in csv.DictReader(io.StringIO(per_run))}
    fed = lines["memes-aligned-a0.5-fedavg-plain-s1"]
    assert (fed["party_worst"], fed["own_metric"]) == ("", "auc")
    assert float(fed["own_worst"]) == 0.53
    assert float(lines["memes-aligned-a0.5-local-plain-s0"]["party_worst"]) == pytest.approx(0.64)


def test_the_worst_party_of_federated_runs_is_on_the_page(with_parties, tmp_path) -> None:
    write(tmp_path / "runs", with_parties)
    found, _ = load_results([tmp_path / "runs"])
    text = write_grid_report(found, tmp_path / "r.html").read_text()
    head = re.search(r'<table class="runs">.*?</thead>', text, re.DOTALL)[0]
    heads = re.findall(r'<button type="button">([^<]*)</button>', head)
    row = re.search(r'<tr[^>]*data-arm="FedAvg" data-seed="1">(.*?)</tr>', text, re.DOTALL)[1]
    cells = dict(zip(heads, re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL), strict=True))
    assert cells["worst party, own samples"] == "0.530"
    assert cells["worst party, test set"] == "–"
    few = write_tables(found, tmp_path / "few.html", title="t", per_run=True).read_text()
    assert 'data-label="worst party, own samples" data-value="0.53">0.530' in few


def test_figures_as_files(page, tmp_path) -> None:
    found, _ = load_results([page.parent / "runs"])
    few = [r for r in found if r["config"]["prompt"] == "plain"]
    files = write_figures(few, tmp_path / "svg")
    names = [file.name for file in files]
    assert names == [
        "memes-radar.svg",
        "memes-curves-aligned.svg",
        "memes-curves-missing.svg",
        "memes-curves-cross.svg",
        "memes-drop.svg",
        "memes-communication.svg",
        "memes-held-aligned-a0.5.svg",
        "memes-held-missing-b0.5.svg",
        "memes-held-cross-i5t5.svg",
    ]
    for file in files:
        ET.parse(file)
    assert " FedYogi" in (tmp_path / "svg" / "memes-radar.svg").read_text()  # the legend
    both = write_figures(found, tmp_path / "both", png=True)
    assert [f.suffix for f in both] == [".svg", ".png"] * (len(both) // 2)
    assert all(f.stat().st_size for f in both)
    plain = (tmp_path / "both" / "memes-radar.svg").read_text()
    assert "+ prompt" not in plain  # a legend names what is drawn
    prompt = (tmp_path / "both" / "memes-radar-prompt.svg").read_text()
    assert "with prompt" in prompt
    assert " FedYogi" in prompt
    again = write_figures(few, tmp_path / "again")
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again]


def test_figures_of_few_runs(tmp_path) -> None:
    """The demo's six runs are no grid."""
    found, _ = load_results([Path(__file__).resolve().parent.parent / "results" / "demo"])
    names = [file.name for file in write_figures(found, tmp_path)]
    assert names[:3] == ["memes-conditions.svg", "memes-curves.svg", "memes-parties-local.svg"]
    held = [name for name in names if "held" in name]
    manifests = {
        r["manifest"]["sha256"] for r in found if r["name"] not in ("zero-shot", "centralised")
    }
    assert len(held) == len(manifests)


def test_who_holds_what_by_class_and_modality(tmp_path) -> None:
    """A result that says both is drawn with both; one that contradicts itself is refused."""
    made = seeds("fedavg", [0.6, 0.7])
    for run in made:
        for client in run["manifest"]["clients"]:
            no, yes = client["labels"].values()
            client["kept"] = {"no": {"image+text": no}, "yes": {"image": yes}}
        run["result_sha256"] = result_digest(run)
    found, problems = load_results([write(tmp_path / "runs", made)])
    assert problems == []
    (summary, *_) = summaries_of(found[0])
    assert summary.counts["yes"] == {"image+text": 0, "image": 80, "text": 0, "neither": 0}
    text = write_grid_report(found, tmp_path / "r.html").read_text()
    assert "no" in re.findall(r">([^<>]+)</text>", text)
    assert summaries_of(seeds("fedavg", [0.6])[0]) == []
    made[0]["manifest"]["clients"][0]["kept"]["no"]["image"] = 1
    made[0]["result_sha256"] = result_digest(made[0])
    _, problems = load_results([write(tmp_path / "runs", made)])
    assert "do not add up to its labels" in problems[0]


def test_what_a_party_sends_and_receives_by_part(tmp_path) -> None:
    """Two clients a round, 0.4 MB: 0.2 MB each. SCAFFOLD's result is of before there were two
    ways."""
    made = [*seeds("fedavg", [0.6, 0.7]), *seeds("scaffold", [0.6, 0.7])]
    up = {"lora": 98_304, "connector": 0, "prototypes": 101_696}
    for run in made[:2]:
        run["bytes"]["per_client_round"] = {"up": up, "down": {"lora": 200_000, "connector": 0}}
    for run in made[2:]:
        run["bytes"]["per_client_round"] = {"lora": 100_000, "connector": 0}
    for run in made:
        run["result_sha256"] = result_digest(run)
    found, problems = load_results([write(tmp_path / "runs", made)])
    assert problems == []
    ((board,), _) = boards(found)
    payload = _payload(board, tmp_path / "runs")
    heads = ["lora, up", "prototypes, up", "all, up", "lora, down", "all, down"]
    assert payload["heads"] == heads
    assert {label: row["numbers"] for label, row in payload["rows"].items()} == {
        "FedAvg": ["0.10", "0.10", "0.20", "0.20", "0.20"],
        "SCAFFOLD": ["0.10", "–", "0.20", "0.10", "0.20"],
    }
    files = payload["rows"]["FedAvg"]["files"]
    assert len(files) == 2
    assert all((tmp_path / "runs" / file).is_file() for file in files)
    made[1]["bytes"]["per_client_round"]["up"] = up | {"prototypes": 2_000_000}
    ((board,), _) = boards(made)
    row = _payload(board, tmp_path)["rows"]["FedAvg"]
    assert row["numbers"][1] == "0.10 to 2.00"


@pytest.mark.parametrize(
    "harm", [{"up": 3}, {"up": {"lora": -1}}, {"up": {"lora": {"a": 1}}}, {"lora": {"up": 3}}]
)
def test_bytes_that_cannot_be_are_a_fault(harm, tmp_path) -> None:
    (made,) = seeds("fedavg", [0.6])
    made["bytes"]["per_client_round"] = harm
    made["result_sha256"] = result_digest(made)
    with pytest.raises(UserError, match=r"bytes\.per_client_round\..* not a number from zero up"):
        load_results([write(tmp_path, [made])])


def test_what_drift_measured_is_on_the_page(tmp_path) -> None:
    """Of two rounds the mean, then of two seeds: (.2 + .4) / 2 and (.4 + .6) / 2 make .4."""
    made = seeds("fedavg", [0.6, 0.7])
    for i, run in enumerate(made):
        for number, line in enumerate(run["history"][:2]):
            line["measured"] = {"drift_cosine": 0.2 + 0.2 * (i + number), "loss": 3.0}
        run["history"][1]["measured"]["drift_dispersion"] = 1.5
        near = {"cosine": 0.8, "distance": 0.25 + 0.5 * i}
        run["modality_alignment"] = {"image_withheld": near, "neither": {"cosine": None}}
        run["result_sha256"] = result_digest(run)
    found, problems = load_results([write(tmp_path / "runs", made)])
    assert problems == []
    ((board,), _) = boards(found)
    drift = _drift(board, tmp_path / "runs")
    assert dict(zip(drift["heads"], drift["rows"][0]["numbers"], strict=True)) == {
        "cosine of updates": "0.400",
        "dispersion of updates": "1.500",
        "cosine to whole, image withheld": "0.800",
        "distance to whole, image withheld": "0.500",
    }
    assert len(drift["rows"][0]["files"]) == 2
    text = write_grid_report(found, tmp_path / "runs" / "r.html").read_text()
    assert "distance to whole, image withheld" in text
    ((board,), _) = boards(seeds("fedavg", [0.6, 0.7]))
    assert _drift(board, tmp_path) == {"heads": [], "rows": []}


def test_the_parties_profiles_are_on_the_page_of_a_grid(tmp_path) -> None:
    made = [*seeds("fedavg", [0.6, 0.7]), *seeds("fedyogi", [0.6, 0.7], TWO[1])]
    for run in made[1:]:
        rows = [{**client, "index": 0.25, "weight": 0.075} for client in run["manifest"]["clients"]]
        run["heterogeneity"] = {"epsilon": None, "clients": rows}
        run["result_sha256"] = result_digest(run)
    found, problems = load_results([write(tmp_path / "runs", made)])
    assert problems == []
    ((board,), _) = boards(found)
    cards = _profiles(board, "b0")
    words = ["aligned-a0.5, FedAvg, seed 1", "missing-b0.5, FedYogi, seed 0"]  # who sent any
    assert [card["label"] for card in cards] == words
    assert all("h 0.25  w 0.075" in card["svg"] for card in cards)
    names = [file.name for file in write_figures(found, tmp_path / "svg")]
    assert names[-2:] == ["memes-profiles-aligned-a0.5.svg", "memes-profiles-missing-b0.5.svg"]
    text = write_grid_report(found, tmp_path / "runs" / "r.html").read_text()
    assert all(label in text for label in words)


def test_forms_by_suffix(page, tmp_path) -> None:
    found, _ = load_results([page.parent / "runs"])
    one = found[:1]
    assert not is_grid(one)
    for name in ("t.md", "t.tex", "t.csv"):
        assert write_tables(found, tmp_path / name, title="t").read_text()
    text = (tmp_path / "t.csv").read_text()
    write_tables(found, tmp_path / "t.csv", title="t", per_run=True)
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + len(found)
    assert text.startswith("task,metric,condition")
    page_of_one = write_tables(one, tmp_path / "one.html", title="t")
    assert 'id="runs"' not in page_of_one.read_text()
    with pytest.raises(UserError, match=r"must end in \.html, \.md, \.tex or \.csv"):
        write_tables(found, tmp_path / "t.pdf", title="t")


TRY = """
  var table = document.querySelector("#runs table"), head = table.tHead.rows[0];
  var names = Array.from(head.cells).map(c => c.textContent.trim());
  function shown() { return Array.from(table.tBodies[0].rows).filter(r => !r.hidden); }
  function press(name) {
    var cell = head.cells[names.indexOf(name)];
    cell.querySelector("button").click();
    return cell.getAttribute("aria-sort");
  }
  function numbers(name) { return shown().map(r => +r.cells[names.indexOf(name)].dataset.value); }
  function words(name) { return shown().map(r => r.cells[names.indexOf(name)].textContent); }
  function ordered(a, sign) { return a.every((v, i) => !i || sign * (v - a[i - 1]) >= 0); }
  say("all", shown().length);
  var way = press("image + text"); say("up", ordered(numbers("image + text"), 1) + " " + way);
  way = press("image + text"); say("down", ordered(numbers("image + text"), -1) + " " + way);
  way = press("arm"); say("text", [...new Set(words("arm"))].join(",") + " " + way);
  way = press("arm"); say("back", [...new Set(words("arm"))][0] + " " + way);
  press("seed"); say("seed", [...new Set(words("seed"))].join(","));
  var select = document.querySelector("select[data-filter=arm]");
  select.value = "FedYogi"; select.dispatchEvent(new Event("change"));
  say("arm", shown().length + " " + shown().every(r => r.dataset.arm === "FedYogi"));
  var search = document.querySelector("#runs input[type=search]");
  search.value = "missing"; search.dispatchEvent(new Event("input"));
  say("words", shown().length);
  document.querySelector("#runs .filters button").click();
  say("clear", shown().length + " " + document.querySelector("#runs [role=status]").textContent);
  document.querySelector("a[data-arm='FedAvg'][data-setting='cross-i5t5']").click();
  say("mean", shown().length + " " + shown()[0].dataset.setting);
  document.querySelector("a[data-arm='Zero-shot'][data-setting='cross-i5t5']").click();
  say("zero", shown().length);
  document.querySelector(".cards a[data-arm]").click();
  say("card", shown().length);
  say("bar", document.querySelector("#runs .filters").offsetHeight > 0);
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_in_chromium(page, tmp_path, width) -> None:
    arms = ["Centralised", "FedAdam", "FedAvg", "FedAvgM", "FedYogi", "Local", "Zero-shot"]
    both = [f"{arm}{more}" for arm in arms[:-1] for more in ("", " + prompt")]
    assert tried(page, TRY, tmp_path, width=width) == [
        "all 73",
        "up true ascending",
        "down true descending",
        f"text {','.join([*both, 'Zero-shot'])} ascending",
        "back Zero-shot descending",
        "seed 0,1",
        "arm 6 true",
        "words 2",
        "clear 73 73 of 73 runs",
        "mean 2 cross-i5t5",
        "zero 1",
        "card 1",
        "bar true",
        "wide false",
        "errors 0 ",
    ]
