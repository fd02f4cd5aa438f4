"""The benchmark: expansion, what is shared, what makes a cell stale, kills, locks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from fedmllm import revisions
from fedmllm.bench import load_grid, lock, run_grid
from fedmllm.bench.deciding import deciding, deciding_digest
from fedmllm.bench.grid import merge
from fedmllm.bench.lock import locked
from fedmllm.bench.state import (
    Present,
    differences,
    digest,
    read_journal,
    states,
    write_journal,
)
from fedmllm.bench.table import _total, plan_lines
from fedmllm.config import CONDITION_NAMES, make_config
from fedmllm.data import DATASETS
from fedmllm.data.dataset import DatasetSpec
from fedmllm.errors import UserError
from fedmllm.experiment import run
from fedmllm.models.mllm import Mllm
from fedmllm.progress import ManyProgress
from fedmllm.report import load_results, write_tables
from fedmllm.report.loading import result_digest

GRIDS = Path(__file__).resolve().parent.parent / "experiments" / "grids"
BASE = {
    "data": {"name": "memes", "train": 40, "test": 16},
    "partition": {"clients": 2},
    "training": {"rounds": 1},
    "evaluation": {"every": 0, "conditions": ["both"]},
}


def grid(tmp_path: Path, axes, overrides=(), only=(), given=(), **more):
    """A grid from its parts, by way of a file."""
    file = tmp_path / "g.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "axes": axes, **more}, sort_keys=False))
    return load_grid(file, overrides, only=only, variables=given)


METHODS = {
    "zero-shot": {"topology": "zero-shot"},
    "fedavg": {},
    "fedadam": {"algorithm": "fedadam"},
}


# -- expansion ---------------------------------------------------------------------------------


def test_axes_multiply_and_zero_shot_is_run_once(tmp_path) -> None:
    found = grid(
        tmp_path,
        {"setting": ["aligned-a0.5", "missing-b0.3"], "method": METHODS, "seed": [0, 1]},
    )
    assert [cell.name for cell in found.cells] == [
        "zero-shot",
        "aligned-a0.5-fedavg-s0",
        "aligned-a0.5-fedavg-s1",
        "aligned-a0.5-fedadam-s0",
        "aligned-a0.5-fedadam-s1",
        "missing-b0.3-fedavg-s0",
        "missing-b0.3-fedavg-s1",
        "missing-b0.3-fedadam-s0",
        "missing-b0.3-fedadam-s1",
    ]
    assert [len(cell.places) for cell in found.cells] == [4] + 8 * [1]
    last = found.cells[-1].config
    assert (last.seed, last.algorithm["name"], last.scenario["beta"]) == (1, "fedadam", 0.3)
    assert last.partition.clients == 2
    assert found.out == Path("runs/g")


def test_rules_leave_out_and_share(tmp_path) -> None:
    methods = {"centralised": {"topology": "centralised"}, "fedavg": {}}
    found = grid(
        tmp_path,
        {"setting": ["aligned-a5.0", "aligned-a0.5"], "method": methods, "seed": [0]},
        exclude=[{"method": "fedavg", "setting": "aligned-a5.0"}],
        share=[
            {
                "when": {"method": "centralised", "setting": "aligned-a5.0"},
                "as": {"setting": "aligned-a0.5"},
            }
        ],
    )
    names = {cell.name: [place["setting"] for place in cell.places] for cell in found.cells}
    assert names == {
        "aligned-a0.5-centralised-s0": ["aligned-a5.0", "aligned-a0.5"],
        "aligned-a0.5-fedavg-s0": ["aligned-a0.5"],
    }
    assert found.cells[0].config.partition.alpha == 0.5


def test_only_takes_a_part_and_keeps_the_names(tmp_path) -> None:
    axes = {"method": METHODS, "seed": [0, 1, 2]}
    found = grid(tmp_path, axes, only=["seed=2", "method=zero-shot,fedavg"])
    assert [cell.name for cell in found.cells] == ["zero-shot", "fedavg-s2"]
    assert found.cells[0].config.seed == 0  # the cell is the same whatever part is asked for


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("axes: {1: [a, b]}", "axes: a key must be text, not 1"),
        ("axes: {true: [a, b]}", "axes: a key must be text, not True"),
        ("axes: {dataset: {a: {1: x}}}", "axes.dataset.a: a config key must be text, not 1"),
        ("axes: {x: {a: {data: {2: x}}}}", "axes.x.a: a config key must be text, not 2"),
        ("axes: {seed: &a [*a]}", "has a value that holds itself"),
    ],
)
def test_bad_keys_and_values_of_a_grid(tmp_path, text, words) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_grid(tmp_path / "grid.yaml")


def part(tmp_path: Path, text: str, only=(), **whole):
    """A part of the grid of three settings (the last shared with the first) and two seeds."""
    axes = {"setting": ["aligned-a0.5", "missing-b0.3", "cross-i5t5"], "seed": [0, 1]}
    share = [{"when": {"setting": "cross-i5t5"}, "as": {"setting": "aligned-a0.5"}}]
    file = tmp_path / "whole.yaml"
    parts = {"base": BASE, "axes": axes, "share": share, **whole}
    file.write_text(yaml.safe_dump(parts, sort_keys=False))
    (tmp_path / "part.yaml").write_text(text)
    return load_grid(tmp_path / "part.yaml", only=only), load_grid(file)


def test_a_part_of_a_grid_has_the_cells_of_the_whole(tmp_path) -> None:
    found, whole = part(tmp_path, "of: whole.yaml\nonly: {setting: cross-i5t5, seed: [1]}", out="o")
    assert found.name == found.title == "part"
    assert found.out == Path("runs/part")
    assert found.axes == {"setting": ("cross-i5t5",), "seed": ("1",)}
    # its run is that of aligned, under the name that it has in the whole
    assert [cell.name for cell in found.cells] == ["aligned-a0.5-s1"]
    assert found.cells[0].places == ({"setting": "cross-i5t5", "seed": "1"},)
    assert found.cells[0].config in [cell.config for cell in whole.cells]
    both, _ = part(tmp_path, "of: whole.yaml\nonly: {seed: 1}", only=["setting=missing-b0.3"])
    assert [cell.name for cell in both.cells] == ["missing-b0.3-s1"]
    all_of_it, whole = part(tmp_path, "of: whole.yaml\ntitle: other")
    assert (all_of_it.title, all_of_it.cells) == ("other", whole.cells)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("only: {seed: 0}\naxes: {seed: [0]}", "only: goes with of"),
        ("of: whole.yaml\nbase: {}", "base: a part of another grid has name, title, out, of, only"),
        ("of: whole.yaml\nonly: {seed: 7}", "only: unknown value of axis seed"),
        ("of: whole.yaml\nonly: {speed: 7}", "only: unknown axis"),
        ("of: whole.yaml\nonly: 7", "only: give at least one axis"),
        ("of: part.yaml", "is a part of another grid itself"),
        ("of: nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_bad_parts_of_a_grid(tmp_path, text, words) -> None:
    with pytest.raises(UserError, match=words):
        part(tmp_path, text)


def test_a_list_may_hold_values_of_any_key(tmp_path) -> None:
    found = grid(tmp_path, {"training.lr": [0.001, 0.01], "algorithm": ["fedavg", "fedyogi"]})
    assert [cell.name for cell in found.cells] == [
        "lr0.001-fedavg",
        "lr0.001-fedyogi",
        "lr0.01-fedavg",
        "lr0.01-fedyogi",
    ]
    assert found.cells[-1].config.training.lr == 0.01
    assert found.cells[-1].config.training.rounds == 1


def test_a_change_reaches_into_sections_and_another_name_drops_options() -> None:
    base = {"data": {"name": "memes", "train": 9}, "training": {"rounds": 3, "lr": 0.1}}
    assert merge(base, {"training.rounds": 5})["training"] == {"rounds": 5, "lr": 0.1}
    assert merge(base, {"data": {"train": 5}})["data"] == {"name": "memes", "train": 5}
    assert merge(base, {"data": {"name": "memes", "test": 5}})["data"] == {
        "name": "memes",
        "train": 9,
        "test": 5,
    }
    assert merge(base, {"data": "crisis"})["data"] == {"name": "crisis"}
    assert merge({"model": {"dtype": "float16"}}, {"model": {"name": "x", "path": "p"}}) == {
        "model": {"dtype": "float16", "name": "x", "path": "p"}
    }
    assert base["training"] == {"rounds": 3, "lr": 0.1}


def test_every_problem_of_every_cell_is_told_at_once(tmp_path) -> None:
    methods = {
        "fedavg": {"training.rounds": -1},
        "typo": {"algorithm": "fedadm"},
        "wrong": {"trainin": 3},
    }
    with pytest.raises(UserError) as caught:
        grid(tmp_path, {"method": methods, "seed": [0, 1]}, ["lora.rank=0"])
    text = str(caught.value)
    assert "4 problems" in text
    assert "training.rounds: -1 must be greater than or equal to 0 (in 2 of 6 places" in text
    assert "did you mean 'fedadam'?" in text
    assert "trainin: unknown key" in text
    assert text.count("lora.rank: 0") == 1
    assert "lora.rank: 0 must be greater than or equal to 1\n" in text  # concerns every cell


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"axes": {}}, "axes: give at least one axis"),
        ({"axes": {"seed": 3}}, "axes.seed: give a list of values"),
        ({"axes": {"m": {"a": 3}}}, "axes.m.a: must map config keys"),
        ({"axis": {}}, "unknown key of a grid file 'axis'"),
        ({"exclude": [{"sede": 0}]}, "exclude[0]: unknown axis 'sede': choose seed"),
        ({"exclude": [{"seed": 7}]}, "unknown value of axis seed '7'"),
        ({"exclude": {"seed": 0}}, "exclude: must be a list"),
        ({"share": [{"when": {"seed": 0}}]}, "share[0]: give when"),
        ({"share": [{"when": {"seed": 0}, "as": {"seed": [0, 1]}}]}, "give one value"),
        ({"base": {"data": {"root": "${x}"}}}, "unknown variable 'x'"),
        ({"exclude": [{"seed": [0, 1]}]}, "no cell is left"),
        ({"out": [1]}, "out: must be a text, not [1]"),
        ({"title": {"a": 1}, "name": 3}, "2 problems"),
    ],
)
def test_bad_grid_files(tmp_path, change, words) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(yaml.safe_dump({"axes": {"seed": [0, 1]}, **change}))
    with pytest.raises(UserError) as caught:
        load_grid(file)
    assert words in str(caught.value)


def test_variables_are_filled_or_named(tmp_path) -> None:
    more = {
        "variables": {"place": "where the data lie"},
        "base": {"data": {"name": "conversations", "root": "${place}/mine"}},
    }
    filled = grid(tmp_path, {"seed": [0]}, given=["place=/d"], **more)
    assert filled.cells[0].config.data["root"] == "/d/mine"
    left = grid(tmp_path, {"seed": [0]}, **more)
    assert left.open_variables == {"place": "where the data lie"}
    with pytest.raises(UserError, match=r"--set place=… +where the data lie"):
        run_grid(left, out=tmp_path / "o")
    with pytest.raises(UserError, match="unknown variable of this grid 'plac'"):
        grid(tmp_path, {"seed": [0]}, given=["plac=/d"], **more)


# -- what can change a number ------------------------------------------------------------------


def config(**change):
    return make_config({"name": "x", **BASE, **change})


def test_keys_that_no_number_depends_on_are_no_part_of_a_cell() -> None:
    same = [config(), config(title="t"), config(threads=2), config(name="y")]
    same += [config(model={"gradient_checkpointing": True})]
    same += [config(evaluation={**BASE["evaluation"], "limit": 9})]  # no test on the way
    assert len({deciding_digest(c) for c in same}) == 1
    other = [config(seed=1), config(prompt="agnostic"), config(lora={"rank": 4})]
    other += [config(training={"rounds": 1, "lr": 0.5}), config(scenario="missing")]
    other += [config(model={"dtype": "bfloat16"}), config(topology="local")]
    assert len({deciding_digest(c) for c in [*same, *other]}) == 1 + len(other)


def test_zero_shot_depends_on_model_data_prompt_and_tests_only(tmp_path, mllm: Mllm) -> None:
    zero = {"topology": "zero-shot"}
    changed = config(
        **zero,
        seed=3,
        scenario="missing",
        partition={"clients": 5},
        training={"rounds": 9, "lr": 0.5},
        lora={"rank": 4, "alpha": 16},
    )
    assert deciding_digest(config(**zero)) == deciding_digest(changed)
    first = run(config(**zero), out=tmp_path / "a", mllm=mllm)
    second = run(changed, out=tmp_path / "b")
    assert first["metrics"] == second["metrics"]
    assert deciding(config(**zero, prompt="agnostic")) != deciding(config(**zero))
    own = {**BASE["evaluation"], "held_out": 0.1}  # then it matters who holds what
    apart = [config(**zero, evaluation=own, seed=seed) for seed in (0, 1)]
    assert deciding_digest(apart[0]) != deciding_digest(apart[1])
    longer = config(**zero, training={"max_length": 99})
    assert deciding_digest(longer) != deciding_digest(changed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mllm: Mllm):
    """A grid of one cell with its result."""
    folder = tmp_path_factory.mktemp("finished")
    found = grid(folder, {"seed": [0]})
    run(found.cells[0].config, out=folder / "out" / found.cells[0].name, mllm=mllm)
    return folder


def state(folder: Path, overrides=(), axes=None):
    found = grid(folder, axes or {"seed": [0]}, overrides)
    return states(found.cells, folder / "out", Present())[found.cells[0].name]


def test_a_result_holds_until_something_that_makes_its_numbers_changes(
    finished, monkeypatch
) -> None:
    assert state(finished).kind == "done"
    assert state(finished, ["threads=2", "title=new", "evaluation.limit=8"]).kind == "done"
    changed = state(finished, ["training.lr=0.5", "algorithm=fedprox"])
    assert changed.kind == "stale"
    assert "config training.lr: 0.001 -> 0.5" in changed.reasons
    assert "config algorithm.name: fedavg -> fedprox" in changed.reasons
    with monkeypatch.context() as patch:
        patch.setitem(revisions.REVISIONS, "algorithm:fedadam", 2)
        assert state(finished).kind == "done"  # another part of the code
        patch.setitem(revisions.REVISIONS, "data:memes", 2)
        assert state(finished).reasons == ("revision of data:memes: 1 -> 2",)
    with monkeypatch.context() as patch:
        now = {"torch": "2.99.1", "numpy": "0", "rich": "99"}
        patch.setattr("fedmllm.results.versions", lambda: now)
        reasons = state(finished).reasons
        assert any(line.startswith("package torch: ") for line in reasons)
        assert not any("rich" in line or "peft" in line for line in reasons)
    with monkeypatch.context() as patch:
        patch.setattr("fedmllm.bench.state.weights_digest", lambda path: "f" * 64)
        assert state(finished).reasons[0].startswith("base model: ")
        patch.setattr("fedmllm.bench.state.weights_digest", lambda path: None)
        assert state(finished).kind == "done"  # not known, not compared


def test_other_data_under_the_same_config_make_a_cell_stale(finished, monkeypatch) -> None:
    spec = DATASETS["memes"]

    def load(**options):
        data = spec.load(**options)
        first = data.test[0]
        changed = type(first)(**{**vars(first), "text": "other words"})
        return type(data)(**{**vars(data), "test": [changed, *data.test[1:]]})

    monkeypatch.setitem(DATASETS, "memes", DatasetSpec("", load, spec.options))
    assert state(finished).reasons[0].startswith("data: ")


@pytest.mark.parametrize(
    ("place", "what"), [("config data.root", "data"), ("config model.path", "base model")]
)
def test_where_it_lay_does_not_count_if_what_lay_there_is_known(place, what) -> None:
    old, new = {place: "a", what: "1" * 64}, {place: "b", what: "1" * 64}
    assert differences(old, new) == ()
    assert digest(old) == digest(new)  # a half run goes on, too
    assert differences(old, {**new, what: "2" * 64})[0].startswith(f"{what}: ")
    assert digest(old) != digest({**new, what: "2" * 64})
    unknown = {**new, what: ""}  # weights too large to be hashed, data that are elsewhere
    assert differences(old, unknown) == (f"{place}: a -> b",)
    assert differences({**old, what: ""}, new) == (f"{place}: a -> b",)
    assert digest({**old, what: ""}) != digest(unknown)


def test_a_patch_release_does_not_count(finished, monkeypatch) -> None:
    versions = json.loads(next(finished.rglob("result.json")).read_text())["versions"]
    now = {name: ".".join([*number.split(".")[:2], "99"]) for name, number in versions.items()}
    monkeypatch.setattr("fedmllm.results.versions", lambda: now)
    assert state(finished).kind == "done"


def test_a_tampered_or_cut_result_is_run_again(finished) -> None:
    file = next(finished.rglob("result.json"))
    whole = file.read_text()
    try:
        result = json.loads(whole)
        result["metrics"]["both"]["accuracy"] = 0.99
        file.write_text(json.dumps(result))
        found = state(finished)
        assert found.kind == "stale"
        assert "changed after it was written" in found.reasons[0]
        file.write_text(whole[:500])
        assert "not valid JSON" in state(finished).reasons[0]
    finally:
        file.write_text(whole)
    assert state(finished).kind == "done"


def test_what_an_older_result_does_not_say_is_not_compared(finished) -> None:
    file = next(finished.rglob("result.json"))
    whole = file.read_text()
    try:
        result = json.loads(whole)
        for key in ("data_sha256", "revisions"):
            del result[key]
        result["result_sha256"] = result_digest(result)
        file.write_text(json.dumps(result))
        assert state(finished).kind == "done"
    finally:
        file.write_text(whole)


def test_a_result_without_its_digest_is_run_again(finished) -> None:
    file = next(finished.rglob("result.json"))
    whole = file.read_text()
    try:
        result = json.loads(whole)
        del result["result_sha256"]
        file.write_text(json.dumps(result))
        found = state(finished)
        assert found.kind == "stale"
        assert "states no digest" in found.reasons[0]
    finally:
        file.write_text(whole)


# -- running -----------------------------------------------------------------------------------


def kill_at(name: str, monkeypatch) -> None:
    """SIGKILL the worker that runs a cell, once, when that tells of its first round."""
    listen, killed = ManyProgress.listen, []

    def listening(self, event) -> None:
        if event["event"] == "round" and event["name"] == name and not killed:
            killed.append(name)
            (child,) = multiprocessing.active_children()
            os.kill(child.pid, signal.SIGKILL)
        listen(self, event)

    monkeypatch.setattr(ManyProgress, "listen", listening)


def test_a_killed_worker_and_a_bad_cell_cost_no_other(tmp_path, mllm: Mllm, monkeypatch) -> None:
    axes = {
        "cell": {
            "killed": {"training.rounds": 5, "data.train": 16},  # the longest, so it comes first
            "good": {"data.train": 16},
            "bad": {"data.train": 2, "partition.clients": 8},
        }
    }
    found = grid(tmp_path, axes)
    kill_at("killed", monkeypatch)
    out = StringIO()
    console = Console(file=out, width=200)
    ended = run_grid(found, out=tmp_path / "out", processes=1, console=console)
    assert ended.done == ("good",)
    assert "SIGKILL" in ended.failed["killed"]
    assert "too few" in ended.failed["bad"]
    text = out.getvalue()
    assert "FAILED killed: its process was killed" in text
    assert len(text.splitlines()) == 3
    told = {cell: s.kind for cell, s in states(found.cells, tmp_path / "out", Present()).items()}
    assert told == {"killed": "failed", "good": "done", "bad": "failed"}

    good = (tmp_path / "out" / "good" / "result.json").read_bytes()
    monkeypatch.undo()
    again = run_grid(found, out=tmp_path / "out", processes=1, console=console)
    assert (again.skipped, again.done, list(again.failed)) == (("good",), ("killed",), ["bad"])
    assert (tmp_path / "out" / "good" / "result.json").read_bytes() == good
    resumed = json.loads((tmp_path / "out" / "killed" / "result.json").read_text())
    assert resumed["time"]["resumed"] is True
    killed = next(cell for cell in found.cells if cell.name == "killed")
    whole = run(killed.config, out=tmp_path / "whole", mllm=mllm)
    assert resumed["metrics"] == whole["metrics"]
    assert [r["loss"] for r in resumed["history"]] == [r["loss"] for r in whole["history"]]


KILLED = """
import os, signal, sys
from fedmllm.cli import main
from fedmllm.progress import ManyProgress
if __name__ == "__main__":
    listen = ManyProgress.listen
    def listening(self, event):
        if (event["event"], event["name"], event.get("round")) == ("round", "second", 1):
            os.kill(os.getpid(), signal.SIGKILL)
        listen(self, event)
    ManyProgress.listen = listening
    main()
"""


@pytest.mark.slow  # three processes load torch
def test_a_killed_benchmark_goes_on_where_it_was(tmp_path, mllm: Mllm) -> None:
    """`fedmllm bench` itself is killed in its second cell. Started again it keeps what was done and
    goes on with what was begun, and the numbers are those of runs that nobody killed."""
    axes = {
        "cell": {
            "first": {"training.rounds": 4, "data.train": 8},  # the longest by rounds
            "second": {"training.rounds": 3, "data.train": 16},
        }
    }
    found, out = grid(tmp_path, axes), tmp_path / "out"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    words = [sys.executable, script, "bench", tmp_path / "g.yaml", "--out", out, "--processes", "1"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    told = {name: state.kind for name, state in states(found.cells, out, Present()).items()}
    assert told == {"first": "done", "second": "begun"}
    first = (out / "first" / "result.json").read_bytes()

    again = run_grid(found, out=out, processes=1, console=Console(file=StringIO()))
    assert (again.skipped, again.done, again.failed) == (("first",), ("second",), {})
    assert (out / "first" / "result.json").read_bytes() == first
    for cell in found.cells:
        made = json.loads((out / cell.name / "result.json").read_text())
        whole = run(cell.config, out=tmp_path / "whole" / cell.name, mllm=mllm)
        assert made["time"]["resumed"] is (cell.name == "second")
        assert made["metrics"] == whole["metrics"]
        assert [r["loss"] for r in made["history"]] == [r["loss"] for r in whole["history"]]
        adapters = [
            (place / cell.name / "adapter" / "adapter_model.safetensors").read_bytes()
            for place in (out, tmp_path / "whole")
        ]
        assert adapters[0] == adapters[1]


def test_a_half_run_of_another_state_of_things_is_begun_anew(tmp_path, mllm, monkeypatch) -> None:
    found = grid(tmp_path, {"cell": {"a": {}}})
    cell, out = found.cells[0], tmp_path / "out"
    run(cell.config, out=out / "a", mllm=mllm)
    (out / "a" / "result.json").unlink()
    assert states([cell], out, Present())["a"].kind == "missing"  # nobody says when it was begun
    from fedmllm.bench.state import digest, fingerprint, write_journal

    mark = digest(fingerprint(cell.config, Present()))
    write_journal(out, {"begun": {"a": mark}, "failed": {}})
    assert states([cell], out, Present())["a"].kind == "begun"
    monkeypatch.setitem(revisions.REVISIONS, "core", 2)
    assert states([cell], out, Present())["a"].kind == "missing"


def test_two_benchmarks_do_not_share_a_folder(tmp_path) -> None:
    script = "import runpy, sys\nfrom pathlib import Path\n"
    script += "locked = runpy.run_path(sys.argv[2])['locked']\n"  # without the package, and torch
    script += "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()\n"
    words = [sys.executable, "-c", script, str(tmp_path), str(lock.__file__)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid} on "), locked(tmp_path):
            pass
        other.kill()
    with locked(tmp_path):  # the lock of a killed process is nobody's
        pass


# -- plan and ready files ----------------------------------------------------------------------


def test_the_plan_counts_and_says_why(finished) -> None:
    found = grid(finished, {"seed": [0, 1]}, ["training.lr=0.5"])
    lines = list(plan_lines(found, out=finished / "out", measured=[], processes=2))
    assert lines[0] == "g: 2 seed; 2 places, 2 cells"
    assert lines[1].startswith("s0  stale")
    assert "config training.lr: 0.001 -> 0.5" in lines[1]
    assert lines[2].startswith("s1  missing")
    assert lines[3] == "1 stale, 1 missing"
    assert lines[4].startswith("to run: 2 cells, about ")
    nothing = list(plan_lines(found, out=finished / "no", measured=[], processes=2))
    assert nothing[1].split() == ["s0", "missing", "unknown"]
    assert "their time is unknown" in nothing[-1]


def test_a_run_is_not_shared_by_processes() -> None:
    assert "about 1m 40s on 2 processes" in _total(1, [100.0], 2)
    assert "about 1m 40s on 2 processes" in _total(3, [100.0, 40.0, 20.0], 2)
    assert "about 1m 40s on 2 processes" in _total(3, [80.0, 60.0, 60.0], 2)


def test_another_try_is_not_called_failed(tmp_path, monkeypatch) -> None:
    """A cell that failed is begun again, and its benchmark killed."""
    found = grid(tmp_path, {"seed": [0]})
    out = tmp_path / "out"
    out.mkdir()
    write_journal(out, {"begun": {}, "failed": {"s0": "no memory"}})
    assert states(found.cells, out, Present())["s0"].kind == "failed"

    def killed(jobs, *, listener, **_):
        for job in jobs:
            listener({"event": "start", "name": job.config.name})
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmllm.bench.run.run_jobs", killed)
    with pytest.raises(KeyboardInterrupt):
        run_grid(found, out=out, processes=1, console=Console(file=StringIO()))
    assert states(found.cells, out, Present())["s0"].kind == "missing"  # of which nothing is there
    assert read_journal(out)["failed"] == {}


def test_mini_is_the_whole_grid() -> None:
    found = load_grid(GRIDS / "mini.yaml")
    assert {axis: len(values) for axis, values in found.axes.items()} == {
        "dataset": 3,
        "setting": 12,
        "method": 9,
        "strategy": 3,
        "seed": 5,
    }
    # with strategies: prompt and regularisation of what is federated, the prompt of what is not
    assert sum(len(cell.places) for cell in found.cells) == 3 * 12 * 9 * 2 * 5
    zero = [cell for cell in found.cells if cell.config.topology == "zero-shot"]
    assert [cell.name for cell in zero][:2] == ["memes-zero-shot-plain", "memes-zero-shot-prompt"]
    assert len(zero) == 5  # medical has none for the prompt: its questions name no modality
    assert sorted(len(cell.places) for cell in zero) == [60, 60, 60, 60, 120]


@pytest.mark.parametrize("file", sorted(GRIDS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_cell_of_the_ready_grids_is_tested_under_four_conditions(file, real_datasets) -> None:
    found = load_grid(file, only=["seed=0"])
    assert {cell.config.evaluation.conditions for cell in found.cells} == {CONDITION_NAMES}


def test_cells_of_mini_quick_have_the_committed_numbers(tmp_path) -> None:
    """Run under their own names, they are those of `mini` in results/, to what another processor
    may change; and there is a report of them."""
    only = ["dataset=memes", "setting=aligned-a0.5", "method=zero-shot,fedavg"]
    found = load_grid(GRIDS / "mini-quick.yaml", only=[*only, "strategy=plain", "seed=0"])
    ended = run_grid(found, out=tmp_path, processes=1, console=Console(file=StringIO()))
    assert set(ended.done) == {"memes-zero-shot-plain", "memes-aligned-a0.5-fedavg-plain-s0"}
    for name in ended.done:
        old, new = (
            json.loads((folder / name / "result.json").read_text())
            for folder in (GRIDS.parent.parent / "results" / "mini", tmp_path)
        )
        assert new["data_sha256"] == old["data_sha256"]
        assert new["metrics"]["both"]["auc"] == pytest.approx(
            old["metrics"]["both"]["auc"], abs=0.1
        )
        first = [run["history"][0]["loss"] for run in (old, new) if run["history"]]
        assert first[-1:] == pytest.approx(first[:1], rel=1e-3)
    tables = tmp_path / "tables.md"
    write_tables(load_results([tmp_path])[0], tables, title="")
    assert "| Zero-shot | " in tables.read_text(encoding="utf-8")


def test_mini_quick_is_a_small_part_of_mini() -> None:
    found = load_grid(GRIDS / "mini-quick.yaml")
    whole = {cell.name: cell.config for cell in load_grid(GRIDS / "mini.yaml").cells}
    assert len(found.cells) <= 120
    assert all(whole[cell.name] == cell.config for cell in found.cells)


@pytest.fixture
def real_datasets(monkeypatch):
    """The real datasets' names; their loaders may be there or not."""
    for name in ("hateful-memes", "crisismmd", "medical-vqa"):
        if name not in DATASETS:
            monkeypatch.setitem(DATASETS, name, DatasetSpec("", SimpleNamespace, {"root": ""}))


def test_paper_has_the_papers_hyper_parameters_and_plans_without_data(real_datasets) -> None:
    found = load_grid(GRIDS / "paper.yaml", only=["seed=0"])
    assert set(found.open_variables) == {"data", "minicpm_v_2_6", "minicpm_v_2_5"}
    rounds = {
        c.config.data["name"]: c.config.training.rounds
        for c in found.cells
        if c.config.topology == "federated"
    }
    assert rounds == {"hateful-memes": 25, "crisismmd": 40, "medical-vqa": 50}
    one = found.cells[-1].config
    assert (one.training.lr, one.training.batch_size, one.training.micro_batch) == (2e-5, 4, 1)
    assert (one.partition.clients, one.training.clients_per_round) == (10, 2)
    assert (one.lora.rank, one.lora.alpha, one.lora.dropout) == (8, 8, 0.05)
    forms = {
        c.config.algorithm["name"]: c.config.algorithm.get("form", "paper")
        for c in found.cells
        if c.config.topology == "federated"
    }
    servers = ("fedavgm", "fedadagrad", "fedadam", "fedyogi")
    assert forms == {
        **dict.fromkeys(("fedavg", "fedprox"), "paper"),
        **dict.fromkeys(servers, "reference"),
    }
    held = {c.config.strategy.edge_layers for c in found.cells if c.config.strategy.mu}
    assert held == {4}
    lines = list(plan_lines(found, out=Path("nowhere"), measured=[], processes=1))
    assert any(line.startswith("to be given: --set data=") for line in lines)
    given = ["data=/d", "minicpm_v_2_6=/a", "minicpm_v_2_5=/b"]
    filled = load_grid(GRIDS / "paper.yaml", variables=given)
    assert not filled.open_variables
    assert {c.config.model.path for c in filled.cells} == {"/a", "/b"}
