"""Whether an owner's files are whole: counts against the published ones, problems, broken images.

`check(spec, name, root)` reads every split that is there; `check_images` decodes every image, on
threads (Pillow and zlib let go of the interpreter while they decode) and one at a time in each.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedmllm.data.dataset import DatasetSpec, OwnerFiles
from fedmllm.data.files import AbsentError, Files, open_files
from fedmllm.data.sample import ImageSource, Sample
from fedmllm.data.tables import Problem, Report
from fedmllm.errors import UserError

MODALITIES = {
    (True, True): "image+text",
    (True, False): "image",
    (False, True): "text",
    (False, False): "neither",
}


@dataclass
class Checked:
    """The outcome. counts: as `counts`; published: those of the owners, by the same names.

    problems: what must be mended. notes: what the owners' files are known for.
    """

    dataset: str
    root: str
    counts: dict[str, int] = field(default_factory=dict)
    published: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    images_checked: int = 0

    @property
    def ok(self) -> bool:
        """Nothing must be mended."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """For machines: every problem, none left out."""
        return {
            "dataset": self.dataset,
            "root": self.root,
            "ok": self.ok,
            "counts": self.counts,
            "published": self.published,
            "images_checked": self.images_checked,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": [asdict(note) for note in self.notes],
        }


def check(
    name: str,
    spec: DatasetSpec,
    root: str | Path,
    *,
    images: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Read all that is at `root` and say what is wrong.

    images: decode every image. progress: called with how many are done, and of how many.
    Raises `UserError` for a dataset without files of its own, and a root that is not there.
    """
    if spec.files is None:
        raise UserError(f"dataset {name!r} has no files to check: it is {spec.source}")
    files = open_files(root, name, archives=spec.files.archives, option="ROOT")
    report = Report()
    found = Checked(dataset=name, root=str(root), published=dict(spec.files.published))
    splits = _read(files, spec.files, report, found.counts)
    found.counts.update(counts(splits))
    found.counts["images"] = len(report.places)
    _twice(splits, report)
    found.problems, found.notes = report.problems, report.notes
    if images:
        found.problems += check_images(report, progress)
        found.images_checked = len(report.places)
    found.problems += _against(found, spec.files, set(splits))
    return found


def counts(splits: dict[str, list[Sample]]) -> dict[str, int]:
    """How many samples each split holds: all, by class or group, and by modalities.

    ``{"test": 3, "test/en": 2, "test/en/open": 2, …, "test [image+text]": 3}``
    """
    found: Counter[str] = Counter()
    for split, samples in splits.items():
        found[split] = len(samples)
        for sample in samples:
            groups = _groups(sample)
            found.update(f"{split}/{group}" for group in groups)
            text = sample.text is not None or bool(sample.question)
            found[f"{split} [{MODALITIES[sample.image is not None, text]}]"] += 1
    return dict(sorted(found.items()))


def check_images(report: Report, progress: Callable[[int, int], None]) -> list[Problem]:
    """Decode every image that the report knows; what is wrong, at the line that names it first."""
    faults = Report()
    sources = list(report.places)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        outcomes = zip(sources, pool.map(_broken, sources), strict=True)
        for done, (source, what) in enumerate(outcomes, 1):
            if what:
                faults.problem(report.places[source], what)
            progress(done, len(sources))
    return faults.problems


def _broken(source: ImageSource) -> str | None:
    try:
        source.open()
    except UserError as error:
        return str(error)
    return None


def _read(
    files: Files, owner: OwnerFiles, report: Report, found: dict[str, int]
) -> dict[str, list[Sample]]:
    """The samples of each split that is there; a needed one that is not is a problem."""
    splits: dict[str, list[Sample]] = {}
    absent: dict[str, list[str]] = {}
    for split in owner.splits:
        before = report.rows
        try:
            splits[split] = owner.read(files, split, report)
        except AbsentError as error:
            absent.setdefault(str(error), []).append(split)
            continue
        found[f"{split} rows"] = report.rows - before
    for what, without in absent.items():  # one folder may be what several splits lack
        needed = set(without) & set(owner.needed)
        told = Problem(f"{', '.join(without)}: {what}")
        (report.problems if needed else report.notes).append(told)
    return splits


def _groups(sample: Sample) -> list[str]:
    """The class of a choice, or every part of the path of a kind."""
    if sample.label is not None:
        return [sample.answer]
    words = sample.kind.split("/") if sample.kind else []
    return ["/".join(words[: end + 1]) for end in range(len(words))]


def _twice(splits: dict[str, list[Sample]], report: Report) -> None:
    """Ids in two splits are a problem; questions asked twice, of one image and answer, a note."""
    seen: dict[str, str] = {}
    asked: dict[object, tuple[str, str]] = {}
    for split, samples in splits.items():
        for sample in samples:
            row = report.samples[sample.id]
            other = seen.setdefault(sample.id, split)
            if other != split:  # development splits may share samples, as the owners' do
                add = report.problem if "train" in (split, other) else report.note
                add(row, f"sample {sample.id} of {split} is in {other} too")
                continue
            content = (sample.image, sample.text, sample.question.lower(), sample.answer.lower())
            first = asked.setdefault(content, (split, sample.id))
            if first[1] != sample.id:
                report.note(row, f"asks what {first[1]} of {first[0]} asks, with its answer")


def _against(found: Checked, owner: OwnerFiles, splits: set[str]) -> list[Problem]:
    """Counts that differ from the published ones, of splits that are there."""
    problems = []
    for name, published in owner.published.items():
        split = name.partition("/")[0].removesuffix(" rows")
        there = splits == set(owner.splits) if name == "images" else split in splits
        count = found.counts.get(name, 0)
        if there and count != published:
            problems.append(Problem(f"{name}: {count:,} found, {published:,} published"))
    return problems
