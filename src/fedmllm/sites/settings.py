"""The one file that a site, or the server, writes itself: `local/fedmllm.yml` in its kit.

Paths in it are relative to the kit. Everything that must be the same everywhere stands in the
experiment's file instead (`agreed.py`). NVFlare's own processes read this file too, so nothing
heavy is imported here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmllm.data.own import party_problem
from fedmllm.errors import UserError

STATUS_FILE = "status.json"
FILE = Path("local") / "fedmllm.yml"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SiteData(_Section):
    """Where a site's data lies: `file`, its own and nobody else's (conversations, a table, the
    folder of a saved data set), or `root`, a data set of which the split gives it a part; neither
    for a data set that is drawn. manifest: a file whose hash the split must have."""

    file: str | None = None
    root: str | None = None
    manifest: str | None = None


class Reveal(_Section):
    """What a site tells besides its updates: its number of samples, its losses and scores; means
    and sums of features of its samples (`strategy.mixtures`, `strategy.evidence`)."""

    samples: bool = True
    metrics: bool = True
    features: bool = False


class SiteFile(_Section):
    """A site. experiments: the folder of the experiments that it agrees to run. state: where it
    keeps what must outlive a job. noise: on its profile where the experiment has
    `strategy.epsilon`: drawn in secret, or from the run's seed, so that whoever knows the seed can
    repeat it, and subtract it."""

    name: str
    experiments: str = "experiments"
    state: str = "state"
    data: SiteData = SiteData()
    settings: dict[str, Any] = Field(default_factory=dict)
    reveal: Reveal = Reveal()
    noise: Literal["secret", "seed"] = "secret"


class ServerData(_Section):
    """The server's own test data: `file` (conversations, a table), or `root`, a data set. none: it
    has none."""

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

    def patience(self, task: str) -> float:
        """Seconds that an answer to a task is waited for."""
        return self.hello_deadline if task == "hello" else self.deadline


def load_site(kit: Path) -> SiteFile:
    """A site's file. Raises `UserError` that lists its problems."""
    found = _load(kit / FILE, SiteFile)
    problem = party_problem(found.name)
    if problem:
        raise UserError(f"{kit / FILE}: name: {problem}")
    if found.data.file is not None and found.data.root is not None:
        raise UserError(f"{kit / FILE}: data: give file or root, not both")
    if found.data.file is not None and found.data.manifest is not None:
        raise UserError(
            f"{kit / FILE}: data: a manifest is of a data set that all split (root): a file of "
            "one's own has none"
        )
    return found


def load_server(kit: Path) -> ServerFile:
    """The server's file. Raises `UserError` that lists its problems."""
    found = _load(kit / FILE, ServerFile)
    twice = sorted({site for site in found.sites if found.sites.count(site) > 1})
    if twice:
        raise UserError(f"{kit / FILE}: sites: {', '.join(twice)} more than once")
    if found.min_sites > len(found.sites):
        raise UserError(
            f"{kit / FILE}: min_sites is {found.min_sites}, and there are {len(found.sites)} sites"
        )
    return found


def _load(file: Path, model: type[Any]) -> Any:
    raw = _yaml(file)
    try:
        return model.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        lines = [f"  - {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError(f"{file}: {len(lines)} problems\n" + "\n".join(lines)) from error


def _yaml(file: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"settings {file} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"settings {file} must be a mapping of keys to values")
    return raw


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it. Infinite numbers and NaN are as in
    JavaScript."""
    draft = file.with_name(f"{file.name}.draft")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, file)
