"""VQA-RAD: questions of clinicians on radiology images, open and closed.

Lau, Gayen, Ben Abacha, Demner-Fushman, Scientific Data 5, 180251 (2018). At osf.io/89kps lie

    VQA_RAD Dataset Public.json
    VQA_RAD Image Folder/synpic54610.jpg ...     (OSF zips the folder's files without the folder)

| field of a row | | sample |
|---|---|---|
| qid | number, unique | id |
| image_name | | image |
| question | | question |
| answer | a text, or a number in a few rows | answer |
| answer_type | OPEN or CLOSED, with stray spaces in a few rows | kind |
| phrase_type | freeform, para: train; test_freeform, test_para: test | |
| image_organ, question_type, and others | | not used |

A few questions of the training split repeat another's image, question and answer, and one repeats
a test question's (card of huggingface.co/datasets/flaviagiammarino/vqa-rad, which drops them).
Here they stay, as the benchmark uses them; `fedmllm data check` names them.
"""

from __future__ import annotations

from pathlib import Path

from fedmllm.data.dataset import Dataset, DatasetSpec, OwnerFiles
from fedmllm.data.files import Files, open_files
from fedmllm.data.sample import Sample, Task
from fedmllm.data.tables import (
    Report,
    Row,
    check_leak,
    choice_of,
    id_of,
    image_of,
    json_rows,
    question_of,
    read_samples,
)

TASK = Task(name="vqa-rad", kind="open", metric="accuracy")
TABLE = "VQA_RAD Dataset Public.json"
IMAGE_FOLDERS = ("VQA_RAD Image Folder", "images", "Images")
ARCHIVES = ("VQA_RAD Image Folder.zip", "osfstorage-archive.zip", "VQA_RAD.zip", "archive.zip")
KINDS = ("open", "closed")
PHRASES = {
    "train": ("freeform", "para"),
    "test": ("test_freeform", "test_para"),
}


def load(*, root: str | Path = "", missing_images: str = "error") -> Dataset:
    """Load both splits.

    root: the unpacked folder or the archive. missing_images: ``error`` lists the rows whose
    picture is absent, ``drop`` leaves them out. Raises `UserError` with all problems.
    """
    report = Report(missing_images)
    files = open_files(root, TASK.name, archives=ARCHIVES)
    train, test = read(files, "train", report), read(files, "test", report)
    check_leak(train, test, report)
    report.stop()
    return Dataset(task=TASK, train=train, test=test)


def read(files: Files, split: str, report: Report) -> list[Sample]:
    """The samples of one split; problems go into `report`.

    A problem of a row that cannot be told to belong to a split is reported with ``train``.
    """
    table = files.table(TABLE)
    images = files.folder(*IMAGE_FOLDERS)
    phrases = PHRASES["train"] + PHRASES["test"]

    def sample(row: Row) -> Sample | None:
        test = str(row.fields.get("phrase_type")).strip().lower().startswith("test")
        if test != (split == "test"):
            return None
        choice_of(row, "phrase_type", phrases)
        question, answer = question_of(row, "question", "answer")
        return Sample(
            id=f"vqa-rad/{id_of(row, 'qid')}",
            question=question,
            answer=answer,
            image=image_of(row, "image_name", images),
            kind=choice_of(row, "answer_type", KINDS),
        )

    whole = report if split == "train" else Report()  # the file's own faults once
    return read_samples(json_rows(table, whole), sample, report)


SPEC = DatasetSpec(
    summary="real radiology images with questions; get it with `fedmllm data info vqa-rad`",
    load=load,
    options={"root": "", "missing_images": "error"},
    source="https://osf.io/89kps/",
    licence="CC0 1.0",
    citation="Lau, Gayen, Ben Abacha, Demner-Fushman, A dataset of clinically generated visual "
    "questions and answers about radiology images, Scientific Data 5, 180251 (2018)",
    files=OwnerFiles(
        unpack="a folder with 'VQA_RAD Dataset Public.json' and the folder or zip 'VQA_RAD Image "
        "Folder' beside it, or OSF's zip of the whole.",
        splits=("train", "test"),
        needed=("train", "test"),
        read=read,
        archives=ARCHIVES,
        published={"train": 1797, "test": 451, "images": 314},
        counted_by="the card of huggingface.co/datasets/flaviagiammarino/vqa-rad on the OSF files "
        "(2,248 pairs, 451 of them test, 314 images used of 315); kinds: not published",
    ),
)
