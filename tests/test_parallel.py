"""Several runs on two processes give what one after the other gives; the demo's own parts."""

from __future__ import annotations

import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from fedmllm import experiment, parallel
from fedmllm.config import make_config
from fedmllm.demo import BASE, RUNS, demo_configs, run_demo
from fedmllm.errors import UserError
from fedmllm.experiment import run
from fedmllm.models.mllm import Mllm
from fedmllm.parallel import Job, _next, default_processes, rough_work, run_many
from fedmllm.progress import ManyProgress

SMALL = {
    "data": {"name": "memes", "train": 40, "test": 16},
    "partition": {"clients": 2},
    "training": {"rounds": 1},
    "evaluation": {"every": 0, "conditions": ["both"]},
}


def config(name: str, **change):
    return make_config({"name": name, **SMALL, **change})


def test_two_processes_give_the_same_bits(tmp_path: Path, mllm: Mllm) -> None:
    configs = [config("a"), config("b", scenario="missing"), config("c", topology="zero-shot")]
    events: list[dict] = []
    found = run_many(configs, tmp_path / "many", processes=2, listener=events.append)
    for each in configs:
        alone = run(each, out=tmp_path / "alone" / each.name, mllm=mllm)
        assert found[each.name]["metrics"] == alone["metrics"]
        parts = ("many", each.name), ("alone", each.name)
        files = [tmp_path.joinpath(*part, "adapter", "adapter_model.safetensors") for part in parts]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert {e["name"] for e in events if e["event"] == "done"} == {"a", "b", "c"}


def test_a_failure_is_raised_with_its_message(tmp_path: Path) -> None:
    bad = config("bad", data={"name": "memes", "train": 2, "test": 16})
    with pytest.raises(UserError, match="too few"):
        run_many([bad], tmp_path, processes=1, listener=lambda event: None)


def test_the_demo_is_the_six_runs_that_the_readme_promises() -> None:
    configs = {c.name: c for c in demo_configs()}
    assert list(configs) == list(RUNS)
    kinds = [(c.topology, c.scenario["name"], c.prompt) for c in configs.values()]
    assert sorted(kinds) == sorted(
        [
            ("zero-shot", "aligned", "plain"),
            ("local", "aligned", "plain"),
            ("centralised", "aligned", "plain"),
            ("federated", "aligned", "plain"),
            ("federated", "missing", "plain"),
            ("federated", "missing", "agnostic"),
        ]
    )
    assert all(c.data == configs["local"].data for c in configs.values())


KILLED = """
import sys, yaml
from pathlib import Path
from fedmllm.config import make_config
from fedmllm.parallel import run_many
if __name__ == "__main__":
    raw = yaml.safe_load(sys.argv[1])
    tell = lambda event: print(event["event"], flush=True)
    run_many([make_config(raw)], Path(sys.argv[2]), processes=1, listener=tell)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "many.py"
    script.write_text(KILLED)
    raw = {"name": "long", **SMALL, "training": {"rounds": 500, "clients_per_round": 1}}
    parent = subprocess.Popen(
        [sys.executable, script, yaml.safe_dump(raw), tmp_path / "out"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.strip() == "round":
            break
    parent.kill()
    parent.wait(timeout=30)
    lines = tmp_path / "out" / "long" / "metrics.jsonl"
    deadline, rounds = time.monotonic() + 60, -1
    while rounds != (now := len(lines.read_text().splitlines())):
        assert time.monotonic() < deadline, "the worker trains on without its parent"
        rounds = now
        time.sleep(3)
    assert rounds < 500


def test_what_the_listener_raises_is_not_lost(tmp_path: Path) -> None:
    def listen(event) -> None:
        if event["event"] == "done":
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_many([config("a", topology="zero-shot")], tmp_path, processes=1, listener=listen)


def test_a_small_demo_end_to_end(tmp_path: Path, monkeypatch, capsys) -> None:
    small = {**BASE, "data": SMALL["data"], "training": {"rounds": 1, "clients_per_round": 2}}
    monkeypatch.setitem(RUNS["centralised"], "training", {"rounds": 1})
    monkeypatch.setattr("fedmllm.demo.BASE", {**small, "partition": {"clients": 3}})
    page = run_demo(tmp_path / "demo")
    text = capsys.readouterr().out
    for name in RUNS:
        assert name in text
        assert (tmp_path / "demo" / name / "result.json").exists()
        assert name in page.read_text()
    assert str(page.name) in text


class Given:
    """A worker's end of the pipe: jobs in, messages out."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs, self.told = list(jobs), []

    def recv(self) -> Job:
        if not self.jobs:
            raise EOFError
        return self.jobs.pop(0)

    def send(self, message) -> None:
        self.told.append(message)


def test_a_worker_loads_a_base_once_for_all_jobs_that_use_it(
    tmp_path: Path, mllm: Mllm, monkeypatch
) -> None:
    """What a worker does, here without its process: three runs on one base, one of them bad, and
    then one on another."""
    loaded, shared = [], []
    load = experiment.load_model

    def loading(config):
        loaded.append(config.lora.rank)
        return mllm if config.lora.rank == 8 else load(config)

    def running(config, **options):
        shared.append(options["shared"])
        return run(config, **options)

    monkeypatch.setattr(experiment, "load_model", loading)
    monkeypatch.setattr(experiment, "run", running)
    bad = {"name": "memes", "train": 2, "test": 16}
    configs = [
        config("a", topology="zero-shot"),
        config("bad", data=bad, partition={"clients": 8}),
        config("b", prompt="agnostic", topology="zero-shot"),
        config("c", lora={"rank": 4}, topology="zero-shot"),
    ]
    pipe = Given(*(Job(each, tmp_path / each.name) for each in configs))
    parallel._work(pipe)
    ended = [value for kind, value in pipe.told if kind == "ended"]
    assert [type(value).__name__ for value in ended] == ["dict", "Failure", "dict", "dict"]
    assert loaded == [8, 4]
    assert [each is shared[0] for each in shared] == [True, True, True, False]
    assert len(shared[0].datasets) == 1  # and both runs read the one data set


@pytest.mark.slow
def test_the_demo_as_the_readme_tells_it(tmp_path: Path) -> None:
    assert run_demo(tmp_path / "demo").exists()


def test_the_demo_never_writes_over_a_strangers_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not a demo folder"):
        run_demo(tmp_path)


def event(kind: str, name: str = "fedavg-aligned", **facts):
    return {"event": kind, "name": name, "elapsed": 12.0, "metric": "auc", **facts}


def round_(number: int, of: int, **facts):
    common = {"federation": "", "round": number, "rounds": of, "loss": 0.5, "metrics": None}
    return event("round", **common | facts)


def test_progress_shows_round_loss_metric_and_time_left() -> None:
    out = StringIO()
    work = {config.name: rough_work(config) for config in demo_configs()}
    progress = ManyProgress(work, Console(file=out, width=100, force_terminal=False))
    progress.listen(event("start", steps=25))
    for number in range(1, 6):
        found = {"both": {"auc": 0.625}} if number == 5 else None
        progress.listen(round_(number, 25, metrics=found))
    progress.console.print(progress.table())
    text = out.getvalue()
    assert "0 of 6 done, 1 running, 0 failed" in text
    assert "5/25" in text
    assert "0.500" in text
    assert "auc 0.625" in text
    assert "time left" in text
    assert progress.part["fedavg-aligned"] == pytest.approx(0.9 * 5 / 25)


def test_progress_is_a_line_a_run_where_no_terminal_is() -> None:
    out = StringIO()
    progress = ManyProgress({"a": 3.0, "b": 1.0}, Console(file=out, width=60))
    progress.began -= 30  # as if it had run for half a minute
    progress.listen(event("start", "a", steps=2))
    progress.listen({**round_(1, 2), "name": "a"})
    progress.listen(event("done", "a", metrics={"both": {"auc": 0.75}}))
    progress.ended("a", seconds=99)  # is counted already
    progress.ended("b", failure="no such file: x\nand more")
    assert out.getvalue().splitlines() == [
        "[1/2] done a: auc 0.750, 12 s (0 failed, 0:10 left)",  # 3 of 4 parts took 30 s
        "[2/2] FAILED b: no such file: x (1 failed, 0:00 left)",
    ]


class Idle:
    """A worker as `_next` sees it."""

    def __init__(self, base: str = "", data: str = "") -> None:
        self.base, self.data = base, data


def test_a_core_each_where_nobody_says(monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 3, 4}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert default_processes() == 3
    assert default_processes(["0", "1"]) == default_processes(["0", "1"], accelerated=True) == 2
    assert default_processes(accelerated=True) == 1
    monkeypatch.delattr("os.sched_getaffinity")  # as on macOS
    assert default_processes() == 64
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert default_processes() == 1


def test_a_worker_keeps_to_what_it_has_loaded_and_begins_with_the_longest() -> None:
    other_data = {"name": "memes", "train": 60, "test": 16}
    jobs = [
        Job(config("short"), Path("a"), work=1),
        Job(config("long"), Path("b"), work=5),
        Job(config("elsewhere", data=other_data), Path("c"), work=5.5),
        Job(config("rank", lora={"rank": 4}), Path("d"), work=9),
    ]
    new, used = Idle(), Idle(jobs[0].base, jobs[0].data)
    order = []
    waiting = list(jobs)
    while waiting:
        order.append(_next(waiting, used).config.name)  # type: ignore[arg-type]
    assert order == ["long", "short", "elsewhere", "rank"]
    assert _next(list(jobs), new).config.name == "rank"  # type: ignore[arg-type]
