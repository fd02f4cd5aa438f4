"""One federated round of real-size models with random weights on a GPU, against the plan.

    python benchmarks/gpu.py                     # all cases on cuda
    python benchmarks/gpu.py NAME …              # some; the others stay as they are in the file
    python benchmarks/gpu.py --device cpu tiny   # the same path on a small model, to try it

Each case is a process of its own. It writes two parties' conversation files with drawn pictures of
realistic sizes, builds the model from its published configuration (random weights, in 4 bit where
the case says so; a byte tokenizer in place of the published one), and runs one round through
`fedmllm.experiment.run`. Measured: peak memory of the device above its context, beside the plan's;
samples a second in training and testing. The case `bf16` compares logits in bfloat16 with those in
float32 on the test vectors of MiniCPM-V. Nothing here says anything about quality. Written to
results/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "gpu.json"
SEED = 0
SIZES = [(1024, 768), (640, 480), (1344, 896), (768, 1024)]  # pixels of the pictures
sys.path.insert(0, str(ROOT / "tests"))  # published configurations and small processors


@dataclass(frozen=True)
class Case:
    """One measurement. model: a name in `FOLDERS`. samples: of each of two parties, and to test."""

    name: str
    model: str
    quantization: str = "none"
    dtype: str = "bfloat16"
    samples: int = 16
    batch: int = 1
    checkpointing: bool = False


@dataclass(frozen=True)
class Model:
    """recipe: the small model whose processor is taken. config: published sizes, none for the
    small model itself. images: settings of the image processor."""

    recipe: str
    config: str = ""
    images: tuple[tuple[str, Any], ...] = ()


FOLDERS: dict[str, Model] = {
    "MiniCPM-V-2.6": Model("minicpmv 2.6", "MiniCPM-V-2.6", (("image_feature_size", 64),)),
    "MiniCPM-Llama3-V-2.5": Model(
        "minicpmv 2.5", "MiniCPM-Llama3-V-2.5", (("image_feature_size", 96),)
    ),
    "Qwen2-VL-2B": Model(
        "qwen2_vl",
        "Qwen2-VL-2B",
        (("patch_size", 14), ("size", {"shortest_edge": 3136, "longest_edge": 12_845_056})),
    ),
    "SmolVLM-256M": Model(
        "smolvlm",
        "SmolVLM-256M",
        (("size", {"longest_edge": 1024}), ("max_image_size", {"longest_edge": 512})),
    ),
    "tiny": Model("qwen2_vl"),
}
CASES = [
    Case("SmolVLM-256M-bf16", "SmolVLM-256M", batch=4),
    Case("Qwen2-VL-2B-bf16", "Qwen2-VL-2B", batch=4),
    Case("Qwen2-VL-2B-nf4", "Qwen2-VL-2B", "nf4", batch=4),
    Case("MiniCPM-V-2.6-bf16", "MiniCPM-V-2.6", batch=2),
    Case("MiniCPM-V-2.6-nf4", "MiniCPM-V-2.6", "nf4"),
    Case("MiniCPM-V-2.6-nf4-checkpointing", "MiniCPM-V-2.6", "nf4", batch=4, checkpointing=True),
    Case("MiniCPM-Llama3-V-2.5-bf16", "MiniCPM-Llama3-V-2.5", batch=2),
    Case("MiniCPM-Llama3-V-2.5-nf4", "MiniCPM-Llama3-V-2.5", "nf4"),
]
TRIALS = [
    Case("tiny", "tiny", dtype="float32", samples=4, batch=2),
    Case("tiny-nf4", "tiny", "nf4", dtype="float32", samples=4, batch=2),
]


def make_folder(name: str, folder: Path) -> Path:
    """Processor, tokenizer and config.json of a model, without weights unless it is the small."""
    from real_configs import CONFIGS
    from tiny_models import make_model

    model = FOLDERS[name]
    make_model(model.recipe, folder)
    if not model.config:
        return folder
    (folder / "model.safetensors").unlink()
    small = json.loads((folder / "config.json").read_text())
    ids = {key: value for key, value in small.items() if key.endswith(("_token_id", "_index"))}
    config = {**CONFIGS[model.config], **ids}
    (folder / "config.json").write_text(json.dumps(config))
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.exists() and model.images:
            settings = json.loads(file.read_text())
            settings.get("image_processor", settings).update(dict(model.images))
            if "image_seq_len" in settings:
                settings["image_seq_len"] = 64  # 512 / 16 / 4, squared
            file.write_text(json.dumps(settings))
    return folder


def build(folder: Path, case: Case, device: str) -> Any:
    """An `Mllm` with random weights, built on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from fedmllm.models import minicpmv
    from fedmllm.models.components import Policy, add_adapter
    from fedmllm.models.loading import _processor, family
    from fedmllm.models.mllm import Mllm
    from fedmllm.models.quantize import pack, settle

    minicpmv.register()
    dtype = getattr(torch, case.dtype)
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(SEED)
    with torch.device(device):
        base = AutoModelForImageTextToText.from_config(config, dtype=dtype).requires_grad_(False)
    if case.quantization == "nf4":
        pack(base, dtype)
        settle(base, dtype)
    model = add_adapter(base, family(config), Policy(), rank=8, alpha=8, dropout=0.05)
    if case.checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.disable_input_require_grads()
    return Mllm(case.model, model.eval(), _processor(folder, config, False))


def write_data(folder: Path, case: Case) -> None:
    """Two parties and a test file; every third sample has no picture."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(SEED)
    (folder / "parties").mkdir(parents=True)
    for party in ("parties/a", "parties/b", "test"):
        rows = []
        for i in range(case.samples):
            image = None
            if i % 3 != 2:
                image = f"{party.replace('/', '-')}-{i}.jpg"
                size = SIZES[i % len(SIZES)]
                coarse = generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize(size).save(folder / image)
            content = ("<image>\n" if image else "") + "What does the picture show, in a word?"
            turns = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": ["a dog", "a house", "a tree"][i % 3]},
            ]
            rows.append({"id": i, "image": image, "conversations": turns})
        (folder / f"{party}.json").write_text(json.dumps(rows))


def measure(case: Case, device: str, work: Path) -> dict[str, Any]:
    """Plan, build, run one round. Runs in a process of its own."""
    import torch

    from fedmllm.config import make_config
    from fedmllm.data import load_dataset
    from fedmllm.experiment import run
    from fedmllm.plan import make_plan
    from fedmllm.prompts import render

    folder = make_folder(case.model, work / "model")
    write_data(work / "data", case)
    config = make_config(
        {
            "name": case.name,
            "model": {
                "name": case.model.lower() + "-random",
                "path": str(folder),
                "dtype": case.dtype,
                "device": device,
                "quantization": case.quantization,
                "gradient_checkpointing": case.checkpointing,
            },
            "data": {"name": "conversations", "root": str(work / "data")},
            "training": {
                "rounds": 1,
                "clients_per_round": 2,
                "batch_size": 4,
                "micro_batch": case.batch,
                "max_length": 4096,
            },
            "evaluation": {"every": 0, "conditions": ["both"], "batch_size": case.batch},
        }
    )
    before = used(device)
    mllm = build(folder, case, device)
    loaded = used(device)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dataset = load_dataset(**config.data)
    encoded = [
        mllm.encode(render(each, dataset.task), max_length=4096)
        for each in (*dataset.train, *dataset.test)
    ]
    began = time.perf_counter()
    result = run(config, out=work / "run", mllm=mllm)
    seconds = time.perf_counter() - began
    tokens = max(item.longest for item in encoded)
    slices = max(slices_of(mllm, item) for item in encoded)
    planned = make_plan(config, tokens=tokens, slices=slices)
    peak = used(device, peak=True) - before
    expected = planned.memory.peak - planned.memory.runtime  # the context was there before
    train, test = result["time"]["train_seconds"], result["time"]["evaluate_seconds"]
    return {
        **asdict(case),
        "device": device,
        "parameters": planned.skeleton.total,
        "longest_sample_tokens": tokens,
        "largest_image_slices": slices,
        "planned_bytes": expected,
        "planned": {**planned.memory.resident, **planned.memory.phases[planned.memory.phase]},
        "planned_phase": planned.memory.phase,
        "measured_bytes": peak,
        "measured_after_loading_bytes": loaded - before,
        "ratio": round(expected / peak, 3),
        "seconds": seconds,
        "train_samples_per_second": 2 * case.samples / train,
        "test_samples_per_second": case.samples / test,
        "commit": result["commit"],
        "versions": result["versions"],
        "hardware": result["hardware"],
    }


def slices_of(mllm: Any, item: Any) -> int:
    """Slices of a sample's image: where each has a fixed number of tokens, so many; else one."""
    if item.image is None:
        return 1
    count = len(mllm.image_features(item.image).features)
    each = getattr(mllm.base.config, "query_num", None)
    each = each or getattr(mllm.processor, "image_seq_len", None) or count
    return max(1, count // each)


def used(device: str, *, peak: bool = False) -> int:
    """Bytes of the device in use by all: context, kernels and what torch's allocator reserved."""
    import torch

    if not device.startswith("cuda"):
        from fedmllm.plan.capacity import resident_now
        from fedmllm.results import peak_memory_bytes

        return peak_memory_bytes() if peak else resident_now()
    free, total = torch.cuda.mem_get_info(device)
    now = total - free
    if not peak:
        return now
    return now - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)


def compare_precisions(device: str) -> dict[str, Any]:
    """Logits of the MiniCPM-V test vectors in float32 and bfloat16 on one device: a sample with a
    picture of three slices, a batch with pictures of three and one, and a text."""
    import torch
    from minicpmv_vectors import VECTORS, build, case_inputs

    from fedmllm.models.quantize import settle

    def logits(name: str, case: str, dtype: torch.dtype) -> torch.Tensor:
        model, inputs = build(name), case_inputs(name, case)
        settle(model, dtype)  # buffers stay in float32, as they do in a checkpoint that is read
        pictures = [each.to(device, dtype) for each in inputs.pop("pixel_values", [])]
        inputs = {key: value.to(device) for key, value in inputs.items()}
        inputs |= {"pixel_values": pictures} if pictures else {}
        with torch.no_grad():
            made = model.to(device)(**inputs).logits.float()
        return made[inputs["attention_mask"].bool()]

    found = {}
    for name in VECTORS:
        for case in ("single", "batch", "text_only_train"):
            whole, half = (logits(name, case, t) for t in (torch.float32, torch.bfloat16))
            found[f"{name} {case}"] = {
                "largest_difference": float((whole - half).abs().max()),
                "largest_logit": float(whole.abs().max()),
                "same_argmax": float((whole.argmax(-1) == half.argmax(-1)).float().mean()),
            }
    return {"name": "bf16", "device": device, "logits": found}


def main() -> None:
    """Every case in a process of its own, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [case.name for case in (*CASES, *TRIALS)] + ["bf16"]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure_named(given.measure, given.device)))
        return
    if wrong := set(given.names) - set(known):
        raise SystemExit(f"error: {sorted(wrong)[0]!r} is no case: choose from {', '.join(known)}")
    for name in given.names or [case.name for case in CASES] + ["bf16"]:
        command = [sys.executable, __file__, "--device", given.device, "--measure", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: failed\n{done.stderr[-2000:]}", flush=True)
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        keep(row, given.out)
        shown = {k: row[k] for k in ("ratio", "train_samples_per_second", "logits") if k in row}
        print(name, shown, flush=True)


def measure_named(name: str, device: str) -> dict[str, Any]:
    """One case by name."""
    if name == "bf16":
        return compare_precisions(device)
    case = next(case for case in (*CASES, *TRIALS) if case.name == name)
    with tempfile.TemporaryDirectory() as work:
        return measure(case, device, Path(work))


def keep(row: dict[str, Any], out: Path) -> None:
    """Put a case's row into the result file, in place of the one before."""
    from fedmllm.results import write_json

    old = json.loads(out.read_text())["cases"] if out.exists() else []
    rows = {each["name"]: each for each in (*old, row)}
    write_json(out, {"schema": 1, "seed": SEED, "cases": [rows[name] for name in sorted(rows)]})


if __name__ == "__main__":
    main()
