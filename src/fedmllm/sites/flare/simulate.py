"""The same federation in NVFlare's simulator: every party a process of this machine, no keys.

For research: controller, executor, resident trainer, gate-less messages and loop are those of real
sites (`controller.py`, `executor.py`), and so are the numbers; the simulator stands in for nodes,
certificates and supervisor. A run that was killed goes on by the same call.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

from fedmllm.config import Config, config_hash
from fedmllm.data import load_dataset
from fedmllm.errors import UserError
from fedmllm.experiment import check_folder, make_manifest
from fedmllm.sites import settings
from fedmllm.sites.agreed import server_config
from fedmllm.sites.flare.kits import CLASSES, KITS, SERVER, SITE_NAME, plain_kit, write_job
from fedmllm.sites.flare.node import node_environment
from fedmllm.sites.settings import STATUS_FILE

LOG = Path("state") / "simulator.log"
_FOREVER = 1e9  # seconds: nobody is late here, and no sign of life is sent
_POLL = 0.2


def simulate(
    config: Config,
    out: Path,
    *,
    at_once: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run an experiment, or go on with it; returns its run folder, `out`/NAME.

    at_once: how many parties have a process at the same time, by default all; with fewer, each
    loads its model anew for every round that it takes part in. Raises `UserError` for what a
    person can mend.
    """
    folder = out.resolve() / config.name
    check_folder(folder, config, resume=True, overwrite=False)
    sites = _sites(config)
    if at_once is not None and not 1 <= at_once <= len(sites):
        raise UserError(f"at-once is {at_once}: 1 to {len(sites)}, the number of parties")
    with tempfile.TemporaryDirectory(prefix="fedmllm-", ignore_cleanup_errors=True) as scratch:
        root = Path(scratch).resolve()
        if shlex.split(str(root)) != [str(root)]:
            raise UserError(f"the simulator cannot work in {root}: set TMPDIR to a plain path")
        _prepare(root, config, folder, sites)
        (folder / LOG).parent.mkdir(parents=True, exist_ok=True)
        (folder / STATUS_FILE).unlink(missing_ok=True)  # of an earlier call
        _run(root, folder, at_once or len(sites), say)
    return folder


def _sites(config: Config) -> list[str]:
    """The parties' names, which are those of an in-process run."""
    names = [client.id for client in make_manifest(config, load_dataset(**config.data)).clients]
    odd = [name for name in names if not SITE_NAME.match(name) or name == SERVER]
    if odd:
        raise UserError(
            f"the simulator cannot have a party called {odd[0]!r}: letters, digits, - and _ only"
        )
    return names


def _prepare(root: Path, config: Config, folder: Path, sites: list[str]) -> None:
    """Kits without keys, the job, and a policy that allows our components only."""
    data: dict[str, Any] = {}
    if config.data.get("root") is not None:
        data = {"root": str(Path(config.data["root"]).resolve())}
    server = {
        "sites": sites,
        "min_sites": len(sites),
        "deadline": _FOREVER,
        "hello_deadline": _FOREVER,
        "runs": str(folder.parent),
        "data": data,
    }
    kit = root / KITS / SERVER
    experiment = plain_kit(kit, config, server, site=False)
    server_config(kit, settings.load_server(kit), experiment)  # what is wrong is said now
    for name in sites:
        state = str(folder / "state" / "sites" / name)
        reveal = {"features": True}  # a party here is nobody else's
        facts = {"name": name, "state": state, "data": data, "reveal": reveal}
        plain_kit(root / KITS / name, config, facts, site=True)
    write_job(
        root / "job",
        config_hash(config),
        name=config.name,
        silence=_FOREVER,
        task_check_interval=0.2,
    )
    local = root / "workspace" / "local"
    local.mkdir(parents=True)
    settings.write_json(
        local / "resources.json", {"format_version": 2, "class_allow_list": CLASSES}
    )


def _run(root: Path, folder: Path, at_once: int, say: Callable[[str], None]) -> None:
    """The simulator in a process of its own, from whose status file the rest is known."""
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedmllm.sites.flare.simulate", str(root), str(at_once)],
            cwd=root,
            env=node_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        status = _watch(process, folder, say)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # sites end when they miss it
        process.wait()
        for left in (folder / "state" / "sites").glob("*/scratch-*"):
            shutil.rmtree(left, ignore_errors=True)
    if status.get("doing") != "done":
        why = status.get("error") or f"the simulator ended with code {process.returncode}"
        raise UserError(f"{folder.name}: {why}; see {folder / LOG}")


def _watch(
    process: subprocess.Popen[bytes], folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Until the simulator ends; the last status. A party that fails ends it: a run that waits for
    one that can never deliver is of no use here."""
    said, status = "", dict[str, Any]()
    while True:
        over = process.poll() is not None
        with contextlib.suppress(OSError, ValueError):
            status = json.loads((folder / STATUS_FILE).read_text())
        line = _line(status)
        if line and line != said:
            said = line
            say(line)
        for site, why in status.get("failed", {}).items():
            log = folder / "state" / "sites" / site / "trainer.log"
            return {**status, "error": f"{site}: {why} ({log})"}
        if over:
            return status
        time.sleep(_POLL)


def _line(status: Mapping[str, Any]) -> str:
    """What is going on."""
    doing, done = str(status.get("doing", "")), status.get("rounds_done", 0)
    if doing == "training":
        return f"round {status['round']} of {status['rounds']}"
    away = ", ".join(f"{site} {why}" for site, why in status.get("away", {}).items())
    return f"{doing} ({done} of {status['rounds']} rounds done) {away}".strip() if doing else ""


class Simulator(SimulatorRunner):
    """NVFlare's, which empties its folder at each start, with the kits put back into it."""

    def _setup_local_startup(self, log_config_file_path: str, workspace: str) -> None:
        super()._setup_local_startup(log_config_file_path, workspace)
        kits = Path(self.simulator_root).parent / KITS
        shutil.copytree(kits / Path(workspace).name, workspace, dirs_exist_ok=True)


def main(root: Path, at_once: int) -> int:
    """Run what `simulate` prepared. In the background process."""
    sites = sorted(kit.name for kit in (root / KITS).iterdir() if kit.name != SERVER)
    simulator = Simulator(
        job_folder=str(root / "job"),
        workspace=str(root / "workspace"),
        clients=",".join(sites),
        threads=at_once,
        max_clients=max(100, len(sites)),
    )
    return int(simulator.run() or 0)


if __name__ == "__main__":
    from fedmllm.sites.flare import simulate as here  # by its own name, for other processes

    sys.exit(here.main(Path(sys.argv[1]), int(sys.argv[2])))
