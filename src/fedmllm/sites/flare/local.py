"""A whole federation on one machine, in the background: for trying it, and for the tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmllm.config import Config
from fedmllm.data import DATASETS
from fedmllm.errors import UserError
from fedmllm.sites import settings
from fedmllm.sites.flare.kits import ADMIN, KITS, SERVER
from fedmllm.sites.flare.supervise import STATUS_FILE, Nodes, Supervisor

PID_FILE, LOG_FILE = "supervisor.json", "supervisor.log"


def free_port() -> int:
    """A TCP port on which nothing listens on loopback, now."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def site_names(config: Config, asked: str) -> list[str]:
    """Names of the sites: a site bears its party's name, since draws derive from it.

    asked: a number, or names. Raises `UserError` where parties and sites do not fit.
    """
    ready = DATASETS[config.data["name"]].ready
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if len(names) == 1 and names[0].isdecimal():
        count = int(names[0])
        if count < 1:
            raise UserError("sites is 0: there must be one at least")
        if ready:
            return [f"site-{i + 1}" for i in range(count)]
        names = [f"client-{i:02d}" for i in range(count)]
    if ready:
        return names
    parties = [f"client-{i:02d}" for i in range(config.partition.clients)]
    if sorted(names) != parties:
        raise UserError(
            f"{len(names)} sites, and the experiment splits its data among "
            f"{config.partition.clients} parties: each party is a site, so give "
            f"partition.clients={len(names)} or --sites {config.partition.clients}"
        )
    return names


def start(folder: Path) -> Path:
    """Start the supervisor of a federation in the background; returns its log."""
    folder = folder.resolve()
    kits = _kits(folder)
    if running(folder):
        raise UserError(f"{folder} runs already: see `fedmllm deploy status {folder}`")
    for kit in kits:  # what is wrong is said now, not in a log
        (settings.load_server if kit.name == SERVER else settings.load_site)(kit)
    with (folder / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedmllm.sites.flare.local", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    settings.write_json(folder / PID_FILE, {"pid": process.pid})
    return folder / LOG_FILE


def running(folder: Path) -> int | None:
    """The supervisor's process, if it is alive and this folder's."""
    try:
        process = int(json.loads((folder / PID_FILE).read_text())["pid"])
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError, KeyError):
        return None
    return process if str(folder.resolve()).encode() in words else None


def stop(folder: Path, *, seconds: float = 30.0) -> bool:
    """End supervisor, server and sites; False if none ran."""
    process = running(folder)
    if process is None:
        return False
    os.kill(process, signal.SIGTERM)
    until = time.monotonic() + seconds
    while running(folder) is not None and time.monotonic() < until:
        time.sleep(0.1)
    if running(folder) is not None:
        raise UserError(f"process {process} does not end: kill it by hand")
    return True


def status(folder: Path) -> dict[str, Any]:
    """What runs, and the status of each run."""
    kits = _kits(folder)
    server = folder / KITS / SERVER
    runs = server / settings.load_server(server).runs
    return {
        "running": running(folder) is not None,
        "runs": {p.parent.name: _read(p) for p in sorted(runs.glob(f"*/{STATUS_FILE}"))},
        "sites": {
            kit.name: _read(kit / settings.load_site(kit).state / STATUS_FILE)
            for kit in kits
            if kit.name != SERVER
        },
    }


def status_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A status for people."""
    yield "running" if found["running"] else "not running"
    for name, run in found["runs"].items():
        done = f"{run.get('rounds_done', 0)} of {run.get('rounds', '?')} rounds done"
        at = f", in round {run['round']}" if "round" in run else ""
        yield f"{name}: {run.get('doing')} ({done}{at})"
        for key in ("waiting", "delivered", "present"):
            if run.get(key):
                yield f"  {key}: {', '.join(run[key])}"
        for key in ("away", "failed", "refused"):
            for site, why in run.get(key, {}).items():
                yield f"  {key}: {site}: {why}"
        if run.get("doing", "").startswith("waiting"):
            yield f"  a round needs {run.get('min_sites')} sites"
        if run.get("error"):
            yield f"  error: {run['error']}"
    for name, site in found["sites"].items():
        why = "; here: ".join(site[key] for key in ("error", "detail") if site.get(key))
        error = f" ({why})" if why else ""
        yield f"{name}: {site.get('doing', 'has not run')}{error}"


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    except (OSError, ValueError):
        return {}


def _kits(folder: Path) -> list[Path]:
    """The server's kit and the sites'."""
    kits = sorted(p for p in (folder / KITS).glob("*") if p.is_dir() and p.name != ADMIN)
    if folder / KITS / SERVER not in kits:
        raise UserError(f"{folder} is not a federation: make one with fedmllm deploy init")
    return kits


def main(folder: Path) -> None:
    """Run nodes and experiments until all are complete. In the background process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    nodes = Nodes(_kits(folder))
    server, admin = folder / KITS / SERVER, folder / KITS / ADMIN
    experiments = server / settings.load_server(server).experiments
    try:
        for file in sorted(experiments.glob("*.yaml")):
            Supervisor(server, admin, file.stem, tend=nodes.tend, say=_say).run()
    except UserError as error:
        _say(f"error: {error}")
    except Exception:
        traceback.print_exc()
    finally:
        nodes.end()
        os._exit(0)  # threads of a session whose server is gone do not end


def _say(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
