"""config.json of published models, as far as it decides shapes, from their own repositories."""

from __future__ import annotations

from typing import Any

from minicpmv_checkpoint import PUBLISHED_SIZES, PUBLISHED_TOWER, QUERIES, tiny_config


def published_minicpm(version: str) -> dict[str, Any]:
    sizes = PUBLISHED_SIZES[version] | {"vision_config": PUBLISHED_TOWER}
    return tiny_config(version, queries=QUERIES[version]) | sizes


CONFIGS: dict[str, dict[str, Any]] = {
    "MiniCPM-V-2.6": published_minicpm("2.6"),
    "MiniCPM-Llama3-V-2.5": published_minicpm("2.5"),
    "SmolVLM-256M": {
        "model_type": "idefics3",
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49280,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
    },
    "Qwen2-VL-2B": {
        "model_type": "qwen2_vl",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 1536,
            "mlp_ratio": 4,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "LLaVA-1.5-7B": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    },
}
