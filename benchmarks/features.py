"""What it saves to keep what a frozen vision tower gives, in seconds of a run, on a CPU.

    python benchmarks/features.py                 # all cases, written to results/features.json
    python benchmarks/features.py --repeats 1     # a look, printed only

A run is ten parties with pictures on disk, two a round, no tests but one of eight samples at the
end. It is timed in four ways, one after the other, again and again, each time with the model
loaded anew; loading it is not counted:

    pixels   the tower runs in every step, as it must where nothing is kept
    memory   what is kept of an image is computed once a run
    cold     and written to disk
    warm     and read from there: the second run of a grid

Compared are seconds of one repetition with each other, and the median of the ratios is told: of
wall time, and of this process's CPU time, which other programs on the machine disturb less. That
all four end with the same bits is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

OUT = Path(__file__).resolve().parent.parent / "results" / "features.json"
SEED = 0
WAYS = ("pixels", "memory", "cold", "warm")
IMAGES, TESTS, CLIENTS, ROUNDS = 160, 8, 10, 10
# vision tower of each model: changes to the embedded model's; where changed, weights are random
TOWERS: dict[str, dict[str, int]] = {
    "embedded": {},
    "wide": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    },
}
POLICIES = ("reference", "paper")  # connector trained; frozen


def make_model(name: str, folder: Path) -> Path:
    """The embedded model with another tower."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from fedmllm.models import model_path

    source = Path(model_path("embedded"))
    if not TOWERS[name]:
        return source
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    config = AutoConfig.from_pretrained(source)
    for key, value in TOWERS[name].items():
        setattr(config.vision_config, key, value)
    torch.manual_seed(SEED)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def make_data(folder: Path) -> Path:
    """Drawn pictures as files, with questions, in conversations of ten parties."""
    from fedmllm.data import load_dataset
    from fedmllm.data.sample import Sample

    (folder / "parties").mkdir(parents=True)
    found = load_dataset("memes", train=8 * IMAGES, test=8 * TESTS)

    def item(sample: Sample, number: int) -> dict[str, Any]:
        assert sample.image is not None
        picture = sample.image.open()
        picture.putpixel((0, 0), (number % 256, number // 256, 0))  # each a file of its own
        picture.save(folder / f"{number}.png")
        words = (f"<image>\n{sample.text}\nIs it hateful?", "yes" if sample.label else "no")
        turns = [
            {"role": r, "content": w} for r, w in zip(("user", "assistant"), words, strict=True)
        ]
        return {"id": number, "image": f"{number}.png", "conversations": turns}

    train = [item(sample, i) for i, sample in enumerate(found.train[:IMAGES])]
    test = [item(sample, IMAGES + i) for i, sample in enumerate(found.test[:TESTS])]
    for client in range(CLIENTS):
        text = json.dumps(train[client::CLIENTS])
        (folder / "parties" / f"{client}.json").write_text(text)
    (folder / "test.json").write_text(json.dumps(test))
    return folder


def timed(way: str, policy: str, model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """One run: wall and CPU seconds, passes of the tower, and a digest of the adapter."""
    import hashlib

    from fedmllm.config import make_config
    from fedmllm.experiment import load_model, run
    from fedmllm.models.components import Policy

    config = make_config(
        {
            "name": way,
            "seed": SEED,
            "data": {"name": "conversations", "root": str(data)},
            "model": {
                "name": "measured",
                "path": str(model),
                "feature_cache": "disk" if way in ("cold", "warm") else "memory",
            },
            "trained": policy,
            "training": {"rounds": ROUNDS, "clients_per_round": 2},
            "evaluation": {"every": 0, "conditions": ["both"]},
        }
    )
    before = {"keeps": property(lambda _: "pixels"), "sees": property(lambda _: True)}
    changed = mock.patch.multiple(Policy, **before) if way == "pixels" else nullcontext()
    with changed:
        mllm = load_model(config)
        passes = []
        leaf = next(m for part in mllm._parts for m in part.modules() if m._parameters)
        leaf.register_forward_hook(lambda *_: passes.append(1))
        wall, cpu = time.perf_counter(), time.process_time()
        run(config, out=folder, mllm=mllm)
        facts = {
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "tower_passes": len(passes),
        }
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return {**facts, "adapter_sha256": hashlib.sha256(weights).hexdigest()}


def measure(name: str, policy: str, repeats: int, folder: Path) -> dict[str, Any]:
    """All ways, alternated; one repetition before them is not counted."""
    model, data = make_model(name, folder / "model"), make_data(folder / "data")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{repeat}")
        for way in WAYS:
            facts = timed(way, policy, model, data, folder / f"{repeat}-{way}")
            if repeat:
                runs[way].append(facts)
        shutil.rmtree(folder / f"cache-{repeat}")
    digests = {run["adapter_sha256"] for found in runs.values() for run in found}
    if len(digests) != 1:
        raise SystemExit(f"error: {name}, {policy}: not all runs end with the same adapter")
    ratios = {
        f"{kind}_{way}": statistics.median(
            a[f"{kind}_seconds"] / b[f"{kind}_seconds"]
            for a, b in zip(runs["pixels"], runs[way], strict=True)
        )
        for kind in ("wall", "cpu")
        for way in WAYS[1:]
    }
    shown = ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
    print(f"{name} {policy}: times faster than pixels: {shown}", flush=True)
    return {
        "model": name,
        "trained": policy,
        "images": IMAGES,
        "samples_trained": ROUNDS * 2 * IMAGES // CLIENTS,
        "pixels_over": ratios,
        "runs": {
            way: [{k: v for k, v in run.items() if k != "adapter_sha256"} for run in found]
            for way, found in runs.items()
        },
    }


def main() -> None:
    """Every case; the file is written only after several repeats of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()

    from fedmllm import results

    cases = []
    for name in TOWERS:
        for policy in POLICIES:
            with tempfile.TemporaryDirectory() as folder:
                cases.append(measure(name, policy, given.repeats, Path(folder)))
    if given.repeats < 3:
        return
    facts = {
        "schema": 1,
        "what": "seconds of a run; what is kept of an image: nothing, in memory, on disk",
        "seed": SEED,
        "cases": cases,
        "versions": results.versions(),
        "commit": results.commit(),
        "hardware": results.hardware(1, "cpu"),
    }
    results.write_json(OUT, facts)
    print(f"result  {OUT.relative_to(OUT.parent.parent)}")


if __name__ == "__main__":
    main()
