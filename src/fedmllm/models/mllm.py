"""One frozen multimodal LLM and one LoRA adapter: encode, loss, score, generate.

A thin layer over `AutoModelForImageTextToText`, `AutoProcessor` and PEFT. It adds what federated
fine-tuning over mixed modalities needs and they do not have: batches in which some samples have
no image, a loss that does not depend on how samples are grouped into micro-batches, option
scores, and vision features computed once per image (the tower is frozen).

Shapes: B samples, T tokens, V vocabulary, N image tokens of one image, D hidden width.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from fedmllm.data.sample import ImageSource
from fedmllm.errors import UserError
from fedmllm.prompts import IMAGE, Prompted
from fedmllm.rng import stream_seed

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Encoded:
    """A sample as token ids: `prompt` up to and including the words that open the answer,
    `answer` with its end-of-turn token; the image by reference."""

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    image: ImageSource | None
    options: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class ImageFeatures:
    """What the language model needs of one image: its token ids and its N x D features."""

    tokens: tuple[int, ...]
    features: torch.Tensor


class FeatureCache:
    """Vision features by image key, kept in memory; the frozen tower sees an image once.

    Bounded by bytes; when full, the oldest entries leave first.
    """

    def __init__(self, budget_bytes: int = 512 * 2**20) -> None:
        self.budget_bytes = budget_bytes
        self._entries: dict[str, ImageFeatures] = {}
        self._bytes = 0

    def get(self, key: str) -> ImageFeatures | None:
        return self._entries.get(key)

    def put(self, key: str, value: ImageFeatures) -> None:
        if key in self._entries:
            return
        self._entries[key] = value
        self._bytes += value.features.nbytes
        while self._bytes > self.budget_bytes and len(self._entries) > 1:
            oldest = next(iter(self._entries))
            self._bytes -= self._entries.pop(oldest).features.nbytes


class Mllm:
    """A frozen base with a trainable LoRA adapter on its language model's attention.

    Build it with `Mllm.load`. The adapter is exchanged as `Params`: PEFT's own key names, float32
    tensors on the CPU, sorted by name.
    """

    def __init__(self, name: str, model: PeftModel, processor: Any) -> None:
        self.name = name
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        if not getattr(processor, "chat_template", None):
            raise UserError(f"model {name!r} has no chat template: its processor needs one")
        self.device = next(model.parameters()).device
        self.features = FeatureCache()
        self.trainable: dict[str, nn.Parameter] = dict(sorted(_adapter_parameters(model).items()))
        self.layer_of, self.num_layers = _layers(model, self.trainable)
        self._answers: dict[str, tuple[int, ...]] = {}
        self.specials = sorted({IMAGE, *self.tokenizer.all_special_tokens})
        self._image_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)

    @classmethod
    def load(
        cls,
        name: str,
        path: str | Path,
        *,
        rank: int = 8,
        alpha: int = 8,
        dropout: float = 0.05,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Mllm:
        """Load a base from a folder or hub name and add a fresh adapter (B = 0: the base itself).

        Raises `UserError` if the model or its language model's attention cannot be found.
        """
        base, processor = load_base(path, dtype=dtype, device=device)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=lora_targets(base),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers an old name
            model = get_peft_model(base, config)
        model.peft_config["default"].base_model_name_or_path = name  # not a path of this machine
        return cls(name, model, processor)

    # -- the adapter -------------------------------------------------------------------------

    def init_adapter(self, seed: int) -> dict[str, torch.Tensor]:
        """A fresh adapter drawn from the seed: A uniform (as PEFT's Kaiming, a = sqrt 5), B = 0."""
        params = {}
        for name, value in self.trainable.items():
            params[name] = torch.zeros(value.shape)
            if "lora_A" in name:
                generator = torch.Generator().manual_seed(stream_seed(seed, "lora", name))
                bound = value.shape[1] ** -0.5
                params[name].uniform_(-bound, bound, generator=generator)
        return params

    def get_adapter(self) -> dict[str, torch.Tensor]:
        """A copy of the adapter as float32 CPU tensors."""
        return {
            name: value.detach().to("cpu", torch.float32, copy=True)
            for name, value in self.trainable.items()
        }

    @torch.no_grad()
    def set_adapter(self, params: dict[str, torch.Tensor]) -> None:
        """Load an adapter. Raises `UserError` if its names or shapes are not this model's."""
        check_adapter(params, self.trainable)
        for name, value in self.trainable.items():
            value.copy_(params[name])

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's own format, which plain PEFT loads."""
        # never the embeddings: PEFT would ask the hub whether the vocabulary was modified
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (Path(folder) / "README.md").unlink(missing_ok=True)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all and trainable."""
        total = sum(p.numel() for p in self.model.parameters())
        return {"total": total, "trainable": sum(p.numel() for p in self.trainable.values())}

    # -- encoding ----------------------------------------------------------------------------

    def encode(self, prompted: Prompted, *, max_length: int = 1200) -> Encoded:
        """Tokenise a conversation; its image is read and passed through the tower once.

        Raises `UserError` naming the sample if it is longer than `max_length` tokens.
        """
        sample = prompted.sample
        self._check_words(prompted)
        text = self.processor.apply_chat_template(
            _messages(prompted.turns), add_generation_prompt=True, tokenize=False
        )
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if sample.image is not None:
            prompt = self._expand_image(prompt, self.image_features(sample.image))
        encoded = Encoded(
            id=sample.id,
            prompt=tuple(prompt),
            answer=self.answer_ids(prompted.turns[-1][1]),
            image=sample.image,
            options=tuple(self.answer_ids(option) for option in prompted.options),
        )
        longest = len(prompt) + max(map(len, (encoded.answer, *encoded.options)))
        if longest > max_length:
            raise UserError(
                f"sample {sample.id} is {longest} tokens long, more than max_length {max_length}: "
                "shorten its text or raise training.max_length"
            )
        return encoded

    def _check_words(self, prompted: Prompted) -> None:
        """Refuse text that spells a special token: it would end a turn or stand for an image."""
        words = [word for turn in prompted.turns for word in turn]
        words[0] = words[0].removeprefix(IMAGE)
        for special in self.specials:
            if any(special in word for word in words):
                raise UserError(
                    f"sample {prompted.sample.id}: its text holds {special!r}, which means "
                    f"something else to {self.name}: remove it"
                )

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of an assistant turn, from the first token after the generation prompt."""
        if answer not in self._answers:
            opening = self.processor.apply_chat_template(
                _messages((("?", ""),)), add_generation_prompt=True, tokenize=False
            )
            full = self.processor.apply_chat_template(
                _messages((("?", answer),), closed=True), tokenize=False
            ).rstrip()
            if not full.startswith(opening):
                raise UserError(f"the chat template of {self.name} rewrites the prompt")
            tokens = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
            pairs = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
            self._answers[answer] = tuple(i for i, (start, _) in pairs if start >= len(opening))
        return self._answers[answer]

    def _expand_image(self, ids: list[int], image: ImageFeatures) -> list[int]:
        at = ids.index(self._image_id)
        return [*ids[:at], *image.tokens, *ids[at + 1 :]]

    @torch.no_grad()
    def image_features(self, source: ImageSource) -> ImageFeatures:
        """Token ids and connector output of an image, from the cache or computed now."""
        found = self.features.get(source.key)
        if found is None:
            found = self._see(source)
            self.features.put(source.key, found)
        return found

    def _see(self, source: ImageSource) -> ImageFeatures:
        inputs = self.processor(
            text=self.processor.image_token, images=[source.open()], return_tensors="pt"
        ).to(self.device)
        tokens = tuple(inputs.pop("input_ids")[0].tolist())
        inputs.pop("attention_mask", None)
        output = _base(self.model).get_image_features(**inputs)
        pooled = output.pooler_output
        features = torch.cat(list(pooled)) if isinstance(pooled, (list, tuple)) else pooled
        return ImageFeatures(tokens, features.reshape(-1, features.shape[-1]).float().cpu())

    # -- forward -----------------------------------------------------------------------------

    def loss_sum(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """Sum over samples of the mean token loss of each sample's answer (a scalar).

        Mean per answer, not per token, so that long answers do not drown short ones and the
        gradient of a step is the same however its samples are grouped into micro-batches.
        """
        rows = [item.prompt + item.answer for item in batch]
        starts = [len(item.prompt) - 1 for item in batch]
        lengths = [len(item.answer) for item in batch]
        logits = self._logits(batch, rows, starts, lengths)
        losses = []
        for item, logits_TV in zip(batch, logits, strict=True):
            target = torch.tensor(item.answer, device=self.device)
            losses.append(nn.functional.cross_entropy(logits_TV.float(), target))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def score_options(self, items: Sequence[Encoded], *, batch_size: int = 64) -> torch.Tensor:
        """Probability of each option, [B, options], rows sum to 1.

        Where the options differ at one token, as "(A) …" and "(B) …" do at the letter, the prompt
        and the shared beginning are read once and the letter's probabilities are compared.
        Otherwise each option is read in full and its summed log-probability compared.
        """
        self.model.eval()
        scored: list[torch.Tensor] = [torch.empty(0)] * len(items)
        for chunk in by_length(items, batch_size):
            shared = _shared_length(items[chunk[0]].options)
            score = self._score_letters if shared is not None else self._score_full
            for index, row in zip(chunk, score([items[i] for i in chunk]), strict=True):
                scored[index] = row.softmax(-1).cpu()
        return torch.stack(scored)

    def _score_letters(self, batch: list[Encoded]) -> list[torch.Tensor]:
        rows, letters = [], []
        for item in batch:
            shared = _shared_length(item.options)
            if shared is None:
                return self._score_full(batch)
            rows.append(item.prompt + item.options[0][:shared])
            letters.append([option[shared] for option in item.options])
        logits = self._logits(batch, rows, [len(row) - 1 for row in rows], [1] * len(rows))
        return [
            values[0, torch.tensor(ids, device=self.device)].float()
            for values, ids in zip(logits, letters, strict=True)
        ]

    def _score_full(self, batch: list[Encoded]) -> list[torch.Tensor]:
        scores = []
        for item in batch:
            copies = [Encoded(item.id, item.prompt, option, item.image) for option in item.options]
            rows = [copy.prompt + copy.answer for copy in copies]
            starts = [len(copy.prompt) - 1 for copy in copies]
            logits = self._logits(copies, rows, starts, [len(copy.answer) for copy in copies])
            scores.append(
                torch.stack(
                    [
                        -nn.functional.cross_entropy(
                            values.float(),
                            torch.tensor(copy.answer, device=self.device),
                            reduction="sum",
                        )
                        for values, copy in zip(logits, copies, strict=True)
                    ]
                )
            )
        return scores

    @torch.no_grad()
    def generate(
        self, items: Sequence[Encoded], *, max_new_tokens: int = 16, batch_size: int = 64
    ) -> list[str]:
        """Greedy answers. Batches are padded on the left, as generation needs."""
        self.model.eval()
        answers = [""] * len(items)
        stop = self.answer_ids("")[-1]
        for chunk in by_length(items, batch_size):
            batch = [items[i] for i in chunk]
            inputs = self._inputs(batch, [item.prompt for item in batch], left=True)
            made = _base(self.model).generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            new = made[:, inputs["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            for index, text in zip(chunk, texts, strict=True):
                answers[index] = text.strip()
        return answers

    def _logits(
        self,
        batch: Sequence[Encoded],
        rows: Sequence[tuple[int, ...]],
        starts: Sequence[int],
        lengths: Sequence[int],
    ) -> list[torch.Tensor]:
        """Logits of each row at positions start .. start + length - 1, as [length, V] each.

        The language model's head runs only over positions that some row needs.
        """
        inputs = self._inputs(batch, rows)
        wanted = sorted({s + j for s, n in zip(starts, lengths, strict=True) for j in range(n)})
        place = {position: i for i, position in enumerate(wanted)}
        keep = torch.tensor(wanted, device=self.device)
        logits_BKV = self.model(**inputs, logits_to_keep=keep, use_cache=False).logits
        return [
            logits_BKV[b, [place[start + j] for j in range(length)]]
            for b, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]

    def _inputs(
        self, batch: Sequence[Encoded], rows: Sequence[tuple[int, ...]], *, left: bool = False
    ) -> dict[str, Any]:
        """Padded ids and mask [B, T] with the features of the images that the batch has."""
        width = max(map(len, rows))
        ids_BT = torch.full((len(rows), width), self.tokenizer.pad_token_id, dtype=torch.long)
        mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
        for b, row in enumerate(rows):
            span = slice(width - len(row), width) if left else slice(0, len(row))
            ids_BT[b, span] = torch.tensor(row)
            mask_BT[b, span] = 1
        inputs: dict[str, Any] = {
            "input_ids": ids_BT.to(self.device),
            "attention_mask": mask_BT.to(self.device),
        }
        seen = [self.image_features(item.image) for item in batch if item.image is not None]
        if seen:
            features = torch.cat([image.features for image in seen]).to(self.device)
            output = BaseModelOutputWithPooling(pooler_output=features)
            inputs["mm_encoder_outputs"] = {"image": output}
        return inputs

    @contextlib.contextmanager
    def training(self, seed: int) -> Iterator[None]:
        """Training mode with dropout drawn from `seed`; torch's global stream is left untouched.

        PEFT's dropout reads the global generator, so it is forked and seeded here and only here.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()


def load_base(path: str | Path, *, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """The frozen base and its processor, offline if `path` is a folder."""
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"cannot load model {str(path)!r}: {first}") from error
    model.requires_grad_(False)
    try:
        return model.to(torch.device(device)).eval(), processor
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        first = str(error).strip().splitlines()[0]
        raise UserError(f"device {device!r} cannot be used: {first}; cpu always can") from error


def lora_targets(base: Any) -> str:
    """A regular expression for the attention projections of the language model, and only those.

    Found from the model's structure: vision towers share the leaf names (q_proj, …), so bare
    names would adapt the tower as well.
    """
    decoder = base.get_decoder()
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    names = {
        name.rsplit(".", 1)[1]
        for name, module in decoder.named_modules()
        if "layers." in name and "attn" in name and isinstance(module, nn.Linear)
    }
    found = sorted(names & set(ATTENTION))
    if not found:
        raise UserError(
            f"no LoRA targets: the language model's attention has {sorted(names) or 'no'} linear "
            f"layers, none named {', '.join(ATTENTION)}"
        )
    return rf"{re.escape(prefix)}\.layers\.\d+\.self_attn\.({'|'.join(found)})"


def by_length(items: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length (stable order), to pad little."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i].prompt), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def check_adapter(params: dict[str, torch.Tensor], expected: dict[str, nn.Parameter]) -> None:
    """Raises `UserError` if names or shapes differ from what the model expects."""
    missing = sorted(expected.keys() - params.keys())
    foreign = sorted(params.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(params[name].shape)}, the model needs {tuple(value.shape)}"
        for name, value in expected.items()
        if name in params and params[name].shape != value.shape
    ]
    if not (missing or foreign or shapes):
        return
    facts = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
    facts += [f"has {len(foreign)} unknown tensors, e.g. {foreign[0]}"] if foreign else []
    facts += shapes[:1]
    raise UserError(
        "the adapter does not fit the model: "
        + "; ".join(facts)
        + ". Use the adapter with the model and LoRA rank it was trained with"
    )


def _messages(turns: Sequence[tuple[str, str]], *, closed: bool = False) -> list[dict[str, Any]]:
    """Chat messages; the last answer is left out unless `closed`."""
    messages: list[dict[str, Any]] = []
    for i, (user, assistant) in enumerate(turns):
        content: list[dict[str, str]] = []
        if user.startswith(IMAGE):
            content.append({"type": "image"})
            user = user.removeprefix(IMAGE).lstrip("\n")
        content.append({"type": "text", "text": user})
        messages.append({"role": "user", "content": content})
        if closed or i < len(turns) - 1:
            answer = [{"type": "text", "text": assistant}]
            messages.append({"role": "assistant", "content": answer})
    return messages


def _shared_length(options: Sequence[tuple[int, ...]]) -> int | None:
    """Number of tokens all options begin with, if they all differ at the next; else None."""
    for i in range(min(map(len, options))):
        tokens = {option[i] for option in options}
        if len(tokens) == len(options):
            return i
        if len(tokens) > 1:
            return None
    return None


def _base(model: PeftModel) -> Any:
    return model.base_model.model


def _adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _layers(model: PeftModel, trainable: dict[str, nn.Parameter]) -> tuple[dict[str, int], int]:
    """Decoder layer index of each adapter tensor, read from the model's structure."""
    layers = _base(model).get_decoder().layers
    owner = {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
    return {name: owner[id(p)] for name, p in trainable.items() if id(p) in owner}, len(layers)
