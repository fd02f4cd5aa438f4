"""Evidence and mixtures over sites: the facts and bits of one process, and what bad sites do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sites import SITES, NearLink, hash_of, make_kits

from fedmllm import manifest
from fedmllm.algorithms.base import ServerState
from fedmllm.config import load_config, make_config
from fedmllm.errors import UserError
from fedmllm.evidence import Hits, Sums
from fedmllm.experiment import Shared, run
from fedmllm.parties import totals
from fedmllm.sites import exchange, settings, wire
from fedmllm.sites.central import NetworkRunner
from fedmllm.sites.release import check_release
from fedmllm.sites.serving import serve
from fedmllm.sites.settings import Reveal
from fedmllm.sites.site import Site
from fedmllm.sites.wire import Message

CROSS = {
    "name": "x",
    "data": {"name": "crisis", "train": 96, "test": 8, "classes": 4},
    "partition": {"clients": 3, "alpha": 100.0},
    "scenario": {"name": "cross", "images": "2:1"},
    "training": {"rounds": 2, "clients_per_round": 3, "lr": 0.01},
    "evaluation": {"every": 0, "conditions": ["both"]},
    "strategy": {"recombine": 1.0, "mixtures": 2, "evidence": 1e-9},
}
FACTS = ("mixtures", "evidence", "bytes", "metrics")


@pytest.fixture
def shared_model(monkeypatch, mllm):
    """Every site and the server use one loaded base; each sets the adapter it needs."""
    monkeypatch.setattr("fedmllm.sites.site.load_model", lambda config: mllm)
    monkeypatch.setattr("fedmllm.sites.serving.load_model", lambda config: mllm)
    return mllm


def experiment(**change: Any) -> dict[str, Any]:
    raw = copy.deepcopy(CROSS)
    for section, values in change.items():
        raw[section] = {**raw[section], **values}
    return raw


def kits_of(
    folder: Path, raw: Mapping[str, Any], *, reveal: Mapping[str, bool] | None = None, **server: Any
) -> dict[str, Path]:
    kits = make_kits(folder, raw, server=server)
    for name in SITES:
        file = kits[name] / settings.FILE
        facts = {**yaml.safe_load(file.read_text()), "reveal": {"features": True, **(reveal or {})}}
        file.write_text(yaml.safe_dump(facts))
    return kits


def served(kits: Mapping[str, Path], link: NearLink) -> dict[str, Any]:
    return serve(kits["server"], hash_of(kits["server"]), link)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def here(tmp_path_factory, mllm) -> Callable[[Mapping[str, Any]], tuple[dict[str, Any], Path]]:
    """The run of one process, made once of each experiment."""
    shared, made = Shared(mllm), {}

    def in_process(raw: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
        key = json.dumps(raw)
        if key not in made:
            folder = tmp_path_factory.mktemp("here")
            (folder / "x.yaml").write_text(yaml.safe_dump(raw))
            result = run(load_config(folder / "x.yaml"), out=folder / "run", shared=shared)
            made[key] = result, folder / "run"
        return made[key]

    return in_process


def tasks(link: NearLink, site: str) -> list[str]:
    return [task for name, task, _ in link.sent if name == site]


@pytest.mark.parametrize(
    ("strategy", "takers"),
    [({}, 1), ({"mixtures": 0}, None), ({"evidence": 0.0}, 1), ({"evidence": 100.0}, 0)],
    ids=["both", "evidence", "mixtures", "nothing-tells"],
)
def test_sites_give_the_bits_and_facts_of_one_process(
    tmp_path, shared_model, here, strategy, takers
) -> None:
    raw = experiment(strategy=strategy)
    kits = kits_of(tmp_path, raw)
    link = NearLink(kits, tmp_path)
    found = served(kits, link)
    result, folder = here(raw)
    assert same(kits["server"] / "runs" / "x", folder)
    for name in FACTS:
        assert found.get(name) == result.get(name), name
    assert [line["loss"] for line in found["history"]] == [
        line["loss"] for line in result["history"]
    ]
    assert "not_in_exchange" not in found["network"]
    told = [message.facts for _, task, message in link.sent if task in ("hits", "exchanged")]
    assert {facts["clients"] for facts in told} == {3}
    for _, _, message in link.came:
        check_release(message, Reveal(features=True))
        facts = json.dumps(message.facts)
        assert "crisis-train" not in facts
        assert "scene" not in facts
    assert (found.get("mixtures") or {}).get("takers") == takers
    if takers:
        assert result["mixtures"]["made"]
        pools = {s: len(m.facts["mixtures"]) for s, t, m in link.sent if t == "exchanged"}
        givers = {s for s, t, m in link.came if t == "mixtures"}
        assert len(givers) == 2
        assert {s for s, n in pools.items() if n} == set(SITES) - givers
        recombined = here(experiment(strategy={**strategy, "mixtures": 0}))[1]
        assert not same(folder, recombined)  # so that the pool matters
    else:
        assert {t for _, t, _ in link.sent}.isdisjoint({"mixtures"})


class StopError(Exception):
    pass


@pytest.mark.parametrize("at", ["hits", "mixtures", "exchanged", "train"])
def test_a_server_that_was_killed_goes_on_to_the_same_bits(
    tmp_path, shared_model, here, at: str
) -> None:
    """In the exchange it asks again; after it, it asks nobody, and sites keep what they have."""
    kits = kits_of(tmp_path, CROSS)

    def stop(site: str, task: str, message: Message) -> Message:
        if task == at and (at != "train" or message.facts["round"] == 1):
            raise StopError
        return message

    with pytest.raises(StopError):
        served(kits, NearLink(kits, tmp_path, stop))
    link = NearLink(kits, tmp_path)  # sites are new as well
    found = served(kits, link)
    result, folder = here(CROSS)
    assert same(kits["server"] / "runs" / "x", folder)
    assert all(found[name] == result[name] for name in FACTS)
    asked = {task for site in SITES for task in tasks(link, site)}
    again = {"sums", "hits", "mixtures", "exchanged"}
    kept = {"exchanged": {"exchanged"}, "train": set()}.get(at, again)
    assert asked & again == kept


def test_a_trainer_that_starts_anew_has_what_it_was_given(tmp_path, shared_model, here) -> None:
    kits = kits_of(tmp_path, CROSS)

    def restart(site: str, task: str, message: Message) -> Message:
        link.sites.pop(site, None)
        return message

    link = NearLink(kits, tmp_path, restart)
    found = served(kits, link)
    result, folder = here(CROSS)
    assert same(kits["server"] / "runs" / "x", folder)
    assert found["evidence"] == result["evidence"]
    (file,) = kits[SITES[0]].glob("state/*/exchange.safetensors")
    file.unlink()
    facts = {"run": file.parent.name, "lr": 0.1, "clients": 3, "since": 0}
    with pytest.raises(UserError, match="has lost what it was given before the first round"):
        Site(kits[SITES[0]], hash_of(kits["server"])).train(
            wire.pack_state(ServerState(0, shared_model.get_adapter()), (), facts)
        )


@pytest.mark.parametrize(
    ("change", "given", "takers"),
    [
        ({"scenario": {"images": "1:2"}, "strategy": {"evidence": 0.0}}, True, 2),
        ({}, False, 0),  # nobody who was there would take any, so none were asked for
    ],
    ids=["pool", "none"],
)
def test_a_late_site_is_given_what_came_of_it_and_gives_nothing(
    tmp_path, shared_model, here, monkeypatch, change, given, takers
) -> None:
    """A site of texts, away until the others have trained a round."""
    monkeypatch.setattr("fedmllm.sites.serving.NetworkRunner", quick)
    raw = experiment(**change)
    held = manifest.load(here(raw)[1] / "manifest.json").clients
    late = next(client.id for client in held if not any(row[1] for row in client.rows))
    kits = kits_of(tmp_path, raw, min_sites=2, hello_deadline=0.01, deadline=30.0)
    trained: list[str] = []

    def away(site: str, task: str, message: Message) -> Message | None:
        trained.extend([site] if task == "train" else [])
        return None if site == late and not trained else message

    link = NearLink(kits, tmp_path, away)
    found = served(kits, link)
    assert [task for task in tasks(link, late) if task in ("sums", "hits", "mixtures")] == []
    (told,) = [m for s, t, m in link.sent if (s, t) == (late, "exchanged")]
    assert bool(told.facts["mixtures"]) == given
    assert [late in line["clients"] for line in found["history"]] == [False, True]
    assert found["mixtures"]["takers"] == takers
    assert found["mixtures"]["bytes"]["down"] == takers * found["mixtures"]["bytes"]["up"]
    if "evidence" in found:
        assert told.facts["filled"] == found["evidence"]["filled"]
        assert late not in {client["id"] for client in found["evidence"]["clients"]}


def quick(**options: Any) -> NetworkRunner:
    """One that asks who failed again at once, by a clock of its own that runs."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.5
        return now[0]

    return NetworkRunner(**{**options, "pauses": (0.0, 0.0, 0.0), "clock": clock})


@pytest.mark.parametrize("at", ["sums", "hits", "mixtures"])
@pytest.mark.parametrize("how", ["silent", "lost", "fails"])
def test_a_site_that_dies_in_the_exchange_is_done_without(
    tmp_path, shared_model, here, monkeypatch, at: str, how: str
) -> None:
    """Of two with images one vanishes, does not answer, or fails, at each of the steps."""
    raw = experiment(training={"rounds": 1})
    monkeypatch.setattr("fedmllm.sites.serving.NetworkRunner", quick)
    clients = here(raw)[0]["evidence"]["clients"]
    lost = next(c["id"] for c in clients if c["image"]["samples"])
    kits = kits_of(tmp_path, raw, min_sites=2, deadline=20.0)
    told: list[dict[str, Any]] = []

    def spoil(site: str, task: str, message: Message) -> Message | Exception | None:
        told.append(json.loads((kits["server"] / "runs" / "x" / "status.json").read_text()))
        if (site, task) != (lost, at):
            return message
        if how == "lost":
            link.lost.add(site)
        return RuntimeError("died") if how == "fails" else None

    link = NearLink(kits, tmp_path, spoil)
    found = served(kits, link)
    (why,) = found["network"]["not_in_exchange"].items()
    words = {"silent": "did not answer within 20 s", "lost": "its process", "fails": "died"}[how]
    assert why[0] == lost
    assert why[1].startswith(f"{at}: {words}")
    assert any(status.get("not_in_exchange") for status in told)
    tested = {client["id"] for client in found["evidence"]["clients"]}
    assert (lost in tested) == (at == "mixtures")
    assert found["mixtures"]["givers"] == 1
    assert (lost in found["history"][0]["clients"]) == (how == "fails")
    if how == "fails":  # it has what came of it all the same
        assert "exchanged" in tasks(link, lost)


def test_a_site_that_is_needed_is_asked_again(tmp_path, shared_model, here, monkeypatch) -> None:
    monkeypatch.setattr("fedmllm.sites.serving.NetworkRunner", quick)
    kits = kits_of(tmp_path, CROSS)
    failed: list[str] = []

    def once(site: str, task: str, message: Message) -> Message | Exception:
        if task in ("sums", "hits", "mixtures", "exchanged") and task not in failed:
            failed.append(task)
            return RuntimeError("died")
        return message

    found = served(kits, NearLink(kits, tmp_path, once))
    assert failed == ["sums", "hits", "mixtures", "exchanged"]
    assert same(kits["server"] / "runs" / "x", here(CROSS)[1])
    assert found["evidence"] == here(CROSS)[0]["evidence"]


@pytest.mark.parametrize("at", ["sums", "hits", "mixtures", "exchanged"])
def test_a_needed_site_that_vanished_is_waited_for(
    tmp_path, shared_model, here, monkeypatch, at: str
) -> None:
    """The status says that the run waits, at which a supervisor brings the site back."""
    monkeypatch.setattr("fedmllm.sites.serving.NetworkRunner", quick)
    clients = here(CROSS)[0]["evidence"]["clients"]
    lost = next(c["id"] for c in clients if c["image"]["samples"])
    kits = kits_of(tmp_path, CROSS, deadline=20.0)
    once: list[str] = []

    class Link(NearLink):
        def gone(self) -> set[str]:
            status = json.loads((kits["server"] / "runs" / "x" / "status.json").read_text())
            if self.lost and status["doing"].startswith("waiting for"):
                self.lost.clear()
                once.append(status["doing"])
            return super().gone()

    def vanish(site: str, task: str, message: Message) -> Message | None:
        if (site, task) == (lost, at) and not once:
            link.lost.add(site)
        return None if site in link.lost else message

    link = Link(kits, tmp_path, vanish)
    found = served(kits, link)
    assert once == ["waiting for sites" if at == "exchanged" else "waiting for enough sites"]
    assert same(kits["server"] / "runs" / "x", here(CROSS)[1])
    assert all(found[name] == here(CROSS)[0][name] for name in FACTS)
    assert "not_in_exchange" not in found["network"]


def test_too_few_images_end_the_run_with_the_words_of_one_process(tmp_path, shared_model) -> None:
    kits = kits_of(tmp_path, experiment(strategy={"mixtures": 1000}))
    with pytest.raises(UserError, match="no party has 1000 different images of one class"):
        served(kits, NearLink(kits, tmp_path))
    status = json.loads((kits["server"] / "runs" / "x" / "status.json").read_text())
    assert "no party has 1000 different images" in status["error"]


# -- hostile answers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(tmp_path_factory, mllm) -> tuple[Site, Message, Message, Message]:
    """A site with images, and its good sums, hits and mixtures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmllm.sites.site.load_model", lambda config: mllm)
        kits = kits_of(tmp_path_factory.mktemp("kits"), CROSS)
        sites = [Site(kits[name], hash_of(kits["server"])) for name in SITES]
    site = next(each for each in sites if each.hello({}).facts["images"])
    sums = site.sums(Message())
    return site, sums, site.hits(sums), site.mixtures(Message())


def changed(message: Message, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Message:
    name = next(name for name in message.tensors if name.endswith(key))
    return Message({**message.tensors, name: change(message.tensors[name])}, message.facts)


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.clone()
        made.view(-1)[0] = value
        return made

    return change


def test_sums_that_cannot_be(answers) -> None:
    site, good, _, _ = answers
    width = site.session.mllm.width
    room = {"classes": 4, "width": width, "most": 128}
    assert set(exchange.unpack_sums(good, **room)) == {"image"}
    for bad, words in [
        (changed(good, "|counts", put(-1.0)), "counts are not whole"),
        (changed(good, "|counts", put(0.5)), "counts are not whole"),
        (changed(good, "|counts", put(1e6)), "1 to 128 can be"),
        (changed(good, "|counts", torch.zeros_like), "1 to 128 can be"),
        (changed(good, "|sums", put(float("nan"))), "not finite"),
        (changed(good, "|squares", put(float("inf"))), "not finite"),
        (changed(good, "|squares", put(-1.0)), "squares cannot be"),
        (changed(good, "|squares", put(1e300)), "squares cannot be"),
        (changed(good, "|sums", put(1e9)), "larger than their squares allow"),
        (changed(good, "|sums", lambda t: t[:3]), "not float64"),
        (changed(good, "|sums", lambda t: t.float()), "not float64"),
        (Message({"sums|smell|counts": torch.ones(4)}), "is none of image, text"),
        (Message({"delta|image|counts": torch.ones(4)}), "is none of image, text"),
        (Message({"counts": torch.ones(4)}), "not a tensor's name"),
    ]:
        with pytest.raises(UserError, match=words):
            exchange.unpack_sums(bad, **room)


def test_hits_that_cannot_be(answers) -> None:
    site, sums, good, _ = answers
    own = exchange.unpack_sums(sums, classes=4, width=site.session.mllm.width, most=128)
    facts = good.facts["hits"]["image"]
    assert exchange.unpack_hits(good, own) == {"image": Hits(**facts)}
    for change, words in [
        ({"hits": facts["samples"] + 1}, "hits is"),
        ({"hits": -1}, "hits is -1"),
        ({"hits": 1.5}, "hits is 1.5"),
        ({"hits": True}, "hits is True"),
        ({"samples": facts["samples"] - 1}, "and the sums of"),
        ({"expected": float("nan")}, "expected is nan"),
        ({"expected": 10**400}, "expected is"),
        ({"variance": 1e9}, "variance is"),
        ({"variance": "1"}, "variance is '1'"),
        ({"ages": 3}, "not samples, hits"),
    ]:
        with pytest.raises(UserError, match=words):
            exchange.unpack_hits(Message(facts={"hits": {"image": {**facts, **change}}}), own)
    for found in (None, [], {}, {"image": facts, "text": facts}, {"image": 3}):
        with pytest.raises(UserError, match="hits"):
            exchange.unpack_hits(Message(facts={"hits": found}), own)


def test_mixtures_that_cannot_be(answers) -> None:
    site, _, _, good = answers
    mllm, task = site.session.mllm, site.session.task
    room = {"classes": task.classes, "mllm": mllm, "max_length": 1200, "most": 4}
    first = good.facts["mixtures"][0]

    def told(**change: Any) -> Message:
        return Message(
            good.tensors, {"mixtures": [{**first, **change}, *good.facts["mixtures"][1:]]}
        )

    assert exchange.unpack_mixtures(good, **room)
    for bad, words in [
        (changed(good, "|features", put(float("nan"))), "not finite"),
        (changed(good, "|features", lambda t: t[:, 1:].contiguous()), "not floats of width"),
        (changed(good, "|features", lambda t: t.long()), "not floats of width"),
        (changed(good, "|features", lambda t: t[1:]), "do not fit features"),
        (changed(good, "|features", lambda t: t[:0]), "do not fit features"),
        (told(**{"class": "other"}), "is no class of the task"),
        (told(**{"class": ["x"]}), "is no class of the task"),
        (told(key="x"), "is no key"),
        (told(key=None), "is no key"),
        (told(words="<image>" * 9), "do not fit features"),
        (told(words="a " * 2000 + first["words"]), "do not fit features"),
        (told(words="x" * 10**6), "the words of one are none"),
        (told(words="\ud800"), "the words of one are none"),
        (told(words=3), "the words of one are none"),
        (told(more=1), "not told by class, key and words"),
        (Message(good.tensors, {"mixtures": [first]}), "not of 1 mixtures"),
        (Message({}, {"mixtures": None}), "none, or more"),
        (Message({}, {"mixtures": [first] * 17}), "none, or more"),
        (
            Message({**good.tensors, "mixture|0|pixels": torch.ones(2)}, good.facts),
            "not those of an image",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            exchange.unpack_mixtures(bad, **room)
    five = {f"mixture|{i}|features": next(iter(good.tensors.values())) for i in range(5)}
    with pytest.raises(UserError, match="more than 4 of a class"):
        exchange.unpack_mixtures(Message(five, {"mixtures": [first] * 5}), **room)


def test_a_bad_answer_costs_the_site_its_part(tmp_path, shared_model, here, monkeypatch) -> None:
    monkeypatch.setattr("fedmllm.sites.serving.NetworkRunner", quick)
    raw = experiment(training={"rounds": 1})
    clients = here(raw)[0]["evidence"]["clients"]
    liar = next(c["id"] for c in clients if c["image"]["samples"])
    for method, words in {"sums": "sums", "hits": "hits", "mixtures": "mixtures"}.items():
        kits = kits_of(tmp_path / method, raw, min_sites=2, deadline=20.0)
        honest = getattr(Site, method)

        def check(self: Site, message: Message, honest: Any = honest) -> Message:
            odd = Message({"odd||w": torch.ones(2)}, {"hits": 1, "mixtures": {}})
            return odd if self.name == liar else honest(self, message)

        with monkeypatch.context() as patch:
            patch.setattr(Site, method, check)
            found = served(kits, NearLink(kits, tmp_path))
        assert list(found["network"]["not_in_exchange"]) == [liar]
        assert words in found["network"]["not_in_exchange"][liar]
        assert len(found["history"][0]["clients"]) == 3  # it trains all the same


def test_what_a_model_cannot_read_does_not_end_training(answers, mllm) -> None:
    """Deepstack features for a model that has none, and words that the model writes no image for:
    they are left out, and the rest stays."""
    site, _, _, good = answers
    task, held = site.session.task, site.own.samples[site.name]
    room = {"classes": task.classes, "mllm": mllm, "max_length": 1200, "most": 4}
    pool = exchange.unpack_mixtures(good, **room)
    kept = exchange.usable(pool, mllm, task, held, style="plain")
    assert {name: [m.key for m in each] for name, each in kept.items()} == {
        name: [m.key for m in each] for name, each in pool.items()
    }
    name = next(iter(pool))
    image = pool[name][0].features
    odd = replace(pool[name][0], features=replace(image, deepstack=(image.features,)))
    wordless = replace(pool[name][0], features=replace(image, words="nothing"))
    spoilt = {**pool, name: [odd, wordless, *pool[name][1:]]}
    found = exchange.usable(spoilt, mllm, task, held, style="plain")
    assert [m.key for m in found[name]] == [m.key for m in pool[name][1:]]
    half = replace(pool[name][0], features=replace(image, features=image.features.bfloat16()))
    (made,) = exchange.usable({name: [half]}, mllm, task, held, style="plain")[name]
    assert made.features.features.dtype == image.features.dtype


def test_what_a_site_is_given_is_checked_there(answers, mllm) -> None:
    site, sums, _, good = answers
    with pytest.raises(UserError, match="lack those of"):
        site.hits(Message())
    fewer = {name: value / 2**12 for name, value in sums.tensors.items() if "counts" not in name}
    with pytest.raises(UserError, match="lack those of"):
        site.hits(changed(Message({**sums.tensors, **fewer}), "|counts", torch.ones_like))
    for facts, words in [
        ({"mixtures": [], "filled": ["smell"]}, "are not some of image, text"),
        ({"mixtures": [], "filled": "image"}, "are not some of image, text"),
        ({"mixtures": None, "filled": []}, "mixtures: none"),
    ]:
        with pytest.raises(UserError, match=words):
            site.exchanged(Message({}, {"run": "r", **facts}))
    with pytest.raises(UserError, match="was given mixtures, and it has images"):
        site.exchanged(Message(good.tensors, {"run": "r", "filled": ["image"], **good.facts}))
    assert not list(site.kit.glob("state/r/*"))


def test_bounds_go_by_the_sites_that_there_are(answers, mllm) -> None:
    """The experiment has 3 parties, which parties with data of their own may be more than."""
    site, sums, _, made = answers
    many = Message({name: value * 64 for name, value in sums.tensors.items()})
    with pytest.raises(UserError, match="1 to 384 can be"):
        site.hits(many)
    assert site.hits(Message(many.tensors, {"clients": 64})).facts["hits"]
    classes, groups = site.session.task.classes, wire.unpack_groups(made.tensors)
    pool = {
        ("mixture", str(i)): {name: value.clone() for name, value in groups["mixture", "0"].items()}
        for i in range(13)
    }
    facts = {"filled": ["image"], "mixtures": made.facts["mixtures"][:1] * 13}

    def given(**more: Any) -> Any:
        message = Message(wire.pack_groups(pool), {**facts, **more})
        return exchange.unpack_outcome(message, site.config, classes=classes, mllm=mllm)

    with pytest.raises(UserError, match="more than 12 of a class"):
        given()
    assert [len(each) for each in given(clients=4)[1].values()] == [13]
    for wrong in (0, -1, True, 1.0, "4", None, 10**9):
        with pytest.raises(UserError, match="is no number of sites"):
            given(clients=wrong)
        with pytest.raises(UserError, match="is no number of sites"):
            site.hits(Message(sums.tensors, {"clients": wrong}))


# -- what may leave ------------------------------------------------------------------------------


def test_the_gate_passes_the_answers_and_nothing_more(answers) -> None:
    _, sums, hits, made = answers
    shown = Reveal(features=True)
    for message in (sums, hits, made):
        check_release(message, shown)
        with pytest.raises(UserError, match="features of samples, which this site does not"):
            check_release(message, Reveal())
    for message in (sums, hits):
        with pytest.raises(UserError, match="which count samples"):
            check_release(message, Reveal(samples=False, features=True))
    check_release(made, Reveal(samples=False, features=True))
    check_release(Message(facts={"exchanged": True}), Reveal())
    first = made.facts["mixtures"][0]
    pixels = {"mixture|0|pixels": torch.ones(2)}
    for message, words in [
        (Message(facts={"images": 7}), "say something else"),
        (Message({**sums.tensors, "states||x": torch.ones(2)}), "else than sums over samples"),
        (Message(sums.tensors, {"samples": 3}), "sums with facts"),
        (changed(sums, "|sums", lambda t: t[0]), "else than sums over samples"),
        (changed(sums, "|counts", put(1e6)), "else than sums over samples"),
        (changed(sums, "|counts", put(0.5)), "counts that are none"),
        (changed(sums, "|counts", put(0.0)), "over no samples"),
        (Message(facts={"hits": {"image": {"rows": 3}}}), "else than numbers"),
        (Message(facts={"hits": {"image": dict.fromkeys(_HITS, "a")}}), "else than numbers"),
        (Message(made.tensors, {**made.facts, "samples": 3}), "not those of an answer"),
        (Message(made.tensors, {"mixtures": [{**first, "name": "a"}]}), "say more than class"),
        (Message(made.tensors, {"mixtures": [{**first, "key": 1}]}), "say more than class"),
        (Message({}, {"mixtures": [first] * 5}), "more than 4 mixtures of a class"),
        (Message({**made.tensors, **pixels}, made.facts), "more than features"),
        (Message({**made.tensors, "delta||w": torch.ones(1)}, made.facts), "not a tensor of a mix"),
        (Message(made.tensors), "facts that are not theirs"),
    ]:
        with pytest.raises(UserError, match=words):
            check_release(message, shown)


_HITS = ("samples", "hits", "expected", "variance")


@pytest.mark.parametrize(
    ("strategy", "reveal", "words"),
    [
        ({}, {"features": False}, "does not reveal features .* strategy.evidence sends sums"),
        ({"evidence": 0.0}, {"features": False}, "strategy.mixtures gives means of features"),
        ({}, {"samples": False}, "sums of samples count them by class"),
    ],
)
def test_a_site_that_reveals_too_little_refuses(
    tmp_path, shared_model, strategy, reveal, words
) -> None:
    kits = kits_of(tmp_path, experiment(strategy=strategy), reveal=reveal)
    link = NearLink(kits, tmp_path)
    with pytest.raises(UserError, match=words):
        served(kits, link)
    assert {task for _, task, _ in link.sent} <= {"hello", "refused"}


def test_sums_are_added_in_the_order_of_names() -> None:
    """1e16 - 1e16 + 1 is 1; from the other end it is 0."""
    values = {"c": 1.0, "a": 1e16, "b": -1e16}
    sums = {name: {"text": Sums(*[np.array([x])] * 3)} for name, x in values.items()}
    assert totals(sums)["text"].sums.tolist() == [1.0]
    assert totals(dict(sorted(sums.items(), reverse=True)))["text"].sums.tolist() == [1.0]


def test_sums_are_of_no_more_samples_than_a_site_has(tmp_path) -> None:
    runner: Any = SimpleNamespace(facts={"few": {"samples": 3}, "many": {"samples": 900}})
    made = exchange.Exchanges(make_config(CROSS), runner, file=tmp_path, run_file=tmp_path)
    assert (made._most("few"), made._most("many")) == (3, 128)
