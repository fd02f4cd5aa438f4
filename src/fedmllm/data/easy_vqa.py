"""easy-VQA: small public pictures of one coloured shape, with questions.

Files of the PyPI package ``easy-vqa`` (Victor Zhou, MIT): 4,000 training and 1,000 test images of
64×64 pixels, 38,575 and 9,673 questions, 13 possible answers of which yes and no are 74 %.

A sample: image (64×64 RGB), question (a sentence), answer (one word), text None; kind ``closed``
for yes/no questions and ``open`` for the others; label the index of the answer in the package's
list, which is there for label skew among clients only: the task is an open one.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from fedmllm.data.dataset import Dataset, DatasetSpec
from fedmllm.data.images import ImageFile
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError, needs_package
from fedmllm.rng import uniform

TASK = Task(name="easy-vqa", kind="open", metric="accuracy")
CLOSED = ("yes", "no")


def load(*, max_train: int | None = None, max_test: int | None = None) -> Dataset:
    """Load easy-VQA from the installed package.

    max_train, max_test: keep only so many questions, drawn at random but the same on every
    machine and for every run's seed; a smaller subset lies within a larger one. None: all.
    Raises `UserError` if the package is not installed or a maximum is not positive.
    """
    package = _package()
    return Dataset(
        task=TASK,
        train=_samples(package, "train", _checked("max_train", max_train)),
        test=_samples(package, "test", _checked("max_test", max_test)),
    )


def _package() -> ModuleType:
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError(
            needs_package("dataset 'easy-vqa'", "the package easy-vqa", "easy-vqa")
        ) from error
    return easy_vqa


def _samples(package: ModuleType, split: str, most: int | None) -> list[Sample]:
    root = Path(package.__file__ or "").parent / "data" / split
    questions = getattr(package, f"get_{split}_questions")()
    labels = {answer: i for i, answer in enumerate(package.get_answers())}
    rows = [(f"{split}-{i:05d}", *row) for i, row in enumerate(zip(*questions, strict=True))]
    if most is not None:
        drawn = sorted(rows, key=lambda row: uniform(0, "easy-vqa-subset", row[0]))
        rows = sorted(drawn[:most])
    return [
        Sample(
            id=name,
            question=question,
            answer=answer,
            image=ImageFile(f"images/{image}.png", root),
            label=labels[answer],
            kind="closed" if answer in CLOSED else "open",
        )
        for name, question, answer, image in rows
    ]


def _checked(name: str, most: int | None) -> int | None:
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise UserError(f"{name} is {most!r}: give a number of questions, 1 or more, or nothing")
    return most


SPEC = DatasetSpec(
    summary="questions on pictures of one coloured shape; public, in a 3 MB package",
    load=load,
    options={"max_train": None, "max_test": None},
    source="PyPI package easy-vqa 1.0",
    licence="MIT",
    citation="Victor Zhou, easy-VQA, 2019",
)
