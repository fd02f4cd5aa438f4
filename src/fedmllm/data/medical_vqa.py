"""The medical domain of the paper: VQA-RAD, the MedAlpaca flashcards and SLAKE together.

Parties that hold images share VQA-RAD's training questions, parties that hold text the flashcards
(`Dataset.flashcards`). Tests are VQA-RAD's and SLAKE's, in one list: a sample's kind says where it
is from (``vqa-rad/closed``, ``slake/zh/open``), and accuracy is reported for every part of it, so
that one training gives the figure of each test set. Fields, licences and quirks: `vqa_rad`,
`slake`, `flashcards`.

    root/…/VQA_RAD Dataset Public.json     with VQA_RAD Image Folder
    root/…/test.json                       of SLAKE, with imgs
    root/…/medical_meadow_wikidoc_medical_flashcards.json

Each may lie up to three folders deep, or at a path of its own (`vqa_rad`, `slake`, `flashcards`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedmllm.data import flashcards as cards
from fedmllm.data import slake as slakes
from fedmllm.data import vqa_rad as rads
from fedmllm.data.dataset import Dataset, DatasetSpec, OwnerFiles
from fedmllm.data.files import Files, open_files
from fedmllm.data.sample import Sample, Task
from fedmllm.data.tables import Report, check_leak
from fedmllm.errors import UserError, unknown

TASK = Task(name="medical-vqa", kind="open", metric="accuracy")
TESTS = ("vqa-rad", "slake", "slake-en", "slake-zh")
ARCHIVES = (*rads.ARCHIVES, *slakes.ARCHIVES, *cards.ARCHIVES)
_SPLITS = ("vqa-rad-train", "vqa-rad-test", "slake-test", "flashcards")


def load(
    *,
    root: str | Path = "",
    vqa_rad: str | Path = "",
    slake: str | Path = "",
    flashcards: str | Path = "",
    test: Sequence[str] = ("vqa-rad", "slake"),
    missing_images: str = "error",
) -> Dataset:
    """Load the domain.

    root: a folder that holds all; vqa_rad, slake, flashcards: folders or archives of their own.
    test: one or more of `TESTS`; sets that are not asked for need not be there.
    missing_images: ``error`` lists the rows whose picture is absent, ``drop`` leaves them out.
    Raises `UserError` with all problems.
    """
    _check_tests(test)
    report = Report(missing_images)

    def at(path: str | Path, option: str) -> Files:
        return open_files(
            path or root, TASK.name, archives=ARCHIVES, option=f"data.root or data.{option}"
        )

    rad = at(vqa_rad, "vqa_rad")
    train = read(rad, "vqa-rad-train", report)
    tested = read(rad, "vqa-rad-test", report) if "vqa-rad" in test else []
    if any(name.startswith("slake") for name in test):
        tested += _of_tests(read(at(slake, "slake"), "slake-test", report), test)
    check_leak(train, tested, report)
    pool = read(at(flashcards, "flashcards"), "flashcards", report)
    report.stop()
    return Dataset(task=TASK, train=train, test=tested, flashcards=pool)


def read(files: Files, split: str, report: Report) -> list[Sample]:
    """The samples of one of the three sets' splits; problems go into `report`."""
    if split == "flashcards":
        return cards.read(files, "train", report)
    if split == "slake-test":
        found, source = slakes.read(files, "test", report), "slake"
    else:
        found, source = rads.read(files, split.removeprefix("vqa-rad-"), report), "vqa-rad"
    return [replace(sample, kind=f"{source}/{sample.kind}") for sample in found]


def _of_tests(samples: list[Sample], test: Sequence[str]) -> list[Sample]:
    wanted = [lang for lang in slakes.LANGUAGES if {"slake", f"slake-{lang}"} & set(test)]
    return [sample for sample in samples if sample.kind.split("/")[1] in wanted]


def _check_tests(test: Sequence[str]) -> None:
    if isinstance(test, str) or not test:
        raise UserError(f"test is {test!r}: give a list of one or more of {', '.join(TESTS)}")
    for name in test:
        if name not in TESTS:
            raise UserError(unknown("test set", name, TESTS))


SPEC = DatasetSpec(
    summary="VQA-RAD for image parties, flashcards for text parties; tests VQA-RAD and SLAKE",
    load=load,
    options={
        "root": "",
        "vqa_rad": "",
        "slake": "",
        "flashcards": "",
        "test": ("vqa-rad", "slake"),
        "missing_images": "error",
    },
    source="the datasets vqa-rad, slake and medalpaca-flashcards",
    licence=f"{rads.SPEC.licence}; {slakes.SPEC.licence}; {cards.SPEC.licence}",
    citation="those of vqa-rad, slake and medalpaca-flashcards",
    files=OwnerFiles(
        unpack="a folder with one folder for each of the three, as `fedmllm data info` says of "
        "vqa-rad, slake and medalpaca-flashcards.",
        splits=_SPLITS,
        needed=_SPLITS,
        read=read,
        archives=ARCHIVES,
        published={
            "vqa-rad-train": 1797,
            "vqa-rad-test": 451,
            "slake-test/slake/en": 1061,
            "slake-test/slake/zh": 1033,
            "flashcards rows": 33955,
        },
        counted_by="as for vqa-rad, slake and medalpaca-flashcards",
    ),
)
