"""One frozen multimodal LLM and one LoRA adapter: encode, loss, score, generate.

A thin layer over `AutoModelForImageTextToText`, `AutoProcessor` and PEFT. It adds what federated
fine-tuning over mixed modalities needs and they do not have: adapters drawn from a seed, prompts
with and without images, and vision features computed once per image (the tower is frozen). The
passes over what is encoded are those of `passes.py`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig

from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import ImageSource, Sample
from fedmllm.errors import UserError, unknown
from fedmllm.models.components import (
    Policy,
    add_adapter,
    components_of,
    copied_modules,
    materialise,
    originals,
)
from fedmllm.models.feature_store import store_for
from fedmllm.models.features import (
    MEMORY_BYTES,
    FeatureCache,
    GivenFeatures,
    ImageFeatures,
    see,
)
from fedmllm.models.loading import family, load_base, shape_base
from fedmllm.models.lora import (
    adapted_modules,
    adapter_parameters,
    check_adapter,
    layers_of,
    shared_names,
)
from fedmllm.models.passes import Encoded, Passes, batches_of
from fedmllm.models.tower import to_device, to_file
from fedmllm.prompts import IMAGE, Prompted, shortened
from fedmllm.rng import stream_seed

FEATURE_CACHES = ("memory", "disk")
_MARK = "ANSWER"  # stands for an answer while a chat template is read


class Mllm(Passes):
    """A frozen base with a trainable adapter: LoRA, and what else the policy trains.

    Build it with `Mllm.load`. The adapter is exchanged as `Params`: PEFT's own key names, float32
    tensors on the CPU, sorted by name.
    """

    def __init__(
        self, name: str, model: PeftModel, processor: Any, policy: Policy | None = None
    ) -> None:
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id
        super().__init__(model, policy, pad_id=tokenizer.eos_token_id if pad is None else pad)
        self.name = name
        self.processor = processor
        self.tokenizer = tokenizer
        self.features = FeatureCache()
        self.trainable = adapter_parameters(model)
        self.component_of = components_of(model, self.trainable)
        self.layer_of, self.num_layers = layers_of(self.base, self.trainable)
        self.specials = sorted(_special_words(processor) - {*self.family.ordinary})
        self._hidden = {*self.tokenizer.convert_tokens_to_ids(self.specials)}
        self._around = self._drawn = 0
        self._unseen_sizes: dict[tuple[int, int], ImageFeatures] = {}
        self._answers: dict[str, tuple[int, ...]] = {}
        self._lead = _lead(self.tokenizer)
        self._rows: int = self.base.get_input_embeddings().weight.shape[0]

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
        quantization: str = "none",
        gradient_checkpointing: bool = False,
        remote_code: str | None = None,
        policy: Policy | None = None,
        feature_cache: str = "memory",
        feature_cache_gb: float = 20.0,
        feature_memory_gb: float = MEMORY_BYTES / 1e9,
    ) -> Mllm:
        """Load a base from a folder or hub name and add a fresh adapter (B = 0: the base itself).

        gradient_checkpointing: compute a layer's activations again when they are needed, which
        saves memory for time and changes no gradient. quantization, remote_code: see `load_base`.
        policy: what is trained beside LoRA on the language model's attention; by default nothing.
        feature_cache: ``disk`` keeps what the frozen tower makes of image files also in the user's
        cache folder, at most `feature_cache_gb` times 10^9 bytes for all models.
        feature_memory_gb: in main memory there are at most so many times 10^9 bytes of it.
        Raises `UserError` if the model or a component to train cannot be had.
        """
        if feature_cache not in FEATURE_CACHES:
            raise UserError(unknown("feature cache", feature_cache, FEATURE_CACHES))
        base, processor = load_base(
            path, dtype=dtype, device=device, quantization=quantization, remote_code=remote_code
        )
        policy, entry = policy or Policy(), family(base.config)
        model = add_adapter(base, entry, policy, rank=rank, alpha=alpha, dropout=dropout)
        if gradient_checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})
            base.disable_input_require_grads()  # the frozen embeddings need no gradient
        model.peft_config["default"].base_model_name_or_path = name  # not a path of this machine
        mllm = cls(name, model.eval(), processor, policy)
        store = None
        if feature_cache == "disk":
            limit = int(feature_cache_gb * 1e9)
            facts = (mllm.base, processor, entry, policy.keeps)
            store = store_for(*facts, name=name, limit_bytes=limit)
        mllm.features = FeatureCache(round(feature_memory_gb * 1e9), store)
        return mllm

    @classmethod
    def shapes(
        cls,
        name: str,
        path: str | Path,
        *,
        rank: int = 8,
        alpha: int = 8,
        dropout: float = 0.05,
        dtype: torch.dtype = torch.float32,
        remote_code: str | None = None,
        policy: Policy | None = None,
    ) -> Mllm:
        """The adapter alone, as `load` makes it, around a base that has shapes and no weights.

        It draws, holds, checks and saves adapters, and counts; it reads and answers nothing.
        Raises `UserError` for a policy with full copies, which start from the base's weights.
        """
        base, processor = shape_base(path, dtype=dtype, remote_code=remote_code)
        policy, entry = policy or Policy(), family(base.config)
        model = add_adapter(base, entry, policy, rank=rank, alpha=alpha, dropout=dropout)
        if originals(model):
            raise UserError(f"full copies of {name} start from its weights: load them")
        materialise(model)
        model.peft_config["default"].base_model_name_or_path = name
        return cls(name, model.eval(), processor, policy)

    # -- the adapter -------------------------------------------------------------------------

    def init_adapter(self, seed: int) -> dict[str, torch.Tensor]:
        """A fresh adapter drawn from the seed: A uniform (as PEFT's Kaiming, a = sqrt 5), B = 0.

        Full copies start from the base's own values.
        """
        params = {}
        pretrained = originals(self.model)
        for name, value in self.trainable.items():
            if name in pretrained:
                params[name] = pretrained[name].detach().to("cpu", torch.float32, copy=True)
                continue
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

    def read_adapter(self, folder: str | Path) -> None:
        """Load an adapter that `save_adapter` wrote.

        Raises `UserError` if it is not this model's, OSError or SafetensorError if it cannot be
        read.
        """
        params = load_file(Path(folder) / "adapter_model.safetensors")
        second = shared_names(self.model)  # PEFT writes a shared head under both its names
        self.set_adapter({n: value for n, value in params.items() if n not in second})

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's own format, which plain PEFT loads."""
        # never the embeddings: PEFT would ask the hub whether the vocabulary was modified
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (Path(folder) / "README.md").unlink(missing_ok=True)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, with what is added, and trainable; one in 4 bit is one, though two
        share a byte."""
        trainable, total = self.model.get_nb_trainable_parameters()
        once = {id(value): value.numel() for value in originals(self.model).values()}
        return {"total": total - sum(once.values()), "trainable": trainable}

    def lora_modules(self) -> dict[str, int]:
        """What LoRA adapts: module names, `*` for the layer, and how many of each."""
        return adapted_modules(self.trainable)

    def copied_modules(self) -> dict[str, int]:
        """What is trained as a full copy: module names and their parameters."""
        return copied_modules(self.model)

    # -- encoding ----------------------------------------------------------------------------

    def encode(
        self, prompted: Prompted, *, max_length: int = 1200, long_text: str = "refuse"
    ) -> Encoded:
        """Tokenise a conversation; its image is read and passed through the tower once.

        long_text: what to do with more than `max_length` tokens: ``refuse``, or ``shorten`` the
        text, then the earlier turns (`prompts.shortened`), then the end of a free answer, which
        then has no end-of-turn token to learn. An image's tokens are never cut.
        Raises `UserError` naming the sample if it is too long, or if its image cannot be read.
        """
        self._check_words(prompted)
        encoded = self._encoded(prompted)
        if encoded.longest > max_length and long_text == "shorten":
            shorter = shortened(prompted, lambda cut: self._encoded(cut).longest <= max_length)
            encoded = replace(self._encoded(shorter), shortened=True)
            room = max_length - len(encoded.prompt)
            if room > 0 and not encoded.options:
                encoded = replace(encoded, answer=encoded.answer[:room])
        if encoded.longest > max_length:
            raise UserError(self._too_long(encoded, max_length, long_text))
        return encoded

    def check(
        self, prompted: Prompted, *, max_length: int = 1200, long_text: str = "refuse"
    ) -> None:
        """Raise the `UserError` that `encode` would for a sample's text, length or image file,
        without the vision tower: what a round would stumble on is known before the first.

        What is surely short is not tokenised. How many tokens an image becomes is asked of the
        processor once for each size in pixels; of drawn images the first stands for all where
        text is short.
        """
        self._check_words(prompted)
        sample = prompted.sample
        if not sample.image or isinstance(sample.image, MemoryImage):
            drawn = self._drawn_tokens(sample.image) if sample.image else 0
            if self._at_most(prompted) + drawn <= max_length:
                return
        if sample.image is not None:
            with self._named(sample.id):
                given = GivenFeatures("unseen", self._unseen(sample.image.open()))
            prompted = replace(prompted, sample=replace(sample, image=given))
        self.encode(prompted, max_length=max_length, long_text=long_text)

    def _at_most(self, prompted: Prompted) -> int:
        """A bound on the tokens of a conversation without an image: one for each byte of its words,
        and for each turn what the chat template writes around an empty one."""
        if self._around == 0:
            whole = self._render(_messages((("?", _MARK),), closed=True))
            opening = self._render(_messages((("?", ""),)), add_generation_prompt=True)
            self._around = len(whole.encode()) + len(opening.encode())
        said = sum(len(word.encode()) for word in itertools.chain(*prompted.turns))
        option = max((len(word.encode()) for word in prompted.options), default=0)
        return said + option + len(prompted.turns) * self._around

    def _drawn_tokens(self, image: ImageSource) -> int:
        """Tokens of the first drawn image that was asked for."""
        if self._drawn == 0:
            words = self._unseen(image.open()).words
            self._drawn = len(self.tokenizer(words, add_special_tokens=False)["input_ids"])
        return self._drawn

    def _unseen(self, picture: Image.Image) -> ImageFeatures:
        """The words of an image as the processor writes them, with features of width 0."""
        if picture.size not in self._unseen_sizes:
            words, _ = self.family.read(self.processor, picture)
            ids = self.tokenizer(words, add_special_tokens=False)["input_ids"]
            rows = torch.empty(ids.count(self._image_id), 0)
            self._unseen_sizes[picture.size] = ImageFeatures(words, rows)
        return self._unseen_sizes[picture.size]

    def _encoded(self, prompted: Prompted) -> Encoded:
        sample = prompted.sample
        text = self._render(_messages(prompted.turns), add_generation_prompt=True)
        image = None if sample.image is None else self._image_of(sample.id, sample.image)
        return Encoded(
            id=sample.id,
            prompt=tuple(self._prompt_ids(text, image)),
            answer=self.answer_ids(prompted.turns[-1][1]),
            image=sample.image,
            options=tuple(self.answer_ids(option) for option in prompted.options),
        )

    def _image_of(self, sample: str, source: ImageSource) -> ImageFeatures:
        """An image's features; what its processor refuses (a strip of 1 x 1000) is named."""
        with self._named(sample):
            return self.image_features(source)

    @contextlib.contextmanager
    def _named(self, sample: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, ZeroDivisionError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"sample {sample}: the image processor of {self.name} cannot take its image "
                f"({first}): change the image or leave the sample out"
            ) from error

    def _too_long(self, encoded: Encoded, max_length: int, long_text: str) -> str:
        pictures = encoded.prompt.count(self._image_id)
        of_image = f", {pictures} of them its image's" if pictures else ""
        remedy = (
            "raise training.max_length or use smaller images"
            if long_text == "shorten"
            else "shorten its text, raise training.max_length, or set training.long_text=shorten"
        )
        return (
            f"sample {encoded.id} is {encoded.longest} tokens long{of_image}, more than "
            f"max_length {max_length}: {remedy}"
        )

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

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"the chat template of {self.name} cannot write a conversation ({error}): it must "
                "be a Jinja template that takes a turn's content as a list of parts, of type "
                "image or text"
            ) from error

    def _prompt_ids(self, text: str, image: ImageFeatures | None) -> list[int]:
        """Tokens of a prompt in which an image's words stand in place of its one image token."""
        token = self.processor.image_token
        if text.count(token) != (image is not None):
            raise UserError(
                f"the chat template of {self.name} places {text.count(token)} image tokens "
                f"({token}) for {int(image is not None)} images"
            )
        if image is not None:
            text = text.replace(token, image.words)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if max(ids, default=0) >= self._rows:
            word = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the tokenizer of {self.name} makes token {max(ids)} ({word!r}), and the model "
                f"has {self._rows}: use the tokenizer files that came with the weights"
            )
        if image is not None and ids.count(self._image_id) != len(image.features):
            raise UserError(
                f"the processor of {self.name} makes {ids.count(self._image_id)} tokens of an "
                f"image, its vision tower {len(image.features)} features: their configurations "
                "do not belong together"
            )
        return ids if ids[: len(self._lead)] == self._lead else [*self._lead, *ids]

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of an assistant turn, from the first token after the generation prompt.

        It ends in a special token, the end of the sequence if the template has none, since a
        model that never learns to end its answer does not end it.
        """
        if answer not in self._answers:
            opening = self._render(_messages((("?", ""),)), add_generation_prompt=True)
            full = self._render(_messages((("?", answer),), closed=True))
            if not full.startswith(opening):
                # the template opens an answer with words that it leaves out of a finished turn
                # (an empty thought): the answer goes where the model is asked to give it
                marked = self._render(_messages((("?", _MARK),), closed=True))
                full = opening + answer + marked.rpartition(_MARK)[2]
            full = opening + full[len(opening) :].rstrip()
            if not full[len(opening) :].endswith(tuple(self.specials)):
                full += self.tokenizer.eos_token
            tokens = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
            spans = tokens["offset_mapping"]
            if any(start < len(opening) < end for start, end in spans):
                raise UserError(
                    f"the tokeniser of {self.name} makes one token of the end of the prompt and "
                    f"the beginning of {answer!r}: give the answer without white space before it"
                )
            pairs = zip(tokens["input_ids"], spans, strict=True)
            self._answers[answer] = tuple(i for i, (start, _) in pairs if start >= len(opening))
        return self._answers[answer]

    def image_features(self, source: ImageSource) -> ImageFeatures:
        """Words and connector output of an image: its own, from the cache, or computed now."""
        if isinstance(source, GivenFeatures):
            return source.features
        found = self.features.get(source.key)
        if found is None:
            found = self._see(source)
            self.features.put(source.key, found)
        return found

    def drop_tower(self, samples: Sequence[Sample] = (), *, if_kept: bool = False) -> int:
        """Free the memory of the frozen vision tower; returns its bytes, 0 where it stays.

        samples: those still needed; their images pass the tower first. if_kept: it stays unless
        what it makes of all these images is kept. An image that turns up later brings the tower
        back (on an accelerator) or reads it where it lies (`tower.py`). It stays where it is
        trained, and on an accelerator where the connector is, whose surroundings ask the tower for
        its device. Raises `UserError` if there is no room for the weights in TMPDIR, or if an image
        cannot be read.
        """
        keeps = self.policy.keeps
        if keeps == "pixels" or (keeps == "tower" and self.device.type != "cpu"):
            return 0
        for sample in samples:
            if sample.image is not None:
                self._image_of(sample.id, sample.image)
        images = [sample.image for sample in samples if sample.image is not None]
        if if_kept and not all(self.features.holds(image.key) for image in images):
            return 0
        try:
            return to_file(self._parts)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the vision tower of {self.name} cannot leave memory: {error}; TMPDIR chooses "
                "another place for it"
            ) from error

    def _see(self, source: ImageSource) -> ImageFeatures:
        to_device(self._parts, self.device)
        picture, keeps = source.open(), self.policy.keeps
        return see(self.base, self.processor, self.family, picture, keeps=keeps, parts=self._parts)

    @torch.no_grad()
    def generate(
        self, items: Sequence[Encoded], *, max_new_tokens: int = 16, batch_size: int = 64
    ) -> list[str]:
        """Greedy answers, each distinct question once. Batches are padded on the left, as
        generation needs. What a checkpoint's generation_config.json prefers is not asked."""
        self.model.eval()
        batches, like = batches_of(items, batch_size)
        answers: dict[int, str] = {}
        stop = self.answer_ids("")[-1]
        for chunk in batches:
            batch = [items[i] for i in chunk]
            inputs = self._inputs(batch, [item.prompt for item in batch], left=True)
            with _without_preferences(self.base):
                made = self.base.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=stop,
                    pad_token_id=self._pad_id,
                )
            new = made[:, inputs["input_ids"].shape[1] :].tolist()
            for index, row in zip(chunk, new, strict=True):
                answers[index] = self.decode(row)
        return [answers[i] for i in like]

    def decode(self, ids: Sequence[int]) -> str:
        """The words of an answer, without special tokens but those that are ordinary words to the
        family (MiniCPM-V-2.5 pads with an exclamation mark)."""
        return self.tokenizer.decode([i for i in ids if i not in self._hidden]).strip()


@contextlib.contextmanager
def _without_preferences(base: Any) -> Iterator[None]:
    """Generation asks for nothing but what it is told: a checkpoint may prefer a penalty on
    repeated words or several beams, and its answers would not be greedy."""
    given, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = given


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


def _special_words(processor: Any) -> set[str]:
    """Words that are special tokens: they would end a turn or stand for an image."""
    tokenizer = processor.tokenizer
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return {IMAGE, processor.image_token, *tokenizer.all_special_tokens, *added}


def _lead(tokenizer: Any) -> list[int]:
    """What the tokeniser puts before every text (a BOS token), if anything."""
    special = {*tokenizer.all_special_ids}
    return list(itertools.takewhile(special.__contains__, tokenizer("a")["input_ids"]))
