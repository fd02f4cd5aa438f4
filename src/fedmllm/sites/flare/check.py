"""Before a machine joins: is what its kit names there? Nothing is sent but a TLS handshake.

The base model's weights stay unread, and no experiment is judged that its owner has not put into
`experiments/`.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedmllm.config import Config
from fedmllm.data import load_dataset
from fedmllm.errors import UserError
from fedmllm.experiment import make_manifest, own_samples
from fedmllm.models import model_path
from fedmllm.sites import settings
from fedmllm.sites.agreed import check_reveal, server_config, site_config
from fedmllm.sites.flare.certificates import SOON, certificate

_PATIENCE = 5.0  # seconds for the server to answer


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. good: None where it is worth a look and no obstacle."""

    what: str
    good: bool | None
    said: str


def check_kit(kit: Path) -> Iterator[Line]:
    """What a site or a server needs, line by line. Raises `UserError` if the folder is no kit."""
    kit = kit.resolve()
    if (kit / "startup" / "fed_server.json").is_file():
        server = settings.load_server(kit)
        yield Line("settings", True, f"a server of {', '.join(server.sites)}")
        yield _certificate(kit)
        yield from _experiments(
            kit, server.experiments, lambda file: _server_data(kit, server, file)
        )
        yield _port(kit)
        return
    if not (kit / "startup" / "fed_client.json").is_file():
        raise UserError(f"{kit} is no kit of a server or a site: it lacks startup/fed_*.json")
    site = settings.load_site(kit)
    yield _name(kit, site.name)
    yield _certificate(kit)
    yield from _experiments(kit, site.experiments, lambda file: _site_data(kit, site, file))
    yield _reached(kit)


def _name(kit: Path, name: str) -> Line:
    given = certificate(kit).name
    if given != name:
        return Line("settings", False, f"name is {name!r}, and the certificate is of {given!r}")
    return Line("settings", True, f"site {name}")


def _certificate(kit: Path) -> Line:
    ends = certificate(kit).ends
    left, day = ends - datetime.now(UTC), f"{ends:%Y-%m-%d}"
    if left.total_seconds() <= 0:
        return Line("certificate", False, f"ended on {day}: ask for new ones (deploy renew)")
    said = f"holds until {day}, {left.days} days"
    return Line("certificate", True if left > SOON else None, said)


def _experiments(
    kit: Path, folder: str, data: Callable[[Path], tuple[Config, str]]
) -> Iterator[Line]:
    """Data and base model of each experiment that this machine agrees to."""
    files = sorted((kit / folder).glob("*.y*ml"))
    if not files:
        yield Line("experiments", False, f"none in {folder}/: nothing will be run here")
    for file in files:
        try:
            config, said = data(file)
            yield Line(f"data of {file.stem}", True, said)
            yield Line(f"base of {file.stem}", *_base(config))
        except UserError as error:
            yield Line(f"data of {file.stem}", False, str(error))


def _site_data(kit: Path, site: settings.SiteFile, file: Path) -> tuple[Config, str]:
    config = site_config(kit, site, file)
    check_reveal(config, site)
    dataset = load_dataset(**config.data)
    train, held = own_samples(config, dataset, make_manifest(config, dataset))
    if not train.get(site.name):
        raise UserError(f"nothing in the data is {site.name}'s to train on")
    out = f", {len(held[site.name])} held out" if held[site.name] else ""
    return config, f"{len(train[site.name]):,} samples to train on{out}"


def _server_data(kit: Path, server: settings.ServerFile, file: Path) -> tuple[Config, str]:
    config = server_config(kit, server, file)
    if server.data.none:
        return config, "none here: the server does not test"
    return config, f"{len(load_dataset(**config.data).test):,} test samples"


def _base(config: Config) -> tuple[bool, str]:
    path = model_path(config.model.name, config.model.path)
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return False, f"no config.json in {path}: set model.path below settings"
    files = list(folder.glob("*.safetensors"))
    if not files:
        return False, f"no *.safetensors in {path}"
    if config.model.quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return False, "model.quantization nf4 needs the package bitsandbytes"
    if config.model.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            return False, f"device {config.model.device}: torch finds no GPU here"
    size = sum(file.stat().st_size for file in files)
    return True, f"{size / 1e9:.3g} GB of weights on {config.model.device}"


def _reached(kit: Path) -> Line:
    """Whether the server answers, and is this federation's."""
    startup = kit / "startup"
    facts = json.loads((startup / "fed_client.json").read_text())["servers"][0]
    target, identity = str(facts["service"]["target"]), str(facts["identity"])
    host, _, port = target.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
        context.load_cert_chain(startup / "client.crt", startup / "client.key")
    except OSError as error:
        return Line("server", False, f"the keys in {startup} cannot be read: {error}")
    try:
        with (
            socket.create_connection((host, int(port)), timeout=_PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=identity),
        ):
            return Line("server", True, f"{target} answers with this federation's certificate")
    except ssl.SSLError as error:
        return Line("server", False, f"{target} answers, and not as this federation's: {error}")
    except OSError as error:
        why = f"{target} is not reached ({error}): it does not run yet, or a firewall is between"
        return Line("server", False, why)


def _port(kit: Path) -> Line:
    """Whether the server can listen."""
    facts = json.loads((kit / "startup" / "fed_server.json").read_text())["servers"][0]
    port = int(str(facts["service"]["target"]).rpartition(":")[2])
    with socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(("", port))
        except OSError as error:
            return Line("port", None, f"{port}: {error}; well if this server runs already")
    return Line("port", True, f"{port} is free; sites must reach it")
