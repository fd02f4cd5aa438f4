"""What the stages share: the architecture, the codebook, the optimiser, checkpoints.

Shapes: B conversations or pictures, T positions, P patches, N image tokens, W width.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from fedmllm.data.scenes import COLOURS, KINDS, PLACES, Scene
from fedmllm.rng import stream, stream_seed

SEED = 20260
WIDTH, LAYERS, HEADS, MLP = 128, 6, 4, 384  # language model
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, VISION_MLP = 128, 4, 4, 384
MAX_POSITIONS = 1024


def idefics3_config(vocab_size: int, ids: dict[str, int], bias: bool = True) -> Idefics3Config:
    """The architecture. `ids` holds the special tokens' ids: pad, bos, eos, image."""
    return Idefics3Config(
        vision_config={
            "hidden_size": VISION_WIDTH,
            "intermediate_size": VISION_MLP,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": VISION_HEADS,
            "image_size": 64,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "vocab_size": vocab_size,
            "max_position_embeddings": MAX_POSITIONS,
            "attention_bias": bias,
            "tie_word_embeddings": True,
            "pad_token_id": ids["pad"],
            "bos_token_id": ids["bos"],
            "eos_token_id": ids["eos"],
        },
        scale_factor=2,
        image_token_id=ids["image"],
        tie_word_embeddings=True,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )


def build_model(
    vocab_size: int, ids: dict[str, int], seed: int, *, bias: bool = True
) -> Idefics3ForConditionalGeneration:
    """An untrained model; eager attention, which torch.compile makes twice as fast as SDPA here.

    `bias`: whether the language model's attention has biases, which the wired start needs.
    """
    torch.manual_seed(stream_seed(seed, "embedded-init"))
    config = idefics3_config(vocab_size, ids, bias)
    config._attn_implementation = "eager"
    model = Idefics3ForConditionalGeneration(config)
    nn.init.normal_(model.model.text_model.embed_tokens.weight, std=0.05)
    return model


# ---------------------------------------------------------------- the codebook
class Codebook:
    """Fixed random vectors that stand for what an image token shows.

    Both halves of the pre-training meet here: the language model learns to read sums of these
    vectors, the vision tower learns to produce them, and neither waits for the other.
    Every one of the 4 tokens of a quadrant carries the kind and the colour of the thing in it
    (or `empty`); each token also carries a code of its own place in the 4x4 grid.
    """

    def __init__(self, seed: int = SEED) -> None:
        rng = stream(seed, "codebook")

        def draw(n: int) -> Tensor:
            return torch.from_numpy(rng.normal(0, 0.08, (n, WIDTH))).float()

        self.kinds, self.colours, self.places = draw(len(KINDS)), draw(len(COLOURS)), draw(16)
        self.empty = draw(1)

    def contents(self, scenes: Iterable[Scene]) -> tuple[Tensor, Tensor]:
        """Kind and colour index of each quadrant, shape (B, 4); index len() means empty."""
        kinds, colours = list(KINDS), list(COLOURS)
        rows = []
        for scene in scenes:
            row = [(len(kinds), len(colours))] * 4
            for thing in scene.things:
                spot = PLACES.index(thing.place)
                row[spot] = (kinds.index(thing.kind), colours.index(thing.colour))
            rows.append(row)
        kind_colour = torch.tensor(rows)
        return kind_colour[..., 0], kind_colour[..., 1]

    def features(self, kind_B4: Tensor, colour_B4: Tensor) -> Tensor:
        """Image-token features (B, 16, W) of scenes given by their quadrants' contents."""
        nothing = torch.zeros(1, WIDTH)
        kinds = torch.cat([self.kinds, self.empty])[kind_B4]
        colours = torch.cat([self.colours, nothing])[colour_B4]
        return (kinds + colours)[:, QUADRANT] + self.places


# image token (row-major 4x4) -> the quadrant that it lies in
QUADRANT = torch.tensor([(row // 2) * 2 + column // 2 for row in range(4) for column in range(4)])


# ---------------------------------------------------------------- optimiser
def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al. 2024) on a batch of matrices (…, M, N)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


# Muon on queries and keys, without a norm on them, drove the attention to one-hot within a few
# hundred steps, and nothing that needs a soft start was learnt after that.
PLAIN = ("embed", "q_proj", "k_proj")


class Trainer:
    """bf16 parameters for speed, fp32 masters for precision; Muon for matrices, Adam for the rest.

    The rate falls linearly to a twentieth at step `steps` after a short warm-up.
    """

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        steps: int,
        *,
        muon: float = 0.006,
        adam: float = 1.5e-3,
        plain: tuple[str, ...] = PLAIN,
    ) -> None:
        self.live = params
        self.steps, self.muon_rate, self.adam_rate, self.step_count = steps, muon, adam, 0
        self.master = {n: p.detach().float().clone() for n, p in params.items()}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.master.items()}
        matrix = [n for n in params if params[n].ndim == 2 and not any(w in n for w in plain)]
        self.groups: dict[torch.Size, list[str]] = {}
        for name in matrix:
            self.groups.setdefault(params[name].shape, []).append(name)
        self.plain = [n for n in params if n not in set(matrix)]
        self.square = {n: torch.zeros_like(self.master[n]) for n in self.plain}

    def rate(self) -> float:
        """Share of the peak learning rate at the present step."""
        warm = min(1.0, (self.step_count + 1) / 100)
        return warm * max(0.05, 1 - 0.95 * self.step_count / self.steps)

    @torch.no_grad()
    def step(self) -> None:
        """Take one step from the gradients, copy the masters back, clear the gradients."""
        rate = self.rate()
        self.step_count += 1
        for shape, names in self.groups.items():
            grads = torch.stack([self.live[n].grad.float() for n in names])
            held = torch.stack([self.momentum[n] for n in names]).lerp_(grads, 0.05)
            update = orthogonalised(grads.lerp(held, 0.95))
            size = rate * self.muon_rate * max(1, shape[0] / shape[1]) ** 0.5
            for i, name in enumerate(names):
                self.momentum[name].copy_(held[i])
                self.master[name].mul_(1 - rate * 5e-4).sub_(update[i], alpha=size)
        for name in self.plain:
            self._adam(name, rate * self.adam_rate)
        for name, p in self.live.items():
            p.copy_(self.master[name])
            p.grad = None

    def _adam(self, name: str, rate: float) -> None:
        grad = self.live[name].grad.float()
        first, second, t = self.momentum[name], self.square[name], self.step_count
        first.lerp_(grad, 0.1)
        second.lerp_(grad.square(), 0.02)
        scale = (second / (1 - 0.98**t)).sqrt_().add_(1e-8)
        self.master[name].addcdiv_(first / (1 - 0.9**t), scale, value=-rate)

    def state(self) -> dict:
        """Everything that `load` needs to go on as if nothing had happened."""
        return {
            "master": self.master,
            "momentum": self.momentum,
            "square": self.square,
            "step": self.step_count,
        }

    def load(self, state: dict) -> None:
        """Go on from `state`."""
        self.step_count = state["step"]
        for mine, saved in (
            (self.master, state["master"]),
            (self.momentum, state["momentum"]),
            (self.square, state["square"]),
        ):
            for name, value in saved.items():
                mine[name].copy_(value)
        with torch.no_grad():
            for name, p in self.live.items():
                p.copy_(self.master[name])


# ---------------------------------------------------------------- the loop
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join_world() -> None:
    """Meet the other process, when started as one of several (RANK and WORLD_SIZE are set)."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", rank=RANK, world_size=WORLD)


def backward(trainer: Trainer, loss_at: Callable[[int, int], Tensor], parts: int) -> float:
    """Mean gradient over the parts of a step, each taken by one process; returns my mean loss."""
    mine = range(RANK, parts, WORLD)
    losses = []
    for part in mine:
        loss = loss_at(trainer.step_count, part)
        (loss / parts).backward()
        losses.append(loss.item())
    if WORLD > 1:
        params = list(trainer.live.values())
        flat = torch.cat([p.grad.float().flatten() for p in params])
        dist.all_reduce(flat)
        for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad.copy_(grad.view_as(p))
    return math.fsum(losses) / len(losses)


def run_stage(
    folder: Path,
    name: str,
    trainer: Trainer,
    loss_at: Callable[[int, int], Tensor],
    *,
    check: Callable[[], dict] | None = None,
    every: int = 250,
    stop: int,
    parts: int = 1,
) -> float:
    """Train until `stop` steps; log, checkpoint, resume.

    Returns the stage's seconds so far.

    `loss_at(step, part)` draws a part of that step's batch (a pure function of both) and returns
    its loss. Several processes share the parts of a step; alone, one does all of them.
    """
    saved, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    spent = 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        trainer.load(state["trainer"])
        spent = state["seconds"]
    started, recent = time.time() - spent, []
    while trainer.step_count < stop:
        recent.append(backward(trainer, loss_at, parts))
        trainer.step()
        if RANK or (trainer.step_count % every and trainer.step_count < stop):
            continue
        seconds = time.time() - started
        row = {"step": trainer.step_count, "seconds": round(seconds, 1)}
        row |= {"loss": round(math.fsum(recent) / len(recent), 4), **(check() if check else {})}
        with log.open("a") as out:
            out.write(json.dumps(row) + "\n")
        recent = []
        part = saved.with_suffix(".part")
        torch.save({"trainer": trainer.state(), "seconds": time.time() - started}, part)
        part.replace(saved)
    return torch.load(saved, weights_only=True)["seconds"]
