"""4-bit weights (nf4) through bitsandbytes: what QLoRA trains adapters on.

Quantised are the linear layers inside the decoder's layers, found from the structure; vision tower,
connector, embeddings and head stay as they are. So features of images do not change.

Dettmers et al., "QLoRA", NeurIPS 2023: normal float 4, double quantisation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from fedmllm.errors import UserError, needs_package
from fedmllm.models.lora import decoder_of


def nf4(config: Any, *, dtype: torch.dtype, trust: bool = False) -> BitsAndBytesConfig:
    """How to read a model of this configuration in 4 bit; `dtype` is that of its arithmetic.

    Raises `UserError` if bitsandbytes is not installed or the model has nothing to quantise.
    """
    _need_package("model.quantization nf4")
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept_modules(skeleton),
    )


def packed_already(config: Any) -> dict[str, Any]:
    """How a checkpoint says that it is quantised; empty if it is not."""
    for each in (config, config.get_text_config(decoder=True)):
        found = getattr(each, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, Mapping) else found.to_dict())
    return {}


def check_quantised(path: str | Path, config: Any) -> None:
    """Refuse a checkpoint that is quantised in another way than to 4 bit by bitsandbytes.

    Adapters are trained on those and on whole weights only: in other ways of packing, scales lie
    beside the weights, and without them a model says nothing.
    """
    found = packed_already(config)
    if not found:
        return
    if not found.get("load_in_4bit"):
        how = found.get("quant_method") or "an unnamed method"
        raise UserError(
            f"model {str(path)!r} is quantised by {getattr(how, 'value', how)}, not to 4 bit by "
            "bitsandbytes, which alone can be trained on: use the weights that are not "
            "quantised, with model.quantization=nf4 for 4 bit"
        )
    _need_package(f"model {str(path)!r}, which is in 4 bit,")


def _need_package(what: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(needs_package(what, "the package bitsandbytes", "4bit"))


def kept_modules(base: Any) -> list[str]:
    """The largest modules that hold linear layers and no layer of the decoder.

    >>> # Idefics3: ["lm_head", "model.connector", "model.vision_model"]
    """
    layers = set(decoder_of(base).layers.modules())
    kept: list[str] = []

    def walk(module: nn.Module, name: str) -> None:
        inside = set(module.modules())
        if layers.isdisjoint(inside):
            if any(isinstance(each, nn.Linear) for each in inside):
                kept.append(name)
        elif module not in layers:
            for child, each in module.named_children():
                walk(each, f"{name}.{child}" if name else child)

    walk(base, "")
    return sorted(kept)


@torch.no_grad()
def pack(base: Any, dtype: torch.dtype) -> None:
    """Quantise a model that is in memory, in place, as `nf4` has a checkpoint read."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    kept = tuple(f"{name}." for name in kept_modules(base))
    linear = [
        (name, module)
        for name, module in base.named_modules()
        if type(module) is nn.Linear and not f"{name}.".startswith(kept)
    ]
    for name, module in linear:
        packed = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        where = module.weight.device
        packed.weight = Params4bit(
            module.weight.data.cpu(),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
        )
        packed.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, packed.to(where))
    base.is_loaded_in_4bit = True


@torch.no_grad()
def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a model that was read in 4 bit fit to train, in place.

    Parameters that are not packed take one `dtype`, whatever mixture the checkpoint had. Buffers
    stay as they are, as in a model that is not packed: rotary frequencies in bfloat16 would be
    off by a radian at distant tokens. And bitsandbytes is kept from packing weights once more
    when a model is first evaluated on some CPUs: those have no backward pass, and training goes
    on after a test.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parameter in model.parameters():
        # packed weights may be stored under a floating dtype: their bytes are codes, not values
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
