"""The one file that a site, or the server, writes itself: `local/fedmllm.yml` in its kit.

Paths in it are relative to the kit. Everything that must be the same everywhere stands in the
experiment's file instead; what a machine may choose for itself is in `LOCAL`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmllm.config import Config, config_hash, load_config, read_yaml
from fedmllm.data import DATASETS
from fedmllm.data.own import party_problem
from fedmllm.errors import UserError, unknown
from fedmllm.sites.handshake import RefusedError

FILE = Path("local") / "fedmllm.yml"
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
    "model.drop_tower",
    "training.batch_size",
    "training.micro_batch",
    "training.clients_at_once",
    "evaluation.batch_size",
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SiteData(_Section):
    """Where a site's data lies: `file`, its own conversations, or `root`, a data set of which its
    manifest gives it a part; neither for a data set that is drawn. manifest: a file whose hash
    the split must have."""

    file: str | None = None
    root: str | None = None
    manifest: str | None = None


class Reveal(_Section):
    """What a site tells besides its updates: its number of samples, its losses and scores."""

    samples: bool = True
    metrics: bool = True


class SiteFile(_Section):
    """A site. experiments: the folder of the experiments that it agrees to run. state: where it
    keeps what must outlive a job."""

    name: str
    experiments: str = "experiments"
    state: str = "state"
    data: SiteData = SiteData()
    settings: dict[str, Any] = Field(default_factory=dict)
    reveal: Reveal = Reveal()


class ServerData(_Section):
    """The server's own test data, as a site's: `file` for conversations, `root` for a data set.
    none: it has none."""

    file: str | None = None
    root: str | None = None
    none: bool = False


class ServerFile(_Section):
    """The server. sites: all that may take part, by name. min_sites: so many updates make a
    round. deadline: seconds that a round waits for the slow; hello_deadline: for a site to load
    its model and data. runs: where the run folders go."""

    sites: tuple[str, ...] = Field(min_length=1)
    min_sites: int = Field(1, ge=1)
    deadline: float = Field(3600.0, gt=0)
    hello_deadline: float = Field(1800.0, gt=0)
    experiments: str = "experiments"
    runs: str = "runs"
    data: ServerData = ServerData()
    settings: dict[str, Any] = Field(default_factory=dict)


def load_site(kit: Path) -> SiteFile:
    """A site's file. Raises `UserError` that lists its problems."""
    found = _load(kit / FILE, SiteFile)
    problem = party_problem(found.name)
    if problem:
        raise UserError(f"{kit / FILE}: name: {problem}")
    if found.data.file is not None and found.data.root is not None:
        raise UserError(f"{kit / FILE}: data: give file or root, not both")
    return found


def load_server(kit: Path) -> ServerFile:
    """The server's file. Raises `UserError` that lists its problems."""
    found = _load(kit / FILE, ServerFile)
    if found.min_sites > len(found.sites):
        raise UserError(
            f"{kit / FILE}: min_sites is {found.min_sites}, and there are {len(found.sites)} sites"
        )
    return found


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
    _check_kind(agreed)
    data = _data_overrides(agreed, kit, file.data)
    return load_config(experiment, [*_overrides(file.settings, kit / FILE), *data])


def server_config(kit: Path, file: ServerFile, experiment: Path) -> Config:
    """An experiment as the server runs it."""
    agreed = load_config(experiment)
    _check_kind(agreed)
    data = [] if file.data.none else _test_overrides(agreed, kit, file.data)
    return load_config(experiment, [*_overrides(file.settings, kit / FILE), *data])


def _check_kind(config: Config) -> None:
    if config.topology != "federated":
        raise UserError(
            f"topology {config.topology} has nobody to federate with: several machines run "
            "topology federated"
        )


def _data_overrides(config: Config, kit: Path, data: SiteData) -> list[str]:
    if data.file is not None:
        if config.data["name"] != "conversations":
            raise UserError(
                f"data.file holds conversations, and the experiment's data is "
                f"{config.data['name']}: give data.root, or an experiment with data conversations"
            )
        if config.scenario["name"] != "aligned":
            raise UserError(
                f"scenario {config.scenario['name']} cannot be drawn over a file of one's own: "
                "choose scenario aligned, which trains on data as it is held"
            )
        where = kit / data.file
        return [_set("data.root", str(where.parent)), _set("data.parties", where.name), _NO_TEST]
    return _root(config, kit, data.root)


def _test_overrides(config: Config, kit: Path, data: ServerData) -> list[str]:
    if data.file is not None:
        where = kit / data.file
        return [_set("data.root", str(where.parent)), _set("data.test", where.name), _NO_PARTIES]
    return _root(config, kit, data.root)


def _root(config: Config, kit: Path, root: str | None) -> list[str]:
    if root is None:
        return []
    if "root" not in DATASETS[config.data["name"]].options:
        raise UserError(f"data {config.data['name']} is drawn and has no root: leave it out")
    return [_set("data.root", str(kit / root))]


_NO_TEST, _NO_PARTIES = "data.test=none", "data.parties=none"


def _overrides(settings: Mapping[str, Any], source: Path) -> list[str]:
    for key in settings:
        if key not in LOCAL:
            raise UserError(f"{source}: settings: {unknown('setting of a machine', key, LOCAL)}")
    return [_set(key, value) for key, value in settings.items()]


def _set(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def _load(file: Path, model: type[Any]) -> Any:
    raw = read_yaml(file, "settings")
    try:
        return model.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        lines = [f"  - {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError(f"{file}: {len(lines)} problems\n" + "\n".join(lines)) from error
