"""One machine of a federation: NVFlare's parent process on a kit, in this process' place."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fedmllm.errors import UserError
from fedmllm.sites import settings

_APP = "nvflare.private.fed.app"


def node_command(kit: Path) -> list[str]:
    """The command line that runs a kit. Raises `UserError` if the folder is no kit of a node."""
    startup = kit / "startup"
    common = ["--set", "secure_train=true"]
    if (startup / "fed_server.json").is_file():
        settings.load_server(kit)
        app, which, own = "server.server_train", "fed_server.json", ["org=server"]
    elif (startup / "fed_client.json").is_file():
        name = settings.load_site(kit).name
        given = json.loads((startup / "fed_client.json").read_text())["client"]["fqsn"]
        if given != name:
            raise UserError(
                f"{kit / settings.FILE}: name is {name!r}, and the certificate here is of {given!r}"
            )
        org = "".join(c if c.isalnum() else "_" for c in name)
        app, which, own = "client.client_train", "fed_client.json", [f"uid={name}", f"org={org}"]
    else:
        raise UserError(f"{kit} is no kit of a server or a site: it lacks startup/fed_*.json")
    python = [sys.executable, "-u", "-m", f"{_APP}.{app}"]
    return [*python, "-m", str(kit), "-s", which, *common, *own, "config_folder=config"]


def prepare_node(kit: Path) -> None:
    """What must be right before each start, wherever the kit now lies."""
    place_storage(kit)
    for name in ("pid.fl", "shutdown.fl", "restart.fl", "daemon_pid.fl"):
        (kit / name).unlink(missing_ok=True)


def node_environment() -> dict[str, str]:
    """Offline, quiet, little memory lost to the allocator."""
    return {
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "4",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        **os.environ,
    }


def run_node(kit: Path) -> None:
    """Run a kit; this process becomes NVFlare's."""
    kit = kit.resolve()
    command = node_command(kit)
    prepare_node(kit)
    os.chdir(kit)
    os.execve(command[0], command, node_environment())


def place_storage(kit: Path) -> None:
    """Point the server's storage into its kit, wherever that now lies."""
    file = kit / "local" / "resources.json"
    found = json.loads(file.read_text())
    if "servers" not in found:
        return
    storage = kit.resolve() / "storage"
    found["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
    for component in found["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(storage / "jobs")
    settings.write_json(file, found)
