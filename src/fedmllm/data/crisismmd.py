"""CrisisMMD v2.0: the humanitarian category of tweets with pictures from seven disasters of 2017.

Alam, Ofli, Imran, "CrisisMMD", ICWSM 2018 (arXiv 1805.00713); splits: Ofli, Alam, Imran, ISCRAM
2020 (arXiv 2004.11838). The owners' CrisisMMD_v2.0.tar.gz holds, with the tables zipped once more:

    CrisisMMD_v2.0/crisismmd_datasplit_all.zip
        crisismmd_datasplit_all/task_humanitarian_text_img_{train,dev,test}.tsv
    CrisisMMD_v2.0/data_image/hurricane_harvey/4_9_2017/901646074527535105_0.jpg ...

| column | | sample |
|---|---|---|
| image_id | tweet and number of the picture; a tweet may have several | id |
| tweet_text | URLs are stripped; a tweet of nothing but URLs has no text | text |
| image | path from ``data_image/`` on | image |
| label_image | the class that annotators gave to the picture | label |
| event_name, tweet_id, label, label_text, label_text_image | | not used |

Tab-separated without quoting: a tweet may hold a single quote. The files of the agreed labels
(``…_agreed_lab_…``) and of other tasks are not read; the owners' Hugging Face copy has one label
for both modalities and cannot be used here.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedmllm.data.crisis import CLASSES
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
    read_samples,
    text_of,
    tsv_rows,
)
from fedmllm.errors import UserError, unknown

TASK = Task(
    name="crisismmd",
    kind="choice",
    metric="macro_f1",
    classes=CLASSES,
    question="What is the humanitarian category{modality}?",
)
TESTS = ("test", "dev")
COLUMNS = ("image_id", "tweet_text", "image", "label_image")
ARCHIVES = ("crisismmd_datasplit_all.zip", "data_image.zip", "CrisisMMD_v2.0.tar.gz")
_URL = re.compile(r"\bhttps?://\S*|\bwww\.\S+", re.IGNORECASE)


def load(*, root: str | Path = "", test: str = "test", missing_images: str = "error") -> Dataset:
    """Load the training split and ``test`` or ``dev`` as `test`.

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
    table = files.table(f"task_humanitarian_text_img_{split}.tsv")
    images = files.folder("data_image")

    def sample(row: Row) -> Sample:
        name = choice_of(row, "label_image", CLASSES)
        return Sample(
            id=id_of(row, "image_id"),
            answer=name,
            text=without_urls(text_of(row, "tweet_text")) or None,
            image=image_of(row, "image", images),
            label=CLASSES.index(name),
        )

    return read_samples(tsv_rows(table, report, COLUMNS), sample, report)


def without_urls(tweet: str) -> str:
    """The tweet without its links, white space tidied."""
    return " ".join(_URL.sub(" ", tweet).split())


SPEC = DatasetSpec(
    summary="real tweets of disasters, eight classes; get it with `fedmllm data info crisismmd`",
    load=load,
    options={"root": "", "test": "test", "missing_images": "error"},
    source="https://crisisnlp.qcri.org/crisismmd (CrisisMMD_v2.0.tar.gz, 1.8 GB)",
    licence="CC BY-NC-SA 4.0; the tweets under Twitter's terms",
    citation="Alam, Ofli, Imran, CrisisMMD: Multimodal Twitter Datasets from Natural Disasters, "
    "ICWSM 2018, arXiv 1805.00713; Ofli, Alam, Imran, Analysis of Social Media Data using "
    "Multimodal Deep Learning for Disaster Response, ISCRAM 2020, arXiv 2004.11838",
    files=OwnerFiles(
        unpack="the folder CrisisMMD_v2.0 with data_image/ and crisismmd_datasplit_all (the "
        "folder or the zip). Or the tar.gz itself: it is unpacked once into the cache, which "
        "takes a minute and as much disk again.",
        splits=("train", "dev", "test"),
        needed=("train", "test"),
        read=read,
        archives=ARCHIVES,
        published={"train": 13608, "dev": 2237, "test": 2237, "images": 18082},
        counted_by="the owners' card, huggingface.co/datasets/QCRI/CrisisMMD, and page, "
        "crisisnlp.qcri.org/crisismmd (images); classes of label_image by split: not published",
    ),
)
