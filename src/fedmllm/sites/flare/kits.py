"""Kits for a federation: certificates by NVFlare's provisioning, policies and settings by us.

    DIR/project.yml       what provisioning was asked
    DIR/kits/server/      one kit a machine: startup/ (keys), local/ (policy, settings),
    DIR/kits/SITE/        experiments/, README.md, systemd/
    DIR/kits/admin/       for who submits and stops jobs
    DIR/authority/        the root certificate's private key: keep it off all machines

Safe defaults: no code from jobs, only this package's components, no shell commands through the
administrator, no logs streamed to the server, storage inside the kit.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fedmllm.config import Config
from fedmllm.errors import UserError
from fedmllm.sites.agreed import check_kind, check_own, check_quorum
from fedmllm.sites.flare.packages import requirements, wheel
from fedmllm.sites.settings import FILE, Reveal
from fedmllm.sites.wire import TASKS

PROJECT, SERVER, ADMIN = "fedmllm", "server", "admin"
_TAKEN = (SERVER, ADMIN, "test")  # the last is the test set's
USER = "admin@fedmllm.local"
KITS, AUTHORITY = "kits", "authority"
SITE_NAME = re.compile(r"^[A-Za-z0-9_-]{1,60}$")
_HOST = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$")
CLASSES = ["fedmllm.sites.flare"]
_OWN_ENDING = {"conversations": ".json", "table": ".csv", "hf-datasets": ""}
# who may do what at a site or at the server; a right that is not named is denied
_RIGHTS = {
    "submit_job": "any",
    "manage_job": "any",
    "view": "any",
    "operate": "any",
    "clone_job": "none",
    "download_job": "none",
    "shell_commands": "none",
    "byoc": "none",
}


@dataclass(frozen=True)
class Plan:
    """What is to be made. host, port: where sites reach the server."""

    config: Config
    sites: Sequence[str]
    host: str = "localhost"
    port: int = 8002
    min_sites: int = 1
    deadline: float = 3600.0


def make_kits(plan: Plan, out: Path) -> Path:
    """Write the kits. Raises `UserError` for wrong names and if `out` exists."""
    check_plan(plan, out)
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True, mode=0o700)
    try:
        _provision(plan, draft)
        _fill(draft / KITS / SERVER, plan, server_facts(plan), site=False)
        for site in plan.sites:
            _fill(draft / KITS / site, plan, site_facts(plan, site), site=True)
        _fill_admin(draft / KITS / ADMIN, plan)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def check_plan(plan: Plan, out: Path) -> None:
    """Raise `UserError` for wrong names and if `out` exists."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists: choose another folder with --out")
    odd = [site for site in plan.sites if not SITE_NAME.match(site) or site in _TAKEN]
    if odd:
        raise UserError(
            f"a site cannot be called {odd[0]!r}: letters, digits, - and _ only, at most 60, and "
            f"none of {', '.join(_TAKEN)}"
        )
    if len(set(plan.sites)) < len(plan.sites) or not plan.sites:
        raise UserError("sites need different names, and there must be one at least")
    if not _HOST.match(plan.host):
        raise UserError(f"server {plan.host!r} is not a host name, e.g. fed.example.org")
    if plan.host.casefold() in {site.casefold() for site in plan.sites}:
        raise UserError(
            f"a site cannot be called {plan.host!r}, the server's host name: give the site another "
            "name"
        )
    if not 1 <= plan.min_sites <= len(plan.sites):
        raise UserError(f"min-sites is {plan.min_sites}: 1 to {len(plan.sites)}")
    check_kind(plan.config)
    check_quorum(plan.config, plan.min_sites, "min-sites")
    if own_files(plan.config):
        check_own(plan.config)


def _provision(plan: Plan, draft: Path) -> None:
    file = draft / "project.yml"
    file.write_text(yaml.safe_dump(_project(plan), sort_keys=False))
    made = provision(file, draft)
    (draft / KITS).mkdir()
    for folder in sorted(made.iterdir()):
        folder.rename(draft / KITS / kit_name(folder.name, file))
    (draft / PROJECT / "state").rename(draft / AUTHORITY)
    (draft / AUTHORITY).chmod(0o700)
    shutil.rmtree(draft / PROJECT)


def provision(project: Path, workspace: Path) -> Path:
    """Have NVFlare make its kits of a project file; returns the folder with one a participant.
    Raises `UserError` with its words if it does not."""
    command = [sys.executable, "-m", "nvflare.lighter.provision"]
    done = subprocess.run(
        [*command, "-p", str(project), "-w", str(workspace), "--force"],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    made = workspace / PROJECT / "prod_00"
    if done.returncode or not made.is_dir():
        raise UserError(f"provisioning failed: {(done.stdout + done.stderr).strip()[-500:]}")
    return made


def kit_name(participant: str, project: Path) -> str:
    """What the kit of a participant of a project file is called."""
    found = yaml.safe_load(project.read_text())["participants"]
    (server,) = [each["name"] for each in found if each["type"] == "server"]
    return {server: SERVER, USER: ADMIN}.get(participant, participant)


def _project(plan: Plan) -> dict[str, Any]:
    builder = "nvflare.lighter.impl"
    server = {"name": plan.host, "type": "server", "org": SERVER, "fed_learn_port": plan.port}
    clients = [
        {"name": site, "type": "client", "org": re.sub(r"\W|-", "_", site)} for site in plan.sites
    ]
    admin = {"name": USER, "type": "admin", "org": SERVER, "role": "project_admin"}
    return {
        "api_version": 3,
        "name": PROJECT,
        "participants": [server, *clients, admin],
        "builders": [
            {
                "path": f"{builder}.workspace.WorkspaceBuilder",
                "args": {"template_file": ["master_template.yml"]},
            },
            {
                "path": f"{builder}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config"},
            },
            {"path": f"{builder}.cert.CertBuilder", "args": {"root_valid_days": 1825}},
            {"path": f"{builder}.signature.SignatureBuilder"},
        ],
    }


def server_facts(plan: Plan) -> dict[str, Any]:
    """The server's settings, to begin with."""
    return {
        "sites": list(plan.sites),
        "min_sites": plan.min_sites,
        "deadline": plan.deadline,
        "data": {"none": True} if _needs_root(plan.config) else {},
    }


def site_facts(plan: Plan, site: str) -> dict[str, Any]:
    """A site's settings, to begin with."""
    data: dict[str, Any] = {"root": "data"} if _needs_root(plan.config) else {}
    if own_files(plan.config):
        data = {"file": f"data/{site}{_OWN_ENDING[plan.config.data['name']]}"}
    return {"name": site, "data": data, "reveal": Reveal().model_dump()}


def own_files(config: Config) -> bool:
    """Whether each site holds a file of its own, and no split is drawn."""
    name = config.data["name"]
    pool = name in ("table", "hf-datasets") and config.data["parties"] == "none"
    return name in _OWN_ENDING and not pool


def _needs_root(config: Config) -> bool:
    return "root" in config.data


def _fill(kit: Path, plan: Plan, facts: Mapping[str, Any], *, site: bool) -> None:
    """Policy, settings, experiment, service and a page into a kit."""
    local = kit / "local"
    for old in local.glob("*.sample"):
        old.unlink()
    plain_kit(kit, plan.config, facts, site=site)
    _write(local / "authorization.json", _authorization())
    _write(local / "privacy.json", _privacy(site))
    _write(local / "resources.json", _resources(local / "resources.json.default", site))
    (kit / "data").mkdir()
    (kit / "requirements.txt").write_text(requirements(plan.config))
    _pages(kit, plan, facts, site)


def plain_kit(kit: Path, config: Config, facts: Mapping[str, Any], *, site: bool) -> Path:
    """Settings and experiment, without keys or policy; returns the experiment's file."""
    (kit / FILE).parent.mkdir(parents=True, exist_ok=True)
    (kit / FILE).write_text(_SETTINGS_HEAD[site] + yaml.safe_dump(dict(facts), sort_keys=False))
    return add_experiment(kit, config)


def add_experiment(kit: Path, config: Config) -> Path:
    """Put an experiment among those that a kit's owner agrees to run."""
    folder = kit / "experiments"
    folder.mkdir(exist_ok=True)
    file = folder / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return file


def _authorization() -> dict[str, Any]:
    reader = {"view": "any"}
    return {
        "format_version": "1.0",
        "permissions": {
            "project_admin": _RIGHTS,
            "org_admin": {**reader, "operate": "o:site", "manage_job": "o:site"},
            "lead": {**_RIGHTS, "manage_job": "n:submitter", "operate": "none"},
            "member": reader,
        },
    }


def _privacy(site: bool) -> dict[str, Any]:
    gate = {"path": "fedmllm.sites.flare.filters.ReleaseFilter", "args": {"clip_norm": 0.0}}
    scope: dict[str, Any] = {"name": PROJECT, "properties": {}}
    if site:
        scope["task_result_filters"] = [{**gate, "direction": "out"}]
    return {"scopes": [scope], "default_scope": PROJECT}


def _resources(default: Path, site: bool) -> dict[str, Any]:
    """NVFlare's own, with less: our components only, no log streaming, storage in the kit."""
    found: dict[str, Any] = json.loads(default.read_text())
    found["class_allow_list"] = CLASSES
    drop = {"site_log_streamer", "log_receiver"}
    found["components"] = [c for c in found["components"] if c["id"] not in drop]
    if site:
        found["allow_log_streaming"] = False
    else:
        found["servers"][0]["heart_beat_timeout"] = 60
    return found


def _fill_admin(kit: Path, plan: Plan) -> None:
    (kit / "README.md").write_text(_page("admin", plan, {}))


def write_job(
    folder: Path,
    config_sha256: str,
    *,
    name: str,
    silence: float | None = None,
    task_check_interval: float = 1.0,
) -> Path:
    """The job to submit: names of our two components and the experiment's hash, no code.

    min_clients is 1, below which NVFlare ends a job: how many are needed is the runner's business,
    which waits. silence: seconds without a sign of life after which a site's job counts as gone, by
    default the controller's. task_check_interval: seconds between a site's questions for work.
    """
    args = {"config_sha256": config_sha256}
    limits = {} if silence is None else {"silence": silence}
    _write(
        folder / "meta.json",
        {
            "name": name,
            "resource_spec": {},
            "min_clients": 1,
            "deploy_map": {"app": ["@ALL"]},
        },
    )
    _write(
        folder / "app" / "config" / "config_fed_server.json",
        {
            "format_version": 2,
            "dead_client_grace_period": 10.0,
            "workflows": [
                {
                    "id": "fedmllm",
                    "path": "fedmllm.sites.flare.controller.FedController",
                    "args": {**args, **limits},
                }
            ],
            "components": [],
        },
    )
    executor = {"path": "fedmllm.sites.flare.executor.SiteExecutor", "args": args}
    _write(
        folder / "app" / "config" / "config_fed_client.json",
        {
            "format_version": 2,
            "task_check_interval": task_check_interval,
            "job_heartbeat_interval": 5.0,
            "executors": [{"tasks": list(TASKS), "executor": executor}],
            "components": [],
        },
    )
    return folder


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


# -- pages -------------------------------------------------------------------------------------

_SETTINGS_HEAD = {
    True: "# What this site decides for itself; paths are relative to the kit.\n",
    False: "# What the server decides; paths are relative to the kit.\n",
}


def _pages(kit: Path, plan: Plan, facts: Mapping[str, Any], site: bool) -> None:
    (kit / "README.md").write_text(_page("site" if site else "server", plan, facts))
    name = str(facts.get("name", SERVER))
    (kit / "systemd").mkdir()
    unit = _template("node.service").format(name=name)
    (kit / "systemd" / f"fedmllm-{name}.service").write_text(unit)
    if not site:
        unit = _template("supervisor.service").format(name=plan.config.name)
        (kit / "systemd" / "fedmllm-supervisor.service").write_text(unit)


_WEIGHTS = {
    True: "The server loads it:\n   it draws the first adapter from it, and tests where it "
    "has test data.",
    False: "The server reads\n   the weights for their SHA-256 alone: without test data it builds "
    "the model's shapes only.",
}


def _loads_base(config: Config, facts: Mapping[str, Any]) -> bool:
    """Whether the server loads the base's weights (`serving.py`)."""
    own = [config.trained.get(key) for key in ("connector", "embeddings")]
    return not facts.get("data", {}).get("none") or "full" in own


def _page(which: str, plan: Plan, facts: Mapping[str, Any]) -> str:
    return _template(f"{which}.md").format(
        install=_template("install.md").format(wheel=wheel()).strip(),
        weights=_WEIGHTS[_loads_base(plan.config, facts)],
        name=facts.get("name", which),
        host=plan.host,
        port=plan.port,
        experiment=plan.config.name,
        sites=", ".join(plan.sites),
        min_sites=plan.min_sites,
        data=yaml.safe_dump({"data": facts.get("data") or {}}).strip().replace("\n", "\n   "),
    )


def _template(name: str) -> str:
    return (resources.files("fedmllm.sites.flare") / "pages" / name).read_text(encoding="utf-8")
