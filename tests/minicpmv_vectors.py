"""The published code's inputs and outputs for tiny random MiniCPM-V weights (data/minicpmv).

`v26_*` and `v25_*` hold weights, inputs and outputs of both versions; index.json describes them.
s0 is three slices, s1 one, so that `batch` pads slices and texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedmllm.models.minicpmv import MiniCPMVConfig, MiniCPMVForConditionalGeneration

DATA = Path(__file__).parent / "data" / "minicpmv"
TOLD = json.loads((DATA / "model_cases.json").read_text())
INPUTS = load_file(DATA / "inputs.safetensors")
VECTORS = {name: load_file(DATA / f"{name}_cases.safetensors") for name in ("v26", "v25")}
IMAGE_TOKEN = 7  # of the tiny vocabularies


def build(name: str, attention: str = "sdpa") -> MiniCPMVForConditionalGeneration:
    config = MiniCPMVConfig(
        **TOLD[name]["config"], image_token_id=IMAGE_TOKEN, attn_implementation=attention
    )
    model = MiniCPMVForConditionalGeneration(config)
    weights = load_file(DATA / f"{name}_weights.safetensors")
    model.load_state_dict({key: value.float() for key, value in weights.items()}, strict=True)
    return model.eval()


def pixels(*samples: str) -> dict[str, Any]:
    """Slices of samples, sample by sample."""
    sizes = [INPUTS[f"tgt_sizes.{sample}"] for sample in samples]
    slices = [
        INPUTS[f"pixels.{sample}.{i}"].float()
        for sample, rows in zip(samples, sizes, strict=True)
        for i in range(len(rows))
    ]
    return {"pixel_values": slices, "tgt_sizes": torch.cat(sizes)} if samples else {}


def case_inputs(name: str, case: str) -> dict[str, Any]:
    """Ids, a true mask and unshifted labels of a case, with its pixels."""
    vectors = VECTORS[name]
    ids = vectors[f"{case}.input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = vectors[f"{case}.labels_shifted"][:, :-1]
    mask = torch.arange(ids.shape[1]) < vectors[f"{case}.lengths"][:, None]
    samples = [s for s in TOLD[name]["cases"][case]["samples"] if s != "text-only"]
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": labels,
        **pixels(*samples),
    }
