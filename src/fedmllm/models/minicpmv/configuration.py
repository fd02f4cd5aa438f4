"""The published config.json of MiniCPM-V-2.6 and MiniCPM-Llama3-V-2.5, read as it is.

Both checkpoints name `model_type: minicpmv` and differ by `version` (2.6, "2.5"). Their files are
flat: the language model's fields stand beside `vision_config` and `slice_config`. Here the flat
fields become a `text_config` (Qwen2 or Llama), which is what transformers asks for when it builds
caches, masks and rotary tables; a saved config is flat again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec

from fedmllm.errors import UserError, unknown

BASE_FIELDS = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))
OLD_ROPE = frozenset({"rope_theta", "rope_scaling"})  # what transformers 4 wrote


@dataclass(frozen=True)
class Version:
    """What the two checkpoints do differently."""

    name: str
    text_config: type[PreTrainedConfig]
    query_num: int  # image tokens of one slice
    image_token_id: int  # `<unk>`, the placeholder that slice features overwrite
    grid_positions: bool  # 2-D position ids with padding masked; else 1-D over the padded length
    image_id: bool  # whether a number precedes each image


VERSIONS = {
    "2.6": Version("2.6", Qwen2Config, 64, 128244, grid_positions=True, image_id=True),
    "2.5": Version("2.5", LlamaConfig, 96, 128002, grid_positions=False, image_id=False),
}


def version_of(value: object) -> Version:
    """The version that a config or processor file names. Raises `UserError` for any other."""
    if str(value) not in VERSIONS:
        raise UserError(unknown("MiniCPM-V version", value, VERSIONS))
    return VERSIONS[str(value)]


def text_fields(config_class: type[PreTrainedConfig]) -> frozenset[str]:
    """Names of a language model's own config fields, without those that every config has."""
    return frozenset(field.name for field in dataclasses.fields(config_class)) - BASE_FIELDS


def _of_text(name: str) -> property:
    """An attribute that reads and writes the language model's config."""
    return property(
        lambda self: getattr(self.text_config, name),
        lambda self, value: setattr(self.text_config, name, value),
    )


class MiniCPMVConfig(PreTrainedConfig):
    """Configuration of both versions.

    `version` is 2.6 or 2.5. `query_num` (features of one slice) and `image_token_id` (placeholder
    token) default to the version's. `drop_vision_last_layer` builds the tower one layer short, as
    neither checkpoint does. Language-model fields are given flat, or together as `text_config`.
    `slice_config` is kept as it is: what bounds the cells of an image is the image processor's
    `max_slice_nums`.
    Raises `UserError` for another version.
    """

    model_type = "minicpmv"
    sub_configs_defaults = {  # noqa: RUF012 (transformers reads it from the class)
        "text_config": SubConfigSpec(AutoConfig, model_type="qwen2"),
        "vision_config": SubConfigSpec(SiglipVisionConfig),
    }
    keys_to_ignore_at_inference = ("past_key_values",)

    hidden_size = _of_text("hidden_size")
    vocab_size = _of_text("vocab_size")
    num_hidden_layers = _of_text("num_hidden_layers")
    num_attention_heads = _of_text("num_attention_heads")
    tie_word_embeddings = _of_text("tie_word_embeddings")
    use_cache = _of_text("use_cache")

    def __init__(
        self,
        *,
        version: float | str = 2.6,
        query_num: int | None = None,
        image_token_id: int | None = None,
        drop_vision_last_layer: bool = False,
        slice_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        vision_config: dict[str, Any] | SiglipVisionConfig | None = None,
        **kwargs: Any,
    ) -> None:
        spec = version_of(version)
        names = text_fields(spec.text_config) | OLD_ROPE
        flat = {name: kwargs.pop(name) for name in sorted(names & kwargs.keys())}
        if text_config is None:
            text_config = flat
        if isinstance(text_config, dict):
            text_config = spec.text_config(**_without_type(text_config))
        if not isinstance(vision_config, PreTrainedConfig):
            vision_config = SiglipVisionConfig(**_without_type(vision_config or {}))
        self.text_config = text_config
        self.vision_config = vision_config
        self.version = version
        self.query_num = spec.query_num if query_num is None else query_num
        self.image_token_id = spec.image_token_id if image_token_id is None else image_token_id
        self.drop_vision_last_layer = drop_vision_last_layer
        self.slice_config = {"max_slice_nums": 9, "patch_size": 14, **(slice_config or {})}
        super().__init__(**kwargs)

    @property
    def spec(self) -> Version:
        """What this version does differently from the other."""
        return version_of(self.version)

    def to_dict(self) -> dict[str, Any]:
        """The flat form, as published."""
        output = super().to_dict()
        text = output.pop("text_config", {})
        names = text_fields(self.spec.text_config)
        return {**{name: text[name] for name in sorted(names & text.keys())}, **output}


def _without_type(config: dict[str, Any]) -> dict[str, Any]:
    """2.5 calls its tower `idefics2`, 2.6 `siglip`; the fields and the encoder are the same."""
    return {name: value for name, value in config.items() if name != "model_type"}
