"""Pre-train the embedded model from its seed and write it into the package.

    python scripts/pretrain_embedded.py                 # all stages, then the gate
    python scripts/pretrain_embedded.py --stage vision  # one stage; `language` may run beside it

Stages (docs/embedded-model.md says why): `vision` and `language` meet in a fixed codebook and are
independent; `export` puts them together in src/fedmllm/models/embedded; `gate` measures.
Each stage checkpoints under --work and goes on where it stopped. Steps, not minutes, decide, so a
seed and a machine give the same weights. One thread: run two stages side by side on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from pathlib import Path

import tokenizers
import torch
import transformers
from pretrain import common, gate, language, vision
from pretrain.tokenizer import build_processor, write_processor
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "src" / "fedmllm" / "models" / "embedded"
RESULT = ROOT / "results" / "embedded-gate.json"
STAGES = ("vision", "language", "export", "gate")
STEPS = {"vision": 4000, "language": 5400}


def blank_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    """The untrained model, from the seed."""
    tokens = processor.tokenizer
    ids = {
        "pad": tokens.pad_token_id,
        "bos": tokens.bos_token_id,
        "eos": tokens.eos_token_id,
        "image": processor.image_token_id,
    }
    return common.build_model(len(tokens), ids, common.SEED)


@torch.no_grad()
def load_stage(model: Idefics3ForConditionalGeneration, work: Path, stage: str) -> None:
    """Copy a finished stage's weights into the model."""
    state = torch.load(work / f"{stage}.pt", weights_only=True)["trainer"]
    if state["step"] < STEPS[stage]:
        raise SystemExit(f"stage {stage} stands at step {state['step']} of {STEPS[stage]}: run it")
    core = model.model.text_model if stage == "language" else model.model
    params = dict(core.named_parameters())
    for name, value in state["master"].items():
        params[name].copy_(value)


def train_stage(stage: str, work: Path) -> None:
    """Train one stage to its last step."""
    if stage == "vision":
        # the text side takes no part; its size is kept because it decides the tower's random start
        ids = {"pad": 0, "bos": 1, "eos": 2, "image": 3}
        vision.train(work, common.build_model(64, ids, common.SEED, bias=False), STEPS[stage])
    else:
        processor = build_processor()
        language.train(work, blank_model(processor), processor, STEPS[stage])


def export(work: Path, folder: Path) -> None:
    """Write config, fp16 weights, tokenizer, processor and chat template."""
    processor = write_processor(folder)
    model = blank_model(processor)
    load_stage(model, work, "vision")
    load_stage(model, work, "language")
    model.config._attn_implementation = "sdpa"
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def record(work: Path, folder: Path, count: int) -> dict:
    """The gate's lines with everything that they depend on."""
    weights = (folder / "model.safetensors").read_bytes()
    saved = {s: torch.load(work / f"{s}.pt", weights_only=True) for s in STEPS}
    return {
        "gate": gate.measure(folder, count),
        "needed": {"open": gate.NEEDED_OPEN, "choice": gate.NEEDED_CHOICE},
        "seed": common.SEED,
        "gate_seed": gate.GATE_SEED,
        "steps": {s: saved[s]["trainer"]["step"] for s in STEPS},
        "seconds": {s: round(saved[s]["seconds"]) for s in STEPS},
        "parameters": sum(p.numel() for p in blank_model(build_processor()).parameters()),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "weights_bytes": len(weights),
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all, in order")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pretrain")
    parser.add_argument("--folder", type=Path, default=EMBEDDED, help="where the model is written")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--questions", type=int, default=2000, help="gate questions of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stage or STAGES:
        if stage == "export":
            export(args.work, args.folder)
        elif stage == "gate":
            result = record(args.work, args.folder, args.questions)
            args.result.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(result["gate"], indent=1))
        else:
            train_stage(stage, args.work)


if __name__ == "__main__":
    main()
