"""Numbers of the chapter on 8-billion-parameter models in 4 bit: results/deployment-8b.json.

    python scripts/plan_8b.py

Plans a federation over MiniCPM-Llama3-V-2.5 (Llama-3-8B) from its published config.json, without
weights, as `fedmllm plan` does: exact counts, estimated memory. What a server without test data
takes is measured, since it builds the shapes only: a process of its own draws the first adapter.
Only the tokenizer is a small one, so that the measured process lacks the real one's words.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "deployment-8b.json"
MODEL, SITES, ROUNDS = "MiniCPM-Llama3-V-2.5", 8, 40
sys.path.insert(0, str(ROOT / "tests"))  # the published configuration, a small tokenizer

GPU = ["model.device=cuda"]
NF4 = ["model.quantization=nf4"]
LEAN = ["model.gradient_checkpointing=true"]
TESTS = "server that tests"
MACHINES = {  # machine -> overrides of the experiment
    "site, GPU, 4 bit": [*GPU, *NF4],
    "site, GPU, 4 bit, checkpointing": [*GPU, *NF4, *LEAN],
    "site, GPU, bfloat16, checkpointing": [*GPU, *LEAN],
    "site, CPU, 4 bit, checkpointing": [*NF4, *LEAN],
    f"{TESTS}, CPU, bfloat16": [],
    f"{TESTS}, CPU, 4 bit": NF4,
}


def write_model(folder: Path) -> Path:
    """What a plan and a server without test data read."""
    from minicpmv_checkpoint import preprocessor_file, tokenizer_files
    from real_configs import CONFIGS

    tokenizer_files(folder, "2.5")
    preprocessor_file(folder, "2.5")
    (folder / "config.json").write_text(json.dumps(CONFIGS[MODEL]))
    return folder


def experiment(folder: Path) -> dict[str, Any]:
    """Eight sites with conversations of their own; the paper's training."""
    return {
        "name": "eight-billion",
        "data": {"name": "conversations", "root": "my-data"},
        "partition": {"clients": SITES},
        "model": {"name": MODEL, "path": str(folder), "dtype": "bfloat16"},
        "training": {
            "rounds": ROUNDS,
            "clients_per_round": SITES,
            "batch_size": 4,
            "micro_batch": 1,
            "lr": 2e-5,
        },
        "evaluation": {"batch_size": 1},
    }


def plans(folder: Path) -> dict[str, Any]:
    """What is exact, once; and the estimated peak of each machine."""
    from fedmllm.config import make_config
    from fedmllm.plan import make_plan

    found: dict[str, Any] = {"machines": {}}
    for machine, overrides in MACHINES.items():
        made = make_plan(make_config(experiment(folder), overrides))
        if "exact" not in found:
            found["exact"] = exact(made)
        found["machines"][machine] = memory(made.memory, trains=not machine.startswith(TESTS))
        found["tokens"], found["slices"] = made.load.tokens, made.load.slices
    return found


def memory(found: Any, *, trains: bool) -> dict[str, Any]:
    """Peak of the phases that a machine goes through; a server trains nothing."""
    phases = {name: sum(terms.values()) for name, terms in found.phases.items()}
    if not trains:
        del phases["training"]
    phase = max(phases, key=phases.__getitem__)
    return {
        "peak_bytes": found.runtime + sum(found.resident.values()) + phases[phase],
        "weights_bytes": found.resident["weights"],
        "host_bytes": found.host,
        "phase": phase,
    }


def exact(made: Any) -> dict[str, int]:
    """Counts of a plan that are no estimates. Bytes of all sites together."""
    return {
        "parameters": made.skeleton.loaded,
        "trainable": made.skeleton.trainable,
        "adapter_bytes": 4 * made.skeleton.trainable,
        "round_up": made.traffic.round_up,
        "round_down": made.traffic.round_down,
        "run_up": made.traffic.up,
        "run_down": made.traffic.down,
    }


def shapes(folder: Path) -> None:
    """In a process of its own: what a server without test data builds; prints its peak."""
    from fedmllm.config import make_config
    from fedmllm.experiment import load_shapes
    from fedmllm.plan.capacity import resident_now
    from fedmllm.results import peak_memory_bytes

    libraries = resident_now()
    mllm = load_shapes(make_config(experiment(folder), NF4))
    assert mllm is not None
    adapter = mllm.init_adapter(0)
    size = sum(value.numel() * value.element_size() for value in adapter.values())
    peak = peak_memory_bytes()
    print(json.dumps({"libraries": libraries, "peak_bytes": peak, "adapter_bytes": size}))


def main() -> None:
    """Write the file."""
    from fedmllm.results import hardware, versions

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(Path(scratch))
        found = plans(folder)
        done = subprocess.run(
            [sys.executable, __file__, str(folder)], capture_output=True, text=True, check=True
        )
    found["server_without_tests"] = json.loads(done.stdout.splitlines()[-1])
    about = {
        "schema": 1,
        "what": "a planned federation over an 8-billion model in 4 bit; bytes",
        "model": MODEL,
        "sites": SITES,
        "rounds": ROUNDS,
    }
    facts = {**about, **found, "hardware": hardware(1, "cpu"), "versions": versions()}
    OUT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        shapes(Path(sys.argv[1]))
    else:
        main()
