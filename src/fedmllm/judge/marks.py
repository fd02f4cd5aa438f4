"""From replies to numbers: judged accuracy beside exact match, and how far the judge agrees with
itself."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmllm import metrics
from fedmllm.judge.prompt import PARSING, SYSTEM
from fedmllm.rng import uniform


@dataclass(frozen=True)
class Scheme:
    """How to judge. model: the judge's name at its endpoint. request: further fields of each
    request. second: how many answers of a result are judged twice; seed: which."""

    model: str
    request: Mapping[str, Any]
    second: int = 50
    seed: int = 0

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of each request besides its messages; None leaves a field out."""
        fields = {"model": self.model, "temperature": 0, "max_tokens": 64, **self.request}
        return {name: value for name, value in fields.items() if value is not None}

    def facts(self) -> dict[str, Any]:
        """All that decides a verdict, for judged.json."""
        return {
            "request": self.fields,
            "system": SYSTEM,
            "message": ["question", "expected answer", "given answer"],
            "parsing": PARSING,
        }


@dataclass(frozen=True)
class Item:
    """One answer of a run to an open test question. federation: the party of a local run."""

    federation: str
    condition: str
    kind: str
    question: str
    expected: str
    given: str

    def key(self, scheme: Scheme, repeat: int = 0) -> str:
        """What is asked, as one word: the same question to the same judge is asked once."""
        asked = [SYSTEM, scheme.fields, self.question, self.expected, self.given, repeat]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def sampled(items: Sequence[Item], scheme: Scheme) -> list[Item]:
    """The items that are judged twice: `scheme.second` different ones, drawn by the seed.

    Each item's place in the draw depends on itself alone, so that more of them or another order
    keeps those that were drawn.
    """
    different = {item.key(scheme): item for item in items}
    ranked = sorted(different, key=lambda key: uniform(scheme.seed, "second judgement", key))
    return [different[key] for key in ranked[: scheme.second]]


def scores(items: Sequence[Item], verdicts: Sequence[bool | None]) -> dict[str, Any]:
    """Of one adapter under one condition.

    accuracy: correct ones among the verdicts that could be read, with its standard error; least,
    most: among all, if those that could not be read were all wrong or all right. exact_match: the
    accuracy without a judge, over all. groups: the same by group of questions.
    """
    match = metrics.vqa_accuracy([i.given for i in items], [i.expected for i in items])["all"]
    found = _shares(verdicts)
    groups: dict[str, list[int]] = {}
    for n, item in enumerate(items):
        for group in metrics.groups_of(item.kind):
            groups.setdefault(group, []).append(n)
    return {
        **found,
        "exact_match": match,
        "groups": {
            name: {
                **_shares([verdicts[n] for n in members]),
                "exact_match": metrics.accuracy(
                    [items[n].given for n in members], [items[n].expected for n in members]
                ),
            }
            for name, members in groups.items()
        },
    }


def _shares(verdicts: Sequence[bool | None]) -> dict[str, Any]:
    read = [verdict for verdict in verdicts if verdict is not None]
    correct, lost = sum(read), len(verdicts) - len(read)
    accuracy = correct / len(read) if read else None
    error = None if accuracy is None else metrics.accuracy_standard_error(accuracy, len(read))
    return {
        "n": len(verdicts),
        "correct": correct,
        "unparsable": lost,
        "accuracy": accuracy,
        "accuracy_se": error,
        "least": correct / len(verdicts),
        "most": (correct + lost) / len(verdicts),
    }


_SUMS = ("n", "correct", "unparsable")
_MEANS = ("accuracy", "least", "most", "exact_match")


def mean_of_parties(parties: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A local run's scores: counts of all parties, means over the parties, and each party's own."""
    every = list(parties.values())
    names = dict.fromkeys(name for scores in every for name in scores["groups"])
    groups = {name: _mean_of([s["groups"][name] for s in every]) for name in names}
    return {**_mean_of(every), "groups": groups, "per_party": dict(parties)}


def _mean_of(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {name: sum(scores[name] for scores in every) for name in _SUMS}
    for name in _MEANS:
        known = [scores[name] for scores in every if scores[name] is not None]
        found[name] = math.fsum(known) / len(known) if known else None
    return found


def agreement(pairs: Sequence[tuple[bool | None, bool | None]]) -> dict[str, Any]:
    """How often two judgements of one answer agree, where both could be read, and Cohen's kappa
    (Educational and Psychological Measurement 20, 1960): agreement beyond chance, 1 for full;
    None where it is not defined, since all verdicts are the same."""
    read = [(a, b) for a, b in pairs if a is not None and b is not None]
    kappa = None
    if len({verdict for pair in read for verdict in pair}) == 2:
        from sklearn.metrics import cohen_kappa_score

        kappa = float(cohen_kappa_score(*zip(*read, strict=True)))
    same = sum(a == b for a, b in read)
    share = same / len(read) if read else None
    return {"asked": len(pairs), "read": len(read), "same": same, "share": share, "kappa": kappa}
