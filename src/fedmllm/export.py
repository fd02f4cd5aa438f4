"""A manifest as folders that parties can be sent: each gets what it keeps, and nothing else.

    DIR/parties/client-00.json     the samples of a party, as conversations
    DIR/images/client-00/...       the images that it keeps, named by their content
    DIR/test.json, DIR/images/test/...
    DIR/manifest.json              who holds what, with its hash
    DIR/experiment.yaml            runs on this folder

The dataset `conversations` (`fedmllm.data.conversations`) reads it, with ids ``party/id``: training
on the export is training on the manifest, text for text and pixel for pixel. What a scenario
withholds is not written. Two things the format cannot hold: white space around a text, which is
dropped, and the image marker within one, which is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedmllm import manifest as manifests
from fedmllm.data.dataset import Dataset
from fedmllm.data.images import ArchiveImage, ImageFile
from fedmllm.data.own import MARKER, party_problem
from fedmllm.data.sample import ImageSource, Sample, Task
from fedmllm.errors import UserError, problem_list
from fedmllm.manifest import Manifest

MANIFEST, EXPERIMENT, TEST = "manifest.json", "experiment.yaml", "test.json"
WRITTEN = {MANIFEST, EXPERIMENT, TEST, "parties", "images"}


def export(
    manifest: Manifest, dataset: Dataset, folder: str | Path, *, overwrite: bool = False
) -> Path:
    """Write a conversation file per party, its images, the test file and the manifest.

    folder: must not exist, unless it is empty, or holds an export and `overwrite` says to replace
    it. It appears whole or not at all. Images are read one at a time.
    Raises `UserError` if it exists, for samples that the format cannot hold, all of them at once,
    and for images that cannot be read.
    """
    target = Path(folder).absolute()
    check_folder(target, overwrite=overwrite)
    held = manifests.client_samples(manifest, dataset)
    _check(held, dataset)
    draft = target.with_name(f"{target.name}.{os.getpid()}.draft")
    try:
        _write(draft, manifest, dataset, held)
        if target.exists():
            shutil.rmtree(target)
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise `UserError` where an export would destroy something. Changes nothing."""
    file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if file is not None:
        raise UserError(f"{file} is a file: choose another folder with --export")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = sorted(names - WRITTEN)
    if foreign or (names and MANIFEST not in names):
        raise UserError(
            f"{folder} is not an export, it holds {(foreign or sorted(names))[0]!r}: nothing in "
            "it is touched; choose another folder with --export"
        )
    if names and not overwrite:
        raise UserError(
            f"{folder} holds an export: use --overwrite to replace it, or choose another folder "
            "with --export"
        )


def _check(held: dict[str, list[Sample]], dataset: Dataset) -> None:
    problems = [f"party {n!r}: {p}" for n in held if (p := party_problem(n))]
    folded = {name.casefold() for name in held}
    if len(folded) < len(held):
        problems.append("two parties have names that differ in case only")
    for name, samples in (*held.items(), ("test", dataset.test)):
        problems += [f"{name}, sample {s.id}: {p}" for s in samples for p in _misfits(s, dataset)]
    if not dataset.test:
        problems.append("the dataset has no test samples")
    if problems:
        raise UserError(problem_list(problems))


def _misfits(sample: Sample, dataset: Dataset) -> Iterable[str]:
    """What the conversation format cannot hold."""
    texts = [sample.text or "", sample.question, *(t for turn in sample.turns for t in turn)]
    if any(MARKER in text for text in [*texts, sample.answer]):
        yield f"a text holds {MARKER}, which stands for the image"
    if not sample.answer.strip():
        yield "the answer is empty"
    if dataset.task.kind == "open" and not sample.question.strip():
        yield "the question is empty"


def _write(
    draft: Path, manifest: Manifest, dataset: Dataset, held: dict[str, list[Sample]]
) -> None:
    (draft / "parties").mkdir(parents=True)
    whole = {sample.id: sample for sample in (*dataset.train, *dataset.flashcards)}
    for name, samples in held.items():
        items = [_item(s, whole[s.id], name, draft) for s in samples]
        _write_items(draft / "parties" / f"{name}.json", items)
    _write_items(draft / TEST, [_item(s, s, "test", draft) for s in dataset.test])
    manifests.save(manifest, draft / MANIFEST)
    text = _experiment(dataset.task, manifest)
    (draft / EXPERIMENT).write_text(text, encoding="utf-8")


def _write_items(file: Path, items: Sequence[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")


def _item(sample: Sample, whole: Sample, party: str, draft: Path) -> dict[str, Any]:
    """A sample as a conversation. whole: the sample before the scenario."""
    item: dict[str, Any] = {"id": sample.id.removeprefix(f"{party}/"), "image": None}
    if sample.image is not None:
        item["image"] = _write_image(sample.image, draft, party)
    text = (sample.text or "").strip()
    opened = bool(sample.question)
    asked = [*sample.turns, (sample.question if opened else text, sample.answer)]
    first = f"{text}\n{asked[0][0].strip()}" if opened and text else asked[0][0].strip()
    marked = f"{MARKER}\n{first}".strip() if sample.image is not None else first
    contents = [marked, asked[0][1], *(t for turn in asked[1:] for t in turn)]
    item["conversations"] = [
        {"role": ("user", "assistant")[i % 2], "content": content.strip()}
        for i, content in enumerate(contents)
    ]
    if opened and text:
        item["text"] = text
    if sample.kind:
        item["kind"] = sample.kind
    lost = [m for m in ("image", "text") if getattr(whole, m) and not getattr(sample, m)]
    if not lost and sample.image is None and not contents[0].strip():
        lost = ["image", "text"]  # an export of an export: the first one's scenario
    return item | ({"withheld": lost} if lost else {})


def _write_image(image: ImageSource, draft: Path, party: str) -> str:
    """Write it once into the party's folder; its path within the export.

    A file's bytes are copied as they are, also out of an archive; anything else is written as PNG,
    pixel for pixel.
    """
    if isinstance(image, ImageFile | ArchiveImage):
        data, ending = image.encoded(), image.file.suffix.lower()
    else:
        out = io.BytesIO()
        image.open().save(out, "PNG")
        data, ending = out.getvalue(), ".png"
    path = Path("images") / party / f"{hashlib.sha256(data).hexdigest()[:16]}{ending}"
    file = draft / path
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path.as_posix()


def _experiment(task: Task, manifest: Manifest) -> str:
    """A config that runs on the export; JSON is YAML, so no text needs quotes of its own."""
    data: dict[str, Any] = {"name": "conversations", "root": ".", "task": task.kind}
    if task.kind == "choice":
        data |= {"classes": list(task.classes), "question": task.question, "metric": task.metric}
    return (
        f"# Who holds what: {MANIFEST}, {manifest.sha256}\n"
        "# Run from this folder, or give data.root=FOLDER.\n"
        f"title: FedAvg on an export of {json.dumps(manifest.dataset)[1:-1]}\n"
        f"seed: {manifest.seed}\n"
        f"data: {json.dumps(data)}\n"
        "scenario: aligned  # what it withholds is withheld already\n"
        "algorithm: fedavg\n"
        f"partition: {{clients: {len(manifest.clients)}}}\n"
    )
