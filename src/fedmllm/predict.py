"""Answer for one image and/or text with a trained adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedmllm.data.images import ImageFile
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.evaluation import TestSet
from fedmllm.experiment import ADAPTER_FACTS
from fedmllm.fusion import Fusion
from fedmllm.models import model_path
from fedmllm.models.components import make_policy
from fedmllm.models.loading import resolve_dtype
from fedmllm.models.mllm import Mllm
from fedmllm.prompts import render


def load_adapter(folder: Path, device: str = "cpu") -> tuple[Mllm, dict[str, Any]]:
    """The base with the adapter of a run's folder, and the facts the run left beside it.

    Raises `UserError` if the folder is no adapter of a run or does not fit its model.
    """
    try:
        facts = json.loads((folder / ADAPTER_FACTS).read_text(encoding="utf-8"))
        model, lora = facts["model"], facts["lora"]
        policy = make_policy(**facts.get("trained", {}))
        dtype = getattr(torch, resolve_dtype(model["dtype"], device))
        check_fusion(facts)
        (folder / "adapter_model.safetensors").stat()  # before a large base is read
    except FileNotFoundError as error:
        inside = sorted(p.parent.name for p in folder.glob(f"*/{ADAPTER_FACTS}"))
        hint = f"one of {', '.join(inside)} in it" if inside else "`adapter` inside a run folder"
        raise UserError(
            f"{folder} is not the adapter of a run: {Path(error.filename or folder).name} is "
            f"missing; give the folder {hint}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the adapter in {folder} cannot be read: {error!r}") from error
    mllm = Mllm.load(
        model["name"],
        model_path(model["name"], model["path"]),
        rank=lora["rank"],
        alpha=lora["alpha"],
        dropout=lora["dropout"],
        dtype=dtype,
        device=device,
        quantization=model.get("quantization", "none"),
        remote_code=model.get("remote_code"),
        policy=policy,
    )
    try:
        mllm.read_adapter(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be read: {error!r}") from error
    return mllm, facts


def fusion_in(facts: dict[str, Any]) -> Fusion | None:
    """How the run fused modalities, if it did."""
    return Fusion(**facts["fusion"]) if "fusion" in facts else None


def check_fusion(facts: dict[str, Any]) -> None:
    """Raises ValueError or TypeError unless there is a prior for each class."""
    given = fusion_in(facts)
    if given and len(given.prior) != len(facts["task"]["classes"]):
        raise ValueError("fusion.prior does not fit the classes")


def predict(
    adapter: Path,
    *,
    image: Path | None = None,
    text: str | None = None,
    question: str | None = None,
    device: str = "cpu",
) -> tuple[str, list[tuple[str, float]]]:
    """The answer and, for a choice task, each option with its probability."""
    if image is None and text is None and question is None:
        raise UserError("nothing to answer: give --image, --text or --question")
    source = ImageFile(image) if image is not None else None
    if source is not None:
        source.open()
    mllm, facts = load_adapter(adapter, device)
    task = Task(**{**facts["task"], "classes": tuple(facts["task"]["classes"])})
    sample = Sample(id="input", answer="", image=source, text=text, question=question or "")
    if question is not None or task.kind == "open":
        if question is None:
            raise UserError(f"task {task.name} has open questions: give --question")
        prompted = render(sample, Task(task.name, "open", "accuracy"), facts["prompt"])
        return mllm.generate([mllm.encode(prompted)])[0], []
    labelled = Sample(id="input", answer="", image=source, text=text, label=0)
    asked = TestSet(mllm, task, [labelled], style=facts["prompt"])
    scores = asked.probabilities("both", 1, fusion=fusion_in(facts))[0].tolist()
    ranked = sorted(zip(task.classes, scores, strict=True), key=lambda pair: -pair[1])
    return ranked[0][0], ranked
