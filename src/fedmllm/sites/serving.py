"""The server's run: the experiment's rounds over a `Link`, and the same run folder as in process.

A run goes on by itself: a job that was aborted, or whose server was killed, is submitted again and
continues after the last checkpoint, to the same bits as far as the same sites deliver.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fedmllm
from fedmllm import checkpoint, results
from fedmllm.config import Config, config_hash, load_config
from fedmllm.data import load_dataset
from fedmllm.data.dataset import Dataset
from fedmllm.data.sample import Task
from fedmllm.errors import UserError
from fedmllm.evaluation import TestSet
from fedmllm.experiment import (
    EVERYONE,
    Federation,
    Outcome,
    Session,
    Shared,
    algorithm_of,
    check_folder,
    load_model,
    load_shapes,
    make_folder,
    make_manifest,
    make_result,
    over_parties,
    run_federation,
    save_adapter,
    spare_tower,
    write_result,
)
from fedmllm.models import model_path
from fedmllm.models.mllm import Mllm
from fedmllm.parties import Parties
from fedmllm.sites import digests, exchange, handshake, settings
from fedmllm.sites.agreed import find_experiment, server_config
from fedmllm.sites.central import Link, NetworkRunner
from fedmllm.sites.exchange import Exchanges
from fedmllm.sites.profiles import Profiles
from fedmllm.sites.settings import STATUS_FILE

Accept = Callable[[str, Mapping[str, Any]], list[str]]
RUN_FILE = "network.json"
_EVERY = 1.0  # seconds between two versions of the status that differ in numbers only


def serve(kit: Path, config_sha256: str, link: Link, *, job: str = "") -> dict[str, Any]:
    """Run an experiment's rounds over the sites behind `link`, to its end; returns its result.

    kit: the server's folder. job: its name where the link has one. Writes
    runs/NAME in it; `STATUS_FILE` says what it waits for.
    Raises `UserError` for anything a person can mend.
    """
    began = time.perf_counter()
    file = settings.load_server(kit)
    experiment = find_experiment(kit / file.experiments, config_sha256, who="the server")
    agreed, config = load_config(experiment), server_config(kit, file, experiment)
    torch.set_num_threads(config.threads)
    folder = kit / file.runs / agreed.name
    rounds = config.training.rounds
    status = Status(folder / STATUS_FILE, name=agreed.name, job=job, pid=os.getpid(), rounds=rounds)
    try:
        check_folder(folder, agreed, resume=True, overwrite=False)
        make_folder(folder, agreed, overwrite=False)
        saved = checkpoint.load(folder / "state" / EVERYONE)
        if saved is not None:
            status.facts["rounds_done"] = saved.state.round
        del saved  # its memory is for the run, which reads it again
        status.tell({"doing": "loading the model"})
        result = _serve(config, agreed, file, folder, link, status, began)
    except UserError as error:
        status.tell({"doing": "stopped", "error": str(error)})
        raise
    status.tell({"doing": "done"})
    return result


def _serve(
    config: Config,
    agreed: Config,
    file: settings.ServerFile,
    folder: Path,
    link: Link,
    status: Status,
    began: float,
) -> dict[str, Any]:
    dataset = None if file.data.none else _dataset(config)
    tests = [] if dataset is None else dataset.test
    shapes = None if tests else load_shapes(config)
    mllm = load_model(config) if shapes is None else shapes
    run = _run_id(folder)
    runner = NetworkRunner(
        link=link,
        sites=sorted(file.sites),
        server={**_facts(config, agreed, mllm, dataset), "run": run},
        run=run,
        min_sites=file.min_sites,
        deadline=file.deadline,
        hello_deadline=file.hello_deadline,
        tell=status.tell,
    )
    parties = _parties(config, runner, folder / RUN_FILE)
    exchanges = Exchanges(
        config, runner, file=folder / "state" / exchange.FILE, run_file=folder / RUN_FILE
    )
    runner.accept = _all_of(runner.accept, exchanges.accept)
    runner.greet_all()
    session = _session(config, agreed, folder, mllm, dataset, runner)
    session.listener = status.event
    if tests:
        spare_tower(config, mllm, tests)
    federation = Federation(EVERYONE, dict.fromkeys(runner.sites, ()), config.training.rounds)
    algorithm = algorithm_of(config, len(runner.sites), mllm, session.task)
    if not all(facts["reveal"]["samples"] for facts in runner.facts.values()):
        algorithm = replace(algorithm, weighting="uniform")
    runner.weighted = algorithm.weighting == "samples"
    session.resumed = "rounds_done" in status.facts
    if exchange.used(config):
        exchanges.begin(session.task, mllm)
    outcome = run_federation(
        session, federation, runner=runner, algorithm=algorithm, parties=parties
    )
    found, given = exchanges.found()
    outcome = replace(outcome, evidence=found, exchange=given)
    save_adapter(session, [outcome])
    return _write_result(session, outcome, runner, dataset, time.perf_counter() - began)


def _all_of(*checks: Accept) -> Accept:
    return lambda site, facts: [line for check in checks for line in check(site, facts)]


def _parties(config: Config, runner: NetworkRunner, file: Path) -> Callable[[], Parties] | None:
    """What is made of the sites' profiles, where the experiment asks for them. file: the run's."""
    if not config.strategy.uses_profiles:
        return None
    profiles = Profiles(config, file)
    runner.accept = profiles.take

    def parties() -> Parties:
        found = profiles.parties()
        runner.weights = found.weights if config.strategy.weighs_by_profile else {}
        return found

    return parties


def _dataset(config: Config) -> Dataset:
    return load_dataset(**config.data)


def _facts(config: Config, agreed: Config, mllm: Mllm, dataset: Dataset | None) -> dict[str, Any]:
    """What the server states of itself in the handshake."""
    own = dataset is not None and bool(dataset.train) and not dataset.parties
    held = make_manifest(config, dataset).sha256 if own and dataset is not None else None
    return {
        **handshake.common(fedmllm.__version__),
        "config_sha256": config_hash(agreed),
        "base_sha256": digests.base_digest(model_path(config.model.name, config.model.path)),
        "tokenizer_sha256": digests.tokenizer_digest(mllm.processor),
        "layout": digests.layout(mllm.get_adapter()),
        "manifest_sha256": held,
    }


def _session(
    config: Config,
    agreed: Config,
    folder: Path,
    mllm: Mllm,
    dataset: Dataset | None,
    runner: NetworkRunner,
) -> Session:
    """A session whose result states the experiment as it was agreed on."""
    task = dataset.task if dataset is not None else _task(runner)
    tests = [] if dataset is None else dataset.test
    test = TestSet(
        mllm,
        task,
        tests,
        style=config.prompt,
        max_length=config.training.max_length,
        long_text=config.training.long_text,
    )
    shared = Shared(mllm)
    return Session(agreed, folder, shared, task, test, lambda event: None, time.perf_counter())


def _task(runner: NetworkRunner) -> Task:
    """The task as the sites state it, all alike."""
    facts = dict(next(iter(runner.facts.values()))["task"])
    facts["classes"] = tuple(facts["classes"])
    return Task(**facts)


def _write_result(
    session: Session,
    outcome: Outcome,
    runner: NetworkRunner,
    dataset: Dataset | None,
    seconds: float,
) -> dict[str, Any]:
    """result.json: an in-process run's, with what sites revealed in place of who holds what."""
    result = make_result(session, None, [outcome], seconds)
    found, missing = runner.evaluate(outcome.params)
    if found or missing:
        result["held_out"] = over_parties(found) | ({"missing": missing} if missing else {})
    result["network"] = {
        "sites": list(runner.sites),
        "min_sites": runner.min_sites,
        "deadline": runner.deadline,
        "weighted": "samples" if runner.weighted else "uniform",
        "samples": {site: facts["samples"] for site, facts in sorted(runner.facts.items())},
        "refused": dict(sorted(runner.refused.items())),
    }
    if runner.missed:
        result["network"]["not_in_exchange"] = dict(runner.missed)
    write_result(session.folder, result, [outcome], dataset)
    return result


def _run_id(folder: Path) -> str:
    """The id of this run folder: sites keep what they keep under it."""
    file = folder / RUN_FILE
    if not file.exists():
        results.write_json(file, {"run": uuid.uuid4().hex})
    return str(json.loads(file.read_text())["run"])


class Status:
    """status.json: what the server does and whom it waits for, for people and the supervisor."""

    def __init__(self, file: Path, **facts: Any) -> None:
        self.file, self.facts = file, facts
        self.last: dict[str, Any] = {}
        self.written = 0.0
        self.seen: list[Callable[[Mapping[str, Any]], None]] = []

    def tell(self, status: Mapping[str, Any]) -> None:
        """Write the status if it differs from the last one."""
        new = {k: v for k, v in status.items() if k != "seconds_left"}
        now = time.monotonic()
        if new == self.last and now - self.written < _EVERY:
            return
        self.last, self.written = dict(new), now
        if self.file.parent.is_dir():
            results.write_json(self.file, {**self.facts, **status, "at": time.time()})

    def event(self, event: Mapping[str, Any]) -> None:
        """An event of the run (`experiment.Listener`)."""
        if event["event"] == "round":
            self.facts["rounds_done"] = event["round"]
            self.facts["loss"] = event["loss"]
            self.last = {}
