"""Small trees in the exact formats of the five owners, with the quirks that the real files have.

`write(name, folder)` makes the tree of one dataset below `folder` and returns what to give as
root. Pictures are a few pixels large.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from fedmllm.data.crisis import CLASSES

HEADER = (
    "event_name\ttweet_id\timage_id\ttweet_text\timage\tlabel\tlabel_text\tlabel_image"
    "\tlabel_text_image"
)
RAD_TABLE = "VQA_RAD Dataset Public.json"
RAD_IMAGES = "VQA_RAD Image Folder"
CARDS = "medical_meadow_wikidoc_medical_flashcards.json"
NAMES = ("hateful-memes", "crisismmd", "vqa-rad", "slake", "medalpaca-flashcards", "medical-vqa")


def picture(path: Path, number: int = 0) -> None:
    """A small picture; another number, another colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (number * 37 % 256, number * 91 % 256, number * 151 % 256)
    Image.new("RGB", (8, 6), colour).save(path)


def write(name: str, folder: Path) -> Path:
    """The tree of one dataset; returns its root."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "hateful-memes": hateful_memes,
        "crisismmd": crisismmd,
        "vqa-rad": vqa_rad,
        "slake": slake,
        "medalpaca-flashcards": flashcards,
        "medical-vqa": medical_vqa,
    }[name](folder)


# -- Hateful-Memes -----------------------------------------------------------------------------


def meme(number: int, label: int, text: str = "look at this") -> dict:
    return {"id": number, "img": f"img/{number:05d}.png", "label": label, "text": text}


def hateful_memes(folder: Path) -> Path:
    root = folder / "hateful_memes"
    splits = {
        "train": [meme(i, i % 2) for i in range(40)],
        "dev_seen": [meme(100 + i, i % 2) for i in range(4)],
        "test_seen": [meme(200 + i, i % 2) for i in range(6)],
    }
    splits["train"][3]["text"] = 'he said "no" … ünïcode'
    for name, rows in splits.items():
        jsonl(root / f"{name}.jsonl", rows)
        for row in rows:
            picture(root / row["img"], row["id"])
    return root


def jsonl(path: Path, rows: Iterable[dict]) -> None:
    """As the owners write it: slashes escaped, one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, separators=(",", ":")).replace("/", "\\/") for row in rows]
    path.write_text("\n".join(lines) + "\n")


# -- CrisisMMD ---------------------------------------------------------------------------------


def tweet(number: int, label: str, text: str = "help needed http://t.co/x1", shot: int = 0) -> str:
    name = f"9016460745275{number:05d}"
    image = f"data_image/hurricane_harvey/4_9_2017/{name}_{shot}.jpg"
    cells = ["hurricane_harvey", name, f"{name}_{shot}", text, image, "not_humanitarian"]
    return "\t".join([*cells, "not_humanitarian", label, "Negative"])


def crisismmd(folder: Path) -> Path:
    root = folder / "CrisisMMD_v2.0"
    train = [tweet(i, CLASSES[i % 8]) for i in range(64)]
    train += [tweet(500, CLASSES[0], shot=0), tweet(500, CLASSES[5], shot=1)]  # two pictures
    train.append(tweet(501, CLASSES[7], 'RT @a: "one quote only'))
    train.append(tweet(502, CLASSES[7], "line\u2028separator and \x85 are no line ends"))
    train.append(tweet(503, CLASSES[7], "https://t.co/only"))
    dev = [tweet(600 + i, CLASSES[i]) for i in range(8)]
    test = [tweet(700 + i, CLASSES[i % 8]) for i in range(16)]
    for name, lines in {"train": train, "dev": dev, "test": test}.items():
        table(root, name).parent.mkdir(parents=True, exist_ok=True)
        table(root, name).write_bytes("\n".join([HEADER, *lines, ""]).encode())
        for number, line in enumerate(lines):
            picture(root / line.split("\t")[4], number)
    return root


def table(root: Path, split: str) -> Path:
    return root / "crisismmd_datasplit_all" / f"task_humanitarian_text_img_{split}.tsv"


# -- VQA-RAD -----------------------------------------------------------------------------------


def rad(qid: int, phrase: str, question: str, answer: object, kind: str, image: int = 1) -> dict:
    return {
        "qid": qid,
        "phrase_type": phrase,
        "qid_linked_id": f"03f451ca-{qid}",
        "image_case_url": "https://medpix.nlm.nih.gov/case?id=1",
        "image_name": f"synpic{image}.jpg",
        "image_organ": "HEAD",
        "evaluation": "not evaluated",
        "question": question,
        "question_rephrase": "NULL",
        "answer": answer,
        "answer_type": kind,
        "question_type": "PRES",
    }


def rad_rows() -> list[dict]:
    rows = [rad(i, "freeform", f"what is at {i}?", "heart", "OPEN", i % 4) for i in range(1, 20)]
    rows += [rad(i, "para", f"is it {i}?", "Yes", "CLOSED", i % 4) for i in range(20, 30)]
    rows.append(rad(30, "freeform", "How many gallstones are identified?", 4, "OPEN "))
    rows.append(rad(31, "para", "Is the heart large?", "no\t", " closed "))
    tests = [rad(i, "test_freeform", f"where is {i}?", "left", "OPEN", i % 4) for i in (40, 41, 42)]
    return [*rows, *tests, rad(43, "test_para", "is it there?", "No", "CLOSED ", 2)]


def vqa_rad(folder: Path) -> Path:
    root = folder / "VQA_RAD"
    root.mkdir(parents=True, exist_ok=True)
    (root / RAD_TABLE).write_text(json.dumps(rad_rows(), indent=1))
    for number in range(4):
        picture(root / RAD_IMAGES / f"synpic{number}.jpg", number)
    return root


# -- SLAKE -------------------------------------------------------------------------------------


def slake_row(qid: int, image: int, lang: str = "en", kind: str = "OPEN") -> dict:
    words = {"en": (f"Where is the organ {qid}?", "Left Lung, Right")}
    words["zh"] = (f"器官{qid}在哪里?", "左肺")
    question, answer = words[lang]
    return {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": question,
        "answer": answer,
        "q_lang": lang,
        "location": "Lung",
        "modality": "CT",
        "answer_type": kind,
        "base_type": "vqa",
        "content_type": "Position",
        "triple": ["vhead", "_", "_"],
        "qid": qid,
    }


def slake(folder: Path) -> Path:
    """Lists in one line, Chinese as it is, several questions an image."""
    root = folder / "Slake1.0"
    splits = {
        "train": [slake_row(i, i % 3, "en" if i % 2 else "zh") for i in range(30)],
        "validate": [slake_row(100 + i, 3, "en") for i in range(3)],
        "test": [slake_row(200 + i, 4, "zh" if i % 2 else "en", "CLOSED") for i in range(6)],
    }
    splits["train"][5]["answer"] = ""
    root.mkdir(parents=True)
    for name, rows in splits.items():
        (root / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    for image in range(5):
        picture(root / "imgs" / f"xmlab{image}" / "source.jpg", image)
    return root


# -- flashcards and the medical domain ---------------------------------------------------------


def flashcards(folder: Path) -> Path:
    root = folder / "medical_meadow_medical_flashcards"
    root.mkdir(parents=True, exist_ok=True)
    ask = "Answer this question truthfully"
    rows = [
        {"input": f"What is {i}?", "output": f"It is {i}.", "instruction": ask} for i in range(60)
    ]
    rows += [{"input": "", "output": "", "instruction": ask}, rows[0]]
    (root / CARDS).write_text(json.dumps(rows, indent=2))
    return root


def medical_vqa(folder: Path) -> Path:
    root = folder / "medical"
    for make in (vqa_rad, slake, flashcards):
        make(root)
    return root


# -- archives ----------------------------------------------------------------------------------


def zipped(folder: Path, target: Path, *, flat: bool = False) -> Path:
    """A zip of the folder, under its own name, or flat; with what a Mac leaves behind."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder if flat else folder.parent))
        archive.writestr("__MACOSX/._img", b"x")
    return target


def tarred(folder: Path, target: Path) -> Path:
    with tarfile.open(target, "w:gz") as archive:
        archive.add(folder, folder.name)
    return target


def owners_tar(folder: Path) -> Path:
    """CrisisMMD_v2.0.tar.gz as it is: the tables zipped once more inside."""
    root = crisismmd(folder / "unpacked")
    tables = root / "crisismmd_datasplit_all"
    zipped(tables, root / "crisismmd_datasplit_all.zip")
    shutil.rmtree(tables)
    return tarred(root, folder / "CrisisMMD_v2.0.tar.gz")
