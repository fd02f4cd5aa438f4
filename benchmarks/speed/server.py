"""Row `server`: folding updates of 20 MB and one step, against Flower's strategies.

10 to 1,000 clients, FedAvg and FedAdam, one thread, each measurement in a process of its own.
Ours takes the updates one by one as they arrive (making one is not timed, and it is dropped
afterwards); Flower's `aggregate_train` has all replies in memory. Where they would not fit they are
not measured, and nothing is extrapolated. Peak memory is above what the process held before the
first update: its libraries, the adapter and the server's own state. That of the other algorithms,
and of the aggregations that need all updates, is measured without an alternative.
Flower is that of FLOWER_PYTHON; without it only ours is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import server_load as load
from common import Took, child, compare, high_water, tell, write

CLIENTS = (10, 100, 500, 1000)
THEIRS = {"fedavg": "FedAvg", "fedadam": "FedAdam"}
# algorithm and aggregation, of which the memory alone is measured
ALONE = (
    *((name, "mean") for name in ("fedprox", "fedavgm", "fedadagrad", "fedyogi", "scaffold")),
    *(("fedavg", name) for name in ("median", "trimmed-mean", "krum", "multi-krum")),
)
ALONE_CLIENTS = (10, 100)
LIMIT = 16e9  # bytes of replies; more is not tried
ALIKE = 1e-5  # of FedAvg's result; FedAdam's formulas differ on purpose


def ours(name: str, aggregation: str, clients: int, warm: int) -> dict[str, Any]:
    """Fold and step in this process."""
    import torch

    from fedmllm import results
    from fedmllm.algorithms import make_algorithm
    from fedmllm.algorithms.aggregation import make_aggregation, with_aggregation
    from fedmllm.algorithms.base import Update

    torch.set_num_threads(1)
    algorithm = make_algorithm(name, num_clients=clients)
    algorithm = with_aggregation(algorithm, make_aggregation(aggregation))
    begin, weighting = algorithm.aggregation.begin, algorithm.weighting
    params = load.start()
    state = algorithm.init({name: torch.from_numpy(value) for name, value in params.items()})
    small = {"a": torch.ones(3)}  # all code is in memory before the measurement
    extra = dict.fromkeys(algorithm.broadcast, small)
    mean = begin(weighting, None)
    for _ in range(min(40, clients)):
        mean.fold(Update("c", 1, small, extra))
    algorithm.step(algorithm.init(small), mean)
    del mean
    wall = cpu = 0.0
    results.reset_peak_memory()
    before = high_water()
    probe: list[float] = []
    for _ in range(warm + 1):
        wall, cpu = 0.0, 0.0
        mean = begin(weighting, None)
        for client in range(clients):
            made = load.delta(params, client)
            delta = {name: torch.from_numpy(value) for name, value in made.items()}
            extra = {slot: {n: -v for n, v in delta.items()} for slot in algorithm.broadcast}
            update = Update(str(client), load.samples(client), delta, extra)
            del made, delta, extra
            began = time.perf_counter(), time.process_time()
            mean.fold(update)
            wall, cpu = wall + time.perf_counter() - began[0], cpu + time.process_time() - began[1]
            del update
        began = time.perf_counter(), time.process_time()
        state = algorithm.step(state, mean)
        wall, cpu = wall + time.perf_counter() - began[0], cpu + time.process_time() - began[1]
        probe = probe or [float(value.ravel()[0]) for value in list(state.params.values())[:5]]
    return {"wall": wall, "cpu": cpu, "peak_bytes": high_water() - before, "probe": probe}


def theirs(name: str, clients: int, warm: int) -> dict[str, Any]:
    """The same by Flower's interpreter."""
    script = str(Path(__file__).with_name("server_flower.py"))
    command = [os.environ["FLOWER_PYTHON"], script, THEIRS[name], str(clients), str(warm)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def free() -> int:
    """Memory that is available, bytes (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)


def measure(name: str, clients: int, repeats: int) -> dict[str, Any]:
    """One algorithm and number of clients: `repeats` pairs of processes."""
    size = sum(a * b * 4 for a, b in load.shapes().values())
    warm = 2 if clients <= 10 else 1 if clients <= 100 else 0
    words = ("server", "--here", "part", name, "mean", str(clients), str(warm))
    fits = clients * size <= min(LIMIT, 0.75 * free()) and "FLOWER_PYTHON" in os.environ
    tries: list[dict[str, Took]] = []
    for _ in range(repeats):
        found = {"ours": child(*words)}
        if fits:
            found["Flower"] = theirs(name, clients, warm)
            if name == "fedavg":
                same = zip(found["ours"]["probe"], found["Flower"]["probe"], strict=True)
                if any(abs(a - b) > ALIKE for a, b in same):
                    raise SystemExit(f"error: the results differ: {found}")
        tries.append({way: Took(one["wall"], one["cpu"]) for way, one in found.items()})
    if "FLOWER_PYTHON" not in os.environ:
        missing = "FLOWER_PYTHON was not given"
    else:
        missing = "" if fits else f"all replies in memory take {clients * size / 1e9:.0f} GB"
    return compare(
        f"{name}, {clients:,} clients",
        tries,
        count=clients,
        unit="updates",
        goals={"Flower": 10.0},
        adapter_bytes=size,
        peak_adapters={way: one["peak_bytes"] / size for way, one in found.items()},
        not_measured=missing,
        flwr=found.get("Flower", {}).get("flwr"),
    )


def measure_alone(name: str, aggregation: str, clients: int) -> dict[str, Any]:
    """The memory of one algorithm and aggregation."""
    size = sum(a * b * 4 for a, b in load.shapes().values())
    found = child("server", "--here", "part", name, aggregation, str(clients), "0")
    words = name if aggregation == "mean" else f"{name}, {aggregation}"
    return compare(
        f"{words}, {clients:,} clients",
        [{"ours": Took(found["wall"], found["cpu"])}],
        count=clients,
        unit="updates",
        goals={},
        adapter_bytes=size,
        peak_adapters={"ours": found["peak_bytes"] / size},
        memory_only=True,
    )


def main(quick: bool, part: str = "", *words: str) -> None:
    """Everything, or one measurement of ours."""
    if part:
        name, aggregation, clients, warm = words
        print(json.dumps(ours(name, aggregation, int(clients), int(warm))))
        return
    cases = []
    for clients in (10, 40) if quick else CLIENTS:
        for name in THEIRS:
            repeats = 1 if quick else 5 if clients == 10 else 3 if clients == 100 else 1
            cases.append(measure(name, clients, repeats))
            tell(cases[-1])
            print({k: round(v, 2) for k, v in cases[-1]["peak_adapters"].items()}, flush=True)
    for clients in (10,) if quick else ALONE_CLIENTS:
        for name, aggregation in ALONE:
            cases.append(measure_alone(name, aggregation, clients))
            tell(cases[-1])
            print({k: round(v, 2) for k, v in cases[-1]["peak_adapters"].items()}, flush=True)
    write("server", cases, what=__doc__ or "", quick=quick)
