"""Stage `vision`: the tower and the connector learn to write the codebook for drawn scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pretrain.common import QUADRANT, SEED, Codebook, Trainer, run_stage
from torch import Tensor, nn
from torch.nn import functional

from fedmllm.data.scenes import Scene, draw, sample_scene, sample_single
from fedmllm.rng import stream

BATCH = 128


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Drawn scenes as the image processor would give them: (B, 3, 64, 64) in [-1, 1]."""
    drawn = np.stack([np.asarray(draw(scene)) for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def tower_hidden(core: nn.Module, pixels: Tensor) -> Tensor:
    """Patch features (B, 64, W): the vision model without the arithmetic of padded pictures."""
    tower = core.vision_model
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    hidden = patches + tower.embeddings.position_embedding.weight
    hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
    return tower.post_layernorm(hidden)


def see(core: nn.Module, pixels: Tensor) -> Tensor:
    """Image-token features (B, 16, W), equal to `get_image_features`."""
    return core.connector(tower_hidden(core, pixels))


def draw_scenes(seed: int, step: int, count: int = BATCH) -> list[Scene]:
    """The scenes of one training step: three of ten hold a single thing anywhere."""
    rng = stream(seed, "vision-batch", step)
    return [sample_single(rng) if rng.random() < 0.3 else sample_scene(rng) for _ in range(count)]


def code_logits(book: Codebook, features: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of kind (or empty) and colour per token: nearness to the codes."""
    bare = (features.float() - book.places) * 12
    return bare @ torch.cat([book.kinds, book.empty]).T, bare @ book.colours.T


def code_loss(book: Codebook, features: Tensor, scenes: list[Scene]) -> Tensor:
    """Distance to the codes in units of their variance, and cross-entropy of naming them."""
    kind, colour = book.contents(scenes)
    distance = (features.float() - book.features(kind, colour)).square().mean() / 0.08**2
    kind_logits, colour_logits = code_logits(book, features)
    kind, colour = kind[:, QUADRANT], colour[:, QUADRANT]
    naming = functional.cross_entropy(kind_logits.flatten(0, 1), kind.flatten())
    shown = colour < len(book.colours)
    return distance + naming + functional.cross_entropy(colour_logits[shown], colour[shown])


@torch.no_grad()
def named(book: Codebook, features: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share of quadrants whose kind (or emptiness), and of things whose colour, is read right."""
    kind, colour = book.contents(scenes)
    kind_logits, colour_logits = code_logits(book, features)
    share = torch.zeros(4, 16).index_put((QUADRANT, torch.arange(16)), torch.tensor(0.25))
    kind_right = (share @ kind_logits).argmax(-1) == kind
    shown = colour < len(book.colours)
    colour_right = (share @ colour_logits).argmax(-1) == colour
    whole = (kind_right & (colour_right | ~shown)).all(-1)
    return {
        "kind": round(kind_right[shown].float().mean().item(), 4),
        "empty": round(kind_right[~shown].float().mean().item(), 4),
        "colour": round(colour_right[shown].float().mean().item(), 4),
        "scene": round(whole.float().mean().item(), 4),
    }


def train(folder: Path, model: nn.Module, steps: int, *, seed: int = SEED) -> float:
    """Train `model`'s tower and connector in place; returns the seconds it took."""
    book, core = Codebook(seed), model.model.bfloat16()
    parts = {
        n: p for n, p in core.named_parameters() if n.startswith(("vision_model", "connector"))
    }
    trainer = Trainer(parts, steps, muon=0.012, adam=2e-3, plain=("embed",))
    forward = torch.compile(see, dynamic=False)
    held_out = [
        [sample(stream(seed, "vision-check", name, i)) for i in range(512)]
        for name, sample in (("scene", sample_scene), ("single", sample_single))
    ]
    check_pixels = [pixels_of(scenes).bfloat16().split(BATCH) for scenes in held_out]

    def loss_at(step: int, part: int) -> Tensor:
        scenes = draw_scenes(seed, step)
        return code_loss(book, forward(core, pixels_of(scenes).bfloat16()), scenes)

    @torch.no_grad()
    def check() -> dict:
        rows = {}
        for name, scenes, parts in zip(("many", "one"), held_out, check_pixels, strict=True):
            features = torch.cat([see(core, part) for part in parts])
            rows |= {f"{name}_{k}": v for k, v in named(book, features, scenes).items()}
        return rows

    seconds = run_stage(folder, "vision", trainer, loss_at, check=check, stop=steps)
    model.float()
    with torch.no_grad():
        for name, p in parts.items():
            p.copy_(trainer.master[name])
    return seconds
