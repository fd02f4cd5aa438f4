"""A tiny MiniCPM-V checkpoint, laid out file by file as the published ones are.

The config, preprocessor and tokeniser files have the published form: a flat config.json, an
`auto_map` that points to remote code (which is not there), no processor_config.json, a chat
template that takes only strings. Weights are random; the vocabulary is the 256 bytes and the
control tokens.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from fedmllm.models.minicpmv import MiniCPMVConfig, MiniCPMVForConditionalGeneration

MARKS = ["<image>", "</image>", "<slice>", "</slice>"]
CONTROL = {
    "2.6": [
        "<unk>",
        *MARKS,
        "<image_id>",
        "</image_id>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    ],
    "2.5": [
        "<unk>",
        *MARKS,
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|end_of_text|>",
    ],
}
SPECIAL = {
    "2.6": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "2.5": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "!"},
}
QUERIES = {"2.6": 64, "2.5": 96}
REMOTE = "somewhere.MiniCPMV"


def tokenizer_files(folder: Path, version: str) -> None:
    """tokenizer.json and tokenizer_config.json: bytes, then the control tokens from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL[version])
    if version == "2.5":  # Llama 3's tokeniser adds the beginning of the text by itself
        bos = SPECIAL[version]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"2.6": "MiniCPMVTokenizerFast", "2.5": "PreTrainedTokenizerFast"}[version]
    config: dict[str, Any] = {
        "tokenizer_class": named,
        "auto_map": {"AutoTokenizer": [f"{REMOTE}Tokenizer", f"{REMOTE}TokenizerFast"]},
        "unk_token": "<unk>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}",
        **SPECIAL[version],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def preprocessor_file(folder: Path, version: str, *, queries: int | None = None) -> None:
    config: dict[str, Any] = {
        "image_processor_type": "MiniCPMVImageProcessor",
        "auto_map": {
            "AutoProcessor": f"{REMOTE}Processor",
            "AutoImageProcessor": f"{REMOTE}ImageProcessor",
        },
        "processor_class": "MiniCPMVProcessor",
        "max_slice_nums": 9,
        "scale_resolution": 448,
        "patch_size": 14,
        "image_feature_size": queries or QUERIES[version],
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "slice_mode": True,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": float(version),
    }
    if version == "2.6":
        config |= {"use_image_id": True, "im_id_start": "<image_id>", "im_id_end": "</image_id>"}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def tiny_config(version: str, *, queries: int) -> dict[str, Any]:
    """A flat config.json; the fields are those of the published files."""
    own: dict[str, dict[str, Any]] = {
        "2.6": {
            "version": 2.6,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "max_window_layers": 2,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 263,
            "eos_token_id": 264,
        },
        "2.5": {
            "version": "2.5",
            "rope_theta": 500000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "mm_use_im_start_end": True,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 261,
            "eos_token_id": 265,
        },
    }
    return {
        "_name_or_path": "openbmb/tiny",
        "architectures": ["MiniCPMV"],
        "auto_map": {"AutoConfig": f"{REMOTE}Config", "AutoModel": REMOTE},
        "model_type": "minicpmv",
        "vocab_size": 266,
        "image_token_id": 256,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "batch_vision_input": True,
        "drop_vision_last_layer": False,
        "image_size": 448,
        "patch_size": 14,
        "query_num": queries,
        "slice_mode": True,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
        "vision_config": {
            "hidden_size": 16,
            "image_size": 980,
            "intermediate_size": 24,
            "model_type": {"2.6": "siglip", "2.5": "idefics2"}[version],
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 14,
        },
        **own[version],
    }


# what transformers 4 wrote beside 4-bit weights
INT4 = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["out_proj", "kv_proj", "lm_head"],
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def int4_folder(folder: Path, whole: Path, version: str) -> Path:
    """The published folder `whole` as its 4-bit edition: nf4 with double quantisation, tower packed
    too, and the flat config.json with one more section."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=INT4["llm_int8_skip_modules"],
    )
    packed = AutoModelForImageTextToText.from_pretrained(
        whole, quantization_config=how, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    packed.save_pretrained(folder)
    for file in whole.glob("*.json"):
        shutil.copy(file, folder / file.name)
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": INT4}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "2.6": {
        "vocab_size": 151666,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "query_num": 64,
    },
    "2.5": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "query_num": 96,
    },
}
PUBLISHED_TOWER = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


def published_folder(folder: Path, version: str, *, queries: int = 4, seed: int = 0) -> Path:
    """Everything that AutoModel and AutoProcessor read, in the published form."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_files(folder, version)
    preprocessor_file(folder, version, queries=queries)
    config = tiny_config(version, queries=queries)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MiniCPMVForConditionalGeneration(MiniCPMVConfig(**config))
        for parameter in model.parameters():  # biases and norms too, or a mix-up would not show
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder
