"""Shared fixtures. One thread: the embedded model is small, and results must be the same bits."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from browser import chromium

from fedmllm.data import load_dataset
from fedmllm.models import model_path
from fedmllm.models.mllm import Mllm

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mllm() -> Mllm:
    """The embedded model with a fresh adapter; tests set the adapter they need."""
    return Mllm.load("embedded", model_path("embedded"))


@pytest.fixture(scope="session")
def memes():
    """A small drawn meme dataset."""
    return load_dataset("memes", train=80, test=40)


def pytest_report_header() -> str:
    """Says whether the pages are tried in a browser."""
    found = chromium()
    return f"browser: {found}" if found else "browser: no Chromium, its tests are left out"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests in a browser run wherever there is Chromium. Where there is none they are left out,
    unless they are asked for (`-m browser`) or this is CI: then they fail."""
    asked = (config.option.markexpr or "").strip() == "browser"
    if chromium() or asked or os.environ.get("CI"):
        return
    out = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
