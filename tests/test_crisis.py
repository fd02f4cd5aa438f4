"""The embedded crisis task: what its two modalities tell of the class."""

from collections import defaultdict

import pytest

from fedmllm.data import load_dataset
from fedmllm.data.crisis import CLASSES, TEXTS
from fedmllm.errors import UserError

MATTER = {wording: matter for matter, wordings in TEXTS.items() for wording in wordings}


def thing(sample):
    """What the picture shows first: the cue."""
    return sample.image.key.split("kind='")[1].split("'")[0]


@pytest.mark.parametrize("classes", [4, 8])
def test_two_cues_name_the_class_and_either_alone_leaves_two(classes):
    data = load_dataset(name="crisis", train=320, test=80, noise=0.0, classes=classes)
    assert data.task.classes == CLASSES[:classes]
    by_thing, by_matter, by_both = (defaultdict(set) for _ in range(3))
    for sample in [*data.train, *data.test]:
        assert sample.answer == CLASSES[sample.label]
        by_thing[thing(sample)].add(sample.label)
        by_matter[MATTER[sample.text]].add(sample.label)
        by_both[thing(sample), MATTER[sample.text]].add(sample.label)
    assert len(by_both) == classes
    assert all(len(found) == 1 for found in by_both.values())
    for alone in (by_thing, by_matter):
        assert len(alone) == classes // 2
        assert all(len(found) == 2 for found in alone.values())


def test_classes_are_balanced_and_noise_stays_among_their_cues():
    data = load_dataset(name="crisis", train=400, test=80, noise=0.5, classes=4)
    assert [sum(s.label == k for s in data.train) for k in range(4)] == [100] * 4
    assert {thing(s) for s in data.train} == {"person", "house"}
    assert {MATTER[s.text] for s in data.train} == {"search", "damage"}
    odd = sum(MATTER[s.text] != ("damage" if s.label < 2 else "search") for s in data.train)
    assert 60 < odd < 140  # half of them draw anew, and half of these draw the other one


@pytest.mark.parametrize("options", [{"classes": 5}, {"classes": 4, "train": 3}, {"noise": 2}])
def test_what_cannot_be_drawn_is_refused(options):
    with pytest.raises(UserError, match=r"data\.\w+: "):
        load_dataset(name="crisis", **options)
