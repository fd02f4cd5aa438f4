"""What the page of a grid says first: worked by hand from a few numbers."""

from __future__ import annotations

import pytest
from synthetic_grid import grid, result

from fedmllm.report import glance, write_grid_report
from fedmllm.report.arms import boards
from fedmllm.report.grid_tables import grid_tables
from fedmllm.report.statistics import mean_and_half

TWO = ("aligned-a0.5", "missing-b0.5")


def runs(method: str, *by_setting, settings=TWO, prompt: str = "plain") -> list[dict]:
    """A run for each setting and seed: `by_setting` has a list of values by seed for each."""
    return [
        result(method, setting, seed, value=value, prompt=prompt)
        for setting, values in zip(settings, by_setting, strict=False)
        for seed, value in enumerate(values)
    ]


def told(results):
    ((board,), _) = boards(results)
    (table,), _ = grid_tables(results)
    return board, table


def test_the_best_has_the_best_mean_over_settings() -> None:
    """FedAvg .8 and .6, FedYogi .7 and .76: .7 against .73; each leads once."""
    results = runs("fedavg", [0.8, 0.8], [0.62, 0.58]) + runs("fedyogi", [0.7, 0.7], [0.76, 0.76])
    results += [result("zero-shot", TWO[0], 0, value=0.5), *runs("centralised", [0.9], [0.8])]
    board, table = told(results)
    assert glance.finding(board, table) == (
        "FedYogi has the best mean over settings of 2 federated arms, AUC 0.730: 0.230 above the "
        "untrained model and 0.120 below pooling all data. It leads in 1 of 2 settings."
    )
    cards = glance.cards(board, "both")
    assert [(c["words"], c["value"], c["arm"]) for c in cards] == [
        ("Untrained", "0.500", "Zero-shot"),
        ("Best federated", "0.730", "FedYogi"),
        ("All data pooled", "0.850", "Centralised"),
    ]
    assert [c["half"] for c in cards] == ["", "", ""]  # no interval of two seeds
    assert glance.by_setting(board, table) == {}


def test_an_interval_is_over_seeds_of_their_means_over_settings() -> None:
    """Seed 0: .8 and .6; seed 1: .7 and .5; and so on."""
    first, second = [0.8, 0.7, 0.8, 0.7, 0.75], [0.6, 0.5, 0.6, 0.5, 0.55]
    board, _ = told(runs("fedavg", first, second))
    (found,) = glance.overall(board, "both", "federated")
    assert (found.mean, found.half, found.seeds) == (
        pytest.approx(0.65),
        pytest.approx(mean_and_half([0.7, 0.6, 0.7, 0.6, 0.65])[1]),
        5,
    )
    board, _ = told(runs("fedavg", first[:4], second[:4]))
    assert glance.overall(board, "both", "federated")[0].half is None


def test_an_arm_that_lacks_the_hard_setting_is_not_called_the_best() -> None:
    results = runs("fedavg", [0.8], [0.6]) + runs("fedyogi", [0.9])
    board, table = told(results)
    assert glance.cards(board, "both") == []
    assert glance.finding(board, table) == (
        "Not every federated arm was run in every setting. The best of each setting:"
    )
    assert glance.by_setting(board, table) == {
        "aligned-a0.5": "FedYogi, AUC 0.900",
        "missing-b0.5": "FedAvg, AUC 0.600",
    }


def test_means_over_settings_are_of_the_seeds_that_all_federated_arms_have() -> None:
    """FedYogi was spared the hard seed 1: by seed 0 FedAvg leads, .75 to .7, and pooling has .8
    there."""
    results = runs("fedavg", [0.8, 0.2], [0.7, 0.2]) + runs("fedyogi", [0.7], [0.7])
    results += runs("centralised", [0.8, 0.4], [0.8, 0.4])
    board, table = told(results)
    assert glance.finding(board, table) == (
        "FedAvg has the best mean over settings of 2 federated arms, AUC 0.750: 0.050 below "
        "pooling all data. It leads in 2 of 2 settings."
    )
    late = [result("fedavg", setting, seed, value=0.8) for setting in TWO for seed in (1, 2)]
    board, table = told([*late, result("zero-shot", TWO[0], 0, value=0.5)])  # it has no seed
    assert "0.300 above the untrained model" in glance.finding(board, table)
    apart = runs("fedavg", [0.8], [0.7])
    apart += [result("fedyogi", setting, 1, value=0.9) for setting in TWO]
    board, table = told(apart)
    assert glance.finding(board, table).startswith("The federated arms have no seed in common.")
    assert glance.cards(board, "both") == []


def test_of_many_settings_it_says_who_leads_most_often() -> None:
    results = [r for r in grid(seeds=1, prompts=("plain",)) if r["name"] != "memes-cross-i5t5-x"]
    results = [r for r in results if not r["name"].startswith("memes-cross-i5t5-fedavg-")]
    board, table = told(results)
    assert glance.by_setting(board, table) == {}
    assert glance.finding(board, table) == (
        "Not every federated arm was run in every setting. "
        "Most often in the lead, of 12 settings: FedYogi in 12."
    )


def test_how_sure() -> None:
    few = told(runs("fedavg", [0.6] * 2) + runs("fedyogi", [0.9] * 2))[1]
    assert glance.sure(few).startswith("No difference is tested: 2 seeds cannot tell luck")
    one = told(runs("fedavg", [0.6]) + runs("fedyogi", [0.9]))[1]
    assert "one seed cannot" in glance.sure(one)
    a, b = [0.80, 0.82, 0.81, 0.83, 0.80], [0.70, 0.75, 0.71, 0.74, 0.73]
    many = told(runs("fedavg", b, a) + runs("fedyogi", a, a[::-1]))[1]
    assert glance.sure(many) == (
        "In 1 of 2 settings the best federated arm is better than the next beyond chance "
        "(starred); elsewhere their order may be luck."
    )
    alone = told(runs("fedavg", a))[1]
    assert glance.sure(alone).startswith("No difference between federated arms is tested")


def test_what_was_run() -> None:
    board, _ = told(grid(seeds=2, settings=TWO, keep=lambda name: name in ("fedavg", "fedyogi")))
    assert glance.what(board, (2, 2)) == (
        "33 runs: Zero-shot, Local, FedAvg, FedYogi and Centralised with and without the strategy "
        "prompt in 2 settings with 2 seeds; 4 parties, 2 of them in a round."
    )


def test_the_page_says_it(tmp_path) -> None:
    results = runs("fedavg", [0.8, 0.8], [0.6, 0.6]) + runs("fedyogi", [0.7, 0.7], [0.76, 0.76])
    text = write_grid_report(results, tmp_path / "r.html").read_text()
    start = text.index("<h1>")
    assert start < text.index("FedYogi has the best mean") < text.index('<table class="means">')
    assert (
        start < text.index("8 runs: FedAvg and FedYogi in 2 settings") < text.index("How to read")
    )
