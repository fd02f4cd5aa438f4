"""Stage `language`: the language model learns to talk about scenes given as codes, not pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pretrain.common import SEED, Codebook, Trainer, join_world, run_stage
from pretrain.curriculum import PARTS, PHASES, phase_at
from pretrain.dialogues import Row, Writer
from pretrain.wiring import wire
from torch import Tensor, nn
from torch.nn import functional
from transformers import Idefics3Processor

FEATURE_NOISE = 0.04  # half a code's standard deviation


def embedded(text_model: nn.Module, ids: Tensor, features: Tensor, image_id: int) -> Tensor:
    """Token embeddings with image features (B', 16, W) in the places of the image tokens."""
    tokens = text_model.embed_tokens(ids)
    return tokens.masked_scatter((ids == image_id)[..., None], features.to(tokens.dtype))


def symbolic(
    book: Codebook, rows: list[Row], noise: float, seed: int, step: int, part: int = 0
) -> Tensor:
    """Codes (B', 16, W) of the B' rows that show a scene, with noise drawn per row."""
    scenes = [row.scene for row in rows if row.scene is not None]
    if not scenes:
        return torch.zeros(0)
    features = book.features(*book.contents(scenes))
    torch.manual_seed(seed * 1_000_003 + step + 500_000 * part)
    strength = torch.rand(len(scenes), 1, 1) * noise
    return features + torch.randn_like(features) * strength


def targets(ids: np.ndarray, weights: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Flat positions that predict an answer token, the tokens, and their weights."""
    spots = np.flatnonzero(weights)
    return (
        torch.from_numpy(spots - 1),
        torch.from_numpy(ids.ravel()[spots]),
        torch.from_numpy(weights.ravel()[spots]),
    )


def answer_loss(hidden: Tensor, head: Tensor, ids: np.ndarray, weights: np.ndarray) -> Tensor:
    """Weighted cross-entropy of the answer tokens; the head runs on nothing else."""
    spots, tokens, share = targets(ids, weights)
    logits = (hidden.flatten(0, 1)[spots] @ head.T).float()
    return (functional.cross_entropy(logits, tokens, reduction="none") * share).sum() / share.sum()


def train(
    folder: Path,
    model: nn.Module,
    processor: Idefics3Processor,
    steps: int,
    *,
    seed: int = SEED,
) -> float:
    """Train `model`'s language model in place on codes; returns the seconds it took."""
    join_world()
    book, writer = Codebook(seed), Writer(processor)
    wire(model.model.text_model, processor.tokenizer, book)
    text_model = model.model.text_model.bfloat16()
    text_model.config._attn_implementation = "eager"
    trainer = Trainer(dict(text_model.named_parameters()), steps)
    forward = torch.compile(text_model, dynamic=False)
    image_id = model.config.image_token_id

    def loss_at(step: int, part: int) -> Tensor:
        phase = phase_at(step, part)
        rows = writer.batch(seed, step, phase, part)
        ids, weights = writer.arrays(rows, phase.length)
        features = symbolic(book, rows, FEATURE_NOISE, seed, step, part)
        inputs = embedded(text_model, torch.from_numpy(ids), features, image_id)
        hidden = forward(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return answer_loss(hidden, text_model.embed_tokens.weight, ids, weights)

    def check() -> dict:
        return deciding_tokens(text_model, writer, book, image_id, seed)

    seconds = run_stage(
        folder,
        "language",
        trainer,
        loss_at,
        check=check,
        stop=steps,
        every=100,
        parts=PARTS,
    )
    model.float()
    with torch.no_grad():
        for name, p in text_model.named_parameters():
            p.copy_(trainer.master[name])
    return seconds


@torch.no_grad()
def deciding_tokens(
    text_model: nn.Module, writer: Writer, book: Codebook, image_id: int, seed: int
) -> dict[str, float]:
    """Share of deciding answer tokens predicted right, per kind, open and by letter."""
    right: dict[str, list[bool]] = {}
    for step in range(8):
        phase = PHASES[-1] if step < 5 else PHASES[0]
        rows = writer.batch(seed + 1, step, phase)
        ids, _ = writer.arrays(rows, phase.length)
        features = symbolic(book, rows, 0.0, seed, step)
        inputs = embedded(text_model, torch.from_numpy(ids), features, image_id)
        hidden = text_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        for i, row in enumerate(rows):
            for spot, kind in row.deciding:
                logits = hidden[i, spot - 1] @ text_model.embed_tokens.weight.T
                right.setdefault(kind if step < 5 else f"short_{kind}", []).append(
                    logits.argmax().item() == ids[i, spot]
                )
    return {k: round(sum(v) / len(v), 3) for k, v in sorted(right.items())}
