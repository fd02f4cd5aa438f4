"""MiniCPM-V-2.6 and MiniCPM-Llama3-V-2.5 without remote code.

A SigLIP encoder over patches of unequal slices, a one-layer resampler that turns each slice into
`query_num` features, and Qwen2 (2.6) or Llama (2.5), in whose input the features overwrite
placeholder embeddings. Encoder and language models are transformers' own; the modules carry the
published names, so a published checkpoint's keys are this model's keys.

Facts from the published model code (openbmb/MiniCPM-V-2_6, openbmb/MiniCPM-Llama3-V-2_5,
Apache-2.0); no code of theirs. Two deviations: a batch may mix samples with and without images
in both versions, and a batch without images is plain text (theirs adds a dummy image times zero).

Shapes: B samples, T tokens, D language-model width, S slices of the whole batch (sample by
sample), N patches of the longest slice, E tower width, Q queries, P patch side (14).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipPreTrainedModel

from fedmllm.models.minicpmv.configuration import MiniCPMVConfig
from fedmllm.models.minicpmv.positions import (
    grid_position_ids,
    line_position_ids,
    resampler_positions,
)

LANGUAGE_MODELS = {"qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM}
HEAD_WIDTH = 128  # of the resampler
RESAMPLER_EPS = 1e-6


class MiniCPMVVisionEmbeddings(nn.Module):
    """Patch projection plus a learned position table of side x side rows."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
        )
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, pixels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Pixels [S, 3, P, P * N], ids [S, N] -> [S, N, E]."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding(position_ids)


class MiniCPMVVisionTower(SiglipPreTrainedModel):
    """SigLIP encoder over slices of unequal size, padded to the longest.

    A model of its own, so that transformers tells it which attention to use.
    """

    config_class = SiglipVisionConfig
    base_model_prefix = ""

    def __init__(self, config: Any, *, grid_positions: bool, drop_last: bool) -> None:
        super().__init__(config)
        self.grid_positions = grid_positions
        self.embeddings = MiniCPMVVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        if drop_last:
            self.encoder.layers = self.encoder.layers[:-1]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self, pixels: torch.Tensor, sizes: list[tuple[int, int]], valid: torch.Tensor
    ) -> torch.Tensor:
        """Pixels [S, 3, P, P * N], (rows, columns) of each slice, real patches [S, N] -> [S, N, E].

        2.6 masks the padding; 2.5 attends to it (see `line_position_ids`).
        """
        make_ids = grid_position_ids if self.grid_positions else line_position_ids
        ids_SN = make_ids(sizes, self.embeddings.side).to(pixels.device)
        hidden = self.embeddings(pixels, ids_SN)
        masked = self.grid_positions and not bool(valid.all())
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=valid if masked else None
        )
        hidden = self.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        return self.post_layernorm(hidden)


class MiniCPMVResamplerAttention(nn.Module):
    """Multi-head attention with one packed input projection, under torch's parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Query [S, Q, D], key and value [S, N, D], keys to attend to [S, N] -> [S, Q, D]."""
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if bool(valid.all()) else valid[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MiniCPMVResampler(nn.Module):
    """Q learned queries read a slice's patches once: no MLP, no residual.

    out = LN_post(MHA(LN_q(query), x + pos, x)) @ proj with x = LN_kv(kv_proj(patches)).
    """

    def __init__(self, *, queries: int, width: int, vision_width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj: nn.Module = (
            nn.Identity() if vision_width == width else nn.Linear(vision_width, width, bias=False)
        )
        self.attn = MiniCPMVResamplerAttention(width, heads)
        self.ln_q = nn.LayerNorm(width, eps=RESAMPLER_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=RESAMPLER_EPS)
        self.ln_post = nn.LayerNorm(width, eps=RESAMPLER_EPS)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(
        self, patches: torch.Tensor, sizes: list[tuple[int, int]], valid: torch.Tensor
    ) -> torch.Tensor:
        """Patches [S, N, E] -> features [S, Q, D]."""
        x_SND = self.ln_kv(self.kv_proj(patches))
        position_SND = resampler_positions(sizes, x_SND.shape[-1]).to(x_SND)
        query_SQD = self.ln_q(self.query).expand(len(sizes), -1, -1)
        mixed_SQD = self.attn(query_SQD, x_SND + position_SND, x_SND, valid)
        return self.ln_post(mixed_SQD) @ self.proj


class MiniCPMVForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Both versions; see the module's text. Read a checkpoint with `from_pretrained`."""

    config_class = MiniCPMVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 (as in transformers)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (as in transformers)
    _no_split_modules = [  # noqa: RUF012 (as in transformers)
        "Qwen2DecoderLayer",
        "LlamaDecoderLayer",
        "SiglipEncoderLayer",
        "MiniCPMVVisionEmbeddings",
        "MiniCPMVResampler",
    ]

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        self.llm = LANGUAGE_MODELS[text.model_type](text)
        self.vpm = MiniCPMVVisionTower(
            vision,
            grid_positions=config.spec.grid_positions,
            drop_last=config.drop_vision_last_layer,
        )
        self.resampler = MiniCPMVResampler(
            queries=config.query_num,
            width=text.hidden_size,
            vision_width=vision.hidden_size,
            heads=text.hidden_size // HEAD_WIDTH,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MiniCPMVResampler):
            init.normal_(module.query, std=0.02)
            init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
        elif isinstance(module, MiniCPMVResamplerAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.llm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """The language model's stack of layers, without its head."""
        return self.llm.model

    def get_image_features(
        self,
        pixel_values: torch.Tensor | Sequence[torch.Tensor],
        tgt_sizes: torch.Tensor,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Features of slices: `pooler_output` [S, Q, D], `last_hidden_state` [S, N, E].

        `pixel_values` is [S, 3, P, P * N], zero-padded, or a list of unpadded [3, P, P * n];
        `tgt_sizes` [S, 2] are rows and columns of patches. In 2.5 a slice's features depend on
        the longest slice of the call. `return_dict` is accepted for generation's sake.
        """
        pixels, sizes = _slices(pixel_values, tgt_sizes)
        pixels = pixels.to(self.vpm.post_layernorm.weight.device)
        counts = torch.tensor([h * w for h, w in sizes], device=pixels.device)
        valid_SN = torch.arange(int(counts.max()), device=pixels.device) < counts[:, None]
        hidden = self.vpm(pixels, sizes, valid_SN)
        features = self.resampler(hidden, sizes, valid_SN)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=features)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | Sequence[torch.Tensor] | None = None,
        tgt_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] and, with `labels` [B, T] (not shifted, -100 ignored), the loss.

        Images come as `pixel_values` with `tgt_sizes`, or as the features they gave:
        `mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)}` with
        features [S, Q, D] or [S * Q, D] (or a list of such). They overwrite the embeddings at
        `config.image_token_id`, in order over the whole batch. Padding goes to either side as
        long as `attention_mask` [B, T] says where it is.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        features = self._features(pixel_values, tgt_sizes, mm_encoder_outputs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if features is not None:
            if input_ids is None:
                raise ValueError("images need input_ids: their placeholders say where they go")
            inputs_embeds = self._insert(inputs_embeds, input_ids, features)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _features(
        self,
        pixel_values: torch.Tensor | Sequence[torch.Tensor] | None,
        tgt_sizes: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
    ) -> torch.Tensor | None:
        """Image features of the batch as rows, [S * Q, D], or None."""
        given: Any = (mm_encoder_outputs or {}).get("image")
        if given is not None and pixel_values is not None:
            raise ValueError("give pixel_values or mm_encoder_outputs, not both")
        if pixel_values is not None:
            if tgt_sizes is None:
                raise ValueError("pixel_values need tgt_sizes: rows and columns of each slice")
            given = self.get_image_features(pixel_values, tgt_sizes)
        if given is None:
            return None
        pooled = given.pooler_output
        parts = [pooled] if isinstance(pooled, torch.Tensor) else pooled
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

    def _insert(
        self, embeds: torch.Tensor, input_ids: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Embeddings [B, T, D] with the features [S * Q, D] at the placeholders.

        Out of place: the embeddings may be a leaf that was told to require a gradient.
        """
        places = (input_ids.reshape(-1) == self.config.image_token_id).nonzero().squeeze(1)
        if len(places) != len(features):
            raise ValueError(
                f"the text has {len(places)} image placeholders (token "
                f"{self.config.image_token_id}), the images give {len(features)} features"
            )
        flat = embeds.reshape(-1, embeds.shape[-1])
        return flat.index_copy(0, places.to(flat.device), features.to(flat)).view_as(embeds)


def _slices(
    pixel_values: torch.Tensor | Sequence[torch.Tensor], tgt_sizes: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Pixels [S, 3, P, P * N], cut or padded to the longest slice, and the slices' sizes."""
    sizes = [(int(h), int(w)) for h, w in tgt_sizes.tolist()]
    if len(sizes) != len(pixel_values):
        raise ValueError(f"{len(pixel_values)} slices of pixels, {len(sizes)} rows of tgt_sizes")
    longest = max(h * w for h, w in sizes)
    rows = []
    for pixels, (h, w) in zip(pixel_values, sizes, strict=True):
        patch = pixels.shape[1]
        if pixels.shape[-1] < h * w * patch:
            raise ValueError(f"a slice of {h} x {w} patches has only {pixels.shape[-1]} columns")
        real = pixels[..., : h * w * patch]
        rows.append(functional.pad(real, (0, (longest - h * w) * patch)))
    return torch.stack(rows), sizes
