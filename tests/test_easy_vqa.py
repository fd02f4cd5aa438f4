"""easy-VQA, read from the installed package (numbers counted in its files)."""

import sys
from collections import Counter

import easy_vqa
import pytest

from fedmllm.data import DATASETS, load_dataset
from fedmllm.errors import UserError
from fedmllm.manifest import build_manifest
from fedmllm.prompts import render


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("easy-vqa")


def test_sizes_and_kinds(dataset):
    assert (len(dataset.train), len(dataset.test)) == (38_575, 9_673)
    assert Counter(s.kind for s in dataset.train) == {"closed": 28_407, "open": 10_168}
    assert Counter(s.kind for s in dataset.test) == {"closed": 7_136, "open": 2_537}
    assert len({s.id for s in (*dataset.train, *dataset.test)}) == 38_575 + 9_673


def test_the_first_question(dataset):
    sample = dataset.train[0]
    assert (sample.id, sample.question) == ("train-00000", "what is the blue shape?")
    assert (sample.answer, sample.kind, sample.text) == ("rectangle", "open", None)
    assert sample.image.open().size == (64, 64)
    assert dataset.test[0].image.key != sample.image.key


def test_labels_are_the_thirteen_answers(dataset):
    names = {s.label: s.answer for s in dataset.train}
    assert [names[i] for i in range(13)] == easy_vqa.get_answers()
    assert all(names[s.label] == s.answer for s in dataset.test)


def test_questions_stay_open_whatever_the_label(dataset):
    prompted = render(dataset.train[0], dataset.task)
    assert prompted.turns == (("<image>\nwhat is the blue shape?", "rectangle"),)
    assert prompted.options == ()
    assert (dataset.task.kind, dataset.task.metric) == ("open", "accuracy")


def test_subsets_are_random_the_same_for_all_and_nested(dataset):
    small, larger = (load_dataset("easy-vqa", max_train=n, max_test=5) for n in (100, 300))
    assert (len(small.train), len(small.test)) == (100, 5)
    ids, more = ({s.id for s in d.train} for d in (small, larger))
    assert ids < more < {s.id for s in dataset.train}
    assert [s.id for s in small.train][:3] == ["train-00283", "train-00743", "train-00840"]
    assert 10_000 < sum(int(name[6:]) for name in ids) / 100 < 28_000
    assert small.train == [s for s in dataset.train if s.id in ids]
    assert len(load_dataset("easy-vqa", max_test=10**9).test) == 9_673


def test_the_labels_allow_a_skewed_split(dataset):
    manifest = build_manifest("easy-vqa", dataset, clients=10, alpha=0.5, seed=0)
    assert manifest.partition["name"] == "dirichlet"
    assert len(manifest.classes) == 13


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
@pytest.mark.parametrize("option", ["max_train", "max_test"])
def test_wrong_maxima_are_refused(option, value):
    with pytest.raises(UserError, match=f"{option} is .*: give a number of questions"):
        load_dataset("easy-vqa", **{option: value})


def test_a_package_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[easy-vqa\]'"):
        load_dataset("easy-vqa")


def test_unknown_names_and_options():
    with pytest.raises(UserError, match=r"unknown dataset 'easy_vqa'.*did you mean 'easy-vqa'"):
        load_dataset("easy_vqa")
    with pytest.raises(UserError, match="unknown option of dataset 'easy-vqa' 'max_tran'"):
        load_dataset("easy-vqa", max_tran=3)


def test_every_entry_says_what_it_is():
    for spec in DATASETS.values():
        assert spec.summary
        assert spec.source
        assert spec.licence


def test_no_torch_is_imported_by_the_data_and_split_layers():
    import subprocess

    code = "import sys, fedmllm.data, fedmllm.manifest, fedmllm.metrics, fedmllm.prompts\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
