"""Stage `joint`: tower frozen, connector and language model trained on what the tower really sees.

The tower's outputs for a pool of drawn scenes are computed once; each step asks new questions about
scenes of the pool.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from pretrain.common import PLAIN, SEED, Trainer, run_stage
from pretrain.dialogues import JOINT_PHASES, Row, Writer, draw_scene, phase_at
from pretrain.language import answer_loss, embedded
from pretrain.vision import pixels_of, tower_hidden
from torch import Tensor, nn
from transformers import Idefics3Processor

from fedmllm.data.scenes import Scene
from fedmllm.rng import stream_seed

POOL = 20_000
SINGLE = 0.4  # share of the pool's scenes that hold one thing
MUON, ADAM = 0.004, 1e-3


@torch.no_grad()
def see_pool(core: nn.Module, seed: int, count: int = POOL) -> tuple[list[Scene], Tensor]:
    """Drawn scenes and the tower's outputs for them, (count, 64, W) in bf16."""
    scenes = [draw_scene(seed, SINGLE, "joint-scene", i) for i in range(count)]
    hidden = torch.cat(
        [
            tower_hidden(core, pixels_of(scenes[i : i + 250])).bfloat16()
            for i in range(0, count, 250)
        ]
    )
    return scenes, hidden


def draw_rows(writer: Writer, scenes: list[Scene], seed: int, step: int, steps: int) -> list[Row]:
    """The rows of one step; `row.index` names the pool's scene, -1 for rows without an image."""
    phase, rows = phase_at(step / steps, JOINT_PHASES), []
    for i in range(phase.rows):
        rng = Random(stream_seed(seed, "joint-dialogue", step, i))
        index = -1 if rng.random() < phase.textual else rng.randrange(len(scenes))
        row = writer.row(rng, phase, None if index < 0 else scenes[index])
        row.index = index
        rows.append(row)
    return rows


def train(
    folder: Path,
    model: nn.Module,
    processor: Idefics3Processor,
    steps: int,
    *,
    stop: int | None = None,
    seed: int = SEED,
) -> float:
    """Train `model`'s connector and language model in place; returns the seconds it took."""
    writer, core = Writer(processor), model.model
    scenes, hidden = see_pool(core, seed)
    core.text_model.bfloat16()
    core.connector.bfloat16()
    core.text_model.config._attn_implementation = "eager"
    params = {n: p for n, p in core.named_parameters() if not n.startswith("vision_model")}
    trainer = Trainer(params, steps, muon=MUON, adam=ADAM, plain=(*PLAIN, "connector"))
    forward = torch.compile(core.text_model, dynamic=False)
    held_out, held_hidden = see_pool(core, seed + 1, 1000)

    def hidden_of(rows: list[Row], pool: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
        ids, weights = writer.arrays(rows)
        shown = [row.index for row in rows if row.index >= 0]
        features = core.connector(pool[shown])
        inputs = embedded(core.text_model, torch.from_numpy(ids), features, model.image_token_id)
        return forward(inputs_embeds=inputs, use_cache=False).last_hidden_state, ids, weights

    def loss_at(step: int) -> Tensor:
        outputs, ids, weights = hidden_of(draw_rows(writer, scenes, seed, step, steps), hidden)
        return answer_loss(outputs, core.text_model.embed_tokens.weight, ids, weights)

    def check() -> dict[str, float]:
        """Share of deciding answer tokens predicted right on scenes outside the pool."""
        right: dict[str, list[bool]] = {}
        for step in range(8):
            rows = draw_rows(writer, held_out, seed + 1, steps + step, steps)
            outputs, ids, _ = hidden_of(rows, held_hidden)
            for i, row in enumerate(rows):
                for spot, kind in row.deciding:
                    logits = outputs[i, spot - 1] @ core.text_model.embed_tokens.weight.T
                    right.setdefault(kind, []).append(logits.argmax().item() == ids[i, spot])
        return {k: round(sum(v) / len(v), 3) for k, v in sorted(right.items())}

    seconds = run_stage(folder, "joint", trainer, loss_at, check=check, stop=stop, every=200)
    model.float()
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(trainer.master[name])
    return seconds
