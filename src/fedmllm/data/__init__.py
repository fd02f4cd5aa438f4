"""The datasets by name. To add one: a module with a `SPEC`, and one line in `DATASETS`."""

from __future__ import annotations

from fedmllm.data import (
    conversations,
    crisis,
    crisismmd,
    easy_vqa,
    flashcards,
    hateful_memes,
    hf_datasets,
    medical,
    medical_vqa,
    memes,
    slake,
    table,
    vqa_rad,
)
from fedmllm.data.dataset import Dataset, DatasetSpec
from fedmllm.errors import chosen

DATASETS: dict[str, DatasetSpec] = {
    "memes": memes.SPEC,
    "memes-swapped": memes.SWAPPED,
    "crisis": crisis.SPEC,
    "medical": medical.SPEC,
    "conversations": conversations.SPEC,
    "table": table.SPEC,
    "hf-datasets": hf_datasets.SPEC,
    "easy-vqa": easy_vqa.SPEC,
    "hateful-memes": hateful_memes.SPEC,
    "crisismmd": crisismmd.SPEC,
    "medical-vqa": medical_vqa.SPEC,
    "vqa-rad": vqa_rad.SPEC,
    "slake": slake.SPEC,
    "medalpaca-flashcards": flashcards.SPEC,
}


def load_dataset(name: str, **options: object) -> Dataset:
    """Load a dataset by name with the options of its spec.

    Raises `UserError` for an unknown name or option, and what the loader raises.
    """
    spec = chosen("dataset", name, DATASETS, options, of=f"dataset {name!r}")
    return spec.load(**{**spec.options, **options})
