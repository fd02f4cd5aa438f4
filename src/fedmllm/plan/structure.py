"""The model without its weights: built from config.json on the meta device, and counted.

transformers builds the modules and `add_adapter`, which training uses, puts the adapter there;
tensors have shapes and no storage. So counts are those of a loaded model, for every family that
can be trained, and eight billion parameters take a second.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from fedmllm.algorithms.base import Params
from fedmllm.errors import UserError
from fedmllm.models import minicpmv
from fedmllm.models.components import (
    COMPONENTS,
    Policy,
    add_adapter,
    components_of,
    connector_modules,
    tower_of,
)
from fedmllm.models.families import Family, family_of
from fedmllm.models.loading import BAD_FILES, first_line
from fedmllm.models.lora import adapter_parameters, decoder_of
from fedmllm.plan.images import read_settings

PARTS = ("vision tower", "connector", "embeddings", "language model", "output head")


@dataclass(frozen=True)
class Skeleton:
    """A base and its adapter, shapes only.

    model, base: PEFT's model and within it the frozen base, on the meta device; policy: what of
    it is trained. components: base
    parameters by part, in the order of `PARTS`. adapter: what clients and server exchange,
    under PEFT's names, as meta tensors. component_of: the trained component of each. layer_targets:
    adapter parameters by adapted or copied module, with ``*`` for the layer. quantization: the
    checkpoint's own `quantization_config`, if config.json has one. images: settings of its image
    processor, if the folder has them.
    """

    config: Any
    model: Any
    base: Any
    policy: Policy
    components: dict[str, int]
    adapter: Params
    component_of: dict[str, str]
    layer_targets: dict[str, int]
    quantization: Mapping[str, Any]
    images: Mapping[str, Any]

    @property
    def total(self) -> int:
        """Parameters of the base; one that is shared counts once."""
        return sum(self.components.values())

    @property
    def trainable(self) -> int:
        """Parameters of the adapter."""
        return sum(value.numel() for value in self.adapter.values())

    @property
    def loaded(self) -> int:
        """Parameters of base and LoRA; a copied module counts once, as in a run's result."""
        lora = sum(value.numel() for name, value in self.adapter.items() if ".lora_" in name)
        return self.total + lora

    def by_component(self) -> dict[str, int]:
        """Parameters of the adapter by trained component, zeros included."""
        counts = Counter[str]()
        for name, value in self.adapter.items():
            counts[self.component_of[name]] += value.numel()
        return {component: counts[component] for component in COMPONENTS}


def build_skeleton(
    path: str | Path,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    dtype: str,
    policy: Policy | None = None,
) -> Skeleton:
    """The model of a folder's config.json with a fresh adapter.

    Raises `UserError` if there is no such file, if it makes no image-text model, or if no LoRA
    targets are found in it.
    """
    config, policy = _read_config(path), policy or Policy()
    quantization = _mapping(getattr(config, "quantization_config", None))
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            base: Any = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
            base.requires_grad_(False)
            entry = family_of(config.model_type)
            owner = _owners(base, entry)
            adapted = add_adapter(
                base,
                entry,
                policy,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
            )
    except BAD_FILES as error:
        raise UserError(
            f"no model can be built from {Path(path) / 'config.json'}: {first_line(error)}"
        ) from error
    trained = adapter_parameters(adapted)
    adapter = {name: torch.empty(p.shape, device="meta") for name, p in trained.items()}
    return Skeleton(
        config=config,
        model=adapted,
        base=base,
        policy=policy,
        components=_count(owner),
        adapter=adapter,
        component_of=components_of(adapted, trained),
        layer_targets=_by_target(adapter),
        quantization=quantization,
        images=read_settings(path),
    )


def _read_config(path: str | Path) -> Any:
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(
            f"model {str(path)!r} is not a folder here, and a plan downloads nothing: put the "
            "model's config.json (its weights are not needed) in a folder and give "
            "model.path=FOLDER"
        )
    if not file.is_file():
        raise UserError(
            f"model folder {folder} has no config.json: put the model's config.json in it (its "
            "weights are not needed)"
        )
    logging.set_verbosity_error()
    minicpmv.register()
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BAD_FILES as error:
        why = first_line(error)
        raise UserError(f"{file} cannot be read as a model's config: {why}") from error


def _mapping(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value if isinstance(value, Mapping) else value.to_dict())


# -- counting --------------------------------------------------------------------------------


def _owners(base: Any, entry: Family) -> dict[int, tuple[str, nn.Parameter]]:
    """Each parameter once, with the part that it belongs to.

    A shared matrix belongs to the embeddings. What is in no other part belongs to the connector.
    """
    owner: dict[int, tuple[str, nn.Parameter]] = {}

    def claim(part: str, module: Any) -> None:
        for parameter in module.parameters() if module is not None else ():
            owner.setdefault(id(parameter), (part, parameter))

    for name in connector_modules(base, entry):
        claim("connector", base.get_submodule(name))
    _, tower = tower_of(base) or ("", None)
    claim("vision tower", tower)
    claim("embeddings", base.get_input_embeddings())
    claim("output head", base.get_output_embeddings())
    claim("language model", decoder_of(base))
    claim("connector", base)
    return owner


def _count(owner: Mapping[int, tuple[str, nn.Parameter]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part, parameter in owner.values():
        counts[part] += parameter.numel()
    return {part: counts[part] for part in PARTS}


def _by_target(adapter: Params) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, value in adapter.items():
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        if module == name.removeprefix("base_model.model."):  # of a copied module
            module = module.rpartition(".")[0]
        counts[re.sub(r"\.\d+\.", ".*.", module)] += value.numel()
    return dict(sorted(counts.items()))


# -- bytes of the weights --------------------------------------------------------------------

NF4_BLOCK = 64  # weights that share one scale (bitsandbytes' default)
NF4_NESTED_BLOCK = 256  # scales that share one scale, with double quantisation


def weight_bytes(skeleton: Skeleton, *, four_bit: bool = False) -> dict[str, int]:
    """Bytes of the loaded base by kind: ``plain``, ``nf4`` (half a byte a weight), ``scales``.

    Linear layers are in 4 bit if the checkpoint says so in its `quantization_config`, which names
    what to leave out; with `four_bit`, those of the language model except its head, with
    double quantisation. Blocks of 64 weights share a scale: 4 bytes, or with double quantisation
    1 byte and 4 bytes for every 256 scales. Everything else has the dtype of the model.
    """
    quantised = set(_quantised(skeleton, four_bit))
    nested = bool(skeleton.quantization.get("bnb_4bit_use_double_quant", four_bit))
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for name, tensor in _base_tensors(skeleton.base):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name not in quantised:
            sizes["plain"] += tensor.nbytes
            continue
        blocks = -(-tensor.numel() // NF4_BLOCK)
        sizes["nf4"] += -(-tensor.numel() // 2)
        sizes["scales"] += blocks + 4 * -(-blocks // NF4_NESTED_BLOCK) if nested else 4 * blocks
    return {kind: sizes[kind] for kind in ("plain", "nf4", "scales")}


def _base_tensors(base: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the base under their names before PEFT, without the adapter's."""
    for source in (base.named_parameters(), base.named_buffers()):
        for name, tensor in source:
            if ".lora_" not in name and ".modules_to_save." not in name:
                yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


def _quantised(skeleton: Skeleton, four_bit: bool) -> Iterable[str]:
    """Names of the matrices that are kept in 4 bit."""
    own = skeleton.quantization
    decoder, head = decoder_of(skeleton.base), skeleton.base.get_output_embeddings()
    if own.get("load_in_4bit"):
        skip = own.get("llm_int8_skip_modules")
        inside: Any = skeleton.base
    elif four_bit:
        skip, inside = [], decoder
    else:
        return
    shared = head.weight if head is not None else None
    chosen = {id(module) for module in inside.modules() if isinstance(module, nn.Linear)}
    for name, module in skeleton.base.named_modules():
        plain = name.replace(".base_layer", "")
        if id(module) not in chosen or ".lora_" in name or module.weight is shared:
            continue
        if skip is None or should_convert_module(plain, skip):
            yield f"{plain}.weight"
