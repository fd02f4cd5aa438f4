"""A site's work: its data, its base model, and the functions of an in-process run on them.

Runs in a process of its own (`trainer.py`), which keeps the base loaded over all rounds of a job.
What a client keeps between rounds (SCAFFOLD's c_k) stays on the site's disk, one file a round; the
server says which of them its state builds on, so that a run that goes on after a kill, and a round
whose update came too late, leave nothing behind.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import fedmllm
from fedmllm import manifest as manifests
from fedmllm.algorithms.base import Params, Update
from fedmllm.config import Config
from fedmllm.data import load_dataset
from fedmllm.data.dataset import Dataset
from fedmllm.errors import UserError
from fedmllm.evaluation import TestSet
from fedmllm.evidence import MOST as TESTED
from fedmllm.evidence import Seen, Sums
from fedmllm.experiment import (
    EVERYONE,
    Federation,
    Session,
    Shared,
    algorithm_of,
    load_model,
    local_runner,
    make_manifest,
    own_samples,
    represent,
    score_own,
    spare_tower,
)
from fedmllm.heterogeneity import Profile
from fedmllm.mixtures import Mixtures
from fedmllm.models import model_path
from fedmllm.models.mllm import Mllm
from fedmllm.parties import hits_of, mixtures_by, parties_of, seen_of, sums_of
from fedmllm.sites import agreed, digests, exchange, handshake, profiles, settings, wire
from fedmllm.sites.handshake import RefusedError
from fedmllm.sites.wire import Message, pack_update, unpack_state

KEEP = 3  # newest memories of a client; the one that the server builds on besides


class Site:
    """One site with its model and data loaded. Raises `UserError` if it cannot take part."""

    def __init__(self, kit: Path, config_sha256: str) -> None:
        self.kit, self.file = kit, settings.load_site(kit)
        self.name, self.sha256 = self.file.name, config_sha256
        experiment = agreed.find_experiment(
            kit / self.file.experiments, config_sha256, who=f"site {self.name}"
        )
        self.config = agreed.site_config(kit, self.file, experiment)
        agreed.check_reveal(self.config, self.file)
        torch.set_num_threads(self.config.threads)
        dataset = load_dataset(**self.config.data)
        held = make_manifest(self.config, dataset)
        self.manifest_sha256 = self._checked(held, dataset)
        train, self.held_out = self._own(held, dataset)
        self.session = session_of(self.config, load_model(self.config), dataset, kit)
        own = Federation(EVERYONE, {self.name: train}, self.config.training.rounds)
        self.profile = self._profile(train)
        known = parties_of(self.config, self.session.task, own.samples)
        self.runner = local_runner(self.session, own, known.weights)
        self.own, self.given = own, ""  # the run whose outcome of the exchange the runner has
        self.seen: dict[str, Seen] | None = None
        self.samples = len(train)
        spare_tower(self.config, self.session.mllm, [*train, *self.held_out])
        self.base_sha256 = digests.base_digest(
            model_path(self.config.model.name, self.config.model.path)
        )

    def hello(self, server: Mapping[str, Any]) -> Message:
        """What this site is, and why it will not train with this server if it will not."""
        mllm = self.session.mllm
        facts = {
            **handshake.common(fedmllm.__version__),
            "config_sha256": self.sha256,
            "base_sha256": self.base_sha256,
            "tokenizer_sha256": digests.tokenizer_digest(mllm.processor),
            "layout": digests.layout(mllm.get_adapter()),
            "manifest_sha256": self.manifest_sha256,
            "samples": self.samples,
            "held_out": bool(self.held_out),
            "task": asdict(self.session.task),
            "reveal": self.file.reveal.model_dump(),
        }
        if self.profile is not None:
            facts["profile"] = profiles.to_facts(self.profile)
        if self.config.strategy.mixtures:
            facts["images"] = self._has_images()
        if exchange.used(self.config):
            run = str(server.get("run"))
            facts["exchanged"] = run.isalnum() and self._outcome_file(run).exists()
        problems = handshake.differences(server, facts)
        if not self.file.reveal.samples:
            facts["samples"] = None
        return Message(facts={**facts, "problems": problems})

    def answer(self, task: str, message: Message) -> Message:
        """What a task of `wire.TASKS` asks for."""
        if task == "hello":
            return self.hello(message.facts)
        work = {
            "sums": self.sums,
            "hits": self.hits,
            "mixtures": self.mixtures,
            "exchanged": self.exchanged,
            "train": self.train,
            "evaluate": self.evaluate,
        }
        return work[task](message)

    def train(self, message: Message) -> Message:
        """One round on this site's own samples: `train_client` as in process."""
        facts, state = message.facts, unpack_state(message)
        round_, run = state.round + 1, self._run_folder(str(facts["run"]))
        algorithm = algorithm_of(
            self.config, int(facts["clients"]), self.session.mllm, self.session.task
        )
        if exchange.used(self.config):
            self._take_given(str(facts["run"]))
        if self.config.strategy.weighs_by_profile:
            self.runner.weights = {self.name: self._weight(facts)}
        since = int(facts["since"])
        kept = self._memory(run, since)
        self.runner.memory = {} if kept is None else {self.name: kept}
        arrivals = self.runner.train(round_, [self.name], algorithm, state, lr=float(facts["lr"]))
        update = next(update for _, update in arrivals)
        memory = self.runner.memory.get(self.name)
        if memory is not None:
            _keep(run, round_, memory, since)
        packed = pack_update(self._revealed(update))
        return Message(packed.tensors, {"update": packed.facts, "memory": memory is not None})

    def evaluate(self, message: Message) -> Message:
        """Scores of the adapter on what this site held out; nothing where it reveals none."""
        if not self.held_out or not self.file.reveal.metrics:
            return Message(facts={"metrics": {}})
        self.session.mllm.set_adapter(unpack_state(message).params)
        return Message(facts={"metrics": score_own(self.session, self.held_out)})

    # -- before the first round ----------------------------------------------------------------

    def sums(self, message: Message) -> Message:
        """Sums of this site's samples through each modality (`strategy.evidence`)."""
        self._check_asked("evidence")
        return exchange.pack_sums(self._sums())

    def hits(self, message: Message) -> Message:
        """This site's test against everybody's sums. Raises `RefusedError` if its own are not
        among them."""
        self._check_asked("evidence")
        own, classes = self._sums(), len(self.session.task.classes)
        everybody = exchange.unpack_sums(
            message,
            classes=classes,
            width=self.session.mllm.width,
            most=TESTED * exchange.sites_of(message, self.config),
        )
        for name, one in own.items():
            if name not in everybody or (everybody[name].counts < one.counts).any():
                raise RefusedError(f"the server's sums of {name} lack those of {self.name}")
        return exchange.pack_hits(hits_of(self._seen(), own, everybody))

    def mixtures(self, message: Message) -> Message:
        """Means of features of this site's images (`strategy.mixtures`)."""
        self._check_asked("mixtures")
        held = self.own.samples[self.name]
        made = mixtures_by(self.config, self.session.mllm, held, client=self.name)
        return exchange.pack_mixtures(made)

    def exchanged(self, message: Message) -> Message:
        """Keep what came of the exchange."""
        run = self._run_folder(str(message.facts["run"]))
        self._read_given(message)
        exchange.keep(message, run / exchange.FILE)
        self.given = ""  # it is read when it is needed
        return Message(facts={"exchanged": True})

    def _seen(self) -> dict[str, Seen]:
        if self.seen is None:
            held, look = self.own.samples[self.name], partial(represent, self.session)
            self.seen = seen_of(self.config, held, look, client=self.name)
        return self.seen

    def _sums(self) -> dict[str, Sums]:
        return sums_of(self._seen(), len(self.session.task.classes))

    def _check_asked(self, key: str) -> None:
        if not getattr(self.config.strategy, key):
            raise RefusedError(f"the experiment has no strategy.{key}")

    def _has_images(self) -> bool:
        return any(sample.image is not None for sample in self.own.samples[self.name])

    def _take_given(self, run: str) -> None:
        """Train with what came of this run's exchange. Raises `RefusedError` if it is not there."""
        if self.given == run:
            return
        file = self._outcome_file(run)
        if not file.exists():
            raise RefusedError(
                f"{self.name} has lost what it was given before the first round ({file.name}): "
                "restore it, or restart the site, which is then given it again"
            )
        fill, pool = self._read_given(wire.read(file))
        if pool:
            held, style = self.own.samples[self.name], self.config.prompt
            pool = exchange.usable(pool, self.session.mllm, self.session.task, held, style=style)
        self.runner = local_runner(self.session, self.own, self.runner.weights, pool or None, fill)
        self.given = run

    def _read_given(self, message: Message) -> tuple[tuple[str, ...], Mixtures]:
        classes, mllm = self.session.task.classes, self.session.mllm
        fill, pool = exchange.unpack_outcome(message, self.config, classes=classes, mllm=mllm)
        if pool and self._has_images():
            raise RefusedError(f"{self.name} was given mixtures, and it has images")
        return fill, pool

    def _outcome_file(self, run: str) -> Path:
        return self.kit / self.file.state / run / exchange.FILE

    # -- what it holds -------------------------------------------------------------------------

    def _profile(self, train: list[Any]) -> Profile | None:
        """What it sends of its samples by kind, if the experiment asks for that."""
        if not self.config.strategy.uses_profiles:
            return None
        return profiles.own_profile(
            self.config,
            train,
            classes=len(self.session.task.classes),
            client=self.name,
            noise=self.file.noise,
            file=self.kit / self.file.state / f"profile-{self.sha256[:16]}.json",
        )

    def _weight(self, facts: Mapping[str, Any]) -> float:
        """This party's w_k, which the server made of all profiles."""
        given: Any = facts.get("weight")
        most = self.config.strategy.w
        if type(given) not in (int, float) or not 0 <= given <= most:
            raise RefusedError(
                f"the server gave {self.name} the weight {given!r} of the regularisation: with "
                f"strategy.w it is a number from 0 to {most}"
            )
        return float(given)

    def _checked(self, held: manifests.Manifest, dataset: Dataset) -> str | None:
        """The hash of the split; None where nobody else has this data, and can know it."""
        if self.file.data.manifest is not None:
            given = manifests.load(self.kit / self.file.data.manifest)
            if given.sha256 != held.sha256:
                found = manifests.differences(given, held)[:3]
                print(*found, sep="\n", file=sys.stderr)
                raise RefusedError(
                    f"the manifest of {self.name} ({given.sha256[:12]}) is not of the data there "
                    f"({held.sha256[:12]}): restore the data, or the manifest"
                )
        return None if set(dataset.parties) == {self.name} else held.sha256

    def _own(self, held: manifests.Manifest, dataset: Dataset) -> tuple[list[Any], list[Any]]:
        train, out = own_samples(self.config, dataset, held)
        if self.name not in train:
            raise RefusedError(
                f"the data at {self.name} is another party's: a site bears its party's name, and "
                "so does its file (NAME.json); a table or saved data set of its own stands in "
                "data.file"
            )
        if not train[self.name]:
            raise RefusedError(f"{self.name} has no samples to train on: at least 1 is needed")
        return train[self.name], out[self.name]

    def _revealed(self, update: Update) -> Update:
        if not self.file.reveal.samples:
            update = replace(update, num_samples=1)
        return update if self.file.reveal.metrics else replace(update, metrics={})

    # -- memory --------------------------------------------------------------------------------

    def _run_folder(self, run: str) -> Path:
        if not run.isalnum():
            raise UserError(f"{run!r} is not the name of a run")
        folder = self.kit / self.file.state / run
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _memory(self, run: Path, since: int) -> Params | None:
        """What this client kept from round `since`, on which the server's state builds."""
        if not since:
            return None
        file = run / _name(since)
        if not file.exists():
            raise RefusedError(
                f"{self.name} has lost what it kept from round {since} ({_name(since)}): restore "
                "it; without it this algorithm would go on from a state that never was"
            )
        return dict(sorted(load_file(file).items()))


def session_of(config: Config, mllm: Mllm, dataset: Dataset, folder: Path) -> Session:
    """What the functions of a run share. No test is made of it at a site."""
    shared = Shared(mllm, {Shared.data_key(config): dataset})
    test = TestSet(
        mllm, dataset.task, [], style=config.prompt, max_length=config.training.max_length
    )
    listener: Callable[[Mapping[str, Any]], None] = lambda event: None  # noqa: E731
    return Session(config, folder, shared, dataset.task, test, listener, time.perf_counter())


def _keep(run: Path, round_: int, memory: Params, since: int) -> None:
    """Write a client's memory and delete old ones, but never that of round `since`, on which the
    server's state builds: rounds that came too late may be many."""
    draft = run / "draft.safetensors"
    save_file(memory, draft)
    with draft.open("rb") as opened:
        os.fsync(opened.fileno())
    draft.replace(run / _name(round_))
    for old in sorted(run.glob("memory-*.safetensors"))[:-KEEP]:
        if old.name != _name(since):
            old.unlink()


def _name(round_: int) -> str:
    return f"memory-{round_:06d}.safetensors"
