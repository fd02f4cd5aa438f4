"""What `fedmllm deploy init` writes, and the commands that look at kits: processes are stand-ins
here but in the slow tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml
from sites import SMALL

pytest.importorskip("nvflare", reason='needs pip install "fedmllm[nvflare]"')

from fedmllm.cli import main
from fedmllm.config import make_config
from fedmllm.errors import UserError
from fedmllm.sites import settings
from fedmllm.sites.flare import certificates, check, packages
from fedmllm.sites.flare.certificates import certificate, renew
from fedmllm.sites.flare.check import check_kit
from fedmllm.sites.flare.kits import Plan, check_plan, server_facts, site_facts
from fedmllm.sites.flare.local import free_port, site_names, start, status, status_lines, stop
from fedmllm.sites.flare.supervise import kit_processes

SITES = ("clinic-a", "clinic-b")
PORT = free_port()


def config(name: str = "conversations", **change: Any) -> Any:
    data = {"name": name, **({} if name in ("memes", "medical") else {"root": "my-data"})}
    return make_config({"name": "own", "data": data, **change})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A federation of two sites with conversations of their own, as the command makes it."""
    folder = tmp_path_factory.mktemp("made")
    experiment = folder / "own.yaml"
    experiment.write_text(yaml.safe_dump(config().model_dump(mode="json")))
    words = ["--sites", ", ".join(SITES), "--port", str(PORT), "--out", str(folder / "federation")]
    done = fedmllm("init", str(experiment), *words)
    assert done.returncode == 0, done.stderr
    assert f"certificates end on {datetime.now(UTC) + timedelta(days=360):%Y-%m}" in done.stdout
    return folder / "federation"


@pytest.fixture
def root(made: Path, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "federation"))


def fedmllm(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedmllm.cli", "deploy", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def called(monkeypatch, *words: str) -> int:
    """The exit code of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["fedmllm", "deploy", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# -- packages ------------------------------------------------------------------------------------


def test_the_list_of_packages_follows_the_experiment() -> None:
    """fedmllm is not in it: no index has it, so pip would fail, or take a stranger's package."""

    def names(**facts: Any) -> set[str]:
        text = packages.requirements(make_config({"name": "x", **facts}))
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert all(line.count("==") == 1 and "+" not in line for line in lines)
        return {line.split("==")[0] for line in lines}

    plain = names()
    assert {"nvflare", "torch", "transformers", "grpcio"} <= plain
    assert not {"fedmllm", "pyarrow", "bitsandbytes", "easy-vqa", "pytest"} & plain
    assert names(model={"quantization": "nf4"}) - plain == {"bitsandbytes"}
    assert "pyarrow" in names(data={"name": "hf-datasets", "root": "r"})
    assert "easy-vqa" in names(data={"name": "easy-vqa"})


class Package:
    """A distribution, as far as it is asked."""

    def __init__(self, version: str, *requires: str) -> None:
        self.version, self.requires = version, list(requires)


def test_a_closure_by_hand(monkeypatch) -> None:
    """ours[x] needs a, b and, by its extra, c[y]; c[y] needs d; e is not installed; circles end."""
    there = {
        "ours": Package("1", "A_a>=1", 'b; python_version < "3"', 'c[y]; extra == "x"', "e<2"),
        "a-a": Package("1.5+cpu", "ours"),
        "c": Package("3", 'd>2; extra == "y"', 'f; extra == "z"'),
        "d": Package("4"),
    }

    def distribution(name: str) -> Package:
        if name not in there:
            raise PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(packages, "distribution", distribution)
    whole = {"a-a": "a-a==1.5", "c": "c==3", "d": "d==4", "e": "e<2"}
    assert packages.installed_closure("ours", ("x",)) == whole
    assert packages.installed_closure("ours") == {"a-a": "a-a==1.5", "e": "e<2"}


# -- plans and settings --------------------------------------------------------------------------


def test_where_a_sites_own_data_goes() -> None:
    for name, data in [
        ("conversations", {"file": "data/clinic-a.json"}),
        ("table", {"file": "data/clinic-a.csv"}),
        ("hf-datasets", {"file": "data/clinic-a"}),
        ("hateful-memes", {"root": "data"}),
        ("memes", {}),
    ]:
        plan = Plan(config(name), SITES)
        assert site_facts(plan, "clinic-a")["data"] == data
        assert server_facts(plan)["data"] == ({"none": True} if data else {})
    pool = make_config({"name": "x", "data": {"name": "table", "root": "r", "parties": "none"}})
    assert site_facts(Plan(pool, SITES), "clinic-a")["data"] == {"root": "data"}
    with pytest.raises(UserError, match="each party is a site"):
        site_names(pool, "clinic-a,clinic-b")  # who shares a pool out by seed names the parties


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "clinic-A"}, "a site cannot be called 'clinic-A', the server's host name"),
        ({"sites": ["test"]}, "a site cannot be called 'test'"),
        ({"config": config(scenario={"name": "missing"})}, "choose scenario aligned"),
        ({"config": config("memes", topology="local")}, "has nobody to federate with"),
        ({"config": config("medical", strategy={"fusion": 1.0})}, "works in one process only"),
    ],
)
def test_what_could_not_run_is_refused_before_kits_are_made(tmp_path, change, words) -> None:
    plan = Plan(**{"config": config(), "sites": SITES, **change})
    with pytest.raises(UserError, match=words):
        check_plan(plan, tmp_path / "f")


def test_kits_of_sites_with_files_of_their_own(made: Path) -> None:
    for site in SITES:
        kit = made / "kits" / site
        assert settings.load_site(kit).data.file == f"data/{site}.json"
        page = (kit / "README.md").read_text()
        assert f"file: data/{site}.json" in page
        assert packages.wheel() in page
        assert "{" not in page
    assert settings.load_server(made / "kits" / "server").data.none
    page = (made / "kits" / "server" / "README.md").read_text()
    assert "builds the model's shapes only" in page
    assert packages.wheel() in page
    assert "{" not in page


UNIT = """\
[Unit]
Description=FedMLLM node {name}
After=network-online.target
Wants=network-online.target

[Service]
# put in: the user; for @KIT@ the folder of this kit, for @VENV@ the virtual environment
User=fedmllm
WorkingDirectory=@KIT@
ExecStart=@VENV@/bin/fedmllm deploy node @KIT@
Restart=always
RestartSec=5
KillMode=control-group
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths=@KIT@
Environment=HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

[Install]
WantedBy=multi-user.target
"""
SUPERVISOR = """\
[Unit]
Description=FedMLLM supervisor of own
After=fedmllm-server.service

[Service]
# put in: the user; for @KIT@ the folder of the server's kit, for @ADMIN@ that of the
# administrator's, for @VENV@ the virtual environment
User=fedmllm
WorkingDirectory=@KIT@
ExecStart=@VENV@/bin/fedmllm deploy supervise @KIT@ --admin @ADMIN@ --experiment own
Restart=on-failure
RestartSec=10
# what a person must mend first (docs/deployment.md)
RestartPreventExitStatus=2
UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=multi-user.target
"""


def test_service_units(made: Path, tmp_path) -> None:
    """Word for word, and as systemd reads them where it is there."""
    units = {path.name: path.read_text() for path in made.glob("kits/*/systemd/*")}
    nodes = {f"fedmllm-{name}.service": UNIT.format(name=name) for name in ("server", *SITES)}
    assert units == {**nodes, "fedmllm-supervisor.service": SUPERVISOR}
    if not shutil.which("systemd-analyze"):
        return
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fedmllm").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "fedmllm").chmod(0o755)
    for name, text in units.items():
        for word in ("@KIT@", "@VENV@", "@ADMIN@"):
            text = text.replace(word, str(tmp_path))
        (tmp_path / name).write_text(text.replace("User=fedmllm\n", ""))
    files = [str(tmp_path / name) for name in units]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True
    )
    mine = [line for line in done.stderr.splitlines() if "fedmllm" in line]
    assert mine == [], done.stderr


# -- certificates --------------------------------------------------------------------------------


def test_new_certificates_by_the_same_authority(root: Path) -> None:
    """Each kit gets another key; old and new sites and servers hear each other."""
    new = renew(root)
    assert new.name == f"renewed-{datetime.now(UTC):%Y-%m-%d}"
    assert new.stat().st_mode & 0o077 == 0
    assert {kit.name for kit in new.iterdir()} == {"server", "admin", *SITES}
    for kit in new.iterdir():
        old, made = root / "kits" / kit.name, "server" if kit.name == "server" else "client"
        assert {path.name for path in kit.iterdir()} == {"startup"}
        names = [{p.name for p in (k / "startup").iterdir()} for k in (old, kit)]
        assert names[0] == names[1]
        for name, equal in [("rootCA.pem", True), (f"{made}.key", False), (f"{made}.crt", False)]:
            texts = [(k / "startup" / name).read_bytes() for k in (old, kit)]
            assert (texts[0] == texts[1]) is equal, name
        assert certificate(kit).name == certificate(old).name
        left = certificate(kit).ends - datetime.now(UTC)
        assert timedelta(days=359) < left < timedelta(days=361)
    for server, site in [(new, root / "kits"), (root / "kits", new)]:
        with listening_as(server / "server", PORT):
            assert check._reached(site / SITES[0]).good
    with pytest.raises(UserError, match="were renewed today"):
        renew(root)
    shutil.rmtree(root / "authority")
    with pytest.raises(UserError, match="bring authority/ back"):
        renew(root)


@contextmanager
def listening_as(kit: Path | None, port: int) -> Iterator[None]:
    """A server with a kit's certificate that wants one of its authority; without a kit one that
    answers in the clear."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if kit is not None:
        startup = kit / "startup"
        context.load_cert_chain(startup / "server.crt", startup / "server.key")
        context.load_verify_locations(startup / "rootCA.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    with closing(socket.create_server(("127.0.0.1", port))) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    plain, _ = listener.accept()
                    with plain, suppress(OSError):
                        if kit is None:
                            plain.sendall(b"hello\r\n")
                        else:
                            context.wrap_socket(plain, server_side=True).close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # or the thread would hold the port
            thread.join(10)


# -- check ---------------------------------------------------------------------------------------


def talk(n: int) -> list[dict[str, Any]]:
    asked = {"role": "user", "content": "what?"}
    return [
        {"id": i, "conversations": [asked, {"role": "assistant", "content": "so"}]}
        for i in range(n)
    ]


def test_a_site_is_checked_before_it_joins(root: Path, monkeypatch, capsys) -> None:
    kit = root / "kits" / SITES[0]

    def lines() -> dict[str, tuple[bool | None, str]]:
        return {line.what: (line.good, line.said) for line in check_kit(kit)}

    found = lines()
    assert found["settings"] == (True, "site clinic-a")
    assert found["data of own"][0] is False
    assert "clinic-a.json" in found["data of own"][1]
    assert found["server"][0] is False
    assert f"localhost:{PORT} is not reached" in found["server"][1]
    assert called(monkeypatch, "check", str(kit)) == 1
    assert "NOT   data of own: " in capsys.readouterr().out
    (kit / "data" / f"{SITES[0]}.json").write_text(json.dumps(talk(3)))
    with listening_as(root / "kits" / "server", PORT):
        found = lines()
        assert called(monkeypatch, "check", str(kit)) == 0
    assert found["data of own"] == (True, "3 samples to train on")
    assert found["base of own"][1].endswith("GB of weights on cpu")
    assert found["server"] == (True, f"localhost:{PORT} answers with this federation's certificate")
    assert {good for good, _ in found.values()} == {True}
    with listening_as(None, PORT):
        assert "not as this federation's" in lines()["server"][1]
    own = {"name": SITES[0], "data": {"file": f"data/{SITES[0]}.json"}}
    for change, what, words in [
        ({"name": "clinic-b"}, "settings", "the certificate is of 'clinic-a'"),
        ({"settings": {"training.lr": 1}}, "data of own", "unknown setting of a machine"),
        ({"settings": {"model.device": "cuda:7"}}, "base of own", "torch finds no GPU here"),
        ({"experiments": "none"}, "experiments", "nothing will be run here"),
    ]:
        (kit / settings.FILE).write_text(yaml.safe_dump({**own, **change}))
        good, said = lines()[what]
        assert good is False
        assert words in said
    wanted = yaml.safe_load((kit / "experiments" / "own.yaml").read_text())
    wanted["strategy"] = {"recombine": 1.0, "mixtures": 4}
    (kit / "experiments" / "own.yaml").write_text(yaml.safe_dump(wanted))
    for reveal, good in (({}, False), ({"features": True}, True)):
        (kit / settings.FILE).write_text(yaml.safe_dump({**own, "reveal": reveal}))
        assert lines()["data of own"][0] is good
        assert good or "set reveal.features at the site" in lines()["data of own"][1]
    (root / "config.json").write_text("{}")
    for path, words in [("/nowhere", "no config.json in /nowhere"), (root, "no *.safetensors in")]:
        good, said = check._base(config("memes", model={"name": "m", "path": str(path)}))
        assert (good, said.startswith(words)) == (False, True)


def test_a_certificate_that_ends(root: Path, monkeypatch) -> None:
    kit, now = root / "kits" / SITES[0], datetime.now(UTC)
    for days, good in ((-1, False), (29, None), (31, True)):
        ends = now + timedelta(days=days, minutes=1)
        monkeypatch.setattr(
            check, "certificate", lambda _, ends=ends: certificates.Certificate("x", ends)
        )
        line = check._certificate(kit)
        assert line.good is good
        assert f"{ends:%Y-%m-%d}" in line.said
    with pytest.raises(UserError, match="has no certificate"):
        certificate(root)


def test_a_server_is_checked(root: Path) -> None:
    kit = root / "kits" / "server"

    def lines() -> dict[str, tuple[bool | None, str]]:
        return {line.what: (line.good, line.said) for line in check_kit(kit)}

    found = lines()
    assert found["settings"][1] == "a server of clinic-a, clinic-b"
    assert found["data of own"] == (True, "none here: the server does not test")
    assert found["port"] == (True, f"{PORT} is free; sites must reach it")
    facts = {"sites": list(SITES), "data": {"file": "data/test.json"}}
    (kit / settings.FILE).write_text(yaml.safe_dump(facts))
    (kit / "data" / "test.json").write_text(json.dumps(talk(4)))
    with closing(socket.create_server(("127.0.0.1", PORT))):
        found = lines()
    assert found["data of own"] == (True, "4 test samples")
    assert found["port"][0] is None
    with pytest.raises(UserError, match="is no kit of a server or a site"):
        list(check_kit(root / "kits" / "admin"))


# -- status and stop -----------------------------------------------------------------------------


@contextmanager
def standing_in(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, with these words in its command line."""
    code = "import time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdin=subprocess.DEVNULL)
    try:
        until(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes().endswith(b"\0"))
        yield process
    finally:
        process.kill()
        process.wait()


def until(met: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_stop_ends_what_a_killed_supervisor_left(root: Path, monkeypatch, capsys) -> None:
    """And nothing else; status says who goes on without it, and what was last heard of a run."""
    kits = {name: str(root / "kits" / name) for name in ("server", *SITES)}
    runs = root / "kits" / "server" / "runs" / "own"
    runs.mkdir(parents=True)
    settings.write_json(
        runs / "status.json", {"doing": "training", "round": 3, "rounds_done": 2, "rounds": 9}
    )
    (root / "kits" / SITES[0] / "state").mkdir()
    settings.write_json(root / "kits" / SITES[0] / "state" / "status.json", {"doing": "waiting"})
    settings.write_json(root / "supervisor.json", {"pid": 2**22})  # nobody
    with (
        standing_in("-m", "nvflare.private.fed.app.server.server_train", "-m", kits["server"]) as a,
        standing_in("fedmllm.sites.trainer", kits[SITES[0]], "0") as b,
        standing_in("-m", "http.server", kits["server"]) as stranger,
        standing_in("nvflare.private.fed", kits["server"] + "-2") as other,
    ):
        found = status(root)
        assert not found["running"]
        assert found["processes"] == {"server": [a.pid], SITES[0]: [b.pid], SITES[1]: []}
        lines = list(status_lines(found))
        assert lines[0] == "not running"
        assert lines[1].startswith("without a supervisor: clinic-a, server go on")
        assert lines[2] == "own: training (2 of 9 rounds done, in round 3)"
        assert lines[3:] == ["clinic-a: waiting", "clinic-b: has not run"]
        assert stop(root)
        assert (a.wait(10), b.wait(10)) == (-signal.SIGKILL, -signal.SIGKILL)
        assert (stranger.poll(), other.poll()) == (None, None)
    assert not stop(root)
    lines = list(status_lines(status(root)))
    assert lines[:2] == [
        "not running",
        "own: ended; last: training (2 of 9 rounds done, in round 3)",
    ]
    assert lines[2] == "clinic-a: ended; last: waiting"
    called(monkeypatch, "status", str(root))
    assert capsys.readouterr().out.splitlines() == lines
    settings.write_json(runs / "status.json", {"doing": "done", "rounds_done": 9, "rounds": 9})
    assert list(status_lines(status(root)))[1] == "own: done (9 of 9 rounds done)"


def test_the_status_of_one_kit(root: Path, tmp_path) -> None:
    """Wherever it lies, and without the others."""
    kit = Path(shutil.copytree(root / "kits" / SITES[1], tmp_path / "elsewhere"))
    assert list(status_lines(status(kit))) == ["not running", "clinic-b: has not run"]
    (kit / "state").mkdir()
    settings.write_json(kit / "state" / "status.json", {"doing": "train", "round": 2})
    with standing_in("nvflare.private.fed.app.client.client_train", str(kit)) as process:
        found = status(kit)
        assert found["processes"] == {SITES[1]: [process.pid]}
        assert list(status_lines(found)) == ["running", "clinic-b: train"]
    server = Path(shutil.copytree(root / "kits" / "server", tmp_path / "server"))
    assert status(server)["sites"] == {}
    (server / "runs" / "own").mkdir(parents=True)
    settings.write_json(
        server / "runs" / "own" / "status.json", {"doing": "done", "rounds_done": 9}
    )
    assert list(status_lines(status(server)))[1] == "own: done (9 of ? rounds done)"


@pytest.mark.slow
def test_a_killed_supervisor_leaves_nothing_that_stop_does_not_end(tmp_path) -> None:
    """Real processes, one site's with a renewed certificate; and until then none of them can be
    reached from another machine."""
    raw = {**SMALL, "name": "tiny", "training": {**SMALL["training"], "rounds": 200}}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(raw))
    root = tmp_path / "federation"
    assert fedmllm("init", str(file), "--min-sites", "3", "--out", str(root)).returncode == 0
    startup = root / "kits" / "client-01" / "startup"
    shutil.rmtree(startup)
    (renew(root) / "client-01" / "startup").rename(startup)
    start(root)
    try:
        until(lambda: status(root)["runs"].get("tiny", {}).get("rounds_done", 0) >= 1, 300)
        kits = status(root)["processes"]
        assert all(len(found) >= 2 for found in kits.values())  # a node and its job
        addresses = listening([process for found in kits.values() for process in found])
        port = yaml.safe_load((root / "project.yml").read_text())["participants"][0]
        assert ("127.0.0.1", port["fed_learn_port"]) in addresses
        assert {address for address, _ in addresses} <= {"127.0.0.1", "::1"}, addresses
        os.kill(json.loads((root / "supervisor.json").read_text())["pid"], signal.SIGKILL)
        until(lambda: not status(root)["running"])
        assert all(kit_processes(root / "kits" / name) for name in kits)
        assert "without a supervisor: " in fedmllm("status", str(root)).stdout
        assert fedmllm("stop", str(root)).stdout == "stopped\n"
        assert not any(kit_processes(root / "kits" / name) for name in kits)
        assert "tiny: ended; last: " in fedmllm("status", str(root)).stdout
    finally:
        stop(root)


def listening(processes: list[int]) -> set[tuple[str, int]]:
    """Addresses and ports of their sockets, by /proc: a tool that is not there cannot hide one."""
    inodes = set()
    for process in processes:
        for link in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found
