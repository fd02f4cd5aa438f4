"""Where the adapter goes: the attention of the language model, found from a model's structure.

Vision towers share the leaf names (q_proj, …), so a name is a target only below a layer of the
decoder and inside its attention.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fedmllm.errors import UserError

# the projections of an attention, by their names in transformers: q, k, v and o; o as "out" in
# LFM2; in one matrix; and of a linear attention (Qwen3.5), which has the first three in one
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "in_proj_qkv")
_LAYER_NUMBER = re.compile(r"\b(layers?|blocks)\.\d+\.")
_LAYER = re.compile(r"layers\.\d+\.(?P<block>.*attn)\.(?P<leaf>\w+)")


def decoder_of(base: Any) -> Any:
    """The language model's stack, with its `layers`. Raises `UserError` if there is none."""
    decoder = base.get_decoder()
    if not hasattr(decoder, "layers") and hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()  # a causal language model with its head around the stack
    if decoder is base or not hasattr(decoder, "layers"):
        raise UserError(
            f"no LoRA targets: {type(base).__name__} has no language model with decoder layers"
        )
    return decoder


def last_feed_forward(base: Any) -> nn.Module | None:
    """The feed-forward block of the decoder's last layer, which takes each token by itself; None
    where it is not one of linear layers only (a mixture of experts)."""
    layer = decoder_of(base).layers[-1]
    block = getattr(layer, "mlp", None) or getattr(layer, "feed_forward", None)
    if block is None:
        return None
    own = [
        part for part in block.modules() if next(part.parameters(recurse=False), None) is not None
    ]
    return block if own and all(isinstance(part, nn.Linear) for part in own) else None


def lora_targets(base: Any) -> str:
    """A regular expression for the attention projections of the language model, and only those.

    Raises `UserError` if there are none.
    """
    decoder = decoder_of(base)
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    linear = [
        found
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and (found := _LAYER.fullmatch(name))
    ]
    blocks: dict[str, set[str]] = {}
    for found in linear:
        if found["leaf"] in ATTENTION:
            blocks.setdefault(found["block"], set()).add(found["leaf"])
    if not blocks:
        names = ", ".join(sorted({found["leaf"] for found in linear})) or "no"
        raise UserError(
            f"no LoRA targets: the language model's attention has {names} linear layers, "
            f"none named {', '.join(ATTENTION)}"
        )
    ways = [
        rf"{re.escape(block)}\.({'|'.join(sorted(leaves))})"
        for block, leaves in sorted(blocks.items())
    ]
    either = ways[0] if len(ways) == 1 else f"({'|'.join(ways)})"
    return rf"{re.escape(prefix)}\.layers\.\d+\.{either}"


def adapted_modules(names: Iterable[str]) -> dict[str, int]:
    """Counts of the modules that adapter tensors belong to, with `*` for the layer.

    >>> adapted_modules(["base_model.model.m.layers.0.a.q_proj.lora_A.weight",
    ...                  "base_model.model.m.layers.0.a.q_proj.lora_B.weight",
    ...                  "base_model.model.m.layers.1.a.q_proj.lora_A.weight"])
    {'m.layers.*.a.q_proj': 2}
    """
    adapters = [name for name in names if ".lora_" in name]
    modules = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in adapters}
    counts = Counter(_LAYER_NUMBER.sub(r"\1.*.", module) for module in modules)
    return dict(sorted(counts.items()))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable tensors by PEFT's names in a saved adapter, sorted."""
    found = {
        saved_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return dict(sorted(found.items()))


def saved_name(name: str) -> str:
    """PEFT's name in a saved adapter of a parameter of a model."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def shared_names(model: nn.Module) -> set[str]:
    """Further names, in a saved adapter, of tensors that `adapter_parameters` names once."""
    every = model.named_parameters(remove_duplicate=False)
    return {saved_name(n) for n, p in every if p.requires_grad} - set(adapter_parameters(model))


def layers_of(base: Any, trainable: Mapping[str, nn.Parameter]) -> tuple[dict[str, int], int]:
    """Decoder layer of each adapter tensor, and the number of layers, from the structure."""
    layers = decoder_of(base).layers
    owner = {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
    return {name: owner[id(p)] for name, p in trainable.items() if id(p) in owner}, len(layers)


def check_adapter(params: Mapping[str, torch.Tensor], expected: Mapping[str, nn.Parameter]) -> None:
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
        + ". Use the adapter with the model, LoRA rank and trained components it was made with"
    )
