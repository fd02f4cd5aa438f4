"""Checkpoints: complete, damaged, half-written."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from fedmllm import checkpoint
from fedmllm.algorithms.base import ServerState
from fedmllm.checkpoint import Checkpoint


def make(round_: int) -> Checkpoint:
    value = {"b": torch.arange(3.0) + round_, "a": torch.ones(2) * round_}
    state = ServerState(round_, value, {"m": {"a": torch.full((2,), 0.5)}, "control": {}})
    memory = {"client-03": {"a": torch.full((2,), float(round_))}}
    return Checkpoint(state, memory, [{"round": r + 1} for r in range(round_)])


def test_round_trip_and_only_the_last_two_are_kept(tmp_path) -> None:
    assert checkpoint.load(tmp_path / "none") is None
    for round_ in (1, 2, 3):
        checkpoint.save(tmp_path, make(round_))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000002", "round-000003"]
    found, expected = checkpoint.load(tmp_path), make(3)
    assert found is not None
    assert found.state.round == 3
    assert list(found.state.params) == ["a", "b"]
    for name, value in expected.state.params.items():
        assert torch.equal(found.state.params[name], value)
    assert torch.equal(found.state.slots["m"]["a"], torch.full((2,), 0.5))
    assert found.state.slots["control"] == {}
    assert torch.equal(found.memory["client-03"]["a"], torch.full((2,), 3.0))
    assert found.history == expected.history


def test_a_damaged_checkpoint_is_passed_over(tmp_path) -> None:
    for round_ in (1, 2):
        checkpoint.save(tmp_path, make(round_))
    file = tmp_path / "round-000002" / checkpoint.SERVER
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.state.round == 1
    (tmp_path / "round-000001" / checkpoint.STATE).write_text('{"round": 1')
    assert checkpoint.load(tmp_path) is None


def test_a_half_written_one_is_never_seen(tmp_path) -> None:
    checkpoint.save(tmp_path, make(1))
    draft = tmp_path / ".draft"
    draft.mkdir()
    (draft / checkpoint.STATE).write_text("{")
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.state.round == 1
    checkpoint.save(tmp_path, make(2))
    assert not draft.exists()


@pytest.mark.parametrize("after", [0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15])
def test_a_kill_at_any_instant_of_writing_loses_at_most_one_round(tmp_path, after) -> None:
    """A child saves round after round and is killed; what is left is whole."""
    checkpoint.save(tmp_path, make(1))
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for round_ in range(2, 10**6):
                checkpoint.save(tmp_path, make(round_))
                os.write(tell, b".")
        finally:
            os._exit(1)  # never back into pytest
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        saved = 1 + len(pipe.read())
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert saved <= found.state.round <= saved + 1
    assert torch.equal(found.state.params["b"], torch.arange(3.0) + found.state.round)
    assert torch.equal(found.memory["client-03"]["a"], torch.full((2,), float(found.state.round)))
    assert len(found.history) == found.state.round
