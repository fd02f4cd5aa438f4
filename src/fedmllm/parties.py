"""What parties tell and give before the first round, and what the server makes of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedmllm import evidence, heterogeneity
from fedmllm.config import Config
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.fusion import Fusion, fusion_of
from fedmllm.mixtures import Mixtures, gathered, mixtures_of, payload
from fedmllm.models.features import GivenFeatures
from fedmllm.models.mllm import Mllm
from fedmllm.strategies import party_weights


@dataclass(frozen=True)
class Parties:
    """What the server makes of the parties' profiles, by client: weights of the adaptive
    regularisation, factors on updates and chances to be drawn (None: all alike), late fusion.

    once: bytes that crossed for it, up and down, before the first round.
    """

    found: Mapping[str, heterogeneity.Standing]
    weights: Mapping[str, float]
    scales: Mapping[str, float] | None = None
    chances: Mapping[str, float] | None = None
    fusion: Fusion | None = None
    once: tuple[int, int] = (0, 0)

    def facts(self, config: Config) -> dict[str, Any] | None:
        """What a result says of it; None if no profile was sent."""
        if not self.once[0]:
            return None
        rows = [
            {
                "id": client,
                **dict(zip(heterogeneity.COMBINATIONS, each.profile.modalities, strict=True)),
                "labels": list(each.profile.labels),
                "incomplete": each.incomplete,
                "divergence": each.divergence,
                "label_divergence": each.label_divergence,
                "index": each.index,
                "weight": self.weights[client] if config.strategy.mu else None,
                "scale": self.scales[client] if self.scales else None,
                "chance": self.chances[client] if self.chances else None,
            }
            for client, each in self.found.items()
        ]
        return {"epsilon": config.strategy.epsilon, "clients": rows}


def parties_of(config: Config, task: Task, samples: Mapping[str, Sequence[Sample]]) -> Parties:
    """Every party describes its samples, once; the server weighs them. samples: by client."""
    profiles = {
        client: heterogeneity.noised(
            heterogeneity.profile_of(held, len(task.classes)),
            config.strategy.epsilon,
            client=client,
            seed=config.seed,
        )
        for client, held in samples.items()
    }
    return weighed(config, profiles)


def weighed(config: Config, profiles: Mapping[str, heterogeneity.Profile]) -> Parties:
    """What the server makes of profiles, in whatever order they came."""
    given = config.strategy
    profiles = {client: profiles[client] for client in sorted(profiles)}  # sums of floats
    found = heterogeneity.standings(profiles)
    weights = party_weights(given.weight, given.w, config.scenario["name"], found)
    if not given.uses_profiles or config.topology != "federated":
        return Parties(found, weights)
    fusion = fusion_of(profiles.values(), strength=given.fusion) if given.fusion else None
    up, down = heterogeneity.traffic(profiles.values(), weighted=given.weighs_by_profile)
    return Parties(
        found,
        weights,
        scales=heterogeneity.factors(found, given.aggregation) if given.aggregation else None,
        chances=heterogeneity.factors(found, given.sampling) if given.sampling else None,
        fusion=fusion,
        once=(up, down + len(profiles) * (fusion.nbytes if fusion else 0)),
    )


@dataclass(frozen=True)
class Evidence:
    """What all parties found of each modality (`fedmllm.evidence`), and which may be filled in.

    tests: by client and modality. up, down: bytes of all together, once before the first round.
    """

    threshold: float
    tests: Mapping[str, Mapping[str, evidence.Hits]]
    up: int = 0
    down: int = 0

    @property
    def scores(self) -> dict[str, float]:
        """Standard errors above chance, by modality."""
        return evidence.scores(self.tests)

    @property
    def filled(self) -> tuple[str, ...]:
        """The modalities that tell the class by themselves."""
        return tuple(name for name, score in self.scores.items() if score >= self.threshold)

    def facts(self) -> dict[str, Any]:
        """What a result says of it."""
        clients = [
            {"id": client, **{name: asdict(one) for name, one in self.tests[client].items()}}
            for client in sorted(self.tests)
        ]
        return {
            "threshold": self.threshold,
            "scores": self.scores,
            "filled": list(self.filled),
            "clients": clients,
            "bytes": {"up": self.up, "down": self.down},
        }


def evidence_of(
    config: Config,
    classes: int,
    represent: evidence.Represent,
    samples: Mapping[str, Sequence[Sample]],
) -> Evidence | None:
    """The parties' test of what each modality tells, where the strategy asks for it. classes: of
    the task. represent: by the base that is not trained yet. samples: by client."""
    if not config.strategy.evidence:
        return None
    seen = {c: seen_of(config, held, represent, client=c) for c, held in sorted(samples.items())}
    sums = {client: sums_of(one, classes) for client, one in seen.items()}
    everybody = totals(sums)
    return judged(config, sums, {c: hits_of(one, sums[c], everybody) for c, one in seen.items()})


def seen_of(
    config: Config, samples: Sequence[Sample], represent: evidence.Represent, *, client: str
) -> dict[str, evidence.Seen]:
    """A party's samples through each modality alone, by modality; none that it lacks."""
    alone = {
        name: evidence.seen_alone(samples, name, represent, client=client, seed=config.seed)
        for name in evidence.MODALITIES
    }
    return {name: one for name, one in alone.items() if one}


def sums_of(seen: Mapping[str, evidence.Seen], classes: int) -> dict[str, evidence.Sums]:
    """What a party sends of them, by modality."""
    return {name: evidence.sums_of(one, classes) for name, one in seen.items()}


def totals(sums: Mapping[str, Mapping[str, evidence.Sums]]) -> dict[str, evidence.Sums]:
    """What the server returns, by modality: all parties' sums, added in the order of their names.
    sums: by client and modality."""
    found = {}
    for name in evidence.MODALITIES:
        if given := [sums[client][name] for client in sorted(sums) if name in sums[client]]:
            found[name] = evidence.total(given)
    return found


def hits_of(
    seen: Mapping[str, evidence.Seen],
    own: Mapping[str, evidence.Sums],
    everybody: Mapping[str, evidence.Sums],
) -> dict[str, evidence.Hits]:
    """A party's test against the others, by modality."""
    return {name: evidence.hits_of(one, own[name], everybody[name]) for name, one in seen.items()}


def judged(
    config: Config,
    sums: Mapping[str, Mapping[str, evidence.Sums]],
    hits: Mapping[str, Mapping[str, evidence.Hits]],
) -> Evidence:
    """What the server makes of the parties' tests. sums: of all that sent them, hits: of those
    that tested, both by client and modality."""
    tests = {
        client: {name: found.get(name, evidence.Hits()) for name in evidence.MODALITIES}
        for client, found in hits.items()
    }
    numbers = {client: [one.numbers for one in each.values()] for client, each in sums.items()}
    up, down = evidence_traffic(numbers, {client: len(found) for client, found in hits.items()})
    return Evidence(config.strategy.evidence, tests, up, down)


def evidence_traffic(
    numbers: Mapping[str, Sequence[int]], tested: Mapping[str, int]
) -> tuple[int, int]:
    """Bytes up and down of all parties together, in float32. numbers: of each sum that a party
    sends, by client. tested: the modalities that a party tested.

    Up: its sums; hits, expected and variance. Down: all sums to who tests, the scores to all.
    """
    size = sum(4 * count for each in numbers.values() for count in each)
    up = size + sum(4 * 3 * count for count in tested.values())
    return up, size + 4 * len(evidence.MODALITIES) * len(tested)


@dataclass(frozen=True)
class Exchange:
    """The parties' mixtures of image features. givers, takers: parties with images and without
    any; up, down: bytes of all together, once before the first round."""

    pool: Mixtures
    givers: int
    takers: int
    up: int
    down: int

    def facts(self) -> dict[str, Any]:
        """What a result says of it."""
        made = {name: len(self.pool[name]) for name in sorted(self.pool)}
        return {
            "made": made,
            "givers": self.givers,
            "takers": self.takers,
            "bytes": {"up": self.up, "down": self.down},
        }


def exchange_of(
    config: Config,
    mllm: Mllm,
    samples: Mapping[str, Sequence[Sample]],
    fill: Collection[str] = evidence.MODALITIES,
) -> Exchange | None:
    """Mixtures where the strategy asks for them: every party with images gives, every party
    without any gets all. samples: by client. fill: modalities that may be filled in. Nothing is
    given where nobody would take it.

    Raises `UserError` if somebody would and no class has images enough.
    """
    if not config.strategy.mixtures or config.topology != "federated":
        return None
    images = {c: any(s.image is not None for s in held) for c, held in samples.items() if held}
    givers, takers = givers_takers(images, fill)
    given = {c: mixtures_by(config, mllm, samples[c], client=c) for c in givers if takers}
    return pooled(config, given, givers=len(givers), takers=len(takers))


def givers_takers(images: Mapping[str, bool], fill: Collection[str]) -> tuple[list[str], list[str]]:
    """Parties with images, and those that are to get mixtures. images: whether a party has any, by
    client. fill: modalities that may be filled in."""
    givers = [client for client, has in sorted(images.items()) if has]
    takers = [client for client, has in sorted(images.items()) if not has]
    return givers, takers if "image" in fill else []


def mixtures_by(
    config: Config, mllm: Mllm, samples: Sequence[Sample], *, client: str
) -> dict[str, list[GivenFeatures]]:
    """What a party with images gives, by class."""
    size, see = config.strategy.mixtures, mllm.image_features
    return mixtures_of(samples, see, size=size, client=client, seed=config.seed)


def pooled(
    config: Config,
    given: Mapping[str, Mapping[str, Sequence[GivenFeatures]]],
    *,
    givers: int,
    takers: int,
) -> Exchange:
    """What the server makes of the mixtures that were given, by client and class.

    Raises `UserError` if somebody would take them and there are none.
    """
    pool = gathered(given)
    if takers and not pool:
        raise UserError(
            f"strategy.mixtures: no party has {config.strategy.mixtures} different images of one "
            "class and size, so there is nothing to give to parties without images: lower it or "
            "set it to 0"
        )
    return Exchange(pool, givers, takers, payload(pool), payload(pool) * takers)
