"""A user's own files: what is read, and what is refused with file, item and reason."""

import json

import pytest
from PIL import Image

from fedmllm.data import load_dataset
from fedmllm.data.conversations import MARKER
from fedmllm.errors import UserError
from fedmllm.manifest import build_manifest, client_samples
from fedmllm.prompts import IMAGE, render


def exchange(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def item(*contents, **more):
    return {"conversations": exchange(*(contents or ("q?", "a"))), **more}


@pytest.fixture
def folder(tmp_path):
    """Two parties and a test file, one image."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2), "red").save(tmp_path / "images" / "a.png")
    write(tmp_path, "parties/north.json", [item()])
    write(tmp_path, "parties/east.json", [item()])
    write(tmp_path, "test.json", [item()])
    return tmp_path


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def load(folder, **options):
    return load_dataset("conversations", root=folder, **options)


def north(folder, *items, **options):
    """The samples of a party that holds these items."""
    write(folder, "parties/north.json", list(items))
    return load(folder, **options).parties["north"]


def refusal(folder, *items, **options):
    with pytest.raises(UserError) as caught:
        north(folder, *items, **options)
    return str(caught.value)


def test_parties_and_test_are_read(folder):
    dataset = load(folder)
    assert list(dataset.parties) == ["east", "north"]
    assert [s.id for s in dataset.train] == ["east/1", "north/1"]
    assert [s.id for s in dataset.test] == ["test/1"]
    assert (dataset.task.kind, dataset.task.metric) == ("open", "accuracy")


def test_an_item_becomes_a_sample(folder):
    given = item(f"{MARKER}\nIs it broken?", "no", id=17, image="images/a.png", source="ignored")
    (sample,) = north(folder, given)
    assert (sample.id, sample.question, sample.answer) == ("north/17", "Is it broken?", "no")
    assert sample.text is None
    assert sample.label is None
    assert sample.image.open().getpixel((0, 0)) == (255, 0, 0)


def test_the_marker_is_the_prompts(folder):
    assert MARKER == IMAGE
    given = item(f"{MARKER}\nIs it broken?", "no", image="images/a.png")
    (sample,) = north(folder, given)
    assert render(sample, load(folder).task).turns == (("<image>\nIs it broken?", "no"),)


@pytest.mark.parametrize("start", ["", MARKER, f"{MARKER}\n", f"{MARKER}\r\n", f" {MARKER} \n\n"])
def test_the_marker_may_be_left_out_or_stand_on_the_line(folder, start):
    (sample,) = north(folder, item(f"{start}What?", "a", image="images/a.png"))
    assert sample.question == "What?"


def test_earlier_turns_are_kept(folder):
    given = item(f"{MARKER}\nq1", "a1", "q2", "a2", "q3", "a3", image="images/a.png")
    (sample,) = north(folder, given)
    assert sample.turns == (("q1", "a1"), ("q2", "a2"))
    assert (sample.question, sample.answer) == ("q3", "a3")


def test_ids_may_be_texts_numbers_or_left_out(folder):
    given = [item(id="x"), item(id=None), item(), item(id=0)]
    assert [s.id for s in north(folder, *given)] == ["north/x", "north/2", "north/3", "north/0"]


def test_a_choice_task(folder):
    for name in ("parties/east.json", "test.json"):
        write(folder, name, [item("t", "cat")])
    options = {"task": "choice", "classes": ["dog", "cat"]}
    first = item(f"{MARKER}\n", "dog", image="images/a.png")
    one, two = north(folder, first, item("a text", "cat"), **options)
    assert (one.label, one.text, one.answer) == (0, None, "dog")
    assert (two.label, two.text, two.image) == (1, "a text", None)
    task = load(folder, **options).task
    assert (task.kind, task.metric, task.classes) == ("choice", "macro_f1", ("dog", "cat"))
    assert render(two, task).turns[0][1] == "(B) cat"
    assert "Question: Which option is right based on the text?" in render(two, task).turns[0][0]
    assert load(folder, **options, metric="auc").task.metric == "auc"


def test_ready_parties_become_clients(folder):
    dataset = load(folder)
    manifest = build_manifest("mine", dataset, clients=10, scenario="aligned", seed=0)
    assert list(client_samples(manifest, dataset)) == ["east", "north"]


def test_the_test_file_is_no_party_though_the_pattern_matches(folder):
    write(folder, "a.json", [item()])
    assert list(load(folder, parties="*.json").parties) == ["a"]


def test_a_byte_order_mark_does_not_hurt(folder):
    write(folder, "parties/north.json", b"\xef\xbb\xbf" + json.dumps([item()]).encode())
    assert len(load(folder).parties["north"]) == 1


LOST_HALF = "\ud83d"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", "must be an object with conversations, not a text"),
        (None, "must be an object with conversations, not null"),
        ({}, "conversations must be a list of turns"),
        ({"conversations": []}, "conversations must be a list of turns"),
        ({"conversations": {"role": "user"}}, "conversations must be a list of turns"),
        (item("q?"), "must end with an assistant turn"),
        (item("q?", "a", "more?"), "must end with an assistant turn"),
        ({"conversations": ["q", "a"]}, "turn 1 must be an object with texts 'role' and 'content'"),
        ({"conversations": [{"from": "human", "value": "q"}] * 2}, "turn 1 must be an object"),
        (item("q?", 3), "turn 2 must be an object with texts"),
        (item(None, "a"), "turn 1 must be an object with texts"),
        ({"conversations": exchange("q", "a")[::-1]}, "turn 1 is the assistant's"),
        ({"conversations": exchange("q", "a")[:1] * 2}, "turn 2 is the user's"),
        (
            {"conversations": [{"role": "system", "content": "x"}, *exchange("q")]},
            "turn 1: unknown role 'system': choose assistant or user",
        ),
        (item("q?", " "), "turn 2, the assistant's, is empty"),
        (item("  ", "a"), "a user turn is empty"),
        (item(f"{MARKER}\n", "a", image="images/a.png"), "a user turn is empty"),
        (item(f"{MARKER}\nq?", "a"), "begins with <image> but has no image"),
        (item(f"{MARKER}\nq?", "a", image=None), "begins with <image> but has no image"),
        (item(f"q? {MARKER}", "a", image="images/a.png"), "<image> may stand once, at the start"),
        (item(f"{MARKER}{MARKER}q?", "a", image="images/a.png"), "<image> may stand once"),
        (item("q", "a", f"{MARKER}q", "a", image="images/a.png"), "<image> may stand once"),
        (item("q", f"{MARKER}", image="images/a.png"), "<image> may stand once"),
        (item(f"about {MARKER}", "a"), "<image> may stand once"),
        (item(id=True), "id must be a text or a whole number, not true or false"),
        (item(id=1.5), "id must be a text or a whole number, not a number"),
        (item(id=[]), "id must be a text or a whole number, not a list"),
        (item(id=""), "id must be a text or a whole number, not an empty text"),
        (item(id=LOST_HALF), "id holds a broken character"),
        (item(LOST_HALF, "a"), "turn 1 holds a broken character"),
        (item("q", f"a{LOST_HALF}"), "turn 2 holds a broken character"),
        (item(image=3), "image must be a path or null, not a number"),
        (item(image=["images/a.png"]), "image must be a path or null, not a list"),
        (item(image=LOST_HALF), "image holds a broken character"),
        (item(image=""), "must not be empty"),
        (item(image="images/b.png"), "image 'images/b.png' does not exist"),
        (item(image="../a.png"), "must not contain .."),
        (item(image="/etc/hostname"), "lies outside the data folder"),
        (item(image="test.json"), "is not an image"),
        (item(image="images"), "does not exist in the data folder"),
    ],
)
def test_wrong_items_are_refused(folder, given, message):
    found = refusal(folder, item(), given)
    assert message in found
    assert "north.json, item 2: " in found
    assert found.startswith("1 problem in the data:\n")


def test_links_out_of_the_folder_are_refused(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    Image.new("RGB", (2, 2)).save(elsewhere)
    (folder / "images" / "link.png").symlink_to(elsewhere)
    assert "lies outside the data folder" in refusal(folder, item(image="images/link.png"))


def test_truncated_images_are_named_when_opened(folder):
    Image.effect_noise((64, 64), 50).save(folder / "images" / "b.png")
    whole = (folder / "images" / "b.png").read_bytes()
    (folder / "images" / "b.png").write_bytes(whole[: len(whole) // 2])
    (sample,) = north(folder, item(image="images/b.png"))
    with pytest.raises(UserError, match=r"b\.png cannot be read, it may be truncated"):
        sample.image.open()


def test_headers_need_not_be_verified(folder):
    write(folder, "images/b.png", "no picture")
    assert "is not an image" in refusal(folder, item(image="images/b.png"))
    (sample,) = north(folder, item(image="images/b.png"), verify=False)
    with pytest.raises(UserError, match="is not an image"):
        sample.image.open()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((1, 1), "item 2: its id is that of item 1: ids must be unique"),
        ((1, "1"), "item 2: its id is that of item 1"),
        ((2, None), "item 2: its id is that of item 1"),
    ],
)
def test_repeated_ids_are_refused(folder, ids, message):
    assert message in refusal(folder, *[item(id=given) for given in ids])


def test_the_same_id_in_two_files_is_fine(folder):
    write(folder, "parties/east.json", [item(id=1)])
    assert [s.id for s in north(folder, item(id=1))] == ["north/1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        (" \n", "the file is empty"),
        ("[]", "the list is empty"),
        ("{}", "must hold a JSON list of items, not an object"),
        ("3", "must hold a JSON list of items, not a number"),
        ('[\n {"id" 1}\n]', "not JSON at line 2, column 8"),
        ("[1", "not JSON at line 1, column 3"),
        ("[" * 100_000, "JSON that cannot be read"),
        ("[" + "1" * 5000 + "]", "JSON that cannot be read"),
        (b"\xff\xfe[]", "cannot be read as UTF-8 text"),
    ],
)
@pytest.mark.parametrize("name", ["parties/north.json", "test.json"])
def test_wrong_files_are_refused(folder, name, content, message):
    write(folder, name, content)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert f"{folder / name}: " in str(caught.value)
    assert message in str(caught.value)


def test_all_problems_of_all_files_are_told_at_once(folder):
    write(folder, "parties/east.json", "nothing")
    write(folder, "test.json", [item("q")])
    found = refusal(folder, 3, item(), item("q"))
    assert found.startswith("4 problems in the data:\n")
    for part in (
        "east.json: not JSON",
        "north.json, item 1: ",
        "north.json, item 3: ",
        "test.json",
    ):
        assert part in found
    assert "item 2" not in found


def test_a_long_list_of_problems_is_cut(folder):
    found = refusal(folder, *[3] * 50).splitlines()
    assert found[0] == "50 problems in the data:"
    assert len(found) == 1 + 20 + 1
    assert found[-1].strip() == "… and 30 more"
    assert "more" not in refusal(folder, *[3] * 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": ""}, "needs data.root"),
        ({"root": "/nowhere/at/all"}, "does not exist or is not a folder"),
        ({"parties": "none/*.json"}, "no party files"),
        ({"parties": "/abs/*.json"}, "is not a pattern within root"),
        ({"parties": ""}, "is not a pattern within root"),
        ({"test": "absent.json"}, "absent.json: the file does not exist"),
        ({"task": "opn"}, "unknown task 'opn': choose choice or open"),
        ({"metric": "auc"}, "unknown metric of task 'open' 'auc': choose accuracy"),
        ({"classes": ["a", "b"]}, "classes are given, but task is 'open'"),
        ({"task": "choice"}, "needs 2 to 26 different names"),
        ({"task": "choice", "classes": ["a"]}, "needs 2 to 26 different names"),
        ({"task": "choice", "classes": ["a", "a"]}, "needs 2 to 26 different names"),
        ({"task": "choice", "classes": ["a", ""]}, "needs 2 to 26 different names"),
        ({"task": "choice", "classes": [1, 2]}, "needs 2 to 26 different names"),
        ({"task": "choice", "classes": list("abc"), "metric": "auc"}, "'auc' is for two classes"),
        ({"task": "choice", "classes": ["x", "y"]}, "unknown answer 'a': choose x or y"),
        ({"task": "choice", "classes": ["a", "b"], "question": "{x}?"}, "may hold no braces"),
        ({"clases": ["a", "b"]}, "unknown option of dataset 'conversations' 'clases'"),
    ],
)
def test_wrong_options_are_refused(folder, options, message):
    with pytest.raises(UserError) as caught:
        load_dataset("conversations", **({"root": folder} | options))
    assert message in str(caught.value)


def test_a_choice_item_needs_one_exchange_and_something_to_go_by(folder):
    options = {"task": "choice", "classes": ["a", "b"]}
    assert "has 2 exchanges" in refusal(folder, item("q", "a", "q", "b"), **options)
    assert "neither an image nor a text" in refusal(folder, item("", "a"), **options)


def test_an_empty_choice_item_says_what_was_withheld(folder):
    options = {"task": "choice", "classes": ["a", "b"]}
    for name in ("parties/east.json", "test.json"):
        write(folder, name, [item("t", "a")])
    (sample,) = north(folder, item("", "b", withheld=["image", "text"]), **options)
    assert (sample.image, sample.text, sample.label) == (None, None, 1)
    assert "neither an image" in refusal(folder, item("", "a", withheld=[]), **options)


@pytest.mark.parametrize(
    ("turn", "text", "expected"),
    [
        ("<image>\nthe text\nthe question?", "the text", ("the text", "the question?")),
        ("two\nlines\nq?", "two\nlines", ("two\nlines", "q?")),
        ("the text\nq?", "another", (None, "the text\nq?")),
        ("the text", "the text", (None, "the text")),
        ("the texts\nq?", "the text", (None, "the texts\nq?")),
        ("q?", "", (None, "q?")),
        ("q?", 3, (None, "q?")),
    ],
)
def test_the_text_before_a_question_can_be_told_apart(folder, turn, text, expected):
    (sample,) = north(folder, item(turn, "a", text=text, image="images/a.png"))
    assert (sample.text, sample.question) == expected


@pytest.mark.parametrize(("kind", "expected"), [("closed", "closed"), (3, ""), ("all", "")])
def test_the_kind_of_a_question(folder, kind, expected):
    (sample,) = north(folder, item(kind=kind))
    assert sample.kind == expected


def test_two_files_of_one_name_are_refused(folder):
    write(folder, "other/north.json", [item()])
    with pytest.raises(UserError, match="two party files are called 'north'"):
        load(folder, parties="*/*.json")


def test_a_party_cannot_be_called_test(folder):
    write(folder, "parties/test.json", [item()])
    with pytest.raises(UserError, match="a party cannot be called 'test'"):
        load(folder)
