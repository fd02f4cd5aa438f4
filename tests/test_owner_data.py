"""The owners' files: what is read from them, wherever they lie, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import owner_files as owners
import pytest
from PIL import Image

from fedmllm.data import DATASETS, load_dataset
from fedmllm.data.crisis import CLASSES
from fedmllm.data.crisismmd import without_urls
from fedmllm.errors import UserError
from fedmllm.manifest import build_manifest, client_samples


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path):
    """Make the tree of a dataset: its root."""
    return lambda name: owners.write(name, tmp_path / "data")


def refusal(name, root, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(name, root=root, **options)
    return str(caught.value)


def by_id(samples):
    return {sample.id: sample for sample in samples}


def edit(path: Path, change) -> None:
    """Change the rows of a JSON list."""
    rows = json.loads(path.read_text("utf-8"))
    change(rows)
    path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")


# -- what is read ------------------------------------------------------------------------------


def test_hateful_memes(tree):
    data = load_dataset("hateful-memes", root=tree("hateful-memes"))
    assert (len(data.train), len(data.test)) == (40, 6)
    assert data.task.metric == "auc"
    assert data.task.classes == ("not-hateful", "hateful")
    sample = by_id(data.train)["3"]
    assert (sample.label, sample.answer) == (1, "hateful")
    assert sample.text == 'he said "no" … ünïcode'
    assert str(sample.image.file).endswith("img/00003.png")
    assert {s.id for s in data.test} == {str(200 + i) for i in range(6)}


def test_hateful_memes_has_four_tests(tree):
    root = tree("hateful-memes")
    assert len(load_dataset("hateful-memes", root=root, test="dev_seen").test) == 4
    assert "no test_unseen.jsonl in" in refusal("hateful-memes", root, test="test_unseen")
    assert "unknown test split 'test': choose" in refusal("hateful-memes", root, test="test")
    (root / "dev_seen.jsonl").rename(root / "dev.jsonl")  # as the first release calls it
    assert len(load_dataset("hateful-memes", root=root, test="dev_seen").test) == 4


def test_a_test_split_without_labels_is_named_once(tree):
    root = tree("hateful-memes")
    rows = [{k: v for k, v in owners.meme(200 + i, 0).items() if k != "label"} for i in range(6)]
    owners.jsonl(root / "test_seen.jsonl", rows)
    message = refusal("hateful-memes", root)
    assert message.startswith("1 problem")
    assert "test_seen.jsonl, line 1: no row has a label" in message


def test_crisismmd(tree):
    data = load_dataset("crisismmd", root=tree("crisismmd"))
    assert (len(data.train), len(data.test)) == (69, 16)
    assert data.task.metric == "macro_f1"
    assert data.task.classes == CLASSES
    assert len(CLASSES) == 8
    train = by_id(data.train)
    assert len(train) == 69
    first, second = train["901646074527500500_0"], train["901646074527500500_1"]  # one tweet
    assert (first.answer, second.answer) == ("affected_individuals", "vehicle_damage")
    assert first.image != second.image
    assert train["901646074527500501_0"].text == 'RT @a: "one quote only'
    assert train["901646074527500502_0"].text == "line separator and are no line ends"
    assert train["901646074527500503_0"].text is None  # a link and nothing else
    assert all(s.label == CLASSES.index(s.answer) for s in data.train)
    assert len(load_dataset("crisismmd", root=tree("crisismmd"), test="dev").test) == 8


@pytest.mark.parametrize(
    ("tweet", "text"),
    [
        ("help https://t.co/x now", "help now"),
        ("HTTP://T.CO/x", ""),
        ("see www.redcross.org, please", "see please"),
        ("a  b\u00a0c", "a b c"),
        ("no links here: http is a word", "no links here: http is a word"),
        ("https://t.co/a https://t.co/b…", ""),
    ],
)
def test_urls_are_stripped(tweet, text):
    assert without_urls(tweet) == text


def test_a_tweet_that_is_not_utf8_and_windows_line_ends(tree):
    root = tree("crisismmd")
    table = owners.table(root, "train")
    lines = table.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"help needed", b"caf\xe9 \x93open\x94")
    lines[2] = lines[2].replace(b"help needed", "不要 help".encode())
    table.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    train = load_dataset("crisismmd", root=root).train
    assert train[0].text == "café “open”"
    assert train[1].text == "不要 help"
    assert len(train) == 69
    assert train[3].label == 3


def test_columns_in_another_order_and_a_mark_before_the_first(tree):
    """The byte order mark is no part of the first name, the carriage return none of the last."""
    root = tree("crisismmd")
    table = owners.table(root, "train")
    rows = [line.split("\t") for line in table.read_text("utf-8").split("\n")[:-1]]
    order = (2, 0, 1, 3, 4, 5, 6, 8, 7)
    lines = ["\t".join(row[i] for i in order) for row in rows]
    assert lines[0].startswith("image_id")
    assert lines[0].endswith("label_image")
    expected = contents(load_dataset("crisismmd", root=root))
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert contents(load_dataset("crisismmd", root=root)) == expected


def test_vqa_rad(tree):
    data = load_dataset("vqa-rad", root=tree("vqa-rad"))
    assert (len(data.train), len(data.test)) == (31, 4)
    train = by_id(data.train)
    assert train["vqa-rad/30"].answer == "4"  # a number in JSON
    assert train["vqa-rad/30"].kind == "open"  # "OPEN "
    assert (train["vqa-rad/31"].answer, train["vqa-rad/31"].kind) == ("no", "closed")
    assert Counter(s.kind for s in data.test) == {"open": 3, "closed": 1}
    assert [s.id for s in data.test] == [f"vqa-rad/{i}" for i in (40, 41, 42, 43)]
    assert all(s.text is None and s.question for s in data.train)
    assert len({s.image for s in data.train}) == 4  # several questions an image


@pytest.mark.parametrize(("language", "count"), [("both", 6), ("en", 3), ("zh", 3)])
def test_slake(tree, language, count):
    data = load_dataset("slake", root=tree("slake"), language=language)
    assert len(data.test) == count
    assert {s.kind.split("/")[0] for s in data.test} == (
        {"en", "zh"} if language == "both" else {language}
    )
    if language != "en":
        sample = by_id(data.test)["slake/201"]
        assert (sample.question, sample.answer) == ("器官201在哪里?", "左肺")
        assert sample.kind == "zh/closed"
    assert "slake/5" not in by_id(data.train)  # its answer is empty


def test_slake_without_its_training_file(tree):
    root = tree("slake")
    (root / "train.json").unlink()
    assert load_dataset("slake", root=root).train == []


def test_flashcards(tree):
    root = tree("medalpaca-flashcards")
    data = load_dataset("medalpaca-flashcards", root=root, test=0.2)
    cards = by_id([*data.train, *data.test])
    assert len(cards) == len(data.train) + len(data.test) == 60  # an empty and a repeated one less
    assert 4 <= len(data.test) <= 20
    assert all(card.image is None and card.kind == "flashcard" for card in cards.values())
    edit(root / owners.CARDS, lambda rows: rows.reverse())
    again = load_dataset("medalpaca-flashcards", root=root / owners.CARDS, test=0.2)
    assert set(by_id(again.test)) == set(by_id(data.test))  # whatever the order of the file
    larger = load_dataset("medalpaca-flashcards", root=root, test=0.5)
    assert set(by_id(data.test)) < set(by_id(larger.test))
    for share in (0, 1, 1.5):
        assert "between 0 and 1" in refusal("medalpaca-flashcards", root, test=share)


def test_the_medical_domain(tree):
    data = load_dataset("medical-vqa", root=tree("medical-vqa"))
    assert (len(data.train), len(data.flashcards), len(data.test)) == (31, 60, 10)
    assert Counter(s.kind for s in data.test) == {
        "vqa-rad/open": 3,
        "vqa-rad/closed": 1,
        "slake/en/closed": 3,
        "slake/zh/closed": 3,
    }
    held = client_samples(
        build_manifest(
            "medical-vqa",
            data,
            clients=10,
            scenario="cross",
            scenario_options={"images": "5:5"},
            seed=0,
        ),
        data,
    )
    sources = [{sample.id.split("/")[0] for sample in samples} for samples in held.values()]
    assert Counter(map(tuple, sources)) == {("vqa-rad",): 5, ("flashcard",): 5}


@pytest.mark.parametrize(
    ("test", "sources"),
    [
        (["vqa-rad"], {"vqa-rad": 4}),
        (["slake-zh"], {"slake": 3}),
        (["slake-en", "slake-zh"], {"slake": 6}),
        (["slake", "slake-en"], {"slake": 6}),
    ],
)
def test_the_tests_of_the_medical_domain(tree, test, sources):
    data = load_dataset("medical-vqa", root=tree("medical-vqa"), test=test)
    assert Counter(s.id.split("/")[0] for s in data.test) == sources


def test_the_medical_domain_at_three_places(tmp_path):
    parts = {
        option: owners.write(name, tmp_path / option)
        for option, name in (
            ("vqa_rad", "vqa-rad"),
            ("slake", "slake"),
            ("flashcards", "medalpaca-flashcards"),
        )
    }
    data = load_dataset("medical-vqa", **parts)
    assert (len(data.train), len(data.flashcards), len(data.test)) == (31, 60, 10)
    only = load_dataset(
        "medical-vqa",
        test=["vqa-rad"],
        vqa_rad=parts["vqa_rad"],
        flashcards=parts["flashcards"],
    )
    assert len(only.test) == 4
    message = refusal("medical-vqa", "", vqa_rad=parts["vqa_rad"])
    assert "data.root or data.slake" in message
    for wrong in ([], "slake", ["slak"]):
        with pytest.raises(UserError, match="test"):
            load_dataset("medical-vqa", test=wrong, **parts)


# -- where the files lie -----------------------------------------------------------------------


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def contents(data) -> list:
    return [
        (s.id, s.answer, s.text, s.question, s.kind, s.image and s.image.open().tobytes())
        for s in (*data.train, *data.test, *data.flashcards)
    ]


@pytest.mark.parametrize("name", owners.NAMES)
@pytest.mark.parametrize("form", ["above", "zip", "flat zip", "tar", "folder of a zip"])
def test_the_same_from_everywhere(tmp_path, cache, name, form):
    """A folder up, the archive, or a folder with the archive: the same samples and pictures."""
    root = owners.write(name, tmp_path / "data")
    expected = contents(load_dataset(name, root=root))
    other = tmp_path / "other"
    other.mkdir()
    archive = other / next(n for n in DATASETS[name].files.archives if n.endswith(".zip"))
    if form == "above":
        other = root.parent
    elif form == "tar":
        other = owners.tarred(root, other / "some.tar.gz")
    else:
        owners.zipped(root, archive, flat=form == "flat zip")
        other = other if form == "folder of a zip" else archive
    folder = other if other.is_dir() else other.parent
    before = fingerprint(folder)
    assert contents(load_dataset(name, root=other)) == expected
    assert fingerprint(folder) == before  # nothing is written into the user's folder
    assert cache.exists() == (form == "tar")


def test_crisismmd_as_its_owners_pack_it(tmp_path, cache):
    """A tar.gz with the tables zipped once more; given itself, or lying in the root."""
    expected = contents(load_dataset("crisismmd", root=owners.crisismmd(tmp_path / "plain")))
    archive = owners.owners_tar(tmp_path)
    assert contents(load_dataset("crisismmd", root=archive)) == expected
    shutil.rmtree(tmp_path / "unpacked")
    shutil.rmtree(tmp_path / "plain")
    stamp = fingerprint(cache)
    assert contents(load_dataset("crisismmd", root=tmp_path)) == expected
    assert fingerprint(cache) == stamp  # unpacked once


def test_images_zipped_beside_the_tables(tmp_path):
    """SLAKE's mirror (imgs.zip, validation.json); OSF's flat zip of VQA-RAD's pictures."""
    root = owners.slake(tmp_path)
    expected = contents(load_dataset("slake", root=root))
    owners.zipped(root / "imgs", root / "imgs.zip")
    shutil.rmtree(root / "imgs")
    (root / "validate.json").rename(root / "validation.json")
    assert contents(load_dataset("slake", root=root)) == expected
    rad = owners.vqa_rad(tmp_path)
    expected = contents(load_dataset("vqa-rad", root=rad))
    owners.zipped(rad / owners.RAD_IMAGES, rad / f"{owners.RAD_IMAGES}.zip", flat=True)
    shutil.rmtree(rad / owners.RAD_IMAGES)
    assert contents(load_dataset("vqa-rad", root=rad)) == expected
    whole = owners.zipped(rad, tmp_path / "osfstorage-archive.zip", flat=True)
    assert contents(load_dataset("vqa-rad", root=whole)) == expected  # a zip in a zip


def test_other_layouts_of_the_memes(tmp_path):
    """Kaggle's (data/), MMF's (annotations and images apart)."""
    root = owners.hateful_memes(tmp_path)
    expected = contents(load_dataset("hateful-memes", root=root))
    kaggle = tmp_path / "archive" / "data"
    shutil.copytree(root, kaggle)
    assert contents(load_dataset("hateful-memes", root=kaggle.parent)) == expected
    mmf = tmp_path / "hm" / "defaults"
    shutil.copytree(root / "img", mmf / "images" / "img")
    (mmf / "annotations").mkdir()
    for file in root.glob("*.jsonl"):
        shutil.copy(file, mmf / "annotations")
    assert contents(load_dataset("hateful-memes", root=mmf.parent)) == expected


def test_what_lies_unpacked_is_taken_first(tmp_path, cache):
    root = owners.crisismmd(tmp_path)
    (tmp_path / "CrisisMMD_v2.0.tar.gz").write_bytes(b"half a download")
    assert len(load_dataset("crisismmd", root=tmp_path).train) == 69
    shutil.rmtree(root / "data_image")
    assert "CrisisMMD_v2.0.tar.gz is neither a folder nor" in refusal("crisismmd", tmp_path)
    assert not cache.exists()


def test_two_copies_are_told_apart_by_the_user(tmp_path):
    root = owners.hateful_memes(tmp_path)
    shutil.copytree(root, tmp_path / "copy")
    assert "holds train.jsonl twice" in refusal("hateful-memes", tmp_path)
    assert len(load_dataset("hateful-memes", root=root).train) == 40


def test_a_root_given_by_mistake_is_not_searched_forever(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmllm.data.files.WIDTH", 5)
    for i in range(6):
        (tmp_path / f"project-{i}" / "data").mkdir(parents=True)
    owners.hateful_memes(tmp_path / "project-0")
    looked = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(path) or real(path))
    assert "no train.jsonl in" in refusal("hateful-memes", tmp_path)
    assert len(looked) == 1  # the root alone
    owners.hateful_memes(tmp_path)
    monkeypatch.setattr("fedmllm.data.files.WIDTH", 7)
    assert len(load_dataset("hateful-memes", root=tmp_path).train) == 40


def test_links_that_lead_nowhere_and_pipes_are_passed_over(tree):
    """Neither empties the folder that they lie in, nor is waited for."""
    root = tree("hateful-memes")
    (root / "loop").symlink_to("loop")
    picture = root / "img" / "00007.png"
    picture.unlink()
    os.mkfifo(picture)
    expected = f"image {picture} does not exist"
    assert expected in refusal("hateful-memes", root)


def test_what_a_mac_leaves_behind_is_not_taken_for_data(tmp_path):
    root = owners.hateful_memes(tmp_path / "data")
    (root / "img").rename(root / "__MACOSX")
    owners.picture(root / "__MACOSX" / "img" / "._00000.png")
    (root / "._train.jsonl").write_bytes(b"\0\5\x16\7")
    assert "no folder img in" in refusal("hateful-memes", root)


def test_the_order_of_a_folder_does_not_matter(tree, monkeypatch):
    root = tree("medical-vqa")
    expected = contents(load_dataset("medical-vqa", root=root))
    real = os.scandir

    class Reversed:
        def __init__(self, path):
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(os, "scandir", Reversed)
    assert contents(load_dataset("medical-vqa", root=root)) == expected


@pytest.mark.parametrize("name", owners.NAMES)
def test_no_image_is_read_before_it_is_needed(tree, name, monkeypatch):
    root = tree(name)
    for path in root.rglob("*"):
        if path.suffix in (".png", ".jpg"):
            path.write_bytes(b"no picture")
    data = load_dataset(name, root=root)
    shown = [s for s in data.test if s.image is not None]
    assert name == "medalpaca-flashcards" or shown
    for sample in shown[:1]:
        with pytest.raises(UserError, match="is not an image"):
            sample.image.open()


def test_a_large_table_opens_quickly(tmp_path):
    """18,000 rows, as CrisisMMD has, well below two seconds."""
    import time

    root = owners.crisismmd(tmp_path)
    lines = [owners.tweet(1000 + i, CLASSES[i % 8]) for i in range(18_000)]
    owners.table(root, "train").write_text("\n".join([owners.HEADER, *lines]))
    first = root / lines[0].split("\t")[4]
    owners.picture(first)
    for line in lines[1:]:
        os.link(first, root / line.split("\t")[4])
    began = time.process_time()
    data = load_dataset("crisismmd", root=root)
    assert time.process_time() - began < 2
    assert len(data.train) == 18_000


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", owners.NAMES)
def test_the_root_is_needed_and_must_exist(tmp_path, name):
    assert f"`fedmllm data info {name}`" in refusal(name, "")
    assert "does not exist: check data.root" in refusal(name, tmp_path / "no")
    (tmp_path / "empty").mkdir()
    message = refusal(name, tmp_path / "empty")
    assert "it holds nothing" in message
    assert "data info" in message
    (tmp_path / "file.zip").write_text("no archive")
    assert "file.zip is neither a folder nor a zip" in refusal(name, tmp_path / "file.zip")


def test_a_parquet_mirror_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000.parquet").write_bytes(b"PAR1")
    assert "parquet mirrors are not read" in refusal("vqa-rad", tmp_path)


def test_absent_images_are_listed_or_left_out(tree):
    root = tree("hateful-memes")
    for number in (3, 7, 201):
        (root / f"img/{number:05d}.png").unlink()
    message = refusal("hateful-memes", root)
    assert message.startswith("3 problems")
    assert f"train.jsonl, line 4: image {root / 'img/00003.png'} does not exist" in message
    assert "test_seen.jsonl, line 2: image" in message
    data = load_dataset("hateful-memes", root=root, missing_images="drop")
    assert (len(data.train), len(data.test)) == (38, 5)
    assert "unknown missing_images 'keep'" in refusal("hateful-memes", root, missing_images="keep")
    shutil.rmtree(root / "img")
    message = refusal("hateful-memes", root, missing_images="drop")
    assert "no folder img in" in message  # the folder is a mistake, not a missing picture


@pytest.mark.parametrize("name", ["crisismmd", "vqa-rad", "slake", "medical-vqa"])
def test_each_dataset_drops_rows_without_images(tree, name):
    root = tree(name)
    whole = load_dataset(name, root=root)
    path = whole.test[0].image.file
    absent = sum(s.image is not None and s.image.file == path for s in whole.test)
    path.unlink()
    assert "does not exist" in refusal(name, root)
    part = load_dataset(name, root=root, missing_images="drop")
    assert len(part.test) == len(whole.test) - absent


@pytest.mark.parametrize(
    "path", ["../secret.png", "img/../../secret.png", "/etc/hostname", "", "img/a\0.png"]
)
def test_a_row_cannot_lead_outside(tree, path):
    root = tree("hateful-memes")
    Image.new("RGB", (2, 2)).save(root.parent / "secret.png")
    owners.jsonl(root / "train.jsonl", [{**owners.meme(1, 0), "img": path}])
    assert "is not a path inside the data" in refusal("hateful-memes", root)


def test_repeated_rows(tree):
    root = tree("hateful-memes")
    rows = [owners.meme(i, i % 2) for i in range(40)]
    owners.jsonl(root / "train.jsonl", [*rows, rows[0], rows[5]])
    assert len(load_dataset("hateful-memes", root=root).train) == 40
    owners.jsonl(root / "train.jsonl", [*rows, {**rows[5], "label": 0}])
    message = refusal("hateful-memes", root)
    assert "train.jsonl, line 41: has the id of line 6 and another content" in message


def test_nothing_of_the_test_split_leaks_into_training(tree):
    root = tree("hateful-memes")
    rows = [owners.meme(i, i % 2) for i in range(40)]
    owners.jsonl(root / "train.jsonl", [*rows, owners.meme(203, 1), owners.meme(204, 0)])
    message = refusal("hateful-memes", root)
    assert "test_seen.jsonl, line 4: test sample 203 is a training sample too; so are 1 more" in (
        message
    )


MEME = {"id": 1, "img": "img/00001.png", "label": 1, "text": "x"}
BAD_MEMES = {
    '{"id": 1,': "line 2: not JSON",
    "[1, 2]": "line 2: must be an object, not a list",
    "NaN": "line 2: must be an object, not a number",
    json.dumps({k: v for k, v in MEME.items() if k != "text"}): "field 'text' is missing",
    json.dumps({**MEME, "text": 3}): "text must be a text, not a number",
    json.dumps({**MEME, "text": "\ud800"}): "text holds a broken character",
    json.dumps({**MEME, "label": "1"}): "label is '1': it must be 0 or 1",
    json.dumps({**MEME, "label": True}): "label is True",
    json.dumps({**MEME, "label": [0]}): "label is [0]",
    json.dumps({**MEME, "id": None}): "id must be a text, not null",
    json.dumps({**MEME, "id": 1.5}): "id must be a text or a whole number",
    json.dumps({**MEME, "id": " "}): "id is empty",
    json.dumps({**MEME, "img": None}): "img must be a text, not null",
    "[" * 100_000: "line 2: ",
    "1" * 5000: "line 2: ",
}


@pytest.mark.parametrize("line", BAD_MEMES, ids=range(len(BAD_MEMES)))
def test_bad_lines_of_memes(tree, line):
    root = tree("hateful-memes")
    (root / "train.jsonl").write_text(f"{json.dumps(owners.meme(0, 0))}\n{line}\n")
    message = refusal("hateful-memes", root)
    assert BAD_MEMES[line] in message
    assert "train.jsonl, line 2: " in message
    assert message.startswith("1 problem in")


def test_long_lists_of_problems_are_cut(tree):
    root = tree("hateful-memes")
    (root / "train.jsonl").write_text("{}\n" * 2000 + json.dumps(owners.meme(1, 1)))
    lines = refusal("hateful-memes", root).splitlines()
    assert lines[0] == "2000 problems in the data:"
    assert len(lines) == 22
    assert lines[-1] == "  … and 1980 more"


def test_bad_crisis_tables(tree):
    root = tree("crisismmd")
    table = owners.table(root, "train")
    good = owners.tweet(0, CLASSES[0])
    for line, expected in {
        good.replace("Negative", "Negative\tmore"): "line 2: has 10 columns, the header has 9",
        "a\tb": "line 2: has 2 columns",
        good.replace(CLASSES[0], "no_such_class"): "line 2: unknown label_image 'no_such_class'",
        good.replace("_0.jpg", "_9.jpg"): "line 2: image",
    }.items():
        table.write_text(f"{owners.HEADER}\n{line}\n")
        message = refusal("crisismmd", root)
        assert f"{table}, {expected}" in message
    table.write_text(owners.HEADER.replace("label_image", "label_picture") + "\n")
    assert "line 1: the header lacks label_image" in refusal("crisismmd", root)
    table.write_text(owners.HEADER + "\n")
    assert "the table has no rows" in refusal("crisismmd", root)
    table.write_text("")
    assert "line 1: the header lacks" in refusal("crisismmd", root)


BAD_LISTS = {
    "": "line 1: the file is empty",
    "{}": "line 1: must hold a JSON list",
    "[]": "line 1: the list is empty",
    '[\n{"qid": 1}\n{"qid": 2}]': "line 3: not JSON: a comma or ] must follow",
    '[\n{"qid": 1},\n\n{"qid": }]': "line 4: not JSON: Expecting value",
    '[\n{"qid": 1},]': "line 2: not JSON: Expecting value",
    '[\n{"qid": 1}': "line 2: not JSON: a comma or ]",
    "[\n1,\n2]": "line 2, item 1: must be an object, not a number",
    '[\n{"qid": 1}] more': "line 2: text stands after the list",
    "[" * 100_000: "line 1: JSON that cannot be read",
    '[{"qid": 1,\n"x": "a\nb"}]': "line 2: not JSON: Invalid control character",
}


@pytest.mark.parametrize("text", BAD_LISTS, ids=range(len(BAD_LISTS)))
def test_bad_json_lists(tree, text):
    root = tree("vqa-rad")
    (root / owners.RAD_TABLE).write_text(text)
    message = refusal("vqa-rad", root)
    assert message.count(f"{owners.RAD_TABLE}, {BAD_LISTS[text]}") == 1  # both splits read it


def test_a_json_list_that_is_not_utf8(tree):
    root = tree("slake")
    path = root / "test.json"
    rows = json.loads(path.read_text("utf-8"))
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(f"[{text}]".encode("gb18030"))
    assert "test.json, line 2: is not UTF-8 text" in refusal("slake", root)
    path.write_bytes(b"\xef\xbb\xbf" + f"[{text}]".replace("\n", "\r\n").encode())
    assert len(load_dataset("slake", root=root).test) == 6


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("answer", True, "answer must be a text, not true or false"),
        ("answer", float("nan"), "answer is nan"),
        ("answer", ["a"], "answer must be a text, not a list"),
        ("answer_type", "MAYBE", "unknown answer_type 'maybe': choose closed or open"),
        ("phrase_type", "framed", "unknown phrase_type 'framed'"),
        ("phrase_type", None, "phrase_type must be a text, not null"),
        ("qid", {}, "qid must be a text, not an object"),
        ("image_name", "synpic99.jpg", "does not exist"),
        ("question", 7, "question must be a text, not a number"),
    ],
)
def test_bad_fields_of_vqa_rad(tree, field, value, expected):
    root = tree("vqa-rad")
    edit(root / owners.RAD_TABLE, lambda rows: rows[4].update({field: value}))
    message = refusal("vqa-rad", root)
    assert expected in message
    assert "item 5: " in message
    assert message.startswith("1 problem")


def test_bad_fields_of_slake(tree):
    root = tree("slake")
    edit(root / "test.json", lambda rows: rows[1].update(q_lang="fr"))
    assert "test.json, line 1, item 2: unknown q_lang 'fr'" in refusal("slake", root)
    assert "unknown language 'de'" in refusal("slake", root, language="de")
