"""Numbers that change are said to have changed: `fedmllm.revisions`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import FILE, RUNS, facts_of, small_config

from fedmllm import revisions
from fedmllm.algorithms import ALGORITHMS
from fedmllm.algorithms.aggregation import AGGREGATIONS
from fedmllm.experiment import Shared
from fedmllm.models.mllm import Mllm
from fedmllm.prompts import STYLES
from fedmllm.report.loading import TOPOLOGIES
from fedmllm.revisions import STRATEGY_PARTS, revisions_of
from fedmllm.scenarios import SCENARIOS

KEPT = json.loads(FILE.read_text())
WHAT_TO_DO = (
    "the numbers of this run have changed. If that was meant, raise the number of the part that "
    "changed in src/fedmllm/revisions.py and run `python tests/small_runs.py`; if not, mend it"
)


@pytest.fixture(scope="module")
def shared(mllm: Mllm) -> Shared:
    return Shared(mllm)


@pytest.mark.parametrize("name", RUNS)
def test_numbers_change_only_with_a_revision(name: str, shared: Shared, tmp_path: Path) -> None:
    found = facts_of(small_config(name), shared, tmp_path / "r")
    kept = KEPT[name]
    assert found["revisions"] == kept["revisions"], "run `python tests/small_runs.py`"
    # another processor or a patch of torch moves the last digits, a changed formula far more
    assert found["losses"] == pytest.approx(kept["losses"], rel=1e-3), WHAT_TO_DO
    assert found["surprise"] == pytest.approx(kept["surprise"], rel=1e-3), WHAT_TO_DO
    # one of a dozen samples may tip over
    assert found["metric"] == pytest.approx(kept["metric"], abs=0.1), WHAT_TO_DO


def test_the_small_runs_pass_through_every_part() -> None:
    parts = {part for name in RUNS for part in KEPT[name]["revisions"]}
    assert {f"algorithm:{name}" for name in ALGORITHMS} <= parts
    assert {f"aggregation:{name}" for name in AGGREGATIONS if name != "mean"} <= parts
    assert "aggregation:mean" not in parts
    assert {f"scenario:{name}" for name in SCENARIOS} <= parts
    assert {f"topology:{name}" for name in TOPOLOGIES} <= parts
    assert {f"strategy:{name}" for name in STRATEGY_PARTS} <= parts
    assert {f"prompt:{name}" for name in STYLES} <= parts
    assert {"data:memes", "data:crisis", "data:medical"} <= parts  # the others are read from files


PLAIN = {"aligned": "fedavg", "missing": "missing", "cross": "cross"}


@pytest.mark.parametrize("name", sorted(RUNS.keys() - set(PLAIN.values())))
def test_every_run_differs_from_a_plain_one_of_its_scenario(name: str) -> None:
    """By more than the tolerance: else the numbers would not tell whether its part was there."""
    config = small_config(name)
    plain = KEPT[PLAIN.get(config.scenario["name"], "fedavg")]
    numbers, others = ([*each["losses"], each["surprise"]] for each in (KEPT[name], plain))
    assert numbers != pytest.approx(others, rel=2e-3)


def test_a_raised_part_concerns_only_runs_that_pass_through_it(monkeypatch) -> None:
    before = {name: revisions_of(small_config(name).model_dump()) for name in RUNS}
    monkeypatch.setitem(revisions.REVISIONS, "algorithm:fedadam", 2)
    after = {name: revisions_of(small_config(name).model_dump()) for name in RUNS}
    assert [name for name in RUNS if before[name] != after[name]] == ["fedadam", "median"]
    assert after["fedadam"]["algorithm:fedadam"] == 2
