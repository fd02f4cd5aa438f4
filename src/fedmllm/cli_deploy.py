"""`fedmllm deploy`: one experiment over several machines.

init makes the kits, renew their certificates; check, node and supervise are for the machines;
start, status, stop and resume try all of it on one machine, with real processes, mutual TLS and
loopback only; simulate runs it in NVFlare's simulator.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from fedmllm.errors import UserError, needs_package

app = typer.Typer(
    no_args_is_help=True,
    help="Run an experiment over several machines (with the extra nvflare, or Flower).",
)

Experiment = Annotated[
    Path, typer.Argument(help="A YAML file, e.g. experiments/memes-fedavg.yaml.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. partition.clients=3.")]
Sites = Annotated[str, typer.Option(help="How many, or their names: clinic-a,clinic-b.")]
MinSites = Annotated[
    int | None, typer.Option(min=1, help="Updates that make a round. [default: most sites]")
]
Deadline = Annotated[float, typer.Option(min=1, help="Seconds that a round waits for slow sites.")]
Kit = Annotated[Path, typer.Argument(help="The kit of a server or a site.")]
Folder = Annotated[Path, typer.Argument(help="The folder that `deploy init` made.")]


def _needs_nvflare() -> None:
    if importlib.util.find_spec("nvflare") is None:
        raise UserError(needs_package("deploy", "NVFlare", "nvflare"))


@app.command()
def init(
    experiment: Experiment,
    overrides: Overrides = None,
    sites: Sites = "3",
    out: Annotated[Path, typer.Option(help="Where the kits go.")] = Path("federation"),
    server: Annotated[
        str, typer.Option(help="The server's host name. localhost: all on this machine.")
    ] = "localhost",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="[default: 8002; localhost: a free one]")
    ] = None,
    min_sites: MinSites = None,
    deadline: Deadline = 3600.0,
) -> None:
    """Write a kit for the server, each site and the administrator: keys, policies, settings."""
    _needs_nvflare()
    from fedmllm.config import load_config
    from fedmllm.sites.flare.certificates import certificate
    from fedmllm.sites.flare.kits import Plan, make_kits
    from fedmllm.sites.flare.local import free_port, site_names

    config = load_config(experiment, overrides or [])
    names = site_names(config, sites)
    near = server in ("localhost", "127.0.0.1")
    plan = Plan(
        config,
        names,
        host=server,
        port=port or (free_port() if near else 8002),
        min_sites=min_sites or len(names) // 2 + 1,
        deadline=deadline,
    )
    make_kits(plan, out)
    ends = certificate(out / "kits" / "server").ends
    print(f"kits      {out / 'kits'}: server, admin, {', '.join(names)}")
    print(f"          their certificates end on {ends:%Y-%m-%d}: fedmllm deploy renew {out}")
    print(f"authority {out / 'authority'}: the root key; keep it off all machines")
    print(f"next      README.md in each kit; on this machine alone: fedmllm deploy start {out}")


@app.command()
def renew(folder: Folder) -> None:
    """Make new certificates for all kits, before the old ones end, by the same authority."""
    _needs_nvflare()
    from fedmllm.sites.flare.certificates import renew as renew_all

    made = renew_all(folder)
    print(f"renewed   {made}: a startup/ for each kit, to put in the place of the old one")


@app.command()
def simulate(
    experiment: Experiment,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The run goes to OUT/NAME.")] = Path("runs"),
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Parties with a process at a time. [default: all]")
    ] = None,
) -> None:
    """Run it in NVFlare's simulator: every party a process here, no certificates; the numbers of
    `fedmllm run`. The same call goes on with a run that was killed."""
    _needs_nvflare()
    from fedmllm.config import load_config
    from fedmllm.sites.flare.simulate import simulate as run_simulation

    folder = run_simulation(load_config(experiment, overrides or []), out, at_once=at_once)
    print(f"result  {folder / 'result.json'}")


@app.command()
def flower(
    experiment: Experiment,
    overrides: Overrides = None,
    sites: Sites = "3",
    out: Annotated[Path, typer.Option(help="Where app and kits go.")] = Path("flower"),
    min_sites: MinSites = None,
    deadline: Deadline = 3600.0,
) -> None:
    """Write an app for `flwr run` and a kit for each party of a Flower federation that there is."""
    from fedmllm.config import load_config
    from fedmllm.sites.flare.kits import Plan
    from fedmllm.sites.flare.local import site_names
    from fedmllm.sites.flower.app import make_app

    config = load_config(experiment, overrides or [])
    names = site_names(config, sites)
    least = min_sites or len(names) // 2 + 1
    made = make_app(Plan(config, names, min_sites=least, deadline=deadline), out)
    print(f"kits      {made / 'kits'}: server, {', '.join(names)}")
    print(f"app       flwr run {made / 'app'}")
    print(
        "a site    fedmllm deploy worker KIT, beside flower-supernode --node-config 'kit=\"KIT\"'"
    )


@app.command()
def worker(
    kit: Annotated[Path, typer.Argument(help="The kit of a site of a Flower federation.")],
) -> None:
    """Keep a site's model and answer its Flower node, in the foreground."""
    from fedmllm.sites.flower.worker import main as run_worker

    run_worker(kit)


@app.command()
def node(kit: Kit) -> None:
    """Run a server or a site, in the foreground."""
    _needs_nvflare()
    from fedmllm.sites.flare.node import run_node

    run_node(kit)


@app.command()
def check(kit: Kit) -> None:
    """Say whether a machine is ready: certificate, data, base model, the way to the server.

    Exit code 1 if something is in the way.
    """
    _needs_nvflare()
    from fedmllm.sites.flare.check import check_kit

    ready = True
    for line in check_kit(kit):
        ready = ready and line.good is not False
        word = {True: "good", False: "NOT", None: "look"}[line.good]
        print(f"{word:5} {line.what}: {line.said}")
    if not ready:
        raise typer.Exit(1)


@app.command()
def supervise(
    server: Annotated[Path, typer.Argument(help="The server's kit, on this machine.")],
    admin: Annotated[Path, typer.Option(help="The administrator's kit.")],
    experiment: Annotated[str, typer.Option(help="A name in the server's experiments/.")],
) -> None:
    """Submit an experiment, and again from its checkpoint when the server or a site was killed."""
    _needs_nvflare()
    from fedmllm.sites.flare.supervise import Supervisor

    Supervisor(server.resolve(), admin.resolve(), experiment).run()


@app.command()
def start(folder: Folder) -> None:
    """Run server, sites and supervisor on this machine, in the background."""
    _needs_nvflare()
    from fedmllm.sites.flare.local import start as start_here

    print(f"started   {start_here(folder)}; see: fedmllm deploy status {folder}")


@app.command()
def resume(folder: Folder) -> None:
    """Start again what was stopped or killed; runs go on from their checkpoints."""
    start(folder)


@app.command()
def stop(folder: Folder) -> None:
    """End all processes that `start` began."""
    from fedmllm.sites.flare.local import stop as stop_here

    print("stopped" if stop_here(folder) else "nothing runs")


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="The folder that `deploy init` made, or a kit.")],
    json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what runs, round by round, and whom it waits for; of all kits here, or of one."""
    from fedmllm.sites.flare.local import status as status_here
    from fedmllm.sites.flare.local import status_lines

    found = status_here(folder)
    if json_:
        print(json.dumps(found, indent=1))
        return
    for line in status_lines(found):
        print(line)
