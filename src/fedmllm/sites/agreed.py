"""An experiment as one machine runs it: the file that all agree on, with this machine's data and
settings.

What a machine may set for itself is in `LOCAL`; it is not part of the experiment's hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmllm.algorithms.aggregation import make_aggregation
from fedmllm.algorithms.base import check_enough
from fedmllm.config import Config, config_hash, load_config
from fedmllm.data import DATASETS
from fedmllm.data.rows import ONE
from fedmllm.errors import UserError, unknown
from fedmllm.sites.handshake import RefusedError
from fedmllm.sites.settings import FILE, ServerData, ServerFile, SiteData, SiteFile

OWN = ("conversations", "table", "hf-datasets")  # data sets that a site may hold a file of
# config keys that a machine may set for itself: they change speed, memory and rounding
LOCAL = (
    "threads",
    "model.path",
    "model.dtype",
    "model.device",
    "model.quantization",
    "model.gradient_checkpointing",
    "model.feature_cache",
    "model.feature_cache_gb",
    "model.feature_memory_gb",
    "model.drop_tower",
    "training.batch_size",
    "training.micro_batch",
    "training.clients_at_once",
    "evaluation.batch_size",
)


def find_experiment(folder: Path, sha256: str, *, who: str) -> Path:
    """The experiment file of this config hash in a folder.

    Raises `UserError` if there is none: a party runs what its administrator put there.
    """
    names: list[str] = []
    for file in sorted(folder.glob("*.y*ml")):
        try:
            if config_hash(load_config(file)) == sha256:
                return file
            names.append(file.name)
        except UserError:
            continue  # a file that is no experiment
    raise RefusedError(
        f"{who} has not agreed to experiment {sha256[:12]}: it is not in its "
        f"{folder.name}/ ({len(names)} others are); put the file there if it is to be run"
    )


def site_config(kit: Path, file: SiteFile, experiment: Path) -> Config:
    """An experiment as this site runs it: with its own settings and data."""
    agreed = load_config(experiment)
    check_kind(agreed)
    data = _data_overrides(agreed, kit, file.name, file.data)
    return load_config(experiment, [*_overrides(file.settings, kit / FILE), *data])


def server_config(kit: Path, file: ServerFile, experiment: Path) -> Config:
    """An experiment as the server runs it.

    Raises `UserError` if its rounds may close with fewer updates than the aggregation needs: so
    a round waits for enough of them, whoever drops out.
    """
    agreed = load_config(experiment)
    check_kind(agreed)
    check_quorum(agreed, file.min_sites, "the server's min_sites")
    data = [] if file.data.none else _test_overrides(agreed, kit, file.data)
    return load_config(experiment, [*_overrides(file.settings, kit / FILE), *data])


def check_quorum(config: Config, min_sites: int, what: str) -> None:
    """Raise `UserError` if so many updates are too few for the experiment's aggregation."""
    check_enough(make_aggregation(**config.aggregation), min_sites, f"{what} is {min_sites}")


def check_kind(config: Config) -> None:
    """Raise `UserError` for an experiment that several machines cannot run."""
    if config.topology != "federated":
        raise UserError(
            f"topology {config.topology} has nobody to federate with: several machines run "
            "topology federated"
        )
    if config.strategy.fusion:
        raise UserError("strategy.fusion works in one process only: leave it off over sites")


def check_reveal(config: Config, file: SiteFile) -> None:
    """Raise `RefusedError` for an experiment that would tell what this site does not reveal."""
    given, reveal = config.strategy, file.reveal
    counting = given.prototypes or given.evidence or given.uses_profiles
    if counting and not reveal.samples:
        if given.evidence:
            what, off = "sums of samples count them by class", "leave strategy.evidence out"
        elif given.prototypes:
            what, off = "prototypes count them by class", "leave strategy.prototypes out"
        else:
            what = "a profile counts them by modality and by label"
            off = "leave out strategy.weight=profile, strategy.aggregation and strategy.sampling"
        raise RefusedError(
            f"{file.name} does not reveal how many samples it has, and {what}: {off}, or set "
            "reveal.samples at the site"
        )
    if (given.evidence or given.mixtures) and not reveal.features:
        if given.evidence:
            key, what = "evidence", "sends sums of the model's states of samples by class"
        else:
            key, what = "mixtures", "gives means of features of images"
        raise RefusedError(
            f"{file.name} does not reveal features of its samples, and strategy.{key} {what}: "
            f"leave strategy.{key} out, or set reveal.features at the site"
        )


def check_own(config: Config) -> None:
    """Raise `UserError` for an experiment that cannot train on files of the sites' own."""
    if config.data["name"] not in OWN:
        raise UserError(
            f"data.file holds data of one's own, and the experiment's data is "
            f"{config.data['name']}: give data.root, or an experiment with data {' or '.join(OWN)}"
        )
    if config.scenario["name"] != "aligned":
        raise UserError(
            f"scenario {config.scenario['name']} cannot be drawn over a file of one's own: "
            "choose scenario aligned, which trains on data as it is held"
        )


def _data_overrides(config: Config, kit: Path, name: str, data: SiteData) -> list[str]:
    if data.file is None:
        return _root(config, kit, data.root)
    check_own(config)
    where = kit / data.file
    if config.data["name"] == "conversations":
        return [_set("data.root", str(where.parent)), _set("data.parties", where.name), _NO_TEST]
    return [_set("data.root", str(where)), _set("data.parties", f"{ONE}{name}"), _NO_TEST]


def _test_overrides(config: Config, kit: Path, data: ServerData) -> list[str]:
    if data.file is None:
        return _root(config, kit, data.root)
    where, which = kit / data.file, config.data["name"]
    if which not in _NO_TRAINING:
        raise UserError(
            f"the server's data.file is a test file of {' or '.join(_NO_TRAINING)}, and the "
            f"experiment's data is {which}: give data.root, or none: true"
        )
    test = _set("data.test", where.name)
    return [_set("data.root", str(where.parent)), test, _NO_TRAINING[which]]


def _root(config: Config, kit: Path, root: str | None) -> list[str]:
    if root is None:
        return []
    if "root" not in DATASETS[config.data["name"]].options:
        raise UserError(f"data {config.data['name']} is drawn and has no root: leave it out")
    return [_set("data.root", str(kit / root))]


_NO_TEST = "data.test=none"
_NO_TRAINING = {"conversations": "data.parties=none", "table": "data.files=none"}


def _overrides(settings: Mapping[str, Any], source: Path) -> list[str]:
    for key in settings:
        if key not in LOCAL:
            raise UserError(f"{source}: settings: {unknown('setting of a machine', key, LOCAL)}")
    return [_set(key, value) for key, value in settings.items()]


def _set(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"
