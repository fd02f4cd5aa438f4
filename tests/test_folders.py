"""A run folder belongs to one process at a time, and to one config."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fedmllm import checkpoint
from fedmllm.algorithms.base import ServerState
from fedmllm.config import make_config
from fedmllm.errors import UserError
from fedmllm.experiment import EVERYONE, STATE_FOLDER, check_folder, make_folder, run
from fedmllm.folders import held

HOLDING = """
import sys, time
from pathlib import Path
from fedmllm.folders import held
with held(Path(sys.argv[1])) as hold:
    hold.take()
    print("held", flush=True)
    time.sleep(60)
"""


def saved(folder: Path, round_: int) -> None:
    state = ServerState(round_, {"w": torch.ones(2)}, {})
    checkpoint.save(folder / STATE_FOLDER / EVERYONE, checkpoint.Checkpoint(state, {}, []))


def test_another_process_is_kept_out_until_it_ends_however_that_is(tmp_path) -> None:
    folder = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is at work"), held(folder):
            pass
        for change in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="another process is at work"):
                run(make_config({"name": "second"}), out=folder, **change)
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with held(folder) as hold:
            assert hold.handle is not None
        assert list(folder.iterdir()) == []  # nothing is left of either
    finally:
        other.kill()


def test_a_folder_that_is_not_there_is_made_when_it_is_taken(tmp_path) -> None:
    folder = tmp_path / "a" / "run"
    with held(folder) as hold:
        assert not folder.exists()
        with held(folder) as other:
            hold.take()
            with pytest.raises(UserError, match="another process"):
                other.take()
    with held(folder):
        pass  # let go


def test_bad_input_makes_no_folder(tmp_path) -> None:
    config = make_config({"name": "x", "model": {"name": "mine", "path": str(tmp_path / "no")}})
    with pytest.raises(UserError):
        run(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_overwrite_that_was_killed_leaves_nothing_to_go_on_from(tmp_path, monkeypatch) -> None:
    """Whatever it had deleted: a run of another config begins at its first round."""
    folder = tmp_path / "run"
    first, other = make_config({"name": "x"}), make_config({"name": "x", "seed": 1})
    make_folder(folder, first, overwrite=False)
    saved(folder, 7)
    (folder / "zzz").mkdir()
    real, gone = shutil.rmtree, []

    def killed(path, *rest, **more) -> None:
        gone.append(path)
        if len(gone) > 1:
            raise KeyboardInterrupt
        real(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            make_folder(folder, other, overwrite=True)
    assert (folder / "config.yaml").exists(), "the config goes last"
    real(folder / "zzz", ignore_errors=True)
    with pytest.raises(UserError, match="exists"):
        check_folder(folder, other, resume=False, overwrite=False)

    saved(folder, 7)
    (folder / "config.yaml").unlink()
    check_folder(folder, other, resume=False, overwrite=False)
    make_folder(folder, other, overwrite=False)
    assert checkpoint.load(folder / STATE_FOLDER / EVERYONE) is None


def test_a_run_that_goes_on_keeps_its_checkpoints(tmp_path) -> None:
    config = make_config({"name": "x"})
    make_folder(tmp_path, config, overwrite=False)
    saved(tmp_path, 3)
    make_folder(tmp_path, config, overwrite=False)
    found = checkpoint.load(tmp_path / STATE_FOLDER / EVERYONE)
    assert found is not None
    assert found.state.round == 3


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path, monkeypatch) -> None:
    saved(tmp_path, 3)

    def full(*_) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written to: .*No space left.*--resume"):
        saved(tmp_path, 4)
    found = checkpoint.load(tmp_path / STATE_FOLDER / EVERYONE)
    assert found is not None
    assert found.state.round == 3
