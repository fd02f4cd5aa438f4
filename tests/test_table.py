"""A user's own tables: CSV, TSV, JSON lines, saved Hugging Face datasets; and every refusal."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmllm.config import load_config
from fedmllm.data import load_dataset
from fedmllm.data.images import ImageFile
from fedmllm.data.rows import ROLES
from fedmllm.errors import UserError
from fedmllm.manifest import build_manifest
from fedmllm.prompts import render

SAVED = Path(__file__).parent / "data" / "hf-saved"
HEAD = "id,image,text,question,answer,party,split\n"


@pytest.fixture
def folder(tmp_path):
    """Two pictures; a test file with one row."""
    (tmp_path / "images").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (2, 2), colour).save(tmp_path / "images" / f"{name}.png")
    write(tmp_path, "test.csv", "question,answer\nq?,a\n")
    return tmp_path


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(folder, **options):
    return load_dataset("table", root=folder, **options)


def refusal(folder, content, name="data.csv", **options):
    write(folder, name, content)
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    return str(caught.value)


def split(dataset, **changes):
    return build_manifest("mine", dataset, **({"clients": 2, "seed": 0} | changes))


# --- what is read ----------------------------------------------------------------------------


def test_nan_is_nothing(folder):
    """As Python and pandas write an empty cell into JSON lines."""
    row = {"party": "a", "image": float("nan"), "text": "x", "answer": "yes"}
    rows = [row, row | {"image": "images/a.png", "text": float("nan")}]
    write(folder, "data.jsonl", "\n".join(map(json.dumps, rows)))
    write(folder, "test.csv", "text,answer\nx,no\n")
    options = {"task": "choice", "classes": ["no", "yes"], "question_column": ""}
    first, second = load(folder, **options).train
    assert (first.image, first.text) == (None, "x")
    assert second.image is not None
    assert second.text is None
    assert "line 1: its answer is empty" in refusal(
        folder, '{"text": "x", "answer": NaN}', "data.jsonl", **options
    )


def test_one_file_with_a_party_column(folder):
    write(
        folder,
        "data.csv",
        HEAD
        + "1,images/a.png,a text,what?,yes,north,train\n"
        + "1,,,where?,no,south,train\n"
        + "2,images/b.png,,how?,maybe,,test\n"
        + "3,,,never?,seen,south,validation\n",
    )
    (folder / "test.csv").unlink()
    dataset = load(folder)
    assert list(dataset.parties) == ["north", "south"]
    north, south = dataset.train
    assert (north.id, north.text, north.question, north.answer) == (
        "north/1",
        "a text",
        "what?",
        "yes",
    )
    assert north.image.open().getpixel((0, 0)) == (255, 0, 0)
    assert (south.id, south.text, south.image) == ("south/1", None, None)
    assert [(s.id, s.answer) for s in dataset.test] == [("test/2", "maybe")]
    assert split(dataset, clients=9).partition == {"name": "parties", "clients": 2}


def test_one_party_per_file_and_one_pool(folder):
    write(folder, "north.csv", "question,answer\nq1?,a\n")
    write(folder, "south.tsv", "question\tanswer\nq2?\tb\n")
    write(folder, "dev.csv", "question,answer\nunseen?,a\n")
    write(folder, "notes.txt", "not a table")
    assert {n: [s.question for s in p] for n, p in load(folder).parties.items()} == {
        "north": ["q1?"],
        "south": ["q2?"],
    }
    pool = load(folder, parties="none")
    assert not pool.parties
    assert split(pool).partition == {"name": "even", "clients": 2}
    (folder / "south.tsv").unlink()
    assert not load(folder).parties  # one file is a pool
    assert list(load(folder, parties="files").parties) == ["north"]
    assert [s.answer for s in load(folder / "north.csv").train] == ["a"]  # the file for the folder


def test_json_lines_with_numbers_and_other_column_names(folder):
    lines = [
        {"key": 7, "q": "how many?", "gold": 3, "site": 1, "ignored": {"x": []}},
        {"key": "8", "q": "which?", "gold": "b", "site": 2, "pic": "images/b.png"},
    ]
    write(folder, "data.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    write(folder, "test.csv", "q,gold\nq?,a\n")
    names = {"id": "key", "question": "q", "answer": "gold", "party": "site", "image": "pic"}
    options = {f"{role}_column": name for role, name in names.items()}
    write(folder, "test.csv", "q,gold,key,pic\nq?,a,1,\n")
    first, second = load(folder, **options).train
    assert (first.id, first.answer) == ("1/7", "3")
    assert (second.id, second.image.key) == (
        "2/8",
        ImageFile("images/b.png", folder).key,
    )


def test_a_choice_task_by_name_or_number(folder):
    for name in ("data", "test"):
        write(folder, f"{name}.csv", "image,text,answer\nimages/a.png,,dog\n,a text,1\n,more,0\n")
    options = {"task": "choice", "classes": ["dog", "cat"], "metric": "auc"}
    dataset = load(folder, **options)
    assert [(s.label, s.answer) for s in dataset.train] == [(0, "dog"), (1, "cat"), (0, "dog")]
    assert dataset.task.metric == "auc"
    assert split(dataset).partition["name"] == "dirichlet"
    digits = load(folder, task="choice", classes=["dog", "1", "0"])
    assert [s.label for s in digits.train] == [0, 1, 2]  # a class of that name comes first


@pytest.mark.parametrize("options", ["red|blue | 3", '["red", "blue", 3]'])
@pytest.mark.parametrize("answer", ["blue", "B", "(b)"])
def test_a_row_can_bring_its_own_options(folder, options, answer):
    row = {"question": "which?", "answer": answer, "options": options}
    write(
        folder, "data.jsonl", json.dumps(row) + "\n" + json.dumps({"question": "?", "answer": "x"})
    )
    first, second = load(folder).train
    turn = "which?\nOptions:\n(A) red\n(B) blue\n(C) 3\nAnswer with the letter of the option."
    assert render(first, load(folder).task).turns == ((turn, "(B) blue"),)
    assert (second.question, second.answer) == ("?", "x")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_line_ends_and_quoted_cells(folder, end, mark):
    text = 'question,answer\n"two\nlines, ""quoted""","é,\u2028 \U0001f600"\n\nplain,x\n'
    write(folder, "data.csv", mark + text.replace("\n", end).encode())
    first, second = load(folder).train
    assert first.question == f'two{end}lines, "quoted"'
    assert first.answer == "é,\u2028 \U0001f600"
    assert second.question == "plain"
    lines = ['{"question": "q?", "answer": "a\u2028b"}', '{"question": "r?", "answer": "c"}']
    write(folder, "data.csv", "question,answer\nq?,a\n")
    if end != "\r":
        write(folder, "more.jsonl", mark + end.join(lines).encode())
        assert [s.answer for s in load(folder).parties["more"]] == ["a\u2028b", "c"]


def test_other_separators(folder):
    write(folder, "data.csv", "question;answer\nq, or what?;a\n")
    write(folder, "test.csv", "question;answer\nq?;a\n")
    assert load(folder, separator=";").train[0].question == "q, or what?"
    assert "separated by ';'? Set data.separator" in refusal(folder, "question;answer\nq;a\n")


def test_a_row_without_id_is_named_by_its_content(folder):
    rows = ["q1?,a", "q2?,a", "q1?,b", "q1?,a"]
    ids = []
    for _ in range(5):
        random.Random(len(ids)).shuffle(rows)
        write(folder, "data.csv", "question,answer\n" + "\n".join(rows))
        found = load(folder).train
        ids.append({(s.id, s.question, s.answer) for s in found})
        assert len({s.id for s in found}) == 4
    write(folder, "data.csv", "answer,question\na,q1?\na,q2?\nb,q1?\na,q1?\n")
    ids.append({(s.id, s.question, s.answer) for s in load(folder).train})
    assert all(found == ids[0] for found in ids)


@settings(deadline=None, max_examples=10)
@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_and_columns_does_not_matter(tmp_path_factory, rng):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"id": str(i), "text": f"t{i}", "answer": "ab"[i % 2]} for i in range(20)]
    options = {"task": "choice", "classes": ["a", "b"], "scenario": "missing"}
    hashes = set()
    for shuffled in (False, True):
        if shuffled:
            rng.shuffle(rows)
            rows = [dict(rng.sample(list(row.items()), 3)) for row in rows]
        text = "\n".join(map(json.dumps, rows))
        write(folder, "data.jsonl", text)
        write(folder, "test.jsonl", text)
        dataset = load(folder, task="choice", classes=options["classes"])
        hashes.add(split(dataset, scenario="missing").sha256)
    assert len(hashes) == 1


def test_the_order_of_files_does_not_matter(folder, monkeypatch):
    for name in "cadb":
        write(folder, f"{name}.csv", f"question,answer\nq{name}?,a\n")
    there = split(load(folder)).sha256
    pool = [s.question for s in load(folder, parties="none").train]
    assert pool == ["qa?", "qb?", "qc?", "qd?"]
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, p: reversed(list(listed(self, p))))
    assert split(load(folder)).sha256 == there
    assert [s.question for s in load(folder, parties="none").train] == pool


def test_ready_tables_need_no_number_of_clients(folder):
    config = write(folder, "x.yaml", "data: {name: table}\npartition: {clients: 1}\n")
    assert load_config(config, [f"data.root={folder}", "data.answer_column=label"])


# --- what is refused -------------------------------------------------------------------------

GOOD = "1,,,q?,a,north,train\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (",,,q?,a,,train", "its party is empty"),
        (",,,q?,a,a/b,train", "a party cannot be called 'a/b'"),
        (",,,q?,a,test,train", "a party cannot be called 'test'"),
        (",,,q?,a,..,train", "a party cannot be called '..'"),
        (",,,q?,,north,train", "its answer is empty"),
        (",,,  ,a,north,train", "its question is empty"),
        (",,,q?,a,north,", "its split is empty"),
        (
            ",,,q?,a,north,tets",
            "unknown split 'tets': choose dev, test or train (did you mean 'test'?)",
        ),
        ("1,,,r?,b,north,train", "its id is that of FILE, line 2: ids must be unique"),
        (",images/c.png,,q?,a,north,train", "image 'images/c.png' does not exist"),
        (",../a.png,,q?,a,north,train", "must not contain .."),
        (",/etc/hostname,,q?,a,north,train", "lies outside the data folder"),
        (",data.csv,,q?,a,north,train", "is not an image"),
        (",,<image> x,q?,a,north,train", "text holds <image>"),
        (",,,q?,a,north", "has 6 cells, but the header has 7"),
        (",,,q?,a,north,train,", "has 8 cells, but the header has 7"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(folder, row, message):
    """After a cell of three lines: the record begins on line 6."""
    text = HEAD + GOOD + '2,,,"q\n\n?",a,north,train\n' + row + "\n"
    found = refusal(folder, text)
    file = folder / "data.csv"
    assert found == f"1 problem in the data:\n  {file}, line 6: " + found.split("line 6: ", 1)[1]
    assert message.replace("FILE", str(file)) in found


def test_an_open_quote_is_named_by_the_line_on_which_it_opens(folder):
    found = refusal(folder, 'question,answer\nq?,a\n"open,b\nr?,c\n')
    assert "data.csv, line 3: the record that begins here is not CSV" in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q?", "answer": "a"', "line 2: not JSON at column"),
        ("[1]", "line 2: must be an object, not a list"),
        ("[" * 100_000, "line 2: JSON that cannot be read"),
        (
            '{"question": "q?", "answer": true}',
            "line 2: answer must be a text or a number, not true",
        ),
        (
            '{"question": "q?", "answer": ["a"]}',
            "line 2: answer must be a text or a number, not a list",
        ),
        ('{"question": "q?", "answer": "\\ud83d"}', "line 2: answer holds a broken character"),
        ('{"question": "q?", "answer": "a", "image": 3}', "line 2: image must be a path"),
        ('{"question": "q?", "answer": "a", "image": "\\ud83d"}', "line 2: image holds a broken"),
        ('{"question": "q?", "answer": "c", "options": "a|b"}', "'c' is none of its options: a, b"),
        ('{"question": "q?", "answer": "C", "options": "a|b"}', "'C' is none of its options"),
        ('{"question": "q?", "answer": "a", "options": "a"}', "give 2 to 26 different ones"),
        ('{"question": "q?", "answer": "a", "options": "a|a"}', "give 2 to 26 different ones"),
        ('{"question": "q?", "answer": "a", "options": "[1"}', "begin as a JSON list but are none"),
        (
            '{"question": "q?", "answer": "a", "options": {}}',
            "must be a list of texts, not an object",
        ),
    ],
)
def test_a_wrong_json_line_is_named(folder, line, message):
    good = '{"question": "q?", "answer": "a"}'
    found = refusal(folder, f"{good}\n{line}\n{good}\n", name="data.jsonl")
    assert found.startswith("1 problem in the data:")
    assert message in found


def test_all_problems_of_all_files_are_told_at_once(folder):
    write(folder, "a.csv", "question,answer\n,x\nq?,\n")
    write(folder, "b.csv", "question,answer\n" + ",x\n" * 30)
    found = refusal(folder, "x", name="test.csv")
    assert found.startswith("33 problems in the data:")
    assert "a.csv, line 2: its question is empty" in found
    assert "a.csv, line 3: its answer is empty" in found
    assert found.endswith("… and 13 more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"question,answer\nq?,a\nq?,caf\xe9\n",
            "line 3: byte 0xE9 is not UTF-8: save the file as UTF-8",
        ),
        ("question,answer\n".encode("utf-16"), "line 1: byte 0xFF is not UTF-8"),
        ("", "line 1: the file has no rows"),
        ("question,answer\n", "line 1: the file has no rows"),
        ("question,question\na,b\n", "line 1: two columns are called 'question'"),
        (
            "Question,answer\nq?,a\n",
            "column 'Question': rename it 'question' or set data.question_column",
        ),
        (
            "question,label\nq?,a\n",
            "no column 'answer': it has 'question', 'label'; set data.answer_column",
        ),
    ],
)
def test_a_wrong_file_is_named(folder, content, message):
    found = refusal(folder, content)
    assert str(folder / "data.csv") in found
    assert message in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_column": "label"}, "no column 'label' (data.answer_column): it has"),
        ({"parties": "column"}, "no column 'party' that says whose a row is"),
        ({"parties": "colunm"}, "unknown way of parties 'colunm'"),
        ({"separator": ";;"}, "separator is ';;': give one character"),
        ({"files": "*.json"}, "no training file"),
        ({"files": "/x"}, "is not a pattern within root"),
        (
            {"task": "choice", "classes": ["a", "b"]},
            "column 'question': task 'choice' asks every sample",
        ),
        ({"task": "choice"}, "needs 2 to 26 different names"),
        ({"root": ""}, "needs data.root"),
        ({"root": "nowhere"}, "does not exist"),
        ({"anser_column": "x"}, "unknown option of dataset 'table' 'anser_column'"),
    ],
)
def test_wrong_options_are_refused(folder, options, message):
    write(folder, "data.csv", "question,answer\nq?,a\n")
    with pytest.raises(UserError) as caught:
        load_dataset("table", **({"root": folder} | options))
    assert message in str(caught.value)


def test_wrong_choices_are_refused(folder):
    options = {"task": "choice", "classes": ["a", "b"]}
    write(folder, "test.csv", "text,answer\nt,a\n")
    found = refusal(folder, "text,answer\nt,c\nt,2\n,a\nt,²\n", **options)
    assert "line 2: unknown answer 'c': choose a or b" in found
    assert "line 3: unknown answer '2'" in found
    assert "line 4: has neither an image nor a text" in found
    assert "line 5: unknown answer '²'" in found
    assert "neither a column 'image' nor 'text'" in refusal(folder, "answer\na\n", **options)


def test_training_and_test_rows_are_needed(folder):
    (folder / "test.csv").unlink()
    assert "no test rows" in refusal(folder, "question,answer\nq?,a\n")
    assert "no training rows" in refusal(folder, HEAD + "1,,,q?,a,north,test\n")
    assert "differ in case only" in refusal(
        folder, HEAD + "1,,,q?,a,North,train\n1,,,q?,a,north,train\n1,,,q?,a,,test\n"
    )


WHOLE = {
    "data.csv": HEAD + '1,images/a.png,"a, text","q\n?",yes,north,train\n2,,,r?,no,south,train\n',
    "data.tsv": "question\tanswer\toptions\nq?\ta\ta|b\n",
    "data.jsonl": '{"id": 1, "question": "q?", "answer": 3}\n'
    '{"id": "2", "question": "é", "answer": "a"}',
}


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 2**32))
def test_a_mutated_file_loads_or_is_named(tmp_path_factory, name, seed):
    """Bytes cut out, doubled, changed: a dataset, or a `UserError` with file and line."""
    folder = tmp_path_factory.getbasetemp() / "mutated"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), "red").save(folder / "images" / "a.png")
    write(folder, "test.csv", "question,answer\nq?,a\n")
    rng, data = random.Random(seed), bytearray(WHOLE[name].encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        new = rng.choice(
            [b"", bytes([rng.randrange(256)]), b'"', b"\n", b",", data[at : at + 9] * 2]
        )
        data[at : at + rng.randint(0, 3)] = new
    for other in WHOLE:
        (folder / other).unlink(missing_ok=True)
    write(folder, name, bytes(data))
    try:
        message = ""
        split(load(folder), clients=1)
    except UserError as error:
        message = str(error)
    assert not message or str(folder / name) in message
    for line in message.splitlines()[1:]:
        assert ", line " in line or ": column" in line or "no column" in line


# --- saved Hugging Face datasets --------------------------------------------------------------
# tests/data/hf-saved was written by datasets 5.2.0: a DatasetDict of train (4 rows in 2 files),
# validation and test, with Image, ClassLabel (cat, dog) and strings.


def hf(root=SAVED, **options):
    return load_dataset("hf-datasets", root=root, **({"task": "choice"} | options))


@pytest.fixture
def saved(tmp_path):
    shutil.copytree(SAVED, tmp_path / "saved")
    return tmp_path / "saved"


def save(folder, rows, features=None):
    """What `save_to_disk` leaves of a single dataset, by pyarrow."""
    table = pa.Table.from_pylist(rows)
    folder.mkdir(exist_ok=True)
    with pa.ipc.new_stream(str(folder / "data.arrow"), table.schema) as out:
        out.write_table(table)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (folder / "dataset_info.json").write_text(json.dumps({"features": features or {}}))
    return folder


def test_a_saved_folder_is_read():
    dataset = hf()
    assert dataset.task.classes == ("cat", "dog")
    assert {n: [s.id for s in p] for n, p in dataset.parties.items()} == {
        "north": ["north/a", "north/c"],
        "south": ["south/b", "south/d"],
    }
    a, c, b, d = dataset.train
    assert [s.label for s in (a, b, c, d)] == [0, 1, 1, 0]
    assert [s.text for s in (a, b, c, d)] == ["one", "two", None, "four"]
    assert b.image is None
    pixels = [s.image.open().getpixel((0, 0)) for s in (a, c, d)]
    assert pixels == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert [s.id for s in dataset.test] == ["test/e", "test/f"]
    assert a.image.key == dataset.test[0].image.key != c.image.key
    assert [s.label for s in hf(classes=["dog", "cat"]).test] == [0, 1]


def test_an_image_is_the_one_of_its_row_when_it_is_opened_late(tmp_path):
    """No closure over the last row of the loop."""
    import io

    rows = []
    for colour in ("red", "blue", "lime"):
        out = io.BytesIO()
        Image.new("RGB", (2, 2), colour).save(out, "PNG")
        rows.append({"image": out.getvalue(), "question": colour, "answer": "a", "split": "train"})
    rows.append({"image": None, "question": "q", "answer": "a", "split": "test"})
    dataset = hf(save(tmp_path / "x", rows), task="open")
    found = {s.question: s.image.open().getpixel((0, 0)) for s in reversed(dataset.train)}
    assert found == {"red": (255, 0, 0), "blue": (0, 0, 255), "lime": (0, 255, 0)}


def test_paths_in_a_saved_folder_must_lie_inside(tmp_path):
    def row(path, split):
        return {
            "image": {"bytes": None, "path": path},
            "question": "q",
            "answer": "a",
            "split": split,
        }

    root = save(tmp_path / "x", [row("a.png", "train"), row(None, "test")])
    with pytest.raises(UserError, match=r"row 0: image 'a\.png' does not exist"):
        hf(root, task="open")
    Image.new("RGB", (2, 2), "red").save(root / "a.png")
    assert hf(root, task="open").train[0].image.open().getpixel((0, 0)) == (255, 0, 0)
    save(root, [row("../a.png", "train"), row(None, "test")])
    with pytest.raises(UserError, match=r"must not contain \.\."):
        hf(root, task="open")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_dict.json", b"{}", "has no list of splits"),
        ("dataset_dict.json", b'{"splits": ["../x"]}', "a split cannot be called '../x'"),
        ("dataset_dict.json", b'{"splits": ["dev"]}', "unknown split 'dev'"),
        ("dataset_dict.json", b"\xff", "cannot be read"),
        ("dataset_dict.json", b'{"splits": ["gone"]}', "dataset_info.json is not there"),
        ("train/state.json", None, "state.json is not there"),
        ("train/state.json", b"[]", "must hold an object, not a list"),
        ("train/state.json", b'{"_data_files": [{"filename": "../x"}]}', "names no data files"),
        ("train/data-00000-of-00002.arrow", b"nonsense", "cannot be read as Arrow"),
        ("train/data-00000-of-00002.arrow", None, "cannot be read as Arrow"),
        ("train/data-00000-of-00002.arrow", b"", "cannot be read as Arrow"),
    ],
)
def test_a_damaged_folder_is_named(saved, name, content, message):
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        hf(saved)
    assert message in str(caught.value)
    assert str(saved) in str(caught.value) or "split 'dev'" in message


def test_a_mutated_arrow_file_loads_or_is_named(saved):
    """Offsets that point beyond the file must not end the process either."""
    file = saved / "train" / "data-00000-of-00002.arrow"
    whole = file.read_bytes()
    refused = 0
    for at in range(0, len(whole), 8):
        file.write_bytes(whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :])
        try:
            hf(saved, verify=False)
        except UserError as error:
            refused += 1
            named = str(error)
            assert str(saved) in named
    assert refused > 20


def test_broken_bytes_are_named_by_row(tmp_path):
    rows = [
        {"image": {"bytes": b"nonsense", "path": None}, "question": "q", "answer": "a", "split": s}
        for s in ("train", "test")
    ]
    root = save(tmp_path / "x", rows)
    with pytest.raises(UserError, match=r"^2 problems(.|\n)*row 0: image .*is not an image"):
        hf(root, task="open")
    late = hf(root, task="open", verify=False)
    with pytest.raises(UserError, match="row 0 is not an image"):
        late.train[0].image.open()


def test_every_role_has_an_option():
    from fedmllm.data import DATASETS

    for name in ("table", "hf-datasets"):
        assert {f"{role}_column" for role in ROLES} <= set(DATASETS[name].options)
