"""Chat format and processor of MiniCPM-V: text with `<image>` lines and images to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessorMixin

from fedmllm.models.minicpmv.configuration import version_of
from fedmllm.models.minicpmv.image_processing import flat_images

IMAGE = "<image>"
PLACEHOLDER = "<unk>"
ORDINARY_PAD = "!"  # what 2.5 pads with; with a true mask any token will do

_CONTENT = """
{%- macro words(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
{%- if part.type == 'image' -%}{{ '<image>' }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}"""

# ChatML with Qwen2's default system turn
_QWEN = (
    _CONTENT
    + """
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + words(message.content) + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
)

# Llama 3's headers; the beginning of the text is written here, not by the tokeniser
_LLAMA = (
    _CONTENT
    + """
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- words(message.content) | trim }}{{ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}"""
)

CHAT_TEMPLATES = {"2.6": _QWEN, "2.5": _LLAMA}


class MiniCPMVProcessor(ProcessorMixin):
    """Tokeniser and image processor of one version.

    `image_token` is `<image>`, one token of both vocabularies: the chat template writes it where
    a message holds an image, and a call replaces it by the image's whole placeholder text.
    No token is added at the front, since the chat template writes the beginning of the text.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        if tokenizer.pad_token in (None, ORDINARY_PAD):
            tokenizer.pad_token = tokenizer.eos_token
        template = chat_template or CHAT_TEMPLATES[version_of(image_processor.version).name]
        super().__init__(image_processor, tokenizer, chat_template=template)

    @property
    def control_tokens(self) -> list[str]:
        """Words that mean something else than themselves, which no sample's text may hold."""
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted({t.content for t in added if t.special and t.content != ORDINARY_PAD})

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        max_slice_nums: int | None = None,
        slice_mode: bool | None = None,
        return_tensors: str | None = None,
        videos: None = None,
        audio: None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """`input_ids`, `attention_mask` and, with images, `pixel_values`, `tgt_sizes`.

        `images` is a list of images for each text, or a flat list that the texts' `<image>`
        tokens share out, or a single image. Keywords go to the tokeniser (`padding`,
        `padding_side`, ...). Raises `ValueError` if texts and images do not fit together.
        """
        if text is None:
            raise ValueError("a text is needed: for pixels alone call the image processor")
        texts = [text] if isinstance(text, str) else list(text)
        nested = self._share_out(texts, images)
        options = {"max_slice_nums": max_slice_nums, "slice_mode": slice_mode}
        words = [
            self._expand(row, pictures, options)
            for row, pictures in zip(texts, nested, strict=True)
        ]
        kwargs.setdefault("add_special_tokens", False)
        data = dict(self.tokenizer(words, **kwargs))
        if any(nested):
            data.update(self.image_processor.preprocess(nested, **options))
        return BatchFeature(data, tensor_type=return_tensors)

    def _share_out(self, texts: list[str], images: Any) -> list[list[Image.Image]]:
        """The images of each text."""
        counts = [row.count(IMAGE) for row in texts]
        nested: list[list[Image.Image]]
        if isinstance(images, (list, tuple)) and any(isinstance(i, (list, tuple)) for i in images):
            nested = [flat_images(row or []) for row in images]
        else:
            rest = iter(flat_images([] if images is None else images))
            nested = [list(islice(rest, count)) for count in counts]
            nested[-1] += list(rest)
        if counts != [len(row) for row in nested]:
            raise ValueError(
                f"the texts hold {counts} {IMAGE} tokens and {[len(row) for row in nested]} "
                "images are given"
            )
        return nested

    def _expand(self, text: str, images: list[Image.Image], options: dict[str, Any]) -> str:
        """A text with each `<image>` replaced by what stands for that image."""
        if PLACEHOLDER in text:
            raise ValueError(f"the text holds {PLACEHOLDER!r}, which stands for image features")
        first, *others = text.split(IMAGE)
        for index, (image, words) in enumerate(zip(images, others, strict=True)):
            grid = self.image_processor.grid(image.size, **options)
            first += self.image_processor.placeholder(grid, index) + words
        return first
