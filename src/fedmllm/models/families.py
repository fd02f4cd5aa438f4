"""What differs between families of image-text models: one entry each, keyed by `model_type`.

Everything else is read from the model itself: where the language model lies (`lora.py`), what the
vision tower takes and gives (`features.py`), how many tokens an image becomes (its processor says
so for each image, so a family may cut images into any number of slices).

To add a family, add one entry to `FAMILIES` and one to `TINY` (`tests/tiny_models.py`);
`tests/test_families.py` then holds it to everything that the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Processor,
    Lfm2VlProcessor,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import is_torchvision_available

from fedmllm.errors import UserError, unknown
from fedmllm.models.lfm2_images import Lfm2Images

# (ids [B, T], is part of an answer [B, T], id of the image token) -> token types [B, T]
TokenTypes = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def mark_images(ids_BT: torch.Tensor, answer_BT: torch.Tensor, image_id: int) -> torch.Tensor:
    """1 where an image token stands, else 0."""
    return (ids_BT == image_id).long()


def mark_answers(ids_BT: torch.Tensor, answer_BT: torch.Tensor, image_id: int) -> torch.Tensor:
    """1 in the answer, which is read from left to right; 0 in the prompt, read both ways."""
    return answer_BT.long()


# (processor, picture) -> the text in place of the image token, what the model takes beside it
Reader = Callable[[Any, Image.Image], tuple[str, Mapping[str, Any]]]


def by_replacement(processor: Any, picture: Image.Image) -> tuple[str, Mapping[str, Any]]:
    """Ask the processor what text it put in place of the image token: exact for any text."""
    found = processor(
        text=[processor.image_token],
        images=[picture],
        images_kwargs={"return_tensors": "pt"},
        return_text_replacement_offsets=True,
    )
    return found["text_replacement_offsets"][0][0]["replacement"], found


def by_tokens(processor: Any, picture: Image.Image) -> tuple[str, Mapping[str, Any]]:
    """Read the text back from its tokens, for a processor that cannot be asked.

    Exact where an image becomes special tokens and newlines.
    """
    found = processor(
        text=[processor.image_token],
        images=[picture],
        add_special_tokens=False,
        return_tensors="pt",
    )
    return processor.tokenizer.decode(found["input_ids"][0]), found


@dataclass(frozen=True)
class Family:
    """What a family needs beyond features of its images.

    read: how its processor is asked for one image.
    processor: builds its processor from a folder where `AutoProcessor` cannot; its second argument
    says whether code in that folder may be run.
    image_inputs: what its processor says of an image that its language model must also be given.
    token_types: name of the input that tells token positions apart, and how it is filled.
    chat_template: Jinja; used if the checkpoint's processor has none.
    ordinary: special tokens of its vocabulary that are ordinary words, which text may hold.
    connector: the modules of its vision tower that are the connector, where it lies in there.
    """

    read: Reader = by_replacement
    processor: Callable[[str | Path, bool], Any] | None = None
    image_inputs: tuple[str, ...] = ()
    token_types: tuple[str, TokenTypes] | None = None
    chat_template: str | None = None
    ordinary: tuple[str, ...] = ()
    connector: tuple[str, ...] = ()


def _smolvlm(path: str | Path, trust: bool) -> Any:
    """SmolVLM's own processor spells out frame counts of videos, for which it wants num2words.

    Its treatment of images is that of Idefics3, which it descends from.
    """
    processor = Idefics3Processor.from_pretrained(path, trust_remote_code=trust)
    processor.image_processor = AutoImageProcessor.from_pretrained(
        path, trust_remote_code=trust, backend="pil"
    )
    return processor


def _lfm2_vl(path: str | Path, trust: bool) -> Any:
    """LFM2-VL's own image processor where torchvision is installed, else ours on Pillow."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(path, trust_remote_code=trust)
    settings, _ = ImageProcessingMixin.get_image_processor_dict(path)
    parts, _ = Lfm2VlProcessor.get_processor_dict(path)
    return Lfm2VlProcessor(
        Lfm2Images.of(settings),
        AutoTokenizer.from_pretrained(path, trust_remote_code=trust),
        chat_template=parts.get("chat_template"),
    )


# Beyer et al., "PaliGemma", arXiv 2407.07726, section 3: image tokens, BOS, prefix, "\n", suffix,
# EOS. It was not trained to converse, so its checkpoints have no template; further turns follow.
_PALIGEMMA_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '\\n' }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)

# positions in two dimensions need the grid of each image and where its tokens stand
_QWEN = Family(
    image_inputs=("image_grid_thw",),
    token_types=("mm_token_type_ids", mark_images),
    connector=("merger",),
)

FAMILIES: dict[str, Family] = {
    "idefics3": Family(),
    "smolvlm": Family(processor=_smolvlm),
    "llava": Family(),
    "llava_next": Family(),
    "llava_onevision": Family(),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": replace(_QWEN, connector=("merger", "deepstack_merger_list")),
    "qwen3_5": _QWEN,
    "internvl": Family(),
    # tokens of one image see each other in both directions
    "gemma3": Family(token_types=("token_type_ids", mark_images)),
    "paligemma": Family(
        token_types=("token_type_ids", mark_answers), chat_template=_PALIGEMMA_CHAT
    ),
    "lfm2_vl": Family(processor=_lfm2_vl),
    # 2.6 and 2.5, in fedmllm.models.minicpmv; 2.5 pads with an exclamation mark
    "minicpmv": Family(read=by_tokens, ordinary=("!",)),
    "minicpmv4_6": Family(),
}


def family_of(model_type: str) -> Family:
    """The entry of a model type. Raises `UserError` if there is none."""
    if model_type not in FAMILIES:
        raise UserError(
            unknown("model type", model_type, FAMILIES)
            + ". Another image-text model takes one entry: see CONTRIBUTING, add a model"
        )
    return FAMILIES[model_type]
