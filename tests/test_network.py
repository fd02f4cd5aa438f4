"""The benchmark of the network: what it reads off a run, and the tables made of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "scripts"))

import network  # noqa: E402
import update_docs  # noqa: E402


def case(**change: Any) -> dict[str, Any]:
    peak = {"site job": 2e8, "trainer": 6e8, "all of a site": 9e8, "server job": 1e9}
    return {
        "case": "2x0.2",
        "sites": 2,
        "adapter_bytes": 200_000,
        "median_round_seconds": 2.0,
        "median_exchange_seconds": 1.9,
        "start_seconds": 10.0,
        "finish_seconds": 1.0,
        "leave_seconds": 9.0,
        "peak_bytes": peak,
        "load_before": 0.5,
        **change,
    }


def put(folder: Path, *cases: dict[str, Any]) -> None:
    facts = {"hardware": {"cpu": "C", "cores": 2}, "versions": {"torch": "2", "nvflare": "2.9"}}
    facts |= {"date": "2026-01-01", "cases": list(cases)}
    (folder / "network.json").write_text(json.dumps(facts))


def test_hours_by_hand() -> None:
    """25 rounds of 4 s, of 2 x 2 x 100 MB at 125 MB/s = 3.2 s, and 20 s around them: 200 s."""
    made = case(adapter_bytes=100_000_000, median_round_seconds=4.0)
    assert update_docs.network_seconds(made, rounds=25, link=125e6) == pytest.approx(200.0)


def test_memory_is_counted_in_adapters_above_the_smallest(monkeypatch, tmp_path) -> None:
    """1,500 MB at 300.2 MB less 900 MB at 0.2 MB is 2 adapters."""
    monkeypatch.setattr(update_docs, "RESULTS", tmp_path)
    big = case(case="2x300", adapter_bytes=300_200_000)
    big["peak_bytes"] = {**big["peak_bytes"], "all of a site": 15e8}
    put(tmp_path, case(), big)
    lines = update_docs.network_memory().splitlines()
    assert lines[2].endswith("| – |  |")
    assert lines[3].endswith("| 1,500 MB | 1,000 MB | 2.00 adapters | 4 |")


def test_what_was_not_measured_is_said(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(update_docs, "RESULTS", tmp_path)
    for table in ("network_rounds", "network_memory", "network_sizing"):
        assert getattr(update_docs, table)() == update_docs.NONE
    put(tmp_path, case(), {"case": "8x300", "not_measured": "no memory"})
    assert "| 8 | 300 MB | not measured: no memory |" in update_docs.network_rounds()
    assert "| 8 |" not in update_docs.network_sizing()


def test_a_round_ends_when_its_line_is_written(tmp_path) -> None:
    """Three lines at 10, 13 and 17 s after a first request at 8 s: rounds of 2, 3 and 4 s."""
    run = tmp_path / "kits" / "server" / "runs" / "network"
    run.mkdir(parents=True)
    watch = network.Watch(tmp_path / "kits", run)
    watch.look()
    assert watch.first_round is None
    (run / "status.json").write_text(json.dumps({"doing": "training", "at": 8.0}))
    for count, written in ((1, 10.0), (2, 13.0), (3, 17.0)):
        file = run / "metrics.jsonl"
        file.write_text("{}\n" * count)
        os.utime(file, (written, written))
        watch.look()
    (run / "status.json").write_text(json.dumps({"doing": "done", "at": 18.0}))
    watch.look()
    sites = {"client-00": {"trainer": 7}, "client-01": {"trainer": 4, "site job": 5}}
    watch.most = {"server": {"server job": 5}, **sites}
    watch.peaks = {1: ("server", "server job", 5), 2: ("client-01", "trainer", 6)}
    lines = [{"seconds": 1.0, "clients": ["a", "b"], "measured": {"stub_seconds": 0.1}}] * 3
    result = {"history": lines, "bytes": {"per_client_round": {"up": {"lora": 4}}}}
    found = network.facts(network.Case(2, 0.2, 3), watch, result, times=(1.0, 3.0, 20.0), load=0.0)
    assert found["round_seconds"] == [2.0, 3.0, 4.0]
    assert found["median_round_seconds"] == 3.0
    assert (found["connect_seconds"], found["start_seconds"]) == (2.0, 5.0)
    assert (found["finish_seconds"], found["leave_seconds"]) == (1.0, 2.0)
    peak = {"server job": 5, "trainer": 6, "all of the server": 5, "all of a site": 9}
    assert found["peak_bytes"] == peak
    assert found["at_a_sites_peak_bytes"] == {"trainer": 4, "site job": 5}
    lines[0]["clients"] = ["a"]
    with pytest.raises(SystemExit, match="not every round was seen, or had all sites"):
        network.facts(network.Case(2, 0.2, 3), watch, result, times=(1, 3, 20), load=0.0)


def test_sizes_come_from_the_rank() -> None:
    ranks = {case.name: case.rank for case in network.CASES}
    assert ranks["2x0.2"] == 8
    assert ranks["2x300"] * network.BYTES_A_RANK == pytest.approx(300e6, rel=1e-3)


def test_where_the_goal_was_met_is_said(monkeypatch, tmp_path) -> None:
    """1,500 MB is 2 adapters above 900 MB, 2,400 MB is 5; where 300 MB was not run, nothing."""
    monkeypatch.setattr(update_docs, "RESULTS", tmp_path)
    big, worse = (case(case="x", adapter_bytes=300_200_000) for _ in range(2))
    big["peak_bytes"] = {**big["peak_bytes"], "all of a site": 15e8}
    worse = {**worse, "sites": 8, "peak_bytes": {**big["peak_bytes"], "all of a site": 24e8}}
    put(tmp_path, case(), big, case(sites=8), worse)
    said = "The goal of 4 adapters at a site at 300 MB: met with 2 sites (2.00), **missed** with 8 "
    assert f"\n{said}sites (5.00).\n" in update_docs.network_memory()
    put(tmp_path, case())
    assert "goal of" not in update_docs.network_memory()


def test_bytes_of_a_round_and_of_runs(monkeypatch, tmp_path) -> None:
    """2 sites x 100 MB x 2 ways is 0.4 GB a round."""
    monkeypatch.setattr(update_docs, "RESULTS", tmp_path)
    put(tmp_path, case(adapter_bytes=100_000_000), case(sites=8, adapter_bytes=300_000_000))
    assert "| 2 | 100 MB | 0.4 GB | 10 GB | 40 GB |" in update_docs.network_sizing()
    assert "| 8 | 300 MB | 4.8 GB | 120 GB | 480 GB |" in update_docs.network_sizing()
