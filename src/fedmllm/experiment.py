"""From a config to a result: the one place that takes a config apart.

    result = run(load_config("experiments/memes-fedavg.yaml"), out="runs/mine")

Zero-shot, local and centralised differ from federated only in who federates with whom
(`federations`); the loop is the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
import torch
import yaml

from fedmllm import checkpoint, heterogeneity, manifest, results
from fedmllm.algorithms import make_algorithm
from fedmllm.algorithms.aggregation import make_aggregation, with_aggregation
from fedmllm.algorithms.base import (
    Algorithm,
    Alignment,
    Composition,
    Params,
    Proximal,
    ServerState,
    check_enough,
)
from fedmllm.client import LocalPlan, learning_rate
from fedmllm.config import HASH_KEY, Config, config_hash, options_of
from fedmllm.data import load_dataset
from fedmllm.data.dataset import Dataset
from fedmllm.data.images import ArchiveImage, EncodedImage, ImageFile
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.evaluation import CONDITIONS, Readers, TestSet, mean_over, modality_alignment
from fedmllm.evidence import MODALITIES
from fedmllm.federation import (
    InProcessRunner,
    RoundRecord,
    Runner,
    cohort_of,
    message_parts,
    run_round,
)
from fedmllm.folders import Hold
from fedmllm.folders import held as held_folder
from fedmllm.fusion import Fusion
from fedmllm.mixtures import Mixtures
from fedmllm.models import model_path, weights_digest
from fedmllm.models.components import COMPONENTS, make_policy
from fedmllm.models.loading import resolve_dtype
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.models.recent import Recent
from fedmllm.parties import Evidence, Exchange, Parties, evidence_of, exchange_of, parties_of
from fedmllm.partition import held_out
from fedmllm.prompts import render
from fedmllm.recombination import completions
from fedmllm.report.loading import result_digest
from fedmllm.revisions import revisions_of
from fedmllm.strategies import edge_layers, with_strategy

if TYPE_CHECKING:
    from fedmllm.helpers import Helpers

Event = Mapping[str, Any]
Listener = Callable[[Event], None]
WAYS = ("up", "down")  # from client to server, and back
EVERYONE = ""  # the federation of all; a local run has one named after each client
ADAPTER_FACTS = "fedmllm.json"
# what a process keeps of its runs, beyond what the present one holds
ENCODED_TOKENS = 8_000_000  # some 300 MB
TEST_SETS = 8
CONFIG_FILE = "config.yaml"
STATE_FOLDER = "state"  # checkpoints, by federation
MANIFEST_FILE = "manifest.json"
ANSWERS_FILE = "answers.jsonl"
GROUPS = "groups"  # in a round's line: of clients that shared a pass, and how many still may
SHORTENED_FILE = "shortened.json"  # ids of all samples whose text was
VERDICTS_FILE = "verdicts.jsonl"  # replies of a judge, which may have been paid for
# what a run writes; a folder with anything else is never overwritten
WRITTEN = (
    f"{CONFIG_FILE}*",
    f"{MANIFEST_FILE}*",
    "metrics*.jsonl*",
    STATE_FOLDER,
    "adapter",
    "answers.jsonl*",
    f"{SHORTENED_FILE}*",
    "result.json*",
    "judged.json*",
    VERDICTS_FILE,
    "report.html",
    "network.json*",  # of a run over several machines (sites/)
    "status.json*",
)


@dataclass
class Federation:
    """Who trains together: its name, the samples of each client, and the rounds it runs."""

    name: str
    samples: Mapping[str, Sequence[Sample]]
    rounds: int

    def shares_passes(self, config: Config) -> bool:
        """Whether clients are to train in groups."""
        return config.training.clients_at_once > 1 and len(self.samples) > 1


@dataclass
class Shared:
    """What the runs of one process on one base have in common, so that it is made once: the base
    itself, with the vision features that it keeps; data sets; encoded samples and test sets, those
    used last.

    Nothing in it depends on an adapter. Not for several runs at the same time.
    """

    mllm: Mllm
    datasets: dict[str, Dataset] = field(default_factory=dict)
    tests: Recent[str, TestSet] = field(default_factory=lambda: Recent(TEST_SETS, lambda _: 1))
    checked: set[tuple[Any, ...]] = field(default_factory=set)
    encoded: Recent[tuple[Any, ...], Encoded] = field(
        default_factory=lambda: Recent(
            ENCODED_TOKENS, lambda item: len(item) + sum(map(len, item.options))
        )
    )

    @staticmethod
    def data_key(config: Config) -> str:
        """Configs with one key read the same data set."""
        return json.dumps(config.data, sort_keys=True)

    def dataset(self, config: Config) -> Dataset:
        """The config's data set, read once."""
        key = self.data_key(config)
        if key not in self.datasets:
            self.datasets[key] = load_dataset(**config.data)
        return self.datasets[key]

    def test_set(self, config: Config) -> TestSet:
        """The config's test samples, encoded as they are first asked for."""
        length = config.training.max_length
        key = f"{config.prompt} {length} {config.training.long_text} {self.data_key(config)}"
        found = self.tests.get(key)
        if found is None:
            data = self.dataset(config)
            found = TestSet(
                self.mllm,
                data.task,
                data.test,
                style=config.prompt,
                max_length=length,
                long_text=config.training.long_text,
            )
            self.tests.put(key, found)
        return found

    def encode(self, config: Config, task: Task, sample: Sample) -> Encoded:
        """A training sample as its party sees it; with its masked views where the strategy reads
        them."""
        return self.with_views(config, task, sample, self.encode_whole(config, task, sample))

    def encode_whole(self, config: Config, task: Task, sample: Sample) -> Encoded:
        """A party's sample as the party sees it, to train or to test on, without views."""
        length, long_text = config.training.max_length, config.training.long_text
        held = (sample.id, sample.image is None, sample.text is None)
        key = (*held, config.prompt, length, long_text, self.data_key(config))
        found = self.encoded.get(key)
        if found is None:
            found = self.encode_new(config, task, sample)
            self.encoded.put(key, found)
        return found

    def encode_new(self, config: Config, task: Task, sample: Sample) -> Encoded:
        """A sample that no other run has, such as a completion: not kept here."""
        encoded = self.mllm.encode(
            render(sample, task, config.prompt),
            max_length=config.training.max_length,
            long_text=config.training.long_text,
        )
        return replace(encoded, complete=heterogeneity.is_complete(sample))

    def check(self, config: Config, task: Task, samples: Iterable[Sample]) -> None:
        """Raise the `UserError` for the first sample that could not be encoded when its turn
        comes; each is looked at once."""
        length, long_text = config.training.max_length, config.training.long_text
        for sample in samples:
            held = (sample.id, sample.image is None, sample.text is None)
            key = (*held, config.prompt, length, long_text, self.data_key(config))
            if key in self.checked:
                continue
            prompted = render(sample, task, config.prompt)
            self.mllm.check(prompted, max_length=length, long_text=long_text)
            self.checked.add(key)

    def with_views(self, config: Config, task: Task, sample: Sample, whole: Encoded) -> Encoded:
        """With its masked views, where the strategy reads them."""
        if not config.strategy.uses_views:
            return whole
        views = [self.encode_whole(config, task, view) for view in masked_views(sample)]
        # where its answer was shortened, that of its views is as well
        views = [replace(view, answer=view.answer[: len(whole.answer)]) for view in views]
        return replace(whole, views=tuple(views))


def masked_views(sample: Sample) -> list[Sample]:
    """The sample without its image and without its text, if it has both; a question is never
    taken."""
    if not heterogeneity.is_complete(sample):
        return []
    views = [sample.masked(keep_image=False, keep_text=True)]
    if sample.text is not None:
        views.append(sample.masked(keep_image=True, keep_text=False))
    return views


@dataclass
class Session:
    """What the federations of one run share."""

    config: Config
    folder: Path
    shared: Shared
    task: Task
    test: TestSet
    listener: Listener
    started: float
    resumed: bool = False
    shortened: set[str] = field(default_factory=set)
    helpers: Helpers | None = None

    @property
    def mllm(self) -> Mllm:
        return self.shared.mllm

    def readers(self, params: Params) -> Readers | None:
        """Where test samples are read by an adapter, which the model has; None: here alone."""
        return self.helpers.readers(params) if self.helpers else None


def run(
    config: Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
    mllm: Mllm | None = None,
    shared: Shared | None = None,
    processes: int | None = None,
    devices: Sequence[str] = (),
) -> dict[str, Any]:
    """Run one experiment and return its result, which also lies in `out`/result.json.

    out: the run folder, by default runs/NAME; it must not exist unless `resume` (go on from its
    last checkpoint) or `overwrite`. listener: called with progress events. mllm: a loaded model
    of the same config to use again (a base is loaded once for many runs). shared: the same, and
    what else those runs have in common. processes: how many do the work, each with the base in
    memory, to the same bits (by default one, or one a device); a script that asks for several needs
    the usual `if __name__ == "__main__":`. devices: an accelerator for each by CUDA's number, of
    which this process takes the first.
    Raises `UserError` for anything the user can mend.
    """
    folder = Path(out) if out is not None else Path("runs") / config.name
    count = processes or max(1, len(devices))
    began = time.perf_counter()
    tell = _one_at_a_time(listener or (lambda event: None))
    with contextlib.ExitStack() as stack:
        hold = stack.enter_context(held_folder(folder))
        helpers = None
        if devices:
            stack.enter_context(_seeing_only(devices[0]))
        if count > 1:
            from fedmllm.helpers import Helpers  # which knows this module

            check_folder(folder, config, resume=resume, overwrite=overwrite)
            rest = [devices[i % len(devices)] for i in range(1, count)] if devices else ()
            helpers = stack.enter_context(
                Helpers(config, folder, count=count - 1, devices=rest, tell=tell, began=began)
            )
        return _run(
            config,
            folder,
            began,
            tell,
            hold=hold,
            resume=resume,
            overwrite=overwrite,
            mllm=mllm,
            shared=shared,
            helpers=helpers,
        )


@contextlib.contextmanager
def _seeing_only(device: str) -> Iterator[None]:
    """This process uses one accelerator, by CUDA's number: for good if it has used none before."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = device
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _one_at_a_time(listener: Listener) -> Listener:
    lock = threading.RLock()

    def tell(event: Event) -> None:
        with lock:
            listener(event)

    return tell


def _run(
    config: Config,
    folder: Path,
    began: float,
    tell: Listener,
    *,
    hold: Hold,
    resume: bool,
    overwrite: bool,
    mllm: Mllm | None,
    shared: Shared | None,
    helpers: Helpers | None,
) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    results.reset_peak_memory(config.model.device)
    check_folder(folder, config, resume=resume, overwrite=overwrite)
    make_algorithm(
        config.algorithm["name"],
        num_clients=config.partition.clients,
        **options_of(config.algorithm),
    )
    dataset = shared.dataset(config) if shared else load_dataset(**config.data)
    held = make_manifest(config, dataset)
    if shared is None:
        shared = Shared(mllm or load_model(config), {Shared.data_key(config): dataset})
    algorithm = algorithm_of(config, len(held.clients), shared.mllm, dataset.task)
    if config.topology == "federated":
        parties = len(held.clients)
        size = min(config.training.clients_per_round, parties)
        check_enough(algorithm.aggregation, size, f"a round has {size} of {parties} clients")
    if resume:
        _check_manifest(folder / MANIFEST_FILE, held)
    check_samples(config, shared, dataset, held)
    hold.take()  # only now: bad input has made no folder and lost nothing
    check_folder(folder, config, resume=resume, overwrite=overwrite)  # another may have made it
    make_folder(folder, config, overwrite=overwrite)
    manifest.save(held, folder / MANIFEST_FILE)
    session = Session(
        config=config,
        folder=folder,
        shared=shared,
        task=dataset.task,
        test=shared.test_set(config),
        listener=tell,
        started=began,
        resumed=resume,
        helpers=helpers,
    )
    model = shared.mllm
    found = federations(config, dataset, held)
    _tell(
        session,
        "start",
        parameters=model.parameter_counts(),
        lora_modules=model.lora_modules(),
        copied_modules=model.copied_modules(),
        steps=sum(federation.rounds for federation in found),
    )
    if config.model.drop_tower:
        owned = [s for own in manifest.client_samples(held, dataset).values() for s in own]
        spare_tower(config, model, [*owned, *dataset.test])
    if helpers and len(found) > 1:
        outcomes = helpers.run_apart(session, found)
    else:
        outcomes = [run_federation(session, federation) for federation in found]
    save_adapter(session, outcomes)
    result = make_result(session, held, outcomes, time.perf_counter() - began)
    if config.evaluation.held_out:
        result["held_out"] = _held_out(session, own_samples(config, dataset, held)[1], outcomes)
    if cut := shortened_ids(session):
        results.write_json(folder / SHORTENED_FILE, cut)
    write_result(folder, result, outcomes, dataset)
    _tell(
        session,
        "done",
        metrics=result["metrics"],
        result=str(folder / "result.json"),
        shortened=result.get("shortened"),
    )
    return result


def write_result(
    folder: Path, result: dict[str, Any], outcomes: Sequence[Outcome], dataset: Dataset | None
) -> None:
    """Complete a result by its digests and write it, after the answers that it is made of."""
    if dataset is not None:
        result["data_sha256"] = data_digest(dataset)
    if answers := [line for outcome in outcomes for line in outcome.answers]:
        result["answers_sha256"] = results.write_lines(folder / ANSWERS_FILE, answers)
    result["result_sha256"] = result_digest(result)
    results.write_json(folder / "result.json", result)


def check_folder(folder: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder where something would be lost. Changes nothing.

    A folder is ours if it holds nothing but what a run writes; one in which a run was killed
    before it wrote its config counts as empty.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one of them")
    file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if file is not None:
        raise UserError(f"{file} is a file: choose another run folder with --out")
    if not folder.exists():
        return
    foreign = sorted(p.name for p in folder.iterdir() if not _is_ours(p))
    if foreign:
        raise UserError(
            f"{folder} is not a run folder, it holds {foreign[0]!r}: nothing in it is touched; "
            "choose another with --out"
        )
    resolved = folder / CONFIG_FILE
    if overwrite or not resolved.exists():
        return
    if not resume:
        raise UserError(
            f"run folder {folder} exists: use --resume to go on with it, --overwrite to "
            "replace it, or choose another with --out"
        )
    written = yaml.safe_load(resolved.read_text())
    if not isinstance(written, dict) or written.get(HASH_KEY) != config_hash(config):
        raise UserError(
            f"run folder {folder} holds a run with another config ({resolved}): "
            "resume it with that config or choose another --out"
        )


def make_folder(folder: Path, config: Config, *, overwrite: bool) -> None:
    """Make the run folder, which `check_folder` has passed, and write the resolved config.

    Without its config nothing in it is gone on with: so that goes last, and checkpoints that lack
    theirs go too.
    """
    resolved = folder / CONFIG_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not resolved.exists():
        shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
    if overwrite:
        for path in sorted(folder.iterdir(), key=lambda path: path == resolved):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != VERDICTS_FILE:  # known by what was judged, so still true
                path.unlink()
    facts = {**config.model_dump(mode="json"), HASH_KEY: config_hash(config)}
    draft = folder / f"{CONFIG_FILE}.draft"
    draft.write_text(yaml.safe_dump(facts, sort_keys=False))
    draft.replace(resolved)


def _is_ours(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in WRITTEN)


def _check_manifest(file: Path, held: manifest.Manifest) -> None:
    """A run that goes on must go on with the samples that it began with."""
    if file.exists() and manifest.load(file).sha256 != held.sha256:
        raise UserError(
            f"the data changed since this run began: {file} says who held what then; restore the "
            "data, or start anew with --overwrite or another --out"
        )


def torch_dtype(config: Config) -> torch.dtype:
    """Of the base's arithmetic on the config's device."""
    found: torch.dtype = getattr(torch, resolve_dtype(config.model.dtype, config.model.device))
    return found


def load_model(config: Config) -> Mllm:
    """The base of a config with a fresh adapter."""
    return Mllm.load(
        config.model.name,
        model_path(config.model.name, config.model.path),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        dtype=torch_dtype(config),
        device=config.model.device,
        quantization=config.model.quantization,
        gradient_checkpointing=config.model.gradient_checkpointing,
        remote_code=config.model.remote_code,
        policy=make_policy(config.trained["name"], **options_of(config.trained)),
        feature_cache=config.model.feature_cache,
        feature_cache_gb=config.model.feature_cache_gb,
        feature_memory_gb=config.model.feature_memory_gb,
    )


def spare_tower(config: Config, mllm: Mllm, samples: Sequence[Sample]) -> None:
    """Take the vision tower out of memory where `model.drop_tower` says so. samples: all of the
    run, whose images pass the tower first."""
    wanted = config.model.drop_tower
    if wanted == "auto" and mllm.device.type == "cpu":
        return
    if wanted:
        mllm.drop_tower(samples, if_kept=wanted == "auto")


def load_shapes(config: Config) -> Mllm | None:
    """The adapter of a config around a base without weights, for who neither trains nor tests;
    None where the adapter starts from the base's own weights."""
    policy = make_policy(config.trained["name"], **options_of(config.trained))
    if policy.connector == "full" or policy.embeddings == "full":
        return None
    return Mllm.shapes(
        config.model.name,
        model_path(config.model.name, config.model.path),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        dtype=torch_dtype(config),
        remote_code=config.model.remote_code,
        policy=policy,
    )


def make_manifest(config: Config, dataset: Dataset) -> manifest.Manifest:
    """Who holds what, drawn from the seed."""
    return manifest.build_manifest(
        config.data["name"],
        dataset,
        clients=config.partition.clients,
        partition=config.partition.name,
        alpha=config.partition.alpha,
        scenario=config.scenario["name"],
        scenario_options=options_of(config.scenario),
        seed=config.seed,
    )


def data_digest(dataset: Dataset) -> str:
    """SHA-256 of the samples of a data set: ids, words, labels, and of each picture its name and
    its file's or archive's size in bytes (what a drawn picture is drawn from; the name alone of
    one inside a table).

    Reads no picture, so that it costs nothing; one that is replaced by another of the same name
    and the same size is not noticed.
    """
    digest = hashlib.sha256()
    parties = [dataset.parties[name] for name in sorted(dataset.parties)]
    for pool in (dataset.train, dataset.test, dataset.flashcards, *parties):
        for sample in pool:
            words = (sample.id, sample.answer, sample.question, sample.text, sample.label)
            facts = (*words, sample.kind, sample.turns, _picture(sample))
            digest.update(json.dumps(facts).encode())
        digest.update(b"|")
    return digest.hexdigest()


def _picture(sample: Sample) -> str | None:
    image = sample.image
    if isinstance(image, ImageFile):
        return f"{image.path} {_size(image.file)}"
    if isinstance(image, ArchiveImage):
        return f"{image.member} {_size(image.archive)}"
    if isinstance(image, EncodedImage):
        return image.file.name
    return None if image is None else image.key


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.exists() else None


def own_samples(
    config: Config, dataset: Dataset, held: manifest.Manifest
) -> tuple[dict[str, list[Sample]], dict[str, list[Sample]]]:
    """Each client's samples to train on, and those that it holds out (`evaluation.held_out`)."""
    share = config.evaluation.held_out
    train: dict[str, list[Sample]] = {}
    out: dict[str, list[Sample]] = {}
    for client, samples in manifest.client_samples(held, dataset).items():
        kept = held_out([sample.id for sample in samples], share=share, seed=config.seed)
        train[client] = [sample for sample in samples if sample.id not in kept]
        out[client] = [sample for sample in samples if sample.id in kept]
    return train, out


def check_samples(
    config: Config, shared: Shared, dataset: Dataset, held: manifest.Manifest
) -> None:
    """Refuse a run with a sample that would stop it in the middle: too long, or with an image file
    that cannot be read. Raises `UserError`, which names it."""
    train, out = own_samples(config, dataset, held)
    pools = [*train.values()] if config.topology != "zero-shot" else []
    pools += out.values()
    shared.check(config, dataset.task, itertools.chain(*pools))
    for condition in config.evaluation.conditions:
        image, text = CONDITIONS[condition]
        masked = (sample.masked(keep_image=image, keep_text=text) for sample in dataset.test)
        shared.check(config, dataset.task, masked)


def federations(config: Config, dataset: Dataset, held: manifest.Manifest) -> list[Federation]:
    """Who federates with whom, by topology."""
    samples, _ = own_samples(config, dataset, held)
    rounds = config.training.rounds
    if config.topology == "zero-shot":
        return [Federation(EVERYONE, samples, 0)]
    if config.topology == "centralised":
        pooled = [sample for client in sorted(samples) for sample in samples[client]]
        return [Federation(EVERYONE, {"pooled": pooled}, rounds)]
    if config.topology == "local":
        return [Federation(name, {name: samples[name]}, rounds) for name in sorted(samples)]
    return [Federation(EVERYONE, samples, rounds)]


@dataclass(frozen=True)
class Outcome:
    """A finished federation: its adapter, its rounds, its test metrics by condition, and what it
    answered to open test questions.

    measured: `modality_alignment` of the final adapter. heterogeneity, once, fusion: see `Parties`.
    exchange, evidence: of mixed features and of what each modality tells, before the first round.
    """

    name: str
    params: Params
    history: list[dict[str, Any]]
    metrics: dict[str, dict[str, float]]
    evaluate_seconds: float
    answers: list[dict[str, str]] = field(default_factory=list)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    heterogeneity: dict[str, Any] | None = None
    once: tuple[int, int] = (0, 0)
    exchange: Exchange | None = None
    evidence: Evidence | None = None
    fusion: Fusion | None = None


def run_federation(
    session: Session,
    federation: Federation,
    *,
    runner: Runner | None = None,
    algorithm: Algorithm | None = None,
    parties: Callable[[], Parties] | None = None,
) -> Outcome:
    """Run (or go on with) one federation to its last round and test it.

    runner: where its clients train, by default in this process. algorithm: by default the config's.
    parties: what is made of the profiles that are known, asked before each round; by default those
    of the clients in this process, and of a `runner`'s none.
    """
    config = session.config
    if algorithm is None:
        algorithm = algorithm_of(config, len(federation.samples), session.mllm, session.task)
    known, exchange, evidence = Parties({}, {}), None, None
    if runner is None:
        known = parties_of(config, session.task, federation.samples)
        evidence = evidence_of(
            config, len(session.task.classes), partial(represent, session), federation.samples
        )
        fill = evidence.filled if evidence else MODALITIES
        exchange = exchange_of(config, session.mllm, federation.samples, fill)
        mixtures = exchange.pool if exchange else None
        make = session.helpers.runner if session.helpers else local_runner
        runner = make(session, federation, known.weights, mixtures, fill)
    folder = session.folder / STATE_FOLDER / federation.name
    state = algorithm.init(session.mllm.init_adapter(config.seed))
    history: list[dict[str, Any]] = []
    found = checkpoint.load(folder)
    if found is not None:
        state, history = found.state, found.history
        runner.memory = dict(found.memory)
        if isinstance(runner, InProcessRunner) and history and GROUPS in history[-1]:
            runner.clients_at_once = history[-1][GROUPS]["at_once"]
    while state.round < federation.rounds:
        ready = runner.ready(list(federation.samples))
        known = parties() if parties else known
        cohort = cohort_of(
            ready,
            config.training.clients_per_round,
            seed=config.seed,
            round_=state.round + 1,
            chances=known.chances,
        )
        lr = learning_rate(
            state.round + 1,
            rounds=federation.rounds,
            peak=config.training.lr,
            warmup=config.training.warmup,
        )
        state, record = run_round(
            runner,
            algorithm,
            state,
            cohort,
            lr=lr,
            scales=known.scales,
            drift=config.evaluation.drift,
            scratch=folder,
        )
        history.append(_record(session, federation, record, state.params, known.fusion))
        if isinstance(runner, InProcessRunner) and federation.shares_passes(config):
            held = {"sizes": list(runner.groups), "at_once": runner.clients_at_once}
            history[-1][GROUPS] = held
        checkpoint.save(folder, checkpoint.Checkpoint(state, runner.memory, history))
        _write_history(session.folder, federation.name, history)
        _tell(session, "round", federation=federation.name, rounds=federation.rounds, **history[-1])
    known = parties() if parties else known
    outcome = _test(session, federation, state, history, known.fusion)
    return replace(
        outcome,
        heterogeneity=known.facts(config),
        once=known.once,
        exchange=exchange,
        evidence=evidence,
        fusion=known.fusion,
    )


def algorithm_of(config: Config, clients: int, mllm: Mllm, task: Task) -> Algorithm:
    """The config's algorithm, with its aggregation and strategy, for a federation of so many
    clients."""
    name, options = config.algorithm["name"], options_of(config.algorithm)
    algorithm = make_algorithm(name, num_clients=clients, **options)
    return apply_strategy(
        config,
        with_aggregation(algorithm, make_aggregation(**config.aggregation)),
        layers=mllm.num_layers,
        classes=len(task.classes),
        width=mllm.width,
    )


def apply_strategy(
    config: Config, algorithm: Algorithm, *, layers: int, classes: int, width: int
) -> Algorithm:
    """The algorithm with the config's strategy. layers, width: of the decoder; classes: of the
    task, 0 for open questions. Raises `UserError` if the strategy does not fit them."""
    given = config.strategy
    keys = Alignment.__dataclass_fields__
    if given.fusion and not classes:
        raise UserError(
            "strategy.fusion: the task has open questions, whose answers have no probabilities to "
            "multiply: leave it off there"
        )
    if given.mixtures and not classes:
        raise UserError(
            "strategy.mixtures: the task has open questions and so no classes to mix images of: "
            "leave it off there"
        )
    if given.evidence and not classes:
        raise UserError(
            "strategy.evidence: the task has open questions and so no classes that a modality "
            "could tell: leave it off there"
        )
    # the parties' own weights hold w
    mu = Proximal(given.mu, edge_layers=edge_layers(layers, given.edge_layers))
    return with_strategy(
        algorithm,
        adaptive=mu if given.mu else None,
        alignment=Alignment(**{key: getattr(given, key) for key in keys}),
        composition=Composition(given.recombine, given.resample),
        classes=classes,
        width=width,
        momentum=given.momentum,
    )


def local_runner(
    session: Session,
    federation: Federation,
    weights: Mapping[str, float],
    mixtures: Mixtures | None = None,
    fill: Collection[str] = MODALITIES,
) -> InProcessRunner:
    """The runner that trains a federation's clients in this process. weights: by client, of the
    adaptive regularisation. mixtures: for clients without images. fill: modalities that
    recombination may fill in."""
    config, training = session.config, session.config.training
    encoded: dict[str, Sequence[Encoded]] = {}

    def samples(client: str) -> Sequence[Encoded]:
        if client not in encoded:
            held = federation.samples[client]
            encoded[client] = _encode_party(session, client, held, mixtures, fill)
        return encoded[client]

    plan = LocalPlan(
        epochs=training.local_epochs,
        batch_size=training.batch_size,
        micro_batch=training.micro_batch,
        optimizer=training.optimizer,
        beta1=training.beta1,
        beta2=training.beta2,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
    )
    return InProcessRunner(
        mllm=session.mllm,
        samples=samples,
        plan=plan,
        seed=config.seed,
        clients_at_once=training.clients_at_once,
        weights=weights,
        halved=lambda tried, next_: _tell(session, "memory", tried=tried, next=next_),
    )


def _encode_party(
    session: Session,
    client: str,
    samples: Sequence[Sample],
    mixtures: Mixtures | None,
    fill: Collection[str],
) -> Sequence[Encoded]:
    """A party's training samples, with their completions where the strategy recombines. Each is
    encoded when it is first asked for, so that training does not wait for all images to be seen."""
    config, task, shared = session.config, session.task, session.shared
    found: Mapping[str, Sequence[Sample]] = {}
    if config.strategy.recombine:
        found = completions(samples, client=client, seed=config.seed, given=mixtures, fill=fill)

    def encode(sample: Sample) -> Encoded:
        made = shared.encode(config, task, sample)
        if made.shortened:
            session.shortened.add(made.id)
        if sample.id not in found:
            return made
        return replace(made, completions=_encode_completions(session, found[sample.id]))

    return Deferred(samples, encode)


class Deferred(Sequence[Encoded]):
    """Samples, each encoded when it is first asked for."""

    def __init__(self, samples: Sequence[Sample], encode: Callable[[Sample], Encoded]) -> None:
        self.samples, self.encode = samples, encode
        self.made: dict[int, Encoded] = {}

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, place: SupportsIndex) -> Encoded: ...

    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...

    def __getitem__(self, place: SupportsIndex | slice) -> Encoded | list[Encoded]:
        where = range(len(self.samples))[place]
        if isinstance(where, range):
            return [self[i] for i in where]
        if where not in self.made:
            self.made[where] = self.encode(self.samples[where])
        return self.made[where]


def represent(session: Session, samples: Sequence[Sample]) -> np.ndarray:
    """Representations of samples [n, D] by the adapter of before the first round."""
    config, task, mllm = session.config, session.task, session.mllm
    mllm.set_adapter(mllm.init_adapter(config.seed))
    encoded = [session.shared.encode_whole(config, task, sample) for sample in samples]
    return mllm.represent(encoded, batch_size=config.evaluation.batch_size).numpy()


def _encode_completions(session: Session, made: Sequence[Sample]) -> tuple[Encoded, ...]:
    """Those that fit `training.max_length`: a text and the image of another may not."""
    config, task, shared = session.config, session.task, session.shared
    found = []
    for sample in made:
        with contextlib.suppress(UserError):  # it stays as it is; its own parts were read before
            whole = shared.encode_new(config, task, sample)
            found.append(shared.with_views(config, task, sample, whole))
    return tuple(found)


def _record(
    session: Session,
    federation: Federation,
    record: RoundRecord,
    params: Params,
    fusion: Fusion | None,
) -> dict[str, Any]:
    """A round's line, with the test metrics when an evaluation is due."""
    evaluation = session.config.evaluation
    due = session.test.samples and evaluation.every and record.round % evaluation.every == 0
    found, seconds = None, 0.0
    if due and record.round < federation.rounds and session.config.topology != "local":
        began = time.perf_counter()
        session.mllm.set_adapter(params)
        limit, size = evaluation.limit, evaluation.batch_size
        both = session.test.evaluate(
            "both", limit=limit, batch_size=size, fusion=fusion, readers=session.readers(params)
        )
        found = {"both": both}
        seconds = time.perf_counter() - began
    line = asdict(record)
    line["clients"] = list(line.pop("cohort"))
    for name in ("missing", "chosen", "measured"):
        if not line[name]:
            del line[name]
    if session.config.topology != "federated":  # nothing crossed a network
        line.update(bytes_up=0, bytes_down=0)
    return {**line, "metrics": found, "evaluate_seconds": seconds}


def _test(
    session: Session,
    federation: Federation,
    state: ServerState,
    history: list[dict[str, Any]],
    fusion: Fusion | None,
) -> Outcome:
    """Test the final adapter under every condition; the last round's line gets the metrics."""
    evaluation = session.config.evaluation
    began = time.perf_counter()
    session.mllm.set_adapter(state.params)
    readers = session.readers(state.params)
    found: dict[str, dict[str, float]] = {}
    answers: list[dict[str, str]] = []
    for condition in evaluation.conditions if session.test.samples else ():
        given: list[str] = []
        found[condition] = session.test.evaluate(
            condition,
            batch_size=evaluation.batch_size,
            given=given,
            fusion=fusion,
            readers=readers,
        )
        answers += _answers(federation.name, condition, session.test.samples, given)
        _tell(session, "test", federation=federation.name, condition=condition)
    if history:
        history[-1] = {**history[-1], "metrics": found}
        _write_history(session.folder, federation.name, history)
    seconds = time.perf_counter() - began + sum(r["evaluate_seconds"] for r in history)
    measured = {}
    if evaluation.drift and session.test.samples:
        measured = modality_alignment(
            session.test, limit=evaluation.limit, batch_size=evaluation.batch_size
        )
    return Outcome(federation.name, state.params, history, found, seconds, answers, measured)


def _answers(
    federation: str, condition: str, samples: Sequence[Sample], given: Sequence[str]
) -> list[dict[str, str]]:
    """A line an open test question: asked, expected, given. A choice task has none."""
    if not given:
        return []
    place = {"federation": federation, "condition": condition}
    return [
        {
            **place,
            "id": sample.id,
            "kind": sample.kind,
            "question": sample.question,
            "expected": sample.answer,
            "given": answer,
        }
        for sample, answer in zip(samples, given, strict=True)
    ]


def _held_out(
    session: Session, samples: Mapping[str, list[Sample]], outcomes: list[Outcome]
) -> dict[str, Any]:
    """The final adapter (a local run: its own) on what each party held out, as the party holds
    it."""
    adapters = {outcome.name: outcome for outcome in outcomes}
    found: dict[str, dict[str, float]] = {}
    for client in sorted(name for name in samples if samples[name]):
        outcome = adapters.get(client, outcomes[0])
        session.mllm.set_adapter(outcome.params)
        found[client] = score_own(session, samples[client], outcome.fusion)
    return over_parties(found)


def score_own(
    session: Session, samples: Sequence[Sample], fusion: Fusion | None = None
) -> dict[str, float]:
    """The model's present adapter on a party's own samples, as the party holds them."""
    config, task, shared = session.config, session.task, session.shared
    own = TestSet(
        session.mllm,
        task,
        samples,
        encode=lambda sample: shared.encode_whole(config, task, sample),
    )
    return own.evaluate("both", batch_size=config.evaluation.batch_size, fusion=fusion)


def over_parties(found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Metrics by client, and mean, spread and extremes over the clients.

    A metric that a party's few samples do not allow (an AUC of one class) is null and left out
    of the mean; `accuracy` always has a value.
    """
    names = sorted({name for scores in found.values() for name in scores})
    known = {n: [s[n] for s in found.values() if n in s and s[n] == s[n]] for n in names}
    spread = {n: mean_over([{n: v} for v in vs])[n] for n, vs in known.items() if vs}
    return {"per_client": dict(found), "spread": spread}


def _write_history(folder: Path, federation: str, history: list[dict[str, Any]]) -> None:
    """Rewrite metrics.jsonl (or metrics-CLIENT.jsonl for a local run) up to the last round."""
    name = f"metrics-{federation}.jsonl" if federation else "metrics.jsonl"
    draft = folder / f"{name}.draft"
    draft.unlink(missing_ok=True)
    for record in history:
        results.append_line(draft, record)
    draft.replace(folder / name)


def save_adapter(session: Session, outcomes: list[Outcome]) -> None:
    """Write adapter/ in PEFT's format; a local run has one per client, under adapter/CLIENT."""
    for outcome in outcomes:
        folder = session.folder / "adapter"
        if outcome.name:
            folder = folder / outcome.name
        session.mllm.set_adapter(outcome.params)
        with checkpoint.writing(folder):
            session.mllm.save_adapter(folder)
        facts = {
            "model": session.config.model.model_dump(mode="json"),
            "lora": session.config.lora.model_dump(mode="json"),
            "trained": session.config.trained,
            "prompt": session.config.prompt,
            "task": asdict(session.task),
        }
        if outcome.fusion:
            facts["fusion"] = asdict(outcome.fusion)
        results.write_json(folder / ADAPTER_FACTS, facts)


def shortened_ids(session: Session) -> list[str]:
    """Ids of the samples that a run has read with shortened text, sorted."""
    others = session.helpers.shortened if session.helpers else set()
    return sorted(session.shortened | session.test.shortened() | others)


def make_result(
    session: Session, held: manifest.Manifest | None, outcomes: list[Outcome], seconds: float
) -> dict[str, Any]:
    """A run's result but for its digests; without a manifest it does not say who holds what."""
    config = session.config
    lines = [line for outcome in outcomes for line in outcome.history]
    exchange = outcomes[0].exchange
    result: dict[str, Any] = {
        "schema": results.SCHEMA,
        "name": config.name,
        "title": config.title or config.name,
        "status": "complete",
        "config": config.model_dump(mode="json"),
        "config_sha256": config_hash(config),
        "seed": config.seed,
        "base_sha256": weights_digest(model_path(config.model.name, config.model.path)),
        "task": asdict(session.task),
        "metrics": results.mean_metrics([outcome.metrics for outcome in outcomes]),
        "history": results.mean_history([outcome.history for outcome in outcomes]),
        "bytes": _bytes(session, outcomes),
        "parameters": session.mllm.parameter_counts(),
        "time": {
            "train_seconds": sum(line["seconds"] for line in lines),
            "evaluate_seconds": sum(outcome.evaluate_seconds for outcome in outcomes),
            "total_seconds": seconds,
            "resumed": session.resumed,  # then the total is of the last stretch only
        },
        "peak_memory_bytes": results.peak_memory_bytes(),
        "versions": results.versions(),
        "revisions": revisions_of(config.model_dump(mode="json")),
        "commit": results.commit(),
        "hardware": {
            **results.hardware(config.threads, config.model.device),
            "dtype": session.mllm.dtype,
            **({"processes": session.helpers.count + 1} if session.helpers else {}),
        },
        "started": datetime.fromtimestamp(time.time() - seconds, UTC).isoformat(timespec="seconds"),
    }
    if (most := results.peak_accelerator_bytes(str(session.mllm.device))) is not None:
        result["peak_accelerator_bytes"] = most
    if session.helpers:
        result["helpers"] = session.helpers.facts()
    if held is not None:
        result["samples"] = _samples(config, held, outcomes)
        result["manifest"] = results.holdings(held)
    if found := [line[GROUPS]["at_once"] for line in lines if GROUPS in line]:
        asked = config.training.clients_at_once
        if found[-1] < asked:  # memory did not suffice
            result["clients_at_once"] = {"asked": asked, "fitted": found[-1]}
    if cut := shortened_ids(session):
        result["shortened"] = {"samples": len(cut), "first": cut[:5]}
    if outcomes[0].heterogeneity:
        up, down = outcomes[0].once
        result["heterogeneity"] = {**outcomes[0].heterogeneity, "bytes": {"up": up, "down": down}}
    if exchange:
        result["mixtures"] = exchange.facts()
    if outcomes[0].evidence and len(outcomes) == 1:
        result["evidence"] = outcomes[0].evidence.facts()
    if outcomes[0].fusion and len(outcomes) == 1:
        result["fusion"] = asdict(outcomes[0].fusion)
    if outcomes[0].measured and len(outcomes) == 1:
        result["modality_alignment"] = outcomes[0].measured
    if config.topology == "local":
        result["per_client"] = {outcome.name: outcome.metrics for outcome in outcomes}
        result["spread"] = {
            condition: mean_over([outcome.metrics[condition] for outcome in outcomes])
            for condition in config.evaluation.conditions
        }
    return result


def _samples(
    config: Config, held: manifest.Manifest, outcomes: list[Outcome]
) -> dict[str, float | None]:
    """How many samples were trained on and answered, and how many a second of each."""
    share, seed = config.evaluation.held_out, config.seed
    sizes = {
        client.id: len(client.rows)
        - len(held_out([row[0] for row in client.rows], share=share, seed=seed))
        for client in held.clients
    }
    sizes["pooled"] = sum(sizes.values())
    lines = [line for outcome in outcomes for line in outcome.history]
    trained = sum(sizes[client] for line in lines for client in line["clients"])
    trained *= config.training.local_epochs
    # the last line of a history carries the final metrics
    found = [line["metrics"] for o in outcomes for line in o.history[:-1] if line["metrics"]]
    found += [outcome.metrics for outcome in outcomes]
    tested = sum(int(scores["n"]) for metrics in found for scores in metrics.values())
    train_seconds = sum(line["seconds"] for line in lines)
    test_seconds = sum(outcome.evaluate_seconds for outcome in outcomes)
    return {
        "trained": trained,
        "tested": tested,
        "trained_per_second": trained / train_seconds if train_seconds else None,
        "tested_per_second": tested / test_seconds if test_seconds else None,
    }


def _bytes(session: Session, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Bytes of all clients, up and down; of one client in one round, by part; and, where there are
    any, of all clients before the first round, by part."""
    lines = [line for outcome in outcomes for line in outcome.history]
    once = _once(outcomes[0])
    found: dict[str, Any] = {
        way: sum(line[f"bytes_{way}"] for line in lines) + sum(once[way].values()) for way in WAYS
    }
    found["per_client_round"] = _per_client_round(session, outcomes[0].params)
    return found | ({"once": once} if any(once.values()) else {})


def _once(outcome: Outcome) -> dict[str, dict[str, int]]:
    """Bytes of all clients before the first round, up and down, by part; no part if none cross."""
    found = {"profiles": outcome.once}
    if outcome.exchange:
        found["mixtures"] = (outcome.exchange.up, outcome.exchange.down)
    if outcome.evidence:
        found["evidence"] = (outcome.evidence.up, outcome.evidence.down)
    return {
        way: {name: amount[i] for name, amount in found.items() if any(amount)}
        for i, way in enumerate(WAYS)
    }


def _per_client_round(session: Session, params: Params) -> dict[str, dict[str, int]]:
    """Bytes of one client in one round, up and down, by part; zero where nothing federates."""
    if session.config.topology != "federated":
        return {way: dict.fromkeys(COMPONENTS, 0) for way in WAYS}
    algorithm = algorithm_of(session.config, 1, session.mllm, session.task)
    shapes = {name: torch.empty_like(value, device="meta") for name, value in params.items()}
    return message_parts(algorithm, shapes, session.mllm.component_of)


def _tell(session: Session, kind: str, **facts: Any) -> None:
    elapsed = time.perf_counter() - session.started
    common = {"name": session.config.name, "metric": session.task.metric, "elapsed": elapsed}
    session.listener({"event": kind, **common, **facts})
