"""The embedded memes, and the same with the labels exchanged."""

from collections import Counter

import pytest

from fedmllm.data import load_dataset

SIZE = {"train": 80, "test": 40, "wordings": 2}


@pytest.fixture(params=["memes", "memes-swapped"])
def data(request):
    return load_dataset(name=request.param, **SIZE)


def test_each_text_and_each_picture_has_either_label_as_often(data) -> None:
    """In a group of four a text stands once hateful and once not, and so does a picture."""
    for samples in (data.train, data.test):
        for start in range(0, len(samples), 4):
            group = samples[start : start + 4]
            assert len({sample.text for sample in group}) == 2
            assert len({sample.image.key for sample in group}) == 2
            for value in (lambda s: s.text, lambda s: s.image.key):
                found = Counter((value(sample), sample.label) for sample in group)
                assert set(found.values()) == {1}
                assert len(found) == 4


def test_a_meme_is_hateful_where_the_picture_shows_what_the_text_excludes() -> None:
    """Read off text and scene: ban or hate of what is there, or praise of what is not."""
    data = load_dataset(name="memes", **SIZE)
    for sample in [*data.train, *data.test]:
        shown = sample.image.key.split("kind='")[1].split("'")[0]
        colour = sample.image.key.split("colour='")[1].split("'")[0]
        about = f"{colour} {shown}" in sample.text
        only = sample.text.startswith("only")
        assert sample.label == int(about != only)
        assert sample.answer == ("not-hateful", "hateful")[sample.label]


def test_exchanged_labels_are_all_that_differs() -> None:
    """So each modality alone, with its labels, is the same in both worlds."""
    plain, swapped = (load_dataset(name=name, **SIZE) for name in ("memes", "memes-swapped"))
    assert plain.task == swapped.task
    for one, other in zip(
        [*plain.train, *plain.test], [*swapped.train, *swapped.test], strict=True
    ):
        assert (one.id, one.text, one.image.key) == (other.id, other.text, other.image.key)
        assert one.label == 1 - other.label
        assert one.answer != other.answer
    for value in (lambda s: s.text, lambda s: s.image.key):
        pairs = [Counter((value(s), s.label) for s in data.train) for data in (plain, swapped)]
        assert pairs[0] == pairs[1]
