"""Stage `gate`: what the finished model knows, on held-out scenes, read from pixels.

The saved folder is loaded as a user loads it (Auto classes, fp32). Open questions are answered by
greedy generation and count when the answer matches exactly; choice counts when the right option's
letter has the highest logit after the prompt and " (".
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image
from pretrain.common import SEED
from pretrain.dialogues import Turn, choice_turn, draw_scene, open_turn
from pretrain.questions import ASK, CHOICE_GATE, OPEN_GATE, TEXT_KINDS
from transformers import AutoModelForImageTextToText, AutoProcessor

from fedmllm.data.scenes import Scene, draw
from fedmllm.prompts import IMAGE, LETTERS, STYLES
from fedmllm.rng import stream_seed

GATE_SEED = SEED + 777  # no training stage uses it
BATCH = 50
NEEDED_OPEN, NEEDED_CHOICE = 0.90, 0.85


@dataclass(frozen=True)
class Item:
    """A turn and the picture that goes with it, if any."""

    turn: Turn
    image: Image.Image | None


class Reader:
    """The saved model as a user would load it."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        encode = self.processor.tokenizer.encode
        self.letters = [encode(f"({c}")[-1] for c in LETTERS]

    def inputs(self, items: list[Item], suffix: str, side: str) -> dict:
        """A padded batch of prompts, images where there are some."""
        texts = [self.prompt(item.turn.user) + suffix for item in items]
        images = [[item.image] if item.image else [] for item in items]
        return self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side=side,
            return_tensors="pt",
        )

    def prompt(self, user: str) -> str:
        """The user's turn in the chat template."""
        content = [{"type": "image"}] if user.startswith(IMAGE) else []
        content.append({"type": "text", "text": user.removeprefix(f"{IMAGE}\n")})
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    @torch.no_grad()
    def answers(self, items: list[Item], new_tokens: int = 32) -> list[str]:
        """Greedy answers to open questions."""
        inputs = self.inputs(items, "", "left")
        out = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [a.strip() for a in self.processor.batch_decode(new, skip_special_tokens=True)]

    @torch.no_grad()
    def choices(self, items: list[Item]) -> torch.Tensor:
        """Logits of the letters A to Z after each prompt and " (", shape (B, 26)."""
        inputs = self.inputs(items, " (", "right")
        ends = inputs["attention_mask"].sum(1) - 1
        hidden = self.model.model(**inputs).last_hidden_state
        logits = self.model.lm_head(hidden[torch.arange(len(items)), ends])
        return logits[:, self.letters]


# ---------------------------------------------------------------- questions
def gate_items(kind: str, choice: bool, count: int, seed: int = GATE_SEED) -> list[Item]:
    """`count` questions of a kind, each about a scene of its own; text kinds half with a scene."""
    items: list[Item] = []
    tries = 0
    while len(items) < count:
        name = (kind, choice, tries)
        tries += 1
        rng = Random(stream_seed(seed, "gate", *name))
        scene: Scene | None = draw_scene(seed, 0.4, "gate-scene", *name)
        if kind in TEXT_KINDS and rng.random() < 0.5:
            scene = None
        asked = ASK[kind](rng, scene)  # type: ignore[arg-type]
        if asked is None or (asked.only_choice and not choice):
            continue
        image = draw(scene) if scene else None
        if choice:
            turn = choice_turn(
                rng, asked, image=bool(image), most=rng.randint(2, 8), style=rng.choice(STYLES)
            )
        else:
            turn = open_turn(rng, asked, image=bool(image))
        items.append(Item(turn, image))
    return items


def batches(items: list[Item]) -> list[list[int]]:
    """Indices of items in batches of like length."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].turn.user))
    return [order[i : i + BATCH] for i in range(0, len(order), BATCH)]


def open_marks(reader: Reader, items: list[Item]) -> list[bool]:
    """For each item: was the greedy answer exactly right?"""
    marks = [False] * len(items)
    for indices in batches(items):
        answers = reader.answers([items[i] for i in indices])
        for i, answer in zip(indices, answers, strict=True):
            marks[i] = answer == items[i].turn.answer
    return marks


def choice_marks(reader: Reader, items: list[Item]) -> list[bool]:
    """For each item: did the right letter win among the options' letters?"""
    marks = [False] * len(items)
    for indices in batches(items):
        logits = reader.choices([items[i] for i in indices])
        for row, i in zip(logits, indices, strict=True):
            turn = items[i].turn
            best = int(row[: len(turn.options)].argmax())
            marks[i] = turn.options[best] == turn.answer
    return marks


def score(marks: list[bool]) -> dict[str, float]:
    """Accuracy and number."""
    return {"accuracy": round(sum(marks) / len(marks), 4), "n": len(marks)}


def measure(folder: Path, count: int = 2000, seed: int = GATE_SEED) -> dict:
    """All lines of the gate; `passed` says whether each is high enough."""
    reader = Reader(folder)
    open_lines = {
        kind: score(open_marks(reader, gate_items(kind, False, count, seed))) for kind in OPEN_GATE
    }
    marked: list[tuple[Item, bool]] = []
    for kind in CHOICE_GATE:
        items = gate_items(kind, True, count, seed)
        marked += zip(items, choice_marks(reader, items), strict=True)
    lines = {"open": open_lines, "choice": score([right for _, right in marked])}
    lines["choice_by_kind"] = split(marked, lambda item: item.turn.kind)
    lines["choice_by_options"] = split(marked, lambda item: len(item.turn.options))
    yes_no = [m for m in marked if m[0].turn.answer[4:] in ("yes", "no")]
    lines["choice_yes_no"] = score([right for _, right in yes_no])
    lines["easy_vqa_zero_shot"] = easy_vqa(reader, 1000)
    good = all(line["accuracy"] >= NEEDED_OPEN for line in open_lines.values())
    lines["passed"] = good and lines["choice"]["accuracy"] >= NEEDED_CHOICE
    return lines


def split(marked: list[tuple[Item, bool]], key) -> dict[str, dict[str, float]]:
    """Scores apart by a key of the item."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for item, right in marked:
        groups[key(item)].append(right)
    return {str(k): score(v) for k, v in sorted(groups.items())}


def easy_vqa(reader: Reader, count: int) -> dict:
    """Zero-shot exact match on easy-VQA's test questions, by type; reported, not a gate."""
    import easy_vqa as package

    folder = Path(package.__file__).parent / "data" / "test"
    asked = json.loads((folder / "questions.json").read_text())
    asked = Random(stream_seed(GATE_SEED, "easy-vqa")).sample(asked, count)
    items = []
    for question, answer, image in asked:
        picture = Image.open(folder / "images" / f"{image}.png").convert("RGB")
        items.append(
            Item(Turn(easy_vqa_type(question, answer), f"{IMAGE}\n{question}", answer), picture)
        )
    marked = list(zip(items, open_marks(reader, items), strict=True))
    return {"all": score([r for _, r in marked]), **split(marked, lambda item: item.turn.kind)}


def easy_vqa_type(question: str, answer: str) -> str:
    """shape, colour, exist or negated."""
    if answer in ("yes", "no"):
        return "negated" if {"no", "not"} & set(question.split()) else "exist"
    return "colour" if "color" in question else "shape"
