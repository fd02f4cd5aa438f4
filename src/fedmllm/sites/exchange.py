"""What sites tell and give before the first round, over the wire (`parties.py` has the steps).

    sums       a site's sums by modality and class, float64    (`strategy.evidence`)
    hits       everybody's sums back; its hits
    mixtures   means of its images' features                   (`strategy.mixtures`)
    exchanged  what came of it, to each site before it trains: modalities that may be filled in and,
               where it has no images, all mixtures

Sites that are there when the run begins take part. What came of it holds for the run: the server
keeps it, and a site that comes later is given it and gives nothing.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedmllm.config import Config
from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.evidence import MODALITIES, Hits, Sums
from fedmllm.evidence import MOST as TESTED
from fedmllm.mixtures import MOST, Layout, Mixtures, layout
from fedmllm.models.device import out_of_memory
from fedmllm.models.features import GivenFeatures, ImageFeatures
from fedmllm.models.mllm import Mllm
from fedmllm.parties import Evidence, Exchange, givers_takers, judged, pooled, totals
from fedmllm.prompts import Prompted, render
from fedmllm.sites import wire
from fedmllm.sites.central import NetworkRunner
from fedmllm.sites.settings import write_json
from fedmllm.sites.wire import Message

FILE = "exchange.safetensors"
_KEY = re.compile(r"mixture:[0-9a-f]{32}")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold
_ANY_LENGTH = 2**30  # whether a text and a picture fit together is asked when they are encoded
_LEVELS = 16  # of deepstack features: more than any model has
_SITES = 2**16  # more than a federation has
_LARGEST = float(torch.finfo(torch.float32).max)  # of a state, which is float32


def used(config: Config) -> bool:
    """Whether the experiment has an exchange."""
    return bool(config.strategy.evidence or config.strategy.mixtures)


def sites_of(message: Message, config: Config) -> int:
    """How many sites there are, which bounds what everybody gave: as the server says (``clients``),
    or the experiment's parties. Raises `UserError` if it cannot be."""
    found = message.facts.get("clients", config.partition.clients)
    if type(found) is not int or not 1 <= found <= _SITES:
        raise UserError(f"clients: {found!r} is no number of sites: 1 to {_SITES} can be")
    return found


# -- sums and hits -------------------------------------------------------------------------------


def pack_sums(sums: Mapping[str, Sums]) -> Message:
    """Sums by modality."""
    groups = {
        ("sums", name): {
            item.name: torch.from_numpy(getattr(one, item.name)) for item in fields(one)
        }
        for name, one in sums.items()
    }
    return Message(wire.pack_groups(groups))


def unpack_sums(message: Message, *, classes: int, width: int, most: int) -> dict[str, Sums]:
    """Sums by modality: of so many classes and directions, of at most so many samples each.
    Raises `UserError` if they are none."""
    shapes = {"counts": (classes,), "sums": (classes, width), "squares": (width,)}
    found = {}
    for (field, name), tensors in wire.unpack_groups(message.tensors).items():
        if field != "sums" or name not in MODALITIES or tensors.keys() != shapes.keys():
            raise UserError(f"sums: {field}|{name} is none of {', '.join(MODALITIES)}")
        for part, value in tensors.items():
            if value.dtype != torch.float64 or tuple(value.shape) != shapes[part]:
                raise UserError(
                    f"sums of {name}: {part} are {value.dtype} {tuple(value.shape)}, not float64 "
                    f"{shapes[part]}"
                )
        one = Sums(**{part: value.numpy() for part, value in tensors.items()})
        if problem := _odd(one, most):
            raise UserError(f"sums of {name}: {problem}")
        found[name] = one
    return found


def _odd(one: Sums, most: int) -> str:
    """What is wrong with sums that have the right shapes."""
    size = one.counts.sum()
    if not all(np.isfinite(part).all() for part in (one.counts, one.sums, one.squares)):
        return "not finite"
    if (one.counts < 0).any() or (one.counts != one.counts.round()).any():
        return "counts are not whole numbers from 0"
    if not 1 <= size <= most:
        return f"{size:g} samples, and 1 to {most} can be"
    if (one.squares < 0).any() or (one.squares > size * _LARGEST**2).any():
        return "squares cannot be"
    # of the samples of a class, |sum|² is at most their number times the sum of squares
    room = np.sqrt(np.outer(one.counts, one.squares)) * (1 + 1e-6)
    return "larger than their squares allow" if (np.abs(one.sums) > room).any() else ""


def pack_hits(hits: Mapping[str, Hits]) -> Message:
    """Hits by modality."""
    return Message(facts={"hits": {name: asdict(one) for name, one in hits.items()}})


def unpack_hits(message: Message, sums: Mapping[str, Sums]) -> dict[str, Hits]:
    """Hits by modality, of a site that sent these sums. Raises `UserError` if they are none."""
    found = message.facts.get("hits")
    if not isinstance(found, Mapping) or found.keys() != sums.keys():
        raise UserError(f"hits: none, or not of {', '.join(sorted(sums)) or 'no modality'}")
    for name, facts in found.items():
        n = int(sums[name].counts.sum())
        bounds = {"samples": n, "hits": n, "expected": n, "variance": n * n / 4}
        if not isinstance(facts, Mapping) or facts.keys() != bounds.keys():
            raise UserError(f"hits of {name}: not {', '.join(bounds)}")
        for key, most in bounds.items():
            kinds = (int,) if key in ("samples", "hits") else (int, float)
            if type(facts[key]) not in kinds or not 0 <= facts[key] <= most:
                raise UserError(
                    f"hits of {name}: {key} is {facts[key]!r}, and 0 to {most:g} can be"
                )
        if facts["samples"] != n:
            raise UserError(f"hits of {name}: of {facts['samples']} samples, and the sums of {n}")
    return {name: Hits(**facts) for name, facts in found.items()}


# -- mixtures ------------------------------------------------------------------------------------


def pack_mixtures(mixtures: Mixtures, facts: Mapping[str, Any] | None = None) -> Message:
    """Mixtures by class, in their order."""
    groups: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    listed: list[dict[str, str]] = []
    for name, each in mixtures.items():
        for one in each:
            image, group = one.features, ("mixture", str(len(listed)))
            groups[group] = {
                "features": image.features,
                **{f"deepstack.{k}": level for k, level in enumerate(image.deepstack)},
                **{f"inputs.{key}": value for key, value in image.inputs.items()},
            }
            listed.append({"class": name, "key": one.key, "words": image.words})
    return Message(wire.pack_groups(groups), {"mixtures": listed, **(facts or {})})


def unpack_mixtures(
    message: Message, *, classes: Sequence[str], mllm: Mllm, max_length: int, most: int
) -> dict[str, list[GivenFeatures]]:
    """Mixtures by class for this model, at most so many of a class, each of at most `max_length`
    tokens. Raises `UserError` if they are none."""
    listed = message.facts.get("mixtures")
    groups = wire.unpack_groups(message.tensors)
    if not isinstance(listed, list) or len(listed) > most * len(classes):
        raise UserError(f"mixtures: none, or more than {most} of a class")
    if groups.keys() != {("mixture", str(i)) for i in range(len(listed))}:
        raise UserError(f"mixtures: tensors are not of {len(listed)} mixtures")
    made: dict[str, list[GivenFeatures]] = {}
    for i, facts in enumerate(listed):
        if not isinstance(facts, Mapping) or facts.keys() != {"class", "key", "words"}:
            raise UserError("mixtures: one is not told by class, key and words")
        if facts["class"] not in classes:
            raise UserError(f"mixtures: {facts['class']!r} is no class of the task")
        if not isinstance(facts["key"], str) or not _KEY.fullmatch(facts["key"]):
            raise UserError(f"mixtures: {facts['key']!r} is no key of one")
        image = _image(groups["mixture", str(i)], facts["words"], mllm, max_length)
        made.setdefault(facts["class"], []).append(GivenFeatures(facts["key"], image))
    if any(len(each) > most for each in made.values()):
        raise UserError(f"mixtures: more than {most} of a class")
    return made


def _image(
    tensors: Mapping[str, torch.Tensor], words: Any, mllm: Mllm, max_length: int
) -> ImageFeatures:
    """One mixture's features, without what a site's own model says of the form of its images."""
    names = mllm.family.image_inputs
    levels = [name for name in tensors if name.startswith("deepstack.")]
    wanted = {"features", *(f"deepstack.{k}" for k in range(len(levels)))}
    wanted |= {f"inputs.{name}" for name in names}
    if len(levels) > _LEVELS or tensors.keys() != wanted:
        raise UserError(f"mixtures: tensors {sorted(tensors)} are not those of an image")
    rows = len(tensors["features"]) if tensors["features"].ndim else 0
    for name in ("features", *levels):
        value = tensors[name]
        if not value.is_floating_point() or tuple(value.shape) != (rows, mllm.width):
            raise UserError(
                f"mixtures: {name} are {value.dtype} {tuple(value.shape)}, not floats of width "
                f"{mllm.width}"
            )
        if not torch.isfinite(value).all():
            raise UserError(f"mixtures: {name} are not finite")
    for name in names:
        value = tensors[f"inputs.{name}"]
        if value.dtype not in (torch.int32, torch.int64) or not 1 <= value.numel() <= 16:
            raise UserError(f"mixtures: {name} is {value.dtype} of {value.numel()} numbers")
        if not 1 <= value.min() <= value.prod() <= 64 * max_length:
            raise UserError(f"mixtures: {name} is {value.tolist()}")
    if not isinstance(words, str) or _SURROGATE.search(words) or len(words) > 64 * max_length:
        raise UserError("mixtures: the words of one are none")
    ids = mllm.tokenizer(words, add_special_tokens=False)["input_ids"]
    if not 1 <= rows == ids.count(mllm.base.config.image_token_id) <= len(ids) <= max_length:
        raise UserError(
            f"mixtures: {len(ids)} tokens of words do not fit features of {rows} tokens, where "
            f"training.max_length is {max_length}"
        )
    deepstack = tuple(tensors[f"deepstack.{k}"] for k in range(len(levels)))
    inputs = {name: tensors[f"inputs.{name}"] for name in names}
    return ImageFeatures(words, tensors["features"], deepstack, inputs)


def usable(
    pool: Mixtures, mllm: Mllm, task: Task, samples: Sequence[Sample], *, style: str
) -> dict[str, list[GivenFeatures]]:
    """Mixtures in the form of this model's images and in its precision, without those that it
    cannot read: what another site gave must not end this one's training.

    One of each layout passes the model, with the shortest of `samples`. In which class of output an
    image comes, the model itself says.
    """
    blank = MemoryImage("blank", lambda: Image.new("RGB", (64, 64), "grey"))
    own = mllm.image_features(blank)
    short = min(samples, key=lambda sample: len(sample.text or ""))
    known: dict[tuple[Layout, int], bool] = {}
    made: dict[str, list[GivenFeatures]] = {}
    for name, each in pool.items():
        for one in each:
            image = replace(
                one.features,
                features=one.features.features.to(own.features.dtype),
                deepstack=tuple(level.to(own.features.dtype) for level in one.features.deepstack),
                kind=own.kind,
                listed=own.listed,
            )
            mixture = GivenFeatures(one.key, image)
            form = layout(image), len(image.deepstack)
            if form not in known:
                prompted = render(replace(short, image=mixture), task, style)
                known[form] = len(image.deepstack) == len(own.deepstack) and _reads(mllm, prompted)
            if known[form]:
                made.setdefault(name, []).append(mixture)
    if not all(known.values()):
        print("mixtures that this model cannot read were left out", file=sys.stderr)
    return made


def _reads(mllm: Mllm, prompted: Prompted) -> bool:
    try:
        encoded = mllm.encode(prompted, max_length=_ANY_LENGTH)
        return bool(mllm.represent([encoded]).isfinite().all())
    except (UserError, RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        if out_of_memory(error):
            raise
        return False


# -- what came of it -----------------------------------------------------------------------------


def pack_outcome(fill: Collection[str], pool: Mixtures, run: str, clients: int) -> Message:
    """What a site is given before it trains. clients: how many sites there are."""
    return pack_mixtures(pool, {"run": run, "filled": sorted(fill), "clients": clients})


def unpack_outcome(
    message: Message, config: Config, *, classes: Sequence[str], mllm: Mllm
) -> tuple[tuple[str, ...], dict[str, list[GivenFeatures]]]:
    """The modalities that may be filled in, and mixtures by class. Raises `UserError` if it is
    none of this experiment."""
    filled = message.facts.get("filled")
    if not isinstance(filled, list) or any(name not in MODALITIES for name in filled):
        raise UserError(f"filled: {filled!r} are not some of {', '.join(MODALITIES)}")
    if not config.strategy.evidence and sorted(filled) != sorted(MODALITIES):
        raise UserError(f"filled: {filled!r}, and without strategy.evidence all are")
    most = MOST * sites_of(message, config) if config.strategy.mixtures else 0
    max_length = config.training.max_length
    pool = unpack_mixtures(message, classes=classes, mllm=mllm, max_length=max_length, most=most)
    return tuple(filled), pool


def keep(message: Message, file: Path) -> None:
    """Write a message so that a kill leaves all of it or nothing."""
    draft = file.with_name(f"{file.name}.draft")
    file.parent.mkdir(parents=True, exist_ok=True)
    wire.write(message, draft)
    with draft.open("rb") as opened:
        os.fsync(opened.fileno())
    draft.replace(file)


class Exchanges:
    """The server's part. file: where what came of it is kept; run_file: of the run, where those
    stand that were given mixtures."""

    def __init__(
        self, config: Config, runner: NetworkRunner, *, file: Path, run_file: Path
    ) -> None:
        self.config, self.runner, self.file, self.run_file = config, runner, file, run_file
        self.evidence: Evidence | None = None
        self.exchange: Exchange | None = None
        self.missing: dict[str, str] = {}  # those that were asked and gave nothing, and why

    def begin(self, task: Task, mllm: Mllm) -> None:
        """Exchange with the sites that are there, or go on with what came of it; and give it to
        them. Raises `UserError` where an in-process run would."""
        if not self.restore(task, mllm):
            self._ask(task, mllm)
            self._keep()
        self.runner.brief = self.brief
        self.runner.hand_out()

    def brief(self, site: str) -> Message:
        """What a site is given: all may know the modalities, those without images get the pool."""
        fill = self.evidence.filled if self.evidence else MODALITIES
        takes = self.exchange is not None and not self.runner.facts[site]["images"]
        pool = self.exchange.pool if self.exchange and takes else {}
        if pool and site not in self._takers():
            facts = json.loads(self.run_file.read_text())
            write_json(self.run_file, {**facts, "takers": sorted([*self._takers(), site])})
        return pack_outcome(fill, pool, self.runner.run, len(self.runner.sites))

    def found(self) -> tuple[Evidence | None, Exchange | None]:
        """For the result; who came later and took mixtures is counted."""
        if self.exchange is None:
            return self.evidence, None
        takers, up = len(self._takers()), self.exchange.up
        return self.evidence, replace(self.exchange, takers=takers, down=up * takers)

    def accept(self, site: str, facts: Mapping[str, Any]) -> list[str]:
        """What is wrong with what a site states in the handshake."""
        if self.config.strategy.mixtures and type(facts.get("images")) is not bool:
            return ["images: the site does not say whether it has any"]
        return []

    def _takers(self) -> list[str]:
        found: list[str] = json.loads(self.run_file.read_text()).get("takers", [])
        return found

    def _ask(self, task: Task, mllm: Mllm) -> None:
        """The steps. Who gives nothing in one of them has no part in the next."""
        there = self.runner.present()
        given, classes = self.config.strategy, len(task.classes)
        if given.evidence:
            sums = self._step(
                "sums",
                dict.fromkeys(there, Message()),
                there,
                lambda site, reply: unpack_sums(
                    reply, classes=classes, width=mllm.width, most=self._most(site)
                ),
            )
            there = list(sums)
            message = Message(pack_sums(totals(sums)).tensors, {"clients": len(self.runner.sites)})
            hits = self._step(
                "hits",
                dict.fromkeys(there, message),
                there,
                lambda site, reply: unpack_hits(reply, sums[site]),
            )
            there = list(hits)
            self.evidence = judged(self.config, sums, hits)
        if given.mixtures:
            fill = self.evidence.filled if self.evidence else MODALITIES
            images = {site: self.runner.facts[site]["images"] for site in there}
            givers, takers = givers_takers(images, fill)
            asked = dict.fromkeys(givers if takers else (), Message())
            max_length = self.config.training.max_length
            made = self._step(
                "mixtures",
                asked,
                there,
                lambda site, reply: unpack_mixtures(
                    reply, classes=task.classes, mllm=mllm, max_length=max_length, most=MOST
                ),
            )
            gave = len(made) if takers else len(givers)
            self.exchange = pooled(self.config, made, givers=gave, takers=len(takers))

    def _step(
        self, task: str, asked: Mapping[str, Message], there: Sequence[str], take: Any
    ) -> dict[str, Any]:
        """Answers by site. As many as leave `min_sites` of those who are there may fail."""
        needed = max(0, len(asked) - max(0, len(there) - self.runner.min_sites))
        doing = f"exchange before the first round: {task}"
        found, failed = self.runner.gather(task, asked, take, needed=needed, doing=doing)
        self.missing |= {site: f"{task}: {why}" for site, why in failed.items()}
        self.runner.missed = self.missing
        return found

    def _most(self, site: str) -> int:
        samples = self.runner.facts[site].get("samples")
        return min(TESTED, samples) if isinstance(samples, int) else TESTED

    def _keep(self) -> None:
        evidence, exchange = self.evidence, self.exchange
        facts: dict[str, Any] = {"missing": self.missing}
        if evidence:
            facts["evidence"] = {
                "tests": {
                    site: {name: asdict(one) for name, one in found.items()}
                    for site, found in evidence.tests.items()
                },
                "up": evidence.up,
                "down": evidence.down,
            }
        if exchange:
            facts["exchange"] = {"givers": exchange.givers, "up": exchange.up}
        keep(pack_mixtures(exchange.pool if exchange else {}, facts), self.file)

    def restore(self, task: Task, mllm: Mllm) -> bool:
        """Whether something was kept; it is then what the run goes on with. Raises `UserError` if
        it cannot be read."""
        if not self.file.exists():
            return False
        message = wire.read(self.file)
        facts = message.facts
        self.missing = self.runner.missed = facts["missing"]
        if kept := facts.get("evidence"):
            tests = {
                site: {name: Hits(**one) for name, one in found.items()}
                for site, found in kept["tests"].items()
            }
            threshold = self.config.strategy.evidence
            self.evidence = Evidence(threshold, tests, kept["up"], kept["down"])
        if kept := facts.get("exchange"):
            most, max_length = MOST * len(self.runner.sites), self.config.training.max_length
            pool = unpack_mixtures(
                message, classes=task.classes, mllm=mllm, max_length=max_length, most=most
            )
            self.exchange = Exchange(pool, kept["givers"], 0, kept["up"], 0)
        return True
