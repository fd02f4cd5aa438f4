"""How far the planned peak memory is from the measured one, on a CPU.

    python benchmarks/memory.py            # all cases, about five minutes on one core
    python benchmarks/memory.py NAME …     # some, the others stay as they are in the file

Each case is a process of its own: it loads the libraries, plans, loads the model, and trains two
steps, or answers one test batch, of samples whose length is known, or runs a small experiment.
Measured is the high-water mark
of resident memory (VmHWM of /proc, so Linux only). Written to results/memory.json.

Every case runs twice: as it is, and with MALLOC_MMAP_THRESHOLD_=65536, which makes glibc give
freed tensors back at once. The second is what the arithmetic counts; the first is what a run
takes, with the holes in the heap, for which the plan has one allowance.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "results" / "memory.json"
SEED = 0
ANSWER = 8  # tokens
SLACK = "allocator"  # the plan's term for holes in the heap
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """One measurement. model: a key of `MODELS`. phase: training, testing, or run: a whole
    experiment on the memes, for which tokens are those of the longest sample, found afterwards."""

    model: str
    phase: str
    batch: int
    tokens: int
    dtype: str = "float32"
    dropout: float = 0.05
    quantization: str = "none"

    @property
    def name(self) -> str:
        """A word for the command line."""
        if self.phase == "run":
            return f"{self.model}-run-{self.batch}"
        extra = ("-bf16" if self.dtype == "bfloat16" else "") + ("" if self.dropout else "-nodrop")
        extra += "-nf4" if self.quantization == "nf4" else ""
        return f"{self.model}-{self.phase}-{self.batch}x{self.tokens}{extra}"


# language model of each: changes to the embedded model's; random weights, the same tower
MODELS: dict[str, dict[str, int]] = {
    "embedded": {},
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "100M": {
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 13,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}
CASES = [
    Case("embedded", "training", 8, 64),
    Case("embedded", "training", 8, 512),
    Case("embedded", "training", 32, 256),
    Case("embedded", "training", 8, 512, dropout=0.0),
    Case("embedded", "training", 8, 512, dtype="bfloat16"),
    Case("embedded", "testing", 64, 256),
    Case("embedded", "run", 8, 0),
    Case("embedded", "run", 64, 0),
    Case("tiny", "training", 8, 512),
    Case("tiny", "testing", 64, 256),
    Case("100M", "training", 1, 256),
    Case("100M", "training", 4, 256),
    Case("100M", "training", 2, 384, dtype="bfloat16"),
    Case("100M", "training", 2, 384, dtype="bfloat16", quantization="nf4"),
    Case("100M", "testing", 16, 256),
]


def high_water() -> int:
    """Peak resident memory of this process, bytes. Unlike getrusage's, not its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("error: /proc/self/status has no VmHWM: this benchmark needs Linux")


def make_model(name: str, folder: Path) -> Path:
    """A folder with the embedded model's processor and a language model of another size."""
    import torch
    from transformers import AutoModelForImageTextToText

    from fedmllm.models import model_path

    source = Path(model_path("embedded"))
    if not MODELS[name]:
        return source
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    torch.manual_seed(SEED)
    made = AutoModelForImageTextToText.from_config(model_config(name), dtype=torch.float32)
    made.save_pretrained(folder)
    return folder


def model_config(name: str) -> Any:
    """The embedded model's configuration, with a language model of another size."""
    from transformers import AutoConfig

    from fedmllm.models import model_path

    config = AutoConfig.from_pretrained(model_path("embedded"))
    for key, value in MODELS[name].items():
        setattr(config.text_config, key, value)
    if MODELS[name] and "head_dim" not in MODELS[name]:
        config.text_config.head_dim = config.text_config.hidden_size // 2
    return config


def run_config(case: Case) -> Any:
    """The experiment of a whole run."""
    from fedmllm.config import make_config

    return make_config(
        {
            "name": "memory",
            "seed": SEED,
            "data": {"name": "memes", "train": 400, "test": 128},
            "partition": {"clients": 2},
            "training": {"rounds": 1, "batch_size": case.batch, "micro_batch": case.batch},
            "evaluation": {"every": 0, "conditions": ["both"]},
        }
    )


def plan_of(case: Case, folder: Path, runtime: int) -> tuple[int, dict[str, Any]]:
    """Parameters of a case's model, and the planned bytes by term. folder: of the model's
    config.json. runtime: bytes of the libraries. A run's tokens are those of its longest sample."""
    from fedmllm.plan import make_plan
    from fedmllm.plan.memory import Load, estimate
    from fedmllm.plan.structure import build_skeleton

    if case.phase == "run":
        made = make_plan(run_config(case), tokens=case.tokens)
        found = estimate(made.skeleton, made.load, runtime=runtime)
        terms = found.phases[found.phase]
        return made.skeleton.total, {"runtime": runtime, "resident": found.resident, **terms}
    skeleton = build_skeleton(folder, dtype=case.dtype, rank=8, alpha=8, dropout=case.dropout)
    load = Load(
        tokens=case.tokens,
        slices=1,
        batch=case.batch,
        test_batch=case.batch,
        dropout=case.dropout,
        itemsize=2 if case.dtype == "bfloat16" else 4,
        images=0,
        generates=False,
        answer=ANSWER,
        four_bit=case.quantization == "nf4",
    )
    found = estimate(skeleton, load, runtime=runtime)
    terms = found.phases[case.phase]
    return skeleton.total, {"runtime": runtime, "resident": found.resident, **terms}


def total(terms: dict[str, Any]) -> int:
    """Bytes of all terms."""
    rest = sum(count for name, count in terms.items() if name != "resident")
    return rest + sum(terms["resident"].values())


def samples(case: Case) -> list[Any]:
    """Two batches; the answers of a batch stand at different places, as the plan assumes."""
    from fedmllm.models.passes import Encoded

    made = []
    for i in range(2 * case.batch):
        back = (i % case.batch) * ANSWER % max(1, case.tokens - 2 * ANSWER)
        length = case.tokens - back - ANSWER
        options = ((20, 21), (20, 22)) if case.phase == "testing" else ()
        prompt = (10,) * (case.tokens - 2 - i % case.batch if options else length)
        made.append(Encoded(str(i), prompt, (20,) * ANSWER, None, options))
    return made


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Plan, then do it. Runs in a process of its own."""
    import torch

    import fedmllm.experiment
    from fedmllm.plan.capacity import resident_now

    torch.set_num_threads(1)
    runtime = resident_now()
    if case.phase == "run":
        return measure_run(case, folder, runtime)
    parameters, planned = plan_of(case, folder, runtime)
    options = {"rank": 8, "alpha": 8, "dropout": case.dropout, "quantization": case.quantization}
    dtype = getattr(torch, case.dtype)
    mllm = fedmllm.experiment.Mllm.load(case.model, folder, dtype=dtype, **options)
    loaded = high_water()
    work(mllm, case)
    return measured(case, parameters, planned, loaded, high_water())


def measure_run(case: Case, folder: Path, runtime: int) -> dict[str, Any]:
    """A whole experiment: the plan's phases and their largest are compared, not one of them."""
    from fedmllm.data import load_dataset
    from fedmllm.experiment import load_model, run
    from fedmllm.prompts import render

    config = run_config(case)
    mllm = load_model(config)
    loaded = high_water()
    with tempfile.TemporaryDirectory() as out:
        run(config, out=Path(out) / "run", mllm=mllm)
    peak = high_water()
    dataset = load_dataset(**config.data)
    encoded = [mllm.encode(render(one, dataset.task, config.prompt)) for one in dataset.train]
    case = replace(case, tokens=max(map(len, encoded)))
    return measured(case, *plan_of(case, folder, runtime), loaded, peak)


def measured(
    case: Case, parameters: int, planned: dict[str, Any], loaded: int, peak: int
) -> dict[str, Any]:
    """A case's row; loaded and peak: high-water marks."""
    from fedmllm import results

    return {
        **asdict(case),
        "name": case.name,
        "commit": results.commit(),
        "parameters": parameters,
        "planned": planned,
        "planned_bytes": total(planned),
        "measured_bytes": peak,
        "measured_after_loading_bytes": loaded,
    }


def work(mllm: Any, case: Case) -> None:
    """Two optimiser steps, or one test batch."""
    from fedmllm.algorithms.base import LocalObjective
    from fedmllm.client import LocalPlan, train_client

    items = samples(case)
    if case.phase == "testing":
        mllm.score_options(items[: case.batch], batch_size=case.batch)
        return
    train_client(
        mllm,
        mllm.init_adapter(SEED),
        items,
        client="client",
        round_=1,
        seed=SEED,
        lr=1e-3,
        plan=LocalPlan(batch_size=case.batch, micro_batch=case.batch),
        objective=LocalObjective(),
    )


def main() -> None:
    """Every case in a process of its own, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases; all by default")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        print(make_model(given.make, given.folder))
        return
    if given.measure:
        case = next(case for case in CASES if case.name == given.measure)
        print(json.dumps(measure(case, given.folder)))
        return
    known = [case.name for case in CASES]
    if set(given.names) - set(known):
        raise SystemExit(f"error: choose from {', '.join(known)}")
    write(run_all([case for case in CASES if not given.names or case.name in given.names]))


def run_all(cases: list[Case]) -> list[dict[str, Any]]:
    """Measure and print."""
    rows = []
    for model in dict.fromkeys(case.model for case in cases):
        with tempfile.TemporaryDirectory() as folder:
            path = call("--make", model, "--folder", folder)
            for case in (case for case in cases if case.model == model):
                words = ("--measure", case.name, "--folder", path)
                rows.append(compared(json.loads(call(*words)), json.loads(call(*words, **TIGHT))))
                row = rows[-1]
                print(
                    f"{case.name:36} planned {row['planned_bytes'] / 1e6:6.0f} MB, measured "
                    f"{row['measured_bytes'] / 1e6:6.0f} MB ({row['ratio']:.2f}); without "
                    f"allowance {row['planned_live_bytes'] / 1e6:6.0f} MB, measured "
                    f"{row['measured_live_bytes'] / 1e6:6.0f} MB ({row['ratio_live']:.2f})",
                    flush=True,
                )
    return rows


def compared(row: dict[str, Any], tight: dict[str, Any]) -> dict[str, Any]:
    """A case with its second measurement. Ratios are planned / measured, above the libraries."""
    live = tight["planned_bytes"] - tight["planned"].get(SLACK, 0)
    floor, tight_floor = row["planned"]["runtime"], tight["planned"]["runtime"]
    return {
        **row,
        "planned_live_bytes": live,
        "measured_live_bytes": tight["measured_bytes"],
        "ratio": round((row["planned_bytes"] - floor) / (row["measured_bytes"] - floor), 3),
        "ratio_live": round((live - tight_floor) / (tight["measured_bytes"] - tight_floor), 3),
    }


def call(*words: str, **environment: str) -> str:
    """This script in a process of its own; the last line that it prints."""
    command = [sys.executable, __file__, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words)} failed\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def write(rows: list[dict[str, Any]]) -> None:
    """The committed result: these rows, and the file's own for the other cases."""
    from fedmllm import results

    old = json.loads(OUT.read_text())["cases"] if OUT.exists() else []
    by_name = {row["name"]: row for row in [*old, *rows]}
    facts = {
        "schema": 1,
        "what": "planned and measured peak memory, bytes; one process a case, one thread",
        "seed": SEED,
        "cases": [by_name[case.name] for case in CASES if case.name in by_name],
        "versions": results.versions(),
        "hardware": results.hardware(1, "cpu"),
    }
    results.write_json(OUT, facts)
    print(f"result  {OUT.relative_to(OUT.parent.parent)}")


if __name__ == "__main__":
    main()
