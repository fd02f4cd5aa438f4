"""SLAKE 1.0: bilingual questions on radiology images. The paper uses its test split only.

Liu, Zhan, Xu, Ma, Yang, Wu, "SLAKE", ISBI 2021 (arXiv 2102.09542). Owners' zip and mirror
(huggingface.co/datasets/BoKelvin/SLAKE: ``validation.json``, and ``imgs.zip`` for the folder):

    Slake1.0/train.json  validate.json  test.json
    Slake1.0/imgs/xmlab1/source.jpg ...

| field of a row | | sample |
|---|---|---|
| qid | number, unique over splits and languages | id |
| img_name | path such as ``xmlab1/source.jpg``; several questions an image | image |
| question, answer | English or Chinese; one answer of train.json is empty: left out | both |
| q_lang | en or zh | kind |
| answer_type | OPEN or CLOSED | kind |
| img_id, location, modality, base_type, content_type, triple | | not used |

The kind is ``en/open``, ``zh/closed``, …, so that accuracy is reported by language as well.
"""

from __future__ import annotations

from pathlib import Path

from fedmllm.data.dataset import Dataset, DatasetSpec, OwnerFiles
from fedmllm.data.files import AbsentError, Files, open_files
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
from fedmllm.data.vqa_rad import KINDS
from fedmllm.errors import UserError, unknown

TASK = Task(name="slake", kind="open", metric="accuracy")
LANGUAGES = ("en", "zh")
ARCHIVES = ("imgs.zip", "Slake1.0.zip", "SLAKE.zip", "Slake.zip")
TABLES = {
    "train": ("train.json",),
    "validate": ("validate.json", "validation.json"),
    "test": ("test.json",),
}


def load(
    *, root: str | Path = "", language: str = "both", missing_images: str = "error"
) -> Dataset:
    """Load the test split, and the training split if train.json is there.

    root: the unpacked folder or the archive. language: ``en``, ``zh`` or ``both``.
    missing_images: ``error`` lists the rows whose picture is absent, ``drop`` leaves them out.
    Raises `UserError` with all problems.
    """
    if language not in (*LANGUAGES, "both"):
        raise UserError(unknown("language", language, (*LANGUAGES, "both")))
    report = Report(missing_images)
    files = open_files(root, TASK.name, archives=ARCHIVES)
    test = of_language(read(files, "test", report), language)
    try:
        train = of_language(read(files, "train", report), language)
    except AbsentError:
        train = []
    check_leak(train, test, report)
    report.stop()
    return Dataset(task=TASK, train=train, test=test)


def read(files: Files, split: str, report: Report) -> list[Sample]:
    """The samples of one split in both languages; problems go into `report`."""
    table = files.table(*TABLES[split])
    images = files.folder("imgs")

    def sample(row: Row) -> Sample:
        question, answer = question_of(row, "question", "answer")
        language = choice_of(row, "q_lang", LANGUAGES)
        return Sample(
            id=f"slake/{id_of(row, 'qid')}",
            question=question,
            answer=answer,
            image=image_of(row, "img_name", images),
            kind=f"{language}/{choice_of(row, 'answer_type', KINDS)}",
        )

    return read_samples(json_rows(table, report), sample, report)


def of_language(samples: list[Sample], language: str) -> list[Sample]:
    """The samples in one language, or all for ``both``."""
    return [s for s in samples if language == "both" or s.kind.startswith(f"{language}/")]


SPEC = DatasetSpec(
    summary="real radiology images, English and Chinese; get it with `fedmllm data info slake`",
    load=load,
    options={"root": "", "language": "both", "missing_images": "error"},
    source="https://www.med-vqa.com/slake/ and the owner's "
    "https://huggingface.co/datasets/BoKelvin/SLAKE",
    licence="CC BY 4.0",
    citation="Liu, Zhan, Xu, Ma, Yang, Wu, SLAKE: A Semantically-Labeled Knowledge-Enhanced "
    "Dataset for Medical Visual Question Answering, ISBI 2021, arXiv 2102.09542",
    files=OwnerFiles(
        unpack="a folder with test.json (and train.json, validate.json) and the folder imgs/ or "
        "imgs.zip beside them, or the zip of the whole.",
        splits=("train", "validate", "test"),
        needed=("test",),
        read=read,
        archives=ARCHIVES,
        published={
            "train rows": 9835,
            "validate rows": 2099,
            "test rows": 2094,
            "test/en": 1061,
            "test/zh": 1033,
            "images": 642,
        },
        counted_by="the owners publish 642 images and the sum, 14,028 questions; splits and "
        "languages as counted in the copy of their files at github.com/xiaoman-zhang/PMC-VQA",
    ),
)
