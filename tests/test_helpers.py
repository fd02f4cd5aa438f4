"""A run that other processes help with comes to the same bits, whoever does what, and outlives
them."""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from small_runs import RUNS, SMALL
from stub_helper import stub
from typer.testing import CliRunner

from fedmllm import helpers
from fedmllm.bench.grid import merge
from fedmllm.cli import app
from fedmllm.config import Config, make_config
from fedmllm.errors import UserError
from fedmllm.experiment import run
from fedmllm.helpers import Helpers, Piece, _Waiting
from fedmllm.models.mllm import Mllm
from fedmllm.plan.timing import fitting_rates
from fedmllm.processes import packed, unpacked
from fedmllm.progress import RunProgress
from fedmllm.report.page import provenance


def config_of(name: str, **change: Any) -> Config:
    """One of the small runs, with changes."""
    return make_config(merge(merge({"name": name, **SMALL}, RUNS[name]), change))


def until_loaded(helping: Helpers) -> None:
    """Wait: a run as small as these would else be over before."""
    deadline = time.monotonic() + 120
    while not all(helping._idle):
        assert time.monotonic() < deadline, "a helper does not load"
        time.sleep(0.05)


@pytest.fixture
def done_by_helpers(monkeypatch) -> list[Piece]:
    """The pieces of work that helpers did; runs begin when they have loaded."""
    done: list[Piece] = []
    enter, ask = Helpers.__enter__, Helpers._ask

    def entered(self: Helpers) -> Helpers:
        until_loaded(self)
        return enter(self)

    def asked(self: Helpers, number: int, piece: Piece) -> Any:
        found = ask(self, number, piece)
        done.append(piece)
        return found

    monkeypatch.setattr(Helpers, "__enter__", entered)
    monkeypatch.setattr(Helpers, "_ask", asked)
    return done


def adapters(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "adapter").rglob("*.safetensors"))
    assert files
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


SAME = ("metrics", "bytes", "samples", "per_client", "heterogeneity", "mixtures", "evidence")
TIMES = ("trained_per_second", "tested_per_second")


def facts(result: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    found = {name: result[name] for name in SAME if name in result}
    found["samples"] = {k: v for k, v in found["samples"].items() if k not in TIMES}
    lines = [
        {k: v for k, v in line.items() if not k.endswith("seconds")} for line in result["history"]
    ]
    return {**found, "history": lines}


def both_ways(config: Config, tmp_path: Path, mllm: Mllm) -> dict[str, Any]:
    """The result by two processes, which is that by one."""
    alone = run(config, out=tmp_path / "alone", mllm=mllm)
    helped = run(config, out=tmp_path / "helped", mllm=mllm, processes=2)
    assert facts(helped) == facts(alone)
    assert adapters(tmp_path / "helped") == adapters(tmp_path / "alone")
    assert "helpers" not in alone
    assert [each["peak_memory_bytes"] > 1e8 for each in helped["helpers"]] == [True]
    shown = [provenance([each], tmp_path)["shared"] for each in (alone, helped)]
    assert [each.get("processes") for each in shown] == [None, "2"]
    rates = [fitting_rates([{**each, "_path": "x"}], config) for each in (alone, helped)]
    assert rates[0] is not None
    assert rates[1] is None  # a plan is of one process
    return helped


MANY = {"partition": {"clients": 5}, "data": {"name": "memes", "train": 40, "test": 80}}


@pytest.mark.parametrize(
    ("name", "change", "work"),
    [
        # a control that each client keeps, passes that clients share, and tests on the way
        (
            "scaffold",
            {
                **MANY,
                "training": {"rounds": 3, "clients_per_round": 4, "clients_at_once": 2},
                "evaluation": {"every": 1, "conditions": ["both", "text_withheld"]},
            },
            {"train", "read"},
        ),
        # what parties give each other, weights by profile, prototypes
        (
            "mixtures",
            {
                **MANY,
                "scenario": {"name": "cross"},
                "training": {"clients_per_round": 5},
                "strategy": {"prototypes": 1.0, "mu": 5.0, "weight": "profile"},
            },
            {"train"},
        ),
        # parties on their own, and answers that are generated
        ("local", {"data": {"name": "medical", "train": 24, "test": 12}}, {"federation"}),
    ],
)
def test_two_processes_come_to_the_bits_of_one(
    name, change, work, tmp_path: Path, mllm: Mllm, done_by_helpers
) -> None:
    config = config_of(name, **change)
    both_ways(config, tmp_path, mllm)
    assert work <= {piece.do for piece in done_by_helpers}


def test_a_helper_that_is_killed_costs_its_piece_of_work_only(
    tmp_path: Path, mllm: Mllm, monkeypatch, done_by_helpers
) -> None:
    config = config_of("fedavg", **MANY, training={"rounds": 2, "clients_per_round": 5})
    once, killed = Helpers._ask_once, []

    def ask(self: Helpers, number: int, piece: Piece) -> Any:
        if not killed and piece.do == "train":
            killed.append(piece)
            os.kill(self.children[number].process.pid, signal.SIGKILL)
        return once(self, number, piece)

    monkeypatch.setattr(Helpers, "_ask_once", ask)
    events: list[dict[str, Any]] = []
    alone = run(config, out=tmp_path / "alone", mllm=mllm)
    helped = run(config, out=tmp_path / "helped", mllm=mllm, processes=2, listener=events.append)
    assert facts(helped) == facts(alone)
    assert killed[0] in done_by_helpers
    (told,) = [event for event in events if event["event"] == "helper"]
    console = Console(width=200, force_terminal=False, record=True)
    with RunProgress(console) as progress:
        progress.listen(told)
    said = console.export_text()
    assert "was killed (SIGKILL)" in said
    assert "its work is done again" in said


def test_one_that_dies_twice_over_a_piece_ends_the_run_which_goes_on_with_one_process(
    tmp_path: Path, mllm: Mllm, monkeypatch, done_by_helpers
) -> None:
    config = config_of("fedavg", **MANY, training={"rounds": 3, "clients_per_round": 5})
    once = Helpers._ask_once

    def ask(self: Helpers, number: int, piece: Piece) -> Any:
        if piece.do == "train" and unpacked(self._orders["round"])["round_"] == 2:
            os.kill(self.children[number].process.pid, signal.SIGKILL)
        return once(self, number, piece)

    with monkeypatch.context() as patch:
        patch.setattr(Helpers, "_ask_once", ask)
        with pytest.raises(UserError, match=r"died twice .* --resume .* fewer --processes"):
            run(config, out=tmp_path / "run", mllm=mllm, processes=2)
    resumed = run(config, out=tmp_path / "run", mllm=mllm, resume=True)
    alone = run(config, out=tmp_path / "alone", mllm=mllm)
    assert facts(resumed) == facts(alone)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "alone")


def test_a_run_does_without_a_helper_that_cannot_load(
    tmp_path: Path, mllm: Mllm, monkeypatch
) -> None:
    def entered(self: Helpers) -> Helpers:
        self.children[0].process.kill()
        return self

    monkeypatch.setattr(Helpers, "__enter__", entered)
    events: list[dict[str, Any]] = []
    config = config_of("fedavg", training={"rounds": 4})
    result = run(config, out=tmp_path, mllm=mllm, processes=2, listener=events.append)
    assert result["helpers"] == []
    assert len(result["history"]) == 4
    (told,) = [event for event in events if event["event"] == "helper"]
    assert told["again"] is False
    assert "could not load the run" in told["how"]


def test_what_the_user_can_mend_is_said_as_by_one_process(tmp_path: Path, done_by_helpers) -> None:
    file = tmp_path / "wild.yaml"
    file.write_text("data: {name: memes, train: 40, test: 12}\ntraining: {rounds: 3, lr: 1e30}\n")
    words = ["run", str(file), "--out", str(tmp_path / "run"), "--processes", "2"]
    found = CliRunner().invoke(app, words)
    assert isinstance(found.exception, UserError)  # main prints it and ends with 2
    assert "lower training.lr" in str(found.exception)
    assert CliRunner().invoke(app, [*words[:-1], "0"]).exit_code == 2


def test_helpers_end_with_the_run(tmp_path: Path, mllm: Mllm, monkeypatch, done_by_helpers) -> None:
    made: list[Helpers] = []
    leave = Helpers.__exit__

    def left(self: Helpers, *error: Any) -> None:
        leave(self, *error)
        made.append(self)

    monkeypatch.setattr(Helpers, "__exit__", left)
    config = config_of("zero-shot")

    def listen(event) -> None:
        if event["event"] == "test":
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(config, out=tmp_path / "a", mllm=mllm, processes=2, listener=listen)
    assert not made[0].children[0].process.is_alive()


# -- with processes that have no model ---------------------------------------------------------


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch) -> Callable[..., Helpers]:
    """Makes helpers of that kind, which have started."""
    monkeypatch.setattr(helpers, "_help", stub)

    def make(count: int = 1, tell: Any = lambda event: None, *, loads: bool = True) -> Helpers:
        made = Helpers(SimpleNamespace(name="stub"), tmp_path, count=count, tell=tell, began=0.0)
        if loads:
            until_loaded(made)
        return made

    return make


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What comes of it, or what it raises; a failure where it hangs."""
    found: queue.Queue[Any] = queue.Queue()

    def do() -> None:
        try:
            found.put(work())
        except BaseException as error:
            found.put(error)

    threading.Thread(target=do, daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        pytest.fail(f"it hangs: nothing came in {seconds} s")


def by_helper(helping: Helpers, *does: str) -> dict[int, Any]:
    """Pieces that this process has no part in: it waits until helpers have taken them."""
    pieces = [Piece(do, {}) for do in does]
    taken, take = threading.Event(), _Waiting.take

    def let(waiting: _Waiting, who: int) -> int | None:
        if who == len(helping.children):
            taken.wait(timeout=30)
            return None
        position = take(waiting, who)
        taken.set()
        return position

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Waiting, "take", let)
        return dict(helping.share(pieces, here=lambda piece: None))


def test_a_process_that_dies_is_replaced_and_does_the_piece(tmp_path: Path, stubs) -> None:
    told: list[dict[str, Any]] = []
    with stubs(tell=told.append) as helping:
        first = helping.children[0].process.pid
        (tmp_path / "dies").write_text("x")
        do, second, _ = within(60, lambda: by_helper(helping, "work"))[0]
        assert (do, second != first, helping.shortened) == ("work", True, {"cut"})
        assert [event["again"] for event in told] == [True]
        assert [fact[0] for fact in helping.facts()] == ["facts"]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("how", ["over it", "while it loads"])
def test_the_second_death_over_a_piece_says_how_to_go_on(how: str, tmp_path: Path, stubs) -> None:
    def tell(event: dict[str, Any]) -> None:
        if how == "while it loads":  # the next one
            (tmp_path / "loads").touch()

    with stubs(tell=tell) as helping:
        (tmp_path / "dies").write_text("xx")
        error = within(60, lambda: by_helper(helping, "work"))
    assert isinstance(error, UserError)
    why = {"over it": "SIGKILL", "while it loads": "could not load the run: no memory for the base"}
    assert re.search(f"died twice .*{why[how]}.* --resume .* fewer --processes", str(error))
    assert "in detail" not in str(error)


def test_what_a_listener_raises_in_a_thread_ends_the_run_and_is_no_death(stubs) -> None:
    def tell(event: dict[str, Any]) -> None:
        raise OSError("disk full")

    with stubs(tell=tell) as helping:
        error = within(60, lambda: by_helper(helping, "tell"))
        assert helping.children[0].process.is_alive()
    assert (type(error), str(error)) == (OSError, "disk full")


def test_one_that_is_dead_at_the_end_is_not_started_to_be_asked_what_it_took(stubs) -> None:
    told: list[dict[str, Any]] = []
    with stubs(tell=told.append) as helping:
        helping.children[0].process.kill()
        helping.children[0].process.join()
        assert within(60, helping.facts) == []
    assert told == []


def test_none_is_started_after_the_end(tmp_path: Path, stubs) -> None:
    def tell(event: dict[str, Any]) -> None:  # the run ends while a death is told of
        helping.__exit__(None, None, None)

    helping = stubs(tell=tell)
    (tmp_path / "dies").write_text("x")
    within(60, lambda: by_helper(helping, "work"))
    assert not multiprocessing.active_children()


def test_a_load_that_fails_is_told_and_done_without(tmp_path: Path, stubs) -> None:
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    (tmp_path / "loads").touch()
    with stubs(tell=told.put, loads=False) as helping:
        event = told.get(timeout=60)
        found = within(30, lambda: dict(helping.share([Piece("work", {})], lambda piece: "here")))
    assert found == {0: "here"}
    assert event["how"] == "a helping process could not load the run: no memory for the base"
    assert event["again"] is False


# -- who takes what ----------------------------------------------------------------------------


def taken(waiting: _Waiting, *who: int) -> list[int | None]:
    return [waiting.take(each) for each in who]


def test_the_largest_piece_is_taken_first() -> None:
    sizes = [3.0, 9.0, 9.0, 5.0]
    waiting = _Waiting([Piece("x", {}, size=size) for size in sizes], {})
    assert taken(waiting, 0, 1, 0, 0, 1) == [1, 2, 3, 0, None]


def test_who_has_seen_a_partys_samples_takes_it_again_but_nobody_waits() -> None:
    pieces = [Piece("x", {}, (name,), size) for name, size in (("a", 9.0), ("b", 5.0), ("c", 1.0))]
    seen: dict[str, set[int]] = {}
    assert taken(_Waiting(pieces, seen), 0, 1, 1) == [0, 1, 2]
    assert seen == {"a": {0}, "b": {1}, "c": {1}}
    # 1 has seen b and c; 0 takes what is left, though it is another's
    assert taken(_Waiting(pieces, seen), 1, 1, 0) == [1, 2, 0]
    assert taken(_Waiting(pieces, seen), 0, 0, 0) == [0, 1, 2]
    assert seen["b"] == {0, 1}
    # who has seen none takes the largest that only few have
    fresh = [*pieces, Piece("x", {}, ("d",), 2.0)]
    assert _Waiting(fresh, seen).take(2) == 3
    waiting = _Waiting(pieces, seen)
    waiting.clear()
    assert waiting.take(0) is None


# -- what crosses ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_cross_as_they_are(dtype: torch.dtype) -> None:
    values = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "turned": torch.arange(12).reshape(3, 4).T.to(dtype),
        "single": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
    }
    found = unpacked(packed({"deep": [values, "word", None]}))
    assert found["deep"][1:] == ["word", None]
    for name, value in values.items():
        back = found["deep"][0][name]
        assert back.dtype == dtype
        assert back.shape == value.shape
        assert torch.equal(back, value)
    back = found["deep"][0]["matrix"]
    back.fill_(0)  # it is the receiver's own


def test_a_part_of_a_large_tensor_crosses_alone() -> None:
    whole = torch.zeros(1_000_000)
    assert len(packed({"part": whole[:10]})) < 1000
