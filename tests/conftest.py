"""Shared fixtures. One thread: the embedded model is small, and results must be the same bits."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

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
