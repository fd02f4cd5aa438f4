"""MedAlpaca flashcards: medical questions and answers in words, for parties without images.

Han et al., "MedAlpaca", arXiv 2304.08247; questions made from Anki cards of medical students.
One file, medical_meadow_wikidoc_medical_flashcards.json, a JSON list:

| field of a row | | sample |
|---|---|---|
| instruction | the same request in every row | not used |
| input | the question; empty in some rows: left out | question |
| output | the answer; empty in some rows: left out | answer |

Rows have no id: a sample's is a digest of its question and answer, so that equal cards are one.
There is no test split: `test` holds out a share of the cards, the same ones everywhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedmllm.data.dataset import Dataset, DatasetSpec, OwnerFiles
from fedmllm.data.files import Files, open_files
from fedmllm.data.sample import Sample, Task
from fedmllm.data.tables import Report, Row, json_rows, question_of, read_samples
from fedmllm.errors import UserError
from fedmllm.rng import uniform

TASK = Task(name="medalpaca-flashcards", kind="open", metric="accuracy")
TABLE = "medical_meadow_wikidoc_medical_flashcards.json"
ARCHIVES = ("medical_meadow_medical_flashcards.zip",)


def load(*, root: str | Path = "", test: float = 0.05) -> Dataset:
    """Load the cards. root: the file, its folder, or an archive. test: share held out, 0 to 1.

    Raises `UserError` with all problems.
    """
    if not 0 < test < 1:
        raise UserError(f"test is {test}: give the share of cards to hold out, between 0 and 1")
    report = Report()
    files = open_files(root, TASK.name, archives=ARCHIVES)
    cards = read(files, "train", report)
    report.stop()
    held = {card.id for card in cards if uniform(0, "flashcards-test", card.id) < test}
    return Dataset(
        task=TASK,
        train=[card for card in cards if card.id not in held],
        test=[card for card in cards if card.id in held],
    )


def read(files: Files, split: str, report: Report) -> list[Sample]:
    """All cards; problems go into `report`."""

    def sample(row: Row) -> Sample:
        question, answer = question_of(row, "input", "output")
        digest = hashlib.sha256(f"{question}\0{answer}".encode()).hexdigest()
        return Sample(
            id=f"flashcard/{digest[:20]}", question=question, answer=answer, kind="flashcard"
        )

    return read_samples(json_rows(files.table(TABLE), report), sample, report)


SPEC = DatasetSpec(
    summary="medical questions in words, training only; `fedmllm data info medalpaca-flashcards`",
    load=load,
    options={"root": "", "test": 0.05},
    source="https://huggingface.co/datasets/medalpaca/medical_meadow_medical_flashcards",
    licence="Creative Commons, version not stated by the owners (cc)",
    citation="Han, Adams, Papaioannou, Grundmann, Oberhauser, Löser, Truhn, Bressem, MedAlpaca: "
    "An Open-Source Collection of Medical Conversational AI Models and Training Data, "
    "arXiv 2304.08247",
    files=OwnerFiles(
        unpack=f"a folder with {TABLE}.",
        splits=("train",),
        needed=("train",),
        read=read,
        archives=ARCHIVES,
        published={"train rows": 33955},
        counted_by="DATA_DESCRIPTION.md of github.com/kbressem/medAlpaca (rows, with empty and "
        "repeated ones)",
    ),
)
