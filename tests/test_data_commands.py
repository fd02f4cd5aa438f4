"""`fedmllm data info` and `fedmllm data check`, and a run from the owners' files to the report."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import owner_files as owners
import pytest
from PIL import Image

from fedmllm.cli import main
from fedmllm.config import load_config
from fedmllm.data import DATASETS
from fedmllm.data.check import check, counts
from fedmllm.data.sample import Sample
from fedmllm.errors import problem_list

ROOT = Path(__file__).resolve().parent.parent
# what the small trees hold, in place of the published counts
HOLDS = {
    "hateful-memes": {"train": 40, "dev_seen": 4, "test_seen": 6, "test_unseen": 2000},
    "crisismmd": {"train": 69, "dev": 8, "test": 16, "images": 93},
    "vqa-rad": {"train": 31, "test": 4, "images": 4},
    "slake": {"train rows": 30, "test rows": 6, "test/en": 3, "test/zh": 3, "images": 5},
    "medalpaca-flashcards": {"train rows": 62},
    "medical-vqa": {"vqa-rad-train": 31, "slake-test/slake/en": 3, "flashcards rows": 62},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run `fedmllm words…` in this process; (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmllm", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "120")
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def small(monkeypatch):
    """Let the small trees' counts stand for the published ones."""
    for name, published in HOLDS.items():
        files = replace(DATASETS[name].files, published=published)
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], files=files))


# -- info --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", owners.NAMES)
def test_info_says_where_what_and_how(cli, name):
    code, text, error = cli("data", "info", name)
    assert (code, error) == (0, "")
    spec = DATASETS[name]
    for needed in (spec.source, spec.licence, spec.citation, spec.files.unpack, "data.root="):
        assert needed in text
    for count in spec.files.published.values():
        assert f"{count:,}" in text
    assert spec.files.counted_by in text


@pytest.mark.parametrize("name", ["memes", "crisis", "medical", "conversations", "easy-vqa"])
def test_info_of_other_datasets_is_short(cli, name):
    code, text, _ = cli("data", "info", name)
    assert code == 0
    assert DATASETS[name].source in text
    assert "unpack" not in text
    assert len(text.splitlines()) <= 6


def test_misuse_has_exit_code_two(cli, tmp_path):
    code, _, error = cli("data", "info", "hatefull-memes")
    assert code == 2
    assert "did you mean 'hateful-memes'?" in error
    assert cli("data", "check", "nothing", tmp_path)[0] == 2
    code, _, error = cli("data", "check", "memes", tmp_path)
    assert code == 2
    assert "has no files to check" in error
    code, _, error = cli("data", "check", "slake", tmp_path / "gone")
    assert code == 2
    assert "does not exist: check ROOT" in error
    assert cli("data", "check", "slake")[0] == 2
    assert "Traceback" not in error


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_letters_that_a_terminal_lacks_are_no_error(monkeypatch, small, tmp_path, encoding):
    """A name in bytes that are not UTF-8; authors' names in a terminal of seven bits."""
    root = owners.write("slake", tmp_path / "bad\udcffname")
    (root / "imgs" / "xmlab1" / "source.jpg").write_bytes(b"")
    for words in (["info", "medalpaca-flashcards"], ["check", "slake", root]):
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "argv", ["fedmllm", "data", *map(str, words)])
        with pytest.raises(SystemExit):
            main()
        out.flush()
        text = out.buffer.getvalue().decode(encoding)
        assert "L\\xf6ser" in text or "Löser" in text or "bad\\udcffname" in text


def test_output_for_machines_is_ascii(cli, small, tmp_path):
    root = owners.write("slake", tmp_path / "数据")
    code, text, _ = cli("data", "check", "slake", root, "--json")
    assert (code, text.isascii()) == (0, True)
    assert json.loads(text)["root"] == str(root)


def test_ls_shows_the_datasets(cli):
    text = cli("ls")[1]
    assert all(name in text for name in owners.NAMES)


# -- check -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", owners.NAMES)
def test_whole_files_pass(cli, small, tmp_path, name):
    code, text, _ = cli("data", "check", name, owners.write(name, tmp_path))
    assert code == 0, text
    assert "nothing is wrong" in text
    for what, count in HOLDS[name].items():
        rows = [line.split() for line in text.splitlines() if line.strip().startswith(f"{what} ")]
        found = ["not", "there"] if what == "test_unseen" else [f"{count:,}"]
        assert [*what.split(), *found, f"{count:,}"] in rows


@pytest.mark.parametrize("name", owners.NAMES)
def test_counts_are_held_against_the_published_ones(cli, tmp_path, name):
    """The small trees are not whole by the owners' counts."""
    code, text, _ = cli("data", "check", name, owners.write(name, tmp_path), "--json")
    assert code == 1
    found = json.loads(text)
    problems = [problem["what"] for problem in found["problems"]]
    assert problems
    assert all(what.endswith(" published") for what in problems)
    expected = {n: c for n, c in DATASETS[name].files.published.items() if "unseen" not in n}
    assert len(problems) == len(expected)
    assert found["published"] == DATASETS[name].files.published
    assert found["ok"] is False


def test_counts_by_split_class_modality_and_language(tmp_path):
    root = owners.write("slake", tmp_path)
    found = check("slake", DATASETS["slake"], root).counts
    assert found["test"] == found["test [image+text]"] == found["test rows"] == 6
    assert found["test/zh"] == found["test/zh/closed"] == 3
    assert (found["train rows"], found["train"]) == (30, 29)
    root = owners.write("crisismmd", tmp_path)
    found = check("crisismmd", DATASETS["crisismmd"], root).counts
    assert found["train/vehicle_damage"] == 9
    assert (found["train [image]"], found["train [image+text]"]) == (1, 68)  # a link and no more


def test_counts_worked_by_hand():
    samples = [
        Sample("a", "yes", question="q", kind="en/open"),
        Sample("b", "no", question="q", kind="en/closed"),
        Sample("c", "x", text="t", label=0),
    ]
    assert counts({"test": samples}) == {
        "test": 3,
        "test [text]": 3,
        "test/en": 2,
        "test/en/open": 1,
        "test/en/closed": 1,
        "test/x": 1,
    }


def test_broken_images_are_named_with_file_and_line(cli, small, tmp_path):
    root = owners.write("hateful-memes", tmp_path)
    (root / "img" / "00007.png").write_bytes(b"no picture")
    whole = (root / "img" / "00203.png").read_bytes()
    (root / "img" / "00203.png").write_bytes(whole[:-30])
    Image.new("RGB", (4, 4)).save(root / "img" / "unused.png")
    code, text, _ = cli("data", "check", "hateful-memes", root, "--json")
    assert code == 1
    found = json.loads(text)
    assert found["images_checked"] == 50
    places = {(Path(p["file"]).name, p["line"], p["what"].split()[1]) for p in found["problems"]}
    assert places == {
        ("train.jsonl", 8, str(root / "img" / "00007.png")),
        ("test_seen.jsonl", 4, str(root / "img" / "00203.png")),
    }
    assert cli("data", "check", "hateful-memes", root, "--no-images")[0] == 0


def test_files_inside_a_zip_are_checked_in_place(cli, small, tmp_path):
    root = owners.write("hateful-memes", tmp_path / "data")
    archive = owners.zipped(root, tmp_path / "hm.zip")
    assert cli("data", "check", "hateful-memes", archive)[0] == 0
    (root / "img" / "00007.png").write_bytes(b"no picture")
    owners.zipped(root, archive)
    code, text, _ = cli("data", "check", "hateful-memes", archive, "--json")
    assert code == 1
    (problem,) = json.loads(text)["problems"]
    assert problem["line"] == 8
    assert problem["file"] == str(archive / "hateful_memes" / "train.jsonl")
    assert str(archive / "hateful_memes" / "img" / "00007.png") in problem["what"]


def test_a_plan_counts_pictures_in_a_zip_without_reading_them(cli, tmp_path, monkeypatch):
    root = owners.write("vqa-rad", tmp_path / "data")
    archive = owners.zipped(root, tmp_path / "rad.zip")
    monkeypatch.setattr("fedmllm.data.images.member_bytes", lambda *member: 1 / 0)
    config = ROOT / "experiments" / "vqa-rad.yaml"
    code, text, error = cli("plan", config, f"data.root={archive}", "--json")
    assert (code, error) == (0, "")
    assert "the data cannot be read" not in text


def test_a_broken_image_of_many_questions_is_named_once_at_the_first(cli, small, tmp_path):
    root = owners.write("slake", tmp_path)
    (root / "imgs" / "xmlab1" / "source.jpg").write_bytes(b"")
    code, text, _ = cli("data", "check", "slake", root, "--json")
    assert code == 1
    (problem,) = json.loads(text)["problems"]
    assert Path(problem["file"]).name == "train.json"
    assert (problem["line"], problem["item"]) == (1, 2)


def test_all_problems_are_shown_to_machines_and_twenty_to_people(cli, small, tmp_path):
    root = owners.write("slake", tmp_path)
    rows = json.loads((root / "train.json").read_text("utf-8"))
    for row in rows:
        row["q_lang"] = "fr"
    (root / "train.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    code, text, _ = cli("data", "check", "slake", root)
    assert code == 1
    assert "problems in the data" in text
    assert "more" in text.splitlines()[-1]
    assert text.count("unknown q_lang") == 20
    problems = json.loads(cli("data", "check", "slake", root, "--json")[1])["problems"]
    assert [p["item"] for p in problems if "q_lang" in p["what"]] == [
        i for i in range(1, 31) if i != 6
    ]


def test_absent_splits_and_absent_images(cli, small, tmp_path):
    root = owners.write("crisismmd", tmp_path)
    owners.table(root, "dev").unlink()
    code, text, _ = cli("data", "check", "crisismmd", root, "--json")
    assert code == 0  # dev is not needed
    assert any(note["what"].startswith("dev: no task_") for note in json.loads(text)["notes"])
    next(root.rglob("*_1.jpg")).unlink()
    found = json.loads(cli("data", "check", "crisismmd", root, "--json")[1])
    whats = [(p["line"], p["what"]) for p in found["problems"]]
    assert any(line == 67 and "_1.jpg does not exist" in what for line, what in whats)
    assert (None, "train: 68 found, 69 published") in whats
    owners.table(root, "test").unlink()
    found = json.loads(cli("data", "check", "crisismmd", root, "--json")[1])
    assert any(p["what"].startswith("test: no task_") for p in found["problems"])


def test_what_several_splits_lack_is_told_once(cli, small, tmp_path):
    root = owners.write("vqa-rad", tmp_path)
    shutil.rmtree(root / owners.RAD_IMAGES)
    found = json.loads(cli("data", "check", "vqa-rad", root, "--json")[1])
    (what,) = [problem["what"] for problem in found["problems"]]
    assert what.startswith("train, test: no folder VQA_RAD Image Folder")
    assert found["notes"] == []


def test_what_is_repeated_is_remarked(cli, small, tmp_path):
    """As in the real VQA-RAD: a training question asked twice, and one of the test's."""
    root = owners.write("vqa-rad", tmp_path)
    table = root / owners.RAD_TABLE
    rows = owners.rad_rows()
    rows[1] = {**rows[0], "qid": rows[1]["qid"], "question": "What is at 1?"}
    rows[2] = {**rows[32], "qid": rows[2]["qid"], "phrase_type": "freeform"}
    table.write_text(json.dumps([*rows, rows[5]]))
    code, text, _ = cli("data", "check", "vqa-rad", root, "--json")
    assert code == 0, text
    notes = {note["what"] for note in json.loads(text)["notes"]}
    assert notes == {
        "repeats item 6: left out",
        "asks what vqa-rad/1 of train asks, with its answer",
        "asks what vqa-rad/3 of train asks, with its answer",
    }
    rows[2] = rows[32]  # the same question in both splits by its id
    rows[2] = {**rows[2], "phrase_type": "para"}
    table.write_text(json.dumps(rows))
    code, text, _ = cli("data", "check", "vqa-rad", root)
    assert code == 1
    assert "of test is in train too" in text


def test_progress_counts_every_image(tmp_path):
    seen = []
    root = owners.write("vqa-rad", tmp_path)
    check("vqa-rad", DATASETS["vqa-rad"], root, progress=lambda *now: seen.append(now))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_problem_lists():
    assert problem_list(["a"]) == "1 problem in the data:\n  a"
    assert (
        problem_list(["a", "b", "c"], most=2) == "3 problems in the data:\n  a\n  b\n  … and 1 more"
    )


@pytest.mark.parametrize("name", owners.NAMES)
def test_a_ready_experiment_takes_each_setting(name):
    for setting in ("cross-i3t7", "hybrid-p0.6", "missing-b0.5"):
        config = load_config(ROOT / "experiments" / f"{name}.yaml", [f"setting={setting}"])
        assert config.scenario["name"] == setting.partition("-")[0]


# -- from the owners' files to the report ------------------------------------------------------


@pytest.mark.parametrize("name", owners.NAMES)
def test_a_run_from_the_owners_files_to_the_report(cli, tmp_path, name):
    """The ready experiment of each dataset, made small; three of them from an archive."""
    root = owners.write(name, tmp_path / "data")
    if name in ("hateful-memes", "vqa-rad"):
        root = owners.zipped(root, tmp_path / "download.zip")
    if name == "crisismmd":
        root = owners.owners_tar(tmp_path)
    out = tmp_path / "run"
    code, _, error = cli(
        "run",
        ROOT / "experiments" / f"{name}.yaml",
        f"data.root={root}",
        "training.rounds=1",
        "evaluation.every=0",
        "evaluation.conditions=[both, text_withheld]",
        "--out",
        out,
    )
    assert (code, error) == (0, "")
    result = json.loads((out / "result.json").read_text())
    metrics = result["metrics"]["both"]
    assert 0 <= metrics[result["task"]["metric"]] <= 1
    assert (out / "report.html").read_text().startswith("<!")
    if name == "medical-vqa":
        groups = {key.removeprefix("accuracy_") for key in metrics if "/" in key}
        assert groups == {
            *("vqa-rad/open", "vqa-rad/closed", "slake/en", "slake/zh"),
            *("slake/en/closed", "slake/zh/closed"),
        }
        assert {"accuracy_slake", "accuracy_vqa-rad", "accuracy_closed"} < set(metrics)
        held = result["manifest"]["clients"]
        assert sum(c["image"] + c["image_text"] > 0 for c in held) == 5
