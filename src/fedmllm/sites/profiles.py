"""Parties' profiles over the wire (`heterogeneity.py`): a site's own, and what the server keeps.

A profile is a fact of the handshake. A site with noise on it draws that once for an experiment,
from secrets of its machine, and keeps it: a fresh draw at every handshake could be averaged away.
The server takes the first that a site sends for the whole run, which so goes on to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmllm.config import Config
from fedmllm.data.sample import Sample
from fedmllm.errors import UserError
from fedmllm.heterogeneity import COMBINATIONS, Profile, noised, profile_of
from fedmllm.parties import Parties, weighed
from fedmllm.sites.settings import write_json

_MOST = 2**32  # a count has four bytes
_CHANGED = (
    "profile: it is not the one that this run began with, so the site's data changed: restore the "
    "data, or begin another run"
)


def to_facts(profile: Profile) -> dict[str, list[int]]:
    """A profile as JSON holds it."""
    return {name: list(counts) for name, counts in asdict(profile).items()}


def from_facts(found: Any, *, classes: int) -> Profile:
    """A profile from JSON, for a task of so many classes. Raises `UserError` if it is none."""
    sizes = {"modalities": len(COMBINATIONS), "labels": classes}
    if not isinstance(found, Mapping) or set(found) != set(sizes):
        raise UserError("profile: none, or not one: counts of modalities and of labels")
    for name, size in sizes.items():
        counts = found[name]
        if not isinstance(counts, list) or len(counts) != size:
            raise UserError(f"profile: {name} are not {size} counts")
        if any(type(count) is not int or not 0 <= count < _MOST for count in counts):
            raise UserError(f"profile: {name} are not whole numbers from 0")
    return Profile(**{name: tuple(found[name]) for name in sizes})


def own_profile(
    config: Config, samples: Sequence[Sample], *, classes: int, client: str, noise: str, file: Path
) -> Profile:
    """A site's profile as it sends it, with the noise of `strategy.epsilon`.

    noise: ``secret``, drawn once and kept in `file`; or ``seed``, that of an in-process run.
    Raises `UserError` if what was kept cannot be read.
    """
    exact, epsilon = profile_of(samples, classes), config.strategy.epsilon
    if epsilon is None or noise == "seed":
        return noised(exact, epsilon, client=client, seed=config.seed)
    if file.exists():
        return _kept(file, classes)
    drawn = noised(exact, epsilon, client=client, seed=None)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, to_facts(drawn))
    return drawn


def _kept(file: Path, classes: int) -> Profile:
    try:
        return from_facts(json.loads(file.read_text()), classes=classes)
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): restore it, or remove it, which draws the noise on "
            "this site's profile a second time and so tells more than strategy.epsilon allows"
        ) from error


class Profiles:
    """The profiles that the server was sent, the first of each site; kept in `file`, the run's."""

    def __init__(self, config: Config, file: Path) -> None:
        self.config, self.file = config, file
        kept = json.loads(file.read_text()).get("profiles", {})
        self.known = {
            site: from_facts(facts, classes=len(facts["labels"])) for site, facts in kept.items()
        }

    def take(self, site: str, facts: Mapping[str, Any]) -> list[str]:
        """Take the profile that a site states in the handshake; says what is wrong with it."""
        try:
            found = from_facts(facts.get("profile"), classes=len(facts["task"]["classes"]))
        except UserError as error:
            return [str(error)]
        except (KeyError, TypeError):
            return ["task: the site states none, and its profile counts the classes of one"]
        if site in self.known:
            exact = self.config.strategy.epsilon is None
            changed = exact and self.known[site] != found
            return [_CHANGED] if changed else []
        self.known[site] = found
        kept = {name: to_facts(self.known[name]) for name in sorted(self.known)}
        write_json(self.file, {**json.loads(self.file.read_text()), "profiles": kept})
        return []

    def parties(self) -> Parties:
        """What is made of those that are known by now."""
        return weighed(self.config, self.known)
