"""The garbage collector rests while libraries are imported, and only then."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from fedmllm.imports import collector_at_rest


def test_the_collector_rests_and_goes_on() -> None:
    assert gc.isenabled()
    with collector_at_rest():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error() -> None:
    with pytest.raises(ImportError), collector_at_rest():
        raise ImportError
    assert gc.isenabled()


def test_who_has_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with collector_at_rest():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("command", "frozen"),
    [
        ("import fedmllm; fedmllm.run", False),
        ("from fedmllm.cli import run; run('absent.yaml')", True),
        ("import torch; from fedmllm.cli import run; run('absent.yaml')", False),
    ],
)
def test_the_library_and_the_command_import_by_it(command, frozen) -> None:
    """In a new process no collection happens while torch is imported, and it is on at the end. What
    the command imports is put aside for good; of a process that is somebody else's nothing is."""
    code = f"""
import gc, sys
runs = []
gc.callbacks.append(lambda phase, info: runs.append("transformers" in sys.modules))
try:
    {command}
except Exception as error:
    assert "absent.yaml" in str(error), error
assert gc.isenabled()
print(sum(runs), gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    collections, put_aside = map(int, done.stdout.split())
    assert collections < 10, "thousands, if it does not rest"
    assert (put_aside > 100_000) is frozen
