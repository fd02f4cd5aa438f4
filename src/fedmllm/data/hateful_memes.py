"""Hateful-Memes: is a meme hateful? Neither its picture nor its text alone tells.

Kiela et al., "The Hateful Memes Challenge", NeurIPS 2020 (arXiv 2005.04790). The owners' download
page is closed; mirrors keep its layout:

    train.jsonl  dev_seen.jsonl  test_seen.jsonl  dev_unseen.jsonl  test_unseen.jsonl
    img/42953.png ...

| field of a row | | sample |
|---|---|---|
| id | number; file names are padded to five digits, ids are not | id |
| img | path such as ``img/05218.png`` | image |
| text | what is written on the meme | text |
| label | 0 not-hateful, 1 hateful; absent from the first release of the test sets | label |

The first release called its files ``dev.jsonl`` and ``test.jsonl``. Public mirrors lack pictures
of the dev and unseen splits (the card of huggingface.co/datasets/biecho/hateful_memes counts them):
`missing_images` ``drop`` leaves such rows out.
"""

from __future__ import annotations

from pathlib import Path

from fedmllm.data.dataset import Dataset, DatasetSpec, OwnerFiles
from fedmllm.data.files import Files, open_files
from fedmllm.data.sample import Sample, Task
from fedmllm.data.tables import (
    Report,
    Row,
    RowError,
    check_leak,
    id_of,
    image_of,
    jsonl_rows,
    read_samples,
    text_of,
)
from fedmllm.errors import UserError, unknown

TASK = Task(
    name="hateful-memes",
    kind="choice",
    metric="auc",
    classes=("not-hateful", "hateful"),
    question="Is the content hateful{modality}?",
)
TESTS = ("test_seen", "dev_seen", "test_unseen", "dev_unseen")
ARCHIVES = ("hateful_memes.zip", "hateful_memes.tar.gz", "img.zip", "img.tar.gz")
_FIRST_RELEASE = {"dev_seen": "dev.jsonl", "test_seen": "test.jsonl"}


def load(
    *, root: str | Path = "", test: str = "test_seen", missing_images: str = "error"
) -> Dataset:
    """Load the training split and one of `TESTS`.

    root: the unpacked folder or the archive. missing_images: ``error`` lists the rows whose
    picture is absent, ``drop`` leaves them out. Raises `UserError` with all problems.
    """
    if test not in TESTS:
        raise UserError(unknown("test split", test, TESTS))
    report = Report(missing_images)
    files = open_files(root, TASK.name, archives=ARCHIVES)
    train, tested = read(files, "train", report), read(files, test, report)
    check_leak(train, tested, report)
    report.stop()
    return Dataset(task=TASK, train=train, test=tested)


def read(files: Files, split: str, report: Report) -> list[Sample]:
    """The samples of one split; problems go into `report`."""
    also = [_FIRST_RELEASE[split]] if split in _FIRST_RELEASE else []
    table = files.table(f"{split}.jsonl", *also)
    rows = list(jsonl_rows(table, report))
    if rows and not any("label" in row.fields for row in rows):
        report.problem(
            rows[0],
            "no row has a label, as in the challenge's first release: get the release with "
            "labels, or test on another split",
        )
        return []
    images = files.folder("img")

    def sample(row: Row) -> Sample:
        label = row.fields.get("label")
        if isinstance(label, bool) or label not in (0, 1):
            raise RowError(f"label is {label!r}: it must be 0 or 1")
        return Sample(
            id=id_of(row, "id"),
            answer=TASK.classes[int(label)],
            text=text_of(row, "text") or None,
            image=image_of(row, "img", images),
            label=int(label),
        )

    return read_samples(iter(rows), sample, report)


SPEC = DatasetSpec(
    summary="real memes, hateful or not; get it with `fedmllm data info hateful-memes`",
    load=load,
    options={"root": "", "test": "test_seen", "missing_images": "error"},
    source="https://ai.meta.com/tools/hatefulmemes/ (the download there is closed); mirrors with "
    "the owners' files, e.g. https://huggingface.co/datasets/neuralcatcher/hateful_memes",
    licence="the owners' Hateful Memes dataset licence, for research only (LICENSE.txt inside)",
    citation="Kiela, Firooz, Mohan, Goswami, Singh, Ringshia, Testuggine, The Hateful Memes "
    "Challenge: Detecting Hate Speech in Multimodal Memes, NeurIPS 2020, arXiv 2005.04790",
    files=OwnerFiles(
        unpack="a folder (or hateful_memes.zip) with train.jsonl, test_seen.jsonl, further splits "
        "if you have them, and the pictures in img/. An encrypted zip: unpack it yourself.",
        splits=("train", *TESTS),
        needed=("train",),
        read=read,
        archives=ARCHIVES,
        published={
            "train": 8500,
            "dev_seen": 500,
            "test_seen": 1000,
            "dev_unseen": 540,
            "test_unseen": 2000,
        },
        counted_by="arXiv 2005.04790 (seen splits) and the card of the mirror "
        "huggingface.co/datasets/biecho/hateful_memes (unseen splits); classes: not published",
    ),
)
