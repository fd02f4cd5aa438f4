"""Passes of a frozen base and its adapter over samples of mixed modalities: losses, scores.

What a loaded model (`Mllm`) and a plan's shapes (`fedmllm.plan.tracing`) have in common: it needs a
model and no tokenizer. In a batch some samples have an image and some have none; the loss does not
depend on how samples are grouped into micro-batches; the head runs only where its output is read.

Shapes: B samples, T tokens, V vocabulary, N image tokens of one image, D hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fedmllm.data.sample import ImageSource
from fedmllm.models.components import Policy, train_only_what_is_trained
from fedmllm.models.features import GivenFeatures, ImageFeatures, dtype_of, feature_inputs, look
from fedmllm.models.loading import family
from fedmllm.models.lora import last_feed_forward
from fedmllm.models.replay import frozen_parts


@dataclass(frozen=True)
class Encoded:
    """A sample as token ids: `prompt` up to and including the words that open the answer,
    `answer` with its end-of-turn token; the image by reference. shortened: words were left out.

    For strategies only: whether it is `complete` in its modalities, its masked `views`, and its
    `completions` with what it lacks from other samples.
    """

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    image: ImageSource | None
    options: tuple[tuple[int, ...], ...] = ()
    shortened: bool = False
    complete: bool = True
    views: tuple[Encoded, ...] = ()
    completions: tuple[Encoded, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def longest(self) -> int:
        """Tokens with the answer or the longest option."""
        return len(self.prompt) + max(map(len, (self.answer, *self.options)))

    @property
    def deciding(self) -> int:
        """Index of the answer's token at which the options part; 0 where there is none."""
        return (_shared_length(self.options) or 0) if self.options else 0


@dataclass(frozen=True)
class Reading:
    """What the model makes of a batch at the tokens of its answers; A of them in a sample.

    losses: mean token loss of each answer [B]. logits: [A, V] and hidden: [A, D] by sample, the
    latter as the head gets them, after the last norm. Row j is where token j is predicted.
    """

    losses: torch.Tensor
    logits: tuple[torch.Tensor, ...]
    hidden: tuple[torch.Tensor, ...]

    def rows(self, start: int, stop: int) -> Reading:
        """The reading of a part of the batch."""
        return Reading(self.losses[start:stop], self.logits[start:stop], self.hidden[start:stop])


class Passes:
    """Losses, hidden states and option scores of a model on its device."""

    def __init__(self, model: PeftModel, policy: Policy | None, *, pad_id: int) -> None:
        self.model = model
        self.policy = policy or Policy()
        self.base = _base(model)
        self.family = family(self.base.config)
        self.device = next(model.parameters()).device
        self._parts = [part for _, part in frozen_parts(self.base, self.family)]
        self._image_id: int = self.base.config.image_token_id
        self._last_block = last_feed_forward(self.base)
        self._pad_id = pad_id  # masked out

    def image_features(self, source: ImageSource) -> ImageFeatures:
        """Those that a source holds itself. Raises ValueError for any other."""
        if isinstance(source, GivenFeatures):
            return source.features
        raise ValueError(f"nothing here computes the features of {source.key}")

    def loss_sum(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """Sum over samples of the mean token loss of each sample's answer (a scalar).

        Mean per answer, not per token, so that long answers do not drown short ones and the
        gradient of a step is the same however its samples are grouped into micro-batches.
        """
        return self.losses(batch).sum()

    def losses(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """The terms of `loss_sum` [B]."""
        return self.read(batch).losses

    def read(self, batch: Sequence[Encoded]) -> Reading:
        """One pass with all that losses are made of. The head runs only where a row has an
        answer's token."""
        rows = [item.prompt + item.answer for item in batch]
        places = [
            (b, len(item.prompt) - 1 + j)
            for b, item in enumerate(batch)
            for j in range(len(item.answer))
        ]
        with self._only_at(places) as states:
            logits_1NV = self.model(**self._inputs(batch, rows), use_cache=False).logits
        sizes = [len(item.answer) for item in batch]
        parts = logits_1NV[0].split(sizes)
        losses = []
        for item, logits_TV in zip(batch, parts, strict=True):
            target = torch.tensor(item.answer, device=self.device)
            losses.append(nn.functional.cross_entropy(logits_TV.float(), target))
        return Reading(torch.stack(losses), tuple(parts), tuple(states[0].split(sizes)))

    @torch.no_grad()
    def represent(self, items: Sequence[Encoded], *, batch_size: int = 64) -> torch.Tensor:
        """Where each answer is decided: the hidden state [B, D] from which its deciding token
        (`Encoded.deciding`) is predicted; float32 on the CPU."""
        self.model.eval()
        found: list[torch.Tensor] = [torch.empty(0)] * len(items)
        for chunk in by_length(items, batch_size):
            batch = [items[i] for i in chunk]
            for index, item, hidden in zip(chunk, batch, self.read(batch).hidden, strict=True):
                found[index] = hidden[item.deciding].float().cpu()
        return torch.stack(found)

    @property
    def dtype(self) -> str:
        """In which the base computes, such as ``float32``."""
        return dtype_of(self.base)

    @property
    def width(self) -> int:
        """Width of a hidden state, D."""
        return int(self.base.config.get_text_config().hidden_size)

    @torch.no_grad()
    def score_options(self, items: Sequence[Encoded], *, batch_size: int = 64) -> torch.Tensor:
        """Probability of each option, [B, options], rows sum to 1.

        Where the options differ at one token, as "(A) …" and "(B) …" do at the letter, the prompt
        and the shared beginning are read once and the letter's probabilities are compared.
        Otherwise each option is read in full and its summed log-probability compared. Questions
        that are the same to the model, as all are with both modalities withheld, are read once.
        """
        self.model.eval()
        batches, like = batches_of(items, batch_size)
        scored: dict[int, torch.Tensor] = {}
        for chunk in batches:
            shared = _shared_length(items[chunk[0]].options)
            score = self._score_letters if shared is not None else self._score_full
            for index, row in zip(chunk, score([items[i] for i in chunk]), strict=True):
                scored[index] = row.softmax(-1).cpu()
        return torch.stack([scored[i] for i in like])

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
        """Questions of one length with as many options share a pass, whose rows, one an option,
        are no more than the batch has questions."""
        alike: dict[tuple[int, int], list[int]] = {}
        for index, item in enumerate(batch):
            alike.setdefault((len(item.prompt), len(item.options)), []).append(index)
        scored: list[torch.Tensor] = [torch.empty(0)] * len(batch)
        for (_, options), indices in alike.items():
            size = max(1, len(batch) // options)
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                rows = self._score_after_prompts([batch[i] for i in part])
                for index, row in zip(part, rows, strict=True):
                    scored[index] = row
        return scored

    def _score_after_prompts(self, items: list[Encoded]) -> list[torch.Tensor]:
        """Log-probability of each option [options]: each prompt once, then all on its cache.

        The prompts are of one length, so that nothing is padded, and have as many options, O.
        """
        first = self.read_prompts(items)
        cache = first.past_key_values
        if not _repeatable(cache):
            return [self._score_alone(item) for item in items]
        count = len(items[0].options)
        cache.batch_repeat_interleave(count)
        options = [option for item in items for option in item.options]
        rows = [option[:-1] for option in options]
        logits_RTV = first.logits[0].repeat_interleave(count, 0)[:, None]
        if max(map(len, rows)):
            # no mask: every token sees all before it, and padding comes last
            ids_RT = self._padded(rows)["input_ids"]
            rest = self.model(input_ids=ids_RT, past_key_values=cache, use_cache=True).logits
            logits_RTV = torch.cat([logits_RTV, rest], 1)
        scores = [-self._nll(v, option) for v, option in zip(logits_RTV, options, strict=True)]
        return list(torch.stack(scores).split(count))

    def read_prompts(self, items: Sequence[Encoded]) -> Any:
        """What transformers' models return of the prompts: `logits` [1, B, V] of what comes next,
        and the cache that options and generated answers go on from."""
        core: Any = getattr(self.base, "model", self.base)
        if hasattr(core, "rope_deltas"):
            core.rope_deltas = None  # the Qwen families', of an earlier prompt with an image
        prompts = [item.prompt for item in items]
        with self._only_at([(b, len(prompt) - 1) for b, prompt in enumerate(prompts)]):
            return self.model(**self._inputs(items, prompts), use_cache=True)

    def _score_alone(self, item: Encoded) -> torch.Tensor:
        """The same with the prompt read anew for each option, for models whose layers keep more
        than keys and values (convolutions, linear attention)."""
        copies = [Encoded(item.id, item.prompt, option, item.image) for option in item.options]
        rows = [copy.prompt + copy.answer for copy in copies]
        starts = [len(copy.prompt) - 1 for copy in copies]
        logits = self._logits(copies, rows, starts, [len(copy.answer) for copy in copies])
        scores = zip(logits, item.options, strict=True)
        return torch.stack([-self._nll(values, option) for values, option in scores])

    def _nll(self, logits_TV: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
        """Summed negative log-probability of `tokens`; logits beyond their number are padding."""
        target = torch.tensor(tokens, device=self.device)
        picked = logits_TV[: len(tokens)].float()
        return nn.functional.cross_entropy(picked, target, reduction="sum")

    def _logits(
        self,
        batch: Sequence[Encoded],
        rows: Sequence[tuple[int, ...]],
        starts: Sequence[int],
        lengths: Sequence[int],
    ) -> list[torch.Tensor]:
        """Logits of each row at positions start .. start + length - 1, as [length, V] each.

        The language model's head runs over these positions only.
        """
        places = [
            (b, start + j)
            for b, (start, length) in enumerate(zip(starts, lengths, strict=True))
            for j in range(length)
        ]
        with self._only_at(places):
            logits_1NV = self.model(**self._inputs(batch, rows), use_cache=False).logits
        return list(logits_1NV[0].split(list(lengths)))

    @contextlib.contextmanager
    def _only_at(self, places: Sequence[tuple[int, int]]) -> Iterator[list[torch.Tensor]]:
        """The head runs at `places` (row, position) only, N in all, and gives [1, N, V]: at all
        positions a vocabulary of 250,000 would not fit into memory. Yields a list that then holds
        what the head got there, [N, D].

        So does the last layer's feed-forward block, whose output elsewhere nobody reads; but for
        gradient checkpointing, which runs the layer again when this is over.
        """
        row, column = torch.tensor(places, device=self.device).T
        kept: list[torch.Tensor] = []

        def pick(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (args[0][row, column][None],)

        def pick_and_keep(block: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            kept.append(args[0])
            return pick(block, args)

        def spread(_: nn.Module, __: Any, made_1ND: torch.Tensor) -> torch.Tensor:
            return made_1ND.new_zeros(kept.pop().shape).index_put((row, column), made_1ND[0])

        states: list[torch.Tensor] = []

        def pick_for_head(head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            picked = pick(head, args)
            states.append(picked[0][0])
            return picked

        hooks = [self.base.get_output_embeddings().register_forward_pre_hook(pick_for_head)]
        if self._last_block is not None and not self.base.is_activation_checkpointing:
            hooks.append(self._last_block.register_forward_pre_hook(pick_and_keep))
            hooks.append(self._last_block.register_forward_hook(spread))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def _inputs(
        self, batch: Sequence[Encoded], rows: Sequence[tuple[int, ...]], *, left: bool = False
    ) -> dict[str, Any]:
        """Padded ids and mask [B, T] with the features of the images that the batch has."""
        inputs = self._padded(rows, left=left)
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        if self.family.token_types is not None:
            name, types = self.family.token_types
            lengths = torch.tensor([len(item.prompt) for item in batch], device=self.device)
            answer_BT = (mask_BT.cumsum(1) > lengths[:, None]) & mask_BT.bool()
            inputs[name] = types(ids_BT, answer_BT, self._image_id)
        seen = [self.image_features(item.image) for item in batch if item.image is not None]
        if self.policy.sees:
            seen = [look(self.base, image, self._parts) for image in seen]
        return inputs | feature_inputs(seen, self.device)

    def _padded(
        self, rows: Sequence[tuple[int, ...]], *, left: bool = False
    ) -> dict[str, torch.Tensor]:
        """Token ids and attention mask [B, T]."""
        width = max(map(len, rows))
        ids_BT = torch.full((len(rows), width), self._pad_id, dtype=torch.long)
        mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
        for b, row in enumerate(rows):
            first = width - len(row) if left else 0
            ids_BT[b, first : first + len(row)] = torch.tensor(row, dtype=torch.long)
            mask_BT[b, first : first + len(row)] = 1
        return {"input_ids": ids_BT.to(self.device), "attention_mask": mask_BT.to(self.device)}

    @contextlib.contextmanager
    def training(self, seed: int) -> Iterator[None]:
        """Training mode with dropout drawn from `seed`; torch's global stream is left untouched.

        PEFT's dropout reads the global generator, so it is forked and seeded here and only here.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            train_only_what_is_trained(self.model)
            try:
                yield
            finally:
                self.model.eval()


def by_length(items: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length (stable order), to pad little."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i].prompt), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def batches_of(items: Sequence[Encoded], batch_size: int) -> tuple[list[list[int]], list[int]]:
    """Batches of the items that differ to the model, as their indices, by length; and for each
    item the index of its like in them."""
    seen: dict[tuple[Any, ...], int] = {}
    like = []
    for index, item in enumerate(items):
        question = (item.prompt, item.options, None if item.image is None else item.image.key)
        like.append(seen.setdefault(question, index))
    asked = list(seen.values())
    chunks = by_length([items[i] for i in asked], batch_size)
    return [[asked[i] for i in chunk] for chunk in chunks], like


def _shared_length(options: Sequence[tuple[int, ...]]) -> int | None:
    """Number of tokens all options begin with, if they all differ at the next; else None."""
    for i in range(min(map(len, options))):
        tokens = {option[i] for option in options}
        if len(tokens) == len(options):
            return i
        if len(tokens) > 1:
            return None
    return None


def _repeatable(cache: Any) -> bool:
    """Whether a cache holds nothing but keys and values, so that its rows can be repeated."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in plain for layer in cache.layers)


def _base(model: PeftModel) -> Any:
    return model.base_model.model
