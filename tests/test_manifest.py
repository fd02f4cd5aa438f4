"""Manifests: complete, pinned, readable, tamper-evident, blind to the order of the data."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedmllm.data.dataset import Dataset
from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.manifest import (
    COMBINATIONS,
    build_manifest,
    client_samples,
    from_json,
    holdings,
    load,
    save,
    to_json,
)
from fedmllm.scenarios import SETTINGS

CHOICE = Task("toy", "choice", "auc", ("no", "yes"), "Is it{modality}?")
OPEN = Task("toy", "open", "accuracy")


def picture(name):
    return MemoryImage(name, lambda: Image.new("RGB", (2, 2)))


def memes(count=60):
    """Two classes, image and text."""
    rows = [
        Sample(f"m{i}", CHOICE.classes[i % 2], text=f"t{i}", image=picture(f"{i}"), label=i % 2)
        for i in range(count)
    ]
    return Dataset(CHOICE, rows, rows[:2])


def medical(questions=30, cards=20):
    """Questions about images, and flashcards without any."""
    train = [Sample(f"q{i}", "a", "q?", image=picture(f"{i}")) for i in range(questions)]
    flash = [Sample(f"f{i}", "a", "q?") for i in range(cards)]
    return Dataset(OPEN, train, train[:2], flashcards=flash)


def hospitals():
    """Three ready parties of 4, 3 and 1 open questions."""
    parties = {
        name: [Sample(f"{name}/{i}", "a", "q?", image=picture(f"{name}{i}")) for i in range(n)]
        for name, n in (("north", 4), ("east", 3), ("south", 1))
    }
    return Dataset(OPEN, [s for p in parties.values() for s in p], [], parties=parties)


def build(dataset, setting="aligned-a0.5", **changes):
    scenario, options, alpha = SETTINGS[setting]
    given = {"clients": 5, "alpha": alpha, "scenario": scenario, "scenario_options": options}
    return build_manifest("toy", dataset, **(given | {"seed": 0} | changes))


GOLDEN = {
    ("memes", "aligned-a5.0"): "28575a8ff4feae8cffc14c2e9d1a56a255ee79e338fcba70d865358a99540813",
    ("memes", "missing-b0.3"): "5a020b9c9b250245f8b5647575046ff04f0a866a16ddb76c5c60fba1db78e7d1",
    ("memes", "cross-i3t7"): "0303fa5b9bf731c94f48935247f1b6aa7d62da946d04734d122eb0e4039a80f8",
    ("memes", "hybrid-p0.6"): "81161fbc172c5508196716878a25be8d96a6f669c1ba0d6b6687bc4de652426d",
    ("medical", "aligned-a0.5"): "5d16bbd65bf17a552fa6ba9fb7ff26198e30617efad41a96b95ed02fd9e10431",
    ("medical", "cross-i3t7"): "c89fcf2cc6c004de7ebb2b0332c9e373c446c2dc6bc024406acc06ed7eb4e7aa",
    ("medical", "hybrid-p0.6"): "ad35d1c96c4a1f9d253e2bb7f8b2cd91830b5b013ad141c65a055111637b7771",
    (
        "hospitals",
        "missing-b0.5",
    ): "a361a9a13f0cd23f5479e841a24ba8c7a93b51919b17624788bf42a29aa1c441",
}


@pytest.mark.parametrize("case", GOLDEN, ids="-".join)
def test_manifests_are_pinned(case):
    """The same on every machine. A change here makes every recorded run another one."""
    name, setting = case
    assert build(globals()[name](), setting).sha256 == GOLDEN[case]


@pytest.mark.parametrize("make", [memes, medical, hospitals])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_order_of_the_data_does_not_matter(make, setting):
    dataset = make()
    backwards = replace(
        dataset,
        train=dataset.train[::-1],
        flashcards=dataset.flashcards[::-1],
        parties={name: dataset.parties[name][::-1] for name in reversed(dataset.parties)},
    )
    assert build(dataset, setting) == build(backwards, setting)


@given(st.sampled_from(sorted(SETTINGS)), st.integers(1, 20), st.integers(0, 10_000))
def test_every_sample_has_one_client_and_no_client_is_empty(setting, clients, seed):
    manifest = build(memes(), setting, clients=clients, seed=seed)
    rows = [row[0] for client in manifest.clients for row in client.rows]
    assert sorted(rows) == sorted(f"m{i}" for i in range(60))
    assert all(client.rows for client in manifest.clients)
    assert len(manifest.clients) == clients


@given(st.sampled_from(sorted(SETTINGS)), st.integers(2, 12), st.integers(0, 10_000))
def test_medical_clients_share_the_pools_of_what_they_hold(setting, clients, seed):
    """Even shares; an unused pool is noted; nobody is empty."""
    manifest = build(medical(), setting, clients=clients, seed=seed)
    assert all(client.rows for client in manifest.clients)
    for prefix, count, word in (("q", 30, "train"), ("f", 20, "flashcards")):
        shares = [[r for r in c.rows if r[0].startswith(prefix)] for c in manifest.clients]
        held = [len(share) for share in shares if share]
        if any(f"samples of {word} are unused" in note for note in manifest.notes):
            assert not held
        else:
            assert sum(held) == count
            assert max(held) - min(held) <= 1


def test_aligned_medical_clients_hold_both_pools():
    for client in build(medical()).clients:
        assert {row[0][0] for row in client.rows} == {"q", "f"}
        assert len(client.rows) == 10


def test_cross_medical_clients_hold_one_pool():
    manifest = build(medical(), scenario="cross", scenario_options={"images": 2})
    pools = [{row[0][0] for row in client.rows} for client in manifest.clients]
    assert pools.count({"q"}) == 2
    assert pools.count({"f"}) == 3
    assert sorted(len(c.rows) for c in manifest.clients) == [6, 7, 7, 15, 15]


@pytest.mark.parametrize(
    ("images", "note"),
    [
        (0, "no client holds images: the 30 samples of train are unused"),
        (5, "no client holds text: the 20 samples of flashcards are unused"),
    ],
)
def test_an_unused_pool_is_noted(images, note):
    assert note in build(medical(), scenario="cross", scenario_options={"images": images}).notes


def test_a_modality_that_nobody_holds_is_noted():
    manifest = build(memes(), scenario="cross", scenario_options={"images": 0})
    assert manifest.notes == ("no client holds images",)
    assert all(row[1:] == (False, True) for client in manifest.clients for row in client.rows)
    assert build(memes()).notes == ()


def test_a_question_is_never_withheld():
    manifest = build(medical(), scenario="missing", scenario_options={"beta": 1.0})
    rows = [row for client in manifest.clients for row in client.rows]
    assert {row[0][0] for row in rows} == {"f", "q"}
    assert {row[1:] for row in rows} == {(False, True)}
    samples = client_samples(manifest, medical())
    assert all(sample.question == "q?" for party in samples.values() for sample in party)


def test_clients_see_what_the_manifest_says():
    dataset = memes()
    manifest = build(dataset, "missing-b0.5")
    samples = client_samples(manifest, dataset)
    assert list(samples) == ["client-00", "client-01", "client-02", "client-03", "client-04"]
    whole = {sample.id: sample for sample in dataset.train}
    for client in manifest.clients:
        for (name, image, text), sample in zip(client.rows, samples[client.id], strict=True):
            expected = whole[name].masked(keep_image=image, keep_text=text)
            assert sample == expected
            assert (sample.image is not None, sample.text is not None) == (image, text)


def test_ready_parties_keep_their_names_and_samples():
    manifest = build(hospitals(), "missing-b0.5", clients=99, partition="even")
    assert [client.id for client in manifest.clients] == ["east", "north", "south"]
    assert manifest.partition == {"name": "parties", "clients": 3}
    samples = client_samples(manifest, hospitals())
    assert {name: len(party) for name, party in samples.items()} == {
        "east": 3,
        "north": 4,
        "south": 1,
    }
    assert all(s.id.startswith(f"{name}/") for name, party in samples.items() for s in party)
    assert any(sample.image is None for party in samples.values() for sample in party)


def test_holdings_by_hand():
    """One client of two classes; the masks are counted from the samples that it sees."""
    dataset = memes(40)
    manifest = build(dataset, "missing-b0.5", clients=2)
    for summary in holdings(manifest):
        samples = client_samples(manifest, dataset)[summary.id]
        assert summary.samples == len(samples)
        assert list(summary.profile) == list(COMBINATIONS)
        assert sum(summary.profile.values()) == pytest.approx(1)
        for label, name in enumerate(CHOICE.classes):
            for combination in COMBINATIONS:
                alike = [
                    s
                    for s in samples
                    if s.label == label
                    and (s.image is not None) == (combination in ("image+text", "image"))
                    and (s.text is not None) == (combination in ("image+text", "text"))
                ]
                assert summary.counts[name][combination] == len(alike)
    assert build(dataset, "missing-b0.5", clients=2).clients != build(dataset, clients=2).clients


def test_holdings_count_a_sample_by_what_it_has():
    """An aligned VQA question has an image and no text of its own; a flashcard counts as text."""
    summary = holdings(build(medical()))[0]
    assert summary.counts == {"all": {"image+text": 0, "image": 6, "text": 4, "neither": 0}}
    assert summary.profile == {"image+text": 0.0, "image": 0.6, "text": 0.4, "neither": 0.0}


def test_a_question_that_lost_its_image_counts_as_text():
    summaries = holdings(build(medical(), "missing-b0.5", clients=1))
    counts = summaries[0].counts["all"]
    assert counts["neither"] == 0
    assert counts["text"] > 4  # more than the flashcards
    assert counts["image"] + counts["text"] == summaries[0].samples


def test_a_modality_that_a_sample_never_had_is_not_kept():
    rows = [Sample("i", "no", image=picture("i"), label=0), Sample("t", "no", text="t", label=0)]
    manifest = build(Dataset(CHOICE, rows, []), clients=1)
    assert manifest.clients[0].rows == (("i", True, False), ("t", False, True))


def test_labelled_open_samples_are_skewed_and_named_by_their_answers():
    rows = [Sample(f"s{i}", "red" if i % 2 else "no", "q?", label=i % 2) for i in range(40)]
    manifest = build(Dataset(OPEN, rows, []))
    assert manifest.partition == {"name": "dirichlet", "clients": 5, "alpha": 0.5}
    assert manifest.classes == ("no", "red")
    assert list(holdings(manifest)[0].counts) == ["no", "red"]


def test_samples_without_labels_are_split_evenly():
    rows = [Sample(f"s{i}", "a", "q?") for i in range(10)]
    manifest = build(Dataset(OPEN, rows, []))
    assert manifest.partition == {"name": "even", "clients": 5}
    assert [len(client.rows) for client in manifest.clients] == [2] * 5
    assert "split evenly" in manifest.notes[0]


def test_the_partition_is_the_same_in_every_scenario_of_one_alpha():
    splits = [
        [[row[0] for row in client.rows] for client in build(memes(), setting).clients]
        for setting in SETTINGS
        if SETTINGS[setting].alpha == 0.5
    ]
    assert all(split == splits[0] for split in splits)


def test_the_hash_covers_everything():
    one = build(memes())
    row = ("m0", False, True)
    changed = [
        replace(one, dataset="x"),
        replace(one, seed=1),
        replace(one, scenario={"name": "aligned", "x": 1}),
        replace(one, partition={}),
        replace(one, classes=("a", "b")),
        replace(one, notes=("n",)),
        replace(one, clients=one.clients[:-1]),
        replace(one, clients=(replace(one.clients[0], id="x"), *one.clients[1:])),
        replace(one, clients=(replace(one.clients[0], rows=(row,)), *one.clients[1:])),
        replace(one, clients=(replace(one.clients[0], labels=(1,)), *one.clients[1:])),
    ]
    assert len({manifest.sha256 for manifest in [one, *changed]}) == 1 + len(changed)


@pytest.mark.parametrize("make", [memes, medical, hospitals])
def test_a_manifest_survives_the_disk(tmp_path, make):
    manifest = build(make(), "cross-i3t7")
    save(manifest, tmp_path / "manifest.json")
    found = load(tmp_path / "manifest.json")
    assert found == manifest
    assert found.sha256 == manifest.sha256
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]
    assert json.loads(to_json(manifest))["sha256"] == manifest.sha256


def test_names_outside_ascii_survive_the_disk(tmp_path):
    dataset = replace(hospitals(), parties={"Zürich 医院": hospitals().parties["north"]})
    manifest = build(dataset)
    save(manifest, tmp_path / "m.json")
    assert load(tmp_path / "m.json").clients[0].id == "Zürich 医院"


def tampered(text, change):
    content = json.loads(text)
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(seed=1), "was changed after it was written"),
        (lambda c: c["clients"][0]["rows"][0].__setitem__(1, False), "was changed"),
        (lambda c: c["clients"].pop(), "was changed"),
        (lambda c: c.update(extra=1), "was changed"),
        (lambda c: c.update(sha256="0"), "was changed"),
        (lambda c: c.update(format=2), "has manifest format 2; this version reads 1"),
        (lambda c: c.pop("sha256"), "is not a manifest"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, change, message):
    path = tmp_path / "m.json"
    path.write_text(tampered(to_json(build(memes())), change))
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"sha256": "x"}'])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(UserError, match=r"m\.json is not a manifest"):
        from_json(text, "m.json")


def test_a_hash_over_nonsense_is_no_manifest():
    from fedmllm.manifest import _digest

    for content in ({"format": 1}, {"format": 1, "clients": 3, "dataset": "x"}):
        text = json.dumps(content | {"sha256": _digest(content)})
        with pytest.raises(UserError, match="is not a manifest"):
            from_json(text)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json cannot be read"):
        load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.json cannot be read"):
        load(tmp_path / "binary.json")


def test_a_dataset_that_changed_is_noticed():
    whole = memes()
    smaller = replace(whole, train=[s for s in whole.train if s.id != "m7"])
    with pytest.raises(UserError, match=r"dataset 'toy' lacks samples .*\(1, the first 'm7'\)"):
        client_samples(build(whole), smaller)


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        (memes(), {"partition": "evn"}, "unknown partition 'evn': choose dirichlet or even"),
        (memes(), {"clients": 61}, "61 clients cannot share 60 samples"),
        (memes(), {"clients": 0}, "clients is 0"),
        (memes(), {"alpha": 0}, "alpha is 0"),
        (memes(), {"scenario": "none"}, "unknown scenario 'none'"),
        (memes(0), {}, "5 clients cannot share 0 samples"),
        (medical(cards=4), {}, "5 clients cannot share 4 samples"),
        (replace(memes(), train=memes().train * 2), {}, "60 sample ids occur more than once.*'m0'"),
        (replace(hospitals(), parties={"x": []}), {}, "party 'x' has no samples"),
        (Dataset(OPEN, [Sample("s", "a")], []), {"clients": 1, "alpha": -1}, "alpha is -1"),
    ],
)
def test_bad_input_is_refused(dataset, changes, message):
    with pytest.raises(UserError, match=message):
        build(dataset, **changes)
