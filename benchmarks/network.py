"""What the network costs: seconds a round beyond training, start and end of a job, peak memory.

    python benchmarks/network.py              # all cases, half an hour on two cores
    python benchmarks/network.py 2x0.2 2x5    # some, the others stay as they are in the file
    python benchmarks/network.py --list

A case is SITESxMB: kits as `fedmllm deploy init` makes them, then server, sites, administrator and
supervisor as `fedmllm deploy start` runs them: real processes, mutual TLS, loopback. The adapter
gets its size from LoRA's rank on the embedded model. Training is replaced by writing noise into an
update (`network_stub/`); all else is the production path: trainer, files, executor, filters,
NVFlare, controller, algorithm, checkpoint. Written to results/network.json.

A round is the time from one checkpoint to the next, as the file of its line says. Memory is that of
the processes of a kit, by their command lines: the high-water mark of each (VmHWM), and of a
machine's sum as sampled. A case that leaves less than two gigabytes to the machine is ended, and
that is said. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "network.json"
BYTES_A_RANK = 24_576  # of LoRA on the embedded model's decoder, float32
SPARE = 2_000_000_000  # bytes that a case must leave free
_TICK = 0.05
_MEMORY_EVERY = 0.25
_LOOKS = 8
ROLES = {  # a word of a process's command line -> what it is
    "server.server_train": "server",
    "runner_process": "server job",
    "client.client_train": "site",
    "worker_process": "site job",
    "fedmllm.sites.trainer": "trainer",
}


@dataclass(frozen=True)
class Case:
    """sites, and the adapter in 10^6 bytes."""

    sites: int
    megabytes: float
    rounds: int

    @property
    def name(self) -> str:
        """A word for the command line."""
        return f"{self.sites}x{self.megabytes:g}"

    @property
    def rank(self) -> int:
        """LoRA's rank that gives the size."""
        return max(1, round(self.megabytes * 1e6 / BYTES_A_RANK))


CASES = [
    Case(2, 0.2, 10),
    Case(2, 5, 10),
    Case(2, 100, 6),
    Case(2, 300, 5),
    Case(8, 0.2, 10),
    Case(8, 5, 10),
    Case(8, 100, 4),
    Case(8, 300, 3),
]


def config(case: Case) -> Any:
    """The experiment: eight samples a site, which nobody trains on."""
    from fedmllm.config import make_config

    return make_config(
        {
            "name": "network",
            "data": {"name": "memes", "train": 8 * case.sites, "test": 8},
            "partition": {"name": "even", "clients": case.sites},
            "lora": {"rank": case.rank, "dropout": 0.0},
            "training": {"rounds": case.rounds, "clients_per_round": case.sites},
            "evaluation": {"every": 0, "conditions": ["both"]},
        }
    )


# -- one case, in a process of its own -------------------------------------------------------------


class Watch:
    """When rounds ended, and how much memory the processes of the kits held."""

    def __init__(self, kits: Path, run: Path) -> None:
        self.kits, self.run = str(kits.resolve()).encode(), run
        self.first_round: float | None = None
        self.lines: list[float] = []  # when the line of a round was written
        self.done: float | None = None
        self.peaks: dict[int, tuple[str, str, int]] = {}  # process -> kit, role, bytes
        self.most: dict[str, dict[str, int]] = {}  # kit -> bytes by role when the sum was largest
        self.least_free = sys.maxsize
        self.strangers: dict[int, int] = {}  # process -> how often it was looked at in vain
        self.looked = 0.0

    def look(self) -> None:
        """Once; cheap."""
        now = time.time()
        status = self._status()
        if self.first_round is None and status.get("doing") == "training":
            self.first_round = float(status["at"])
        if self.done is None and status.get("doing") == "done":
            self.done = float(status["at"])
        self._count_lines()
        if now - self.looked >= _MEMORY_EVERY:
            self.looked = now
            self._memory()

    def _status(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.run / "status.json").read_text())
            return found
        return {}

    def _count_lines(self) -> None:
        file = self.run / "metrics.jsonl"
        with contextlib.suppress(OSError):
            written = file.stat().st_mtime
            count = file.read_bytes().count(b"\n")
            if count > len(self.lines):
                self.lines += [written] * (count - len(self.lines))

    def _memory(self) -> None:
        kits: dict[str, dict[str, int]] = {}
        there = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()}
        for process in there:
            who = self._who(process)
            if who is None:
                continue
            with contextlib.suppress(OSError, IndexError, ValueError):
                status = Path(f"/proc/{process}/status").read_text()
                peak, now = (
                    int(status.split(f"{key}:")[1].split()[0]) * 1024 for key in ("VmHWM", "VmRSS")
                )
                self.peaks[process] = (*who, peak)
                kit = kits.setdefault(who[0], {})
                kit[who[1]] = max(now, kit.get(who[1], 0))  # a fork shares its parent's
        for name, roles in kits.items():
            if sum(roles.values()) > sum(self.most.get(name, {}).values()):
                self.most[name] = roles
        self.least_free = min(self.least_free, free_bytes())

    def _who(self, process: int) -> tuple[str, str] | None:
        """Kit and role of a process, asked each time: a fork bears its parent's name until it
        begins its own program. A stranger is looked at a few times."""
        if self.strangers.get(process, 0) > _LOOKS:
            return None
        words = b""
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_bytes()
        kit = words.partition(self.kits + b"/")[2].replace(b"\0", b"/").split(b"/")[0]
        role = next((role for word, role in ROLES.items() if word.encode() in words), None)
        if kit and role is not None:
            return kit.decode(), role
        self.strangers[process] = self.strangers.get(process, 0) + 1
        return None


def free_bytes() -> int:
    """Memory that the machine could give to a process now."""
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024


def measure(case: Case) -> dict[str, Any]:
    """One case. Prepares kits, runs them to the end of the experiment, and looks on."""
    from fedmllm.sites.flare.kits import Plan, make_kits
    from fedmllm.sites.flare.local import free_port
    from fedmllm.sites.flare.supervise import Nodes, Supervisor

    made = config(case)
    sites = [f"client-{i:02d}" for i in range(case.sites)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "federation"
        make_kits(Plan(made, sites, min_sites=case.sites, port=free_port()), root)
        kits = root / "kits"
        nodes = Nodes([kits / name for name in ("server", *sites)])
        watch = Watch(kits, kits / "server" / "runs" / made.name)
        submitted: list[float] = []
        load = os.getloadavg()[0]
        try:
            with looking_on(watch):
                began = time.time()
                boss = Supervisor(
                    kits / "server",
                    kits / "admin",
                    made.name,
                    tend=lambda: tend(nodes, watch),
                    say=lambda line: submitted.append(time.time()) or print(line, file=sys.stderr),  # type: ignore[func-returns-value]
                )
                boss.run()
                ended = time.time()
        finally:
            nodes.end()
        result = json.loads((watch.run / "result.json").read_text())
    if len(submitted) != 1:
        raise SystemExit(f"error: {case.name}: {len(submitted)} jobs instead of one")
    return facts(case, watch, result, times=(began, submitted[0], ended), load=load)


@contextlib.contextmanager
def looking_on(watch: Watch) -> Iterator[None]:
    """Look again and again, in a thread."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(_TICK):
            watch.look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def tend(nodes: Any, watch: Watch) -> None:
    """Keep nodes alive; end a case that takes the machine's memory."""
    nodes.tend()
    if watch.least_free < SPARE:
        raise MemoryError


def facts(
    case: Case,
    watch: Watch,
    result: dict[str, Any],
    *,
    times: tuple[float, float, float],
    load: float,
) -> dict[str, Any]:
    """A case's line of the file. Seconds of a round: from one line to the next; the first from its
    first request."""
    began, submitted, ended = times
    assert watch.first_round is not None
    assert watch.done is not None
    ends = [watch.first_round, *watch.lines]
    rounds = [b - a for a, b in itertools.pairwise(ends)]
    history = result["history"]
    if len(rounds) != case.rounds or any(len(r["clients"]) != case.sites for r in history):
        raise SystemExit(f"error: {case.name}: not every round was seen, or had all sites")
    return {
        "case": case.name,
        "sites": case.sites,
        "adapter_bytes": sum(result["bytes"]["per_client_round"]["up"].values()),
        "rank": case.rank,
        "rounds": case.rounds,
        "round_seconds": rounds,
        "exchange_seconds": [line["seconds"] for line in history],
        "stub_seconds": [line["measured"]["stub_seconds"] for line in history],
        "median_round_seconds": statistics.median(rounds),
        "median_exchange_seconds": statistics.median(line["seconds"] for line in history),
        "connect_seconds": submitted - began,
        "start_seconds": watch.first_round - submitted,
        "finish_seconds": watch.done - watch.lines[-1],
        "leave_seconds": ended - watch.done,
        "peak_bytes": peaks(watch),
        "at_a_sites_peak_bytes": largest_site(watch),
        "least_free_bytes": watch.least_free,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peaks(watch: Watch) -> dict[str, int]:
    """By role the largest high-water mark of a process; of the largest site and of the server all
    processes at one time."""
    found: dict[str, int] = {}
    for _, role, peak in watch.peaks.values():
        found[role] = max(peak, found.get(role, 0))
    found["all of the server"] = sum(watch.most["server"].values())
    found["all of a site"] = sum(largest_site(watch).values())
    return found


def largest_site(watch: Watch) -> dict[str, int]:
    """By role, what a site's processes held when their sum was the largest of all sites'."""
    sites = (roles for kit, roles in watch.most.items() if kit != "server")
    return max(sites, key=lambda roles: sum(roles.values()))


# -- all of them -----------------------------------------------------------------------------------


def main() -> None:
    """Every case in a process of its own, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases; all by default")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = {case.name: case for case in CASES}
    if given.list:
        print(*known, sep="\n")
        return
    if given.measure:
        one(known[given.measure])
    if set(given.names) - set(known):
        raise SystemExit(f"error: choose from {', '.join(known)}")
    for name in given.names or known:
        write(child(known[name]))


def one(case: Case) -> None:
    """Measure in this process, and leave it: threads of a session may go on. A signal ends the
    nodes, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    code = 1
    try:
        found = measure(case)
        code = 0
    except MemoryError:
        why = f"it left less than {SPARE / 1e9:g} GB of this machine's memory free"
        found, code = {"case": case.name, "not_measured": why}, 0
    finally:
        if code == 0:
            print(json.dumps(found), flush=True)
        else:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.stderr.flush()
        os._exit(code)


def child(case: Case) -> dict[str, Any]:
    """A case in a process of its own, whose nodes inherit the stub."""
    paths = [str(ROOT / "benchmarks" / "network_stub"), str(ROOT / "src")]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", case.name],
        stdout=subprocess.PIPE,
        text=True,
        env=known,
    )
    if done.returncode:
        raise SystemExit(f"error: {case.name} failed")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if "not_measured" in found:
        print(f"{case.name:8} not measured: {found['not_measured']}", flush=True)
        return found
    print(
        f"{case.name:8} {found['median_round_seconds']:6.2f} s a round, job start "
        f"{found['start_seconds']:.1f} s, end {found['finish_seconds']:.1f} + "
        f"{found['leave_seconds']:.1f} s, a site {found['peak_bytes']['all of a site'] / 1e6:,.0f} "
        f"MB, the server's job {found['peak_bytes']['server job'] / 1e6:,.0f} MB, "
        f"load {found['load_before']:.1f}",
        flush=True,
    )
    return found


def write(row: dict[str, Any]) -> None:
    """The committed result: this row, and the file's own for the other cases."""
    from fedmllm import results

    old = json.loads(OUT.read_text())["cases"] if OUT.exists() else []
    by_name = {each["case"]: each for each in [*old, row]}
    row["commit"] = results.commit()
    facts = {
        "schema": 1,
        "what": "seconds a round beyond training, start and end of a job, peak memory in bytes; "
        "processes on loopback, mutual TLS, training replaced by writing an update of noise",
        "config": config(CASES[0]).model_dump(mode="json"),
        "cases": [by_name[case.name] for case in CASES if case.name in by_name],
        "versions": {**results.versions(), "nvflare": version("nvflare")},
        "hardware": results.hardware(1, "cpu"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    results.write_json(OUT, facts)
    print(f"result  {OUT.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main()
