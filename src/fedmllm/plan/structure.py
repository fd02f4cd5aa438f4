"""The model without its weights: built from config.json on the meta device, and counted.

transformers builds the modules, `lora_targets` (the function that training uses) finds where the
adapter goes and PEFT puts it there; tensors have shapes and no storage. So counts are those of a
loaded model, for every family that can be trained, and eight billion parameters take a second.
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
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from fedmllm.algorithms.base import Params
from fedmllm.errors import UserError
from fedmllm.models import minicpmv
from fedmllm.models.lora import decoder_of, lora_targets

COMPONENTS = ("vision tower", "connector", "embeddings", "language model", "output head")
_LORA = re.compile(r"\.lora_(A|B)\.default")
_BAD_CONFIG = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    IndexError,
    AssertionError,
    StopIteration,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Skeleton:
    """A base and its adapter, shapes only.

    base: the frozen base with PEFT's layers inside, on the meta device. components: base
    parameters by part, in the order of `COMPONENTS`. adapter: what clients and server exchange,
    under PEFT's names, as meta tensors. layer_targets: adapter parameters by adapted module, with
    ``*`` for the layer. trainable_components: adapter parameters by the part that they sit in.
    quantization: the checkpoint's own `quantization_config`, if config.json has one.
    """

    config: Any
    base: Any
    components: dict[str, int]
    adapter: Params
    trainable_components: dict[str, int]
    layer_targets: dict[str, int]
    quantization: Mapping[str, Any]

    @property
    def total(self) -> int:
        """Parameters of the base; one that is shared counts once."""
        return sum(self.components.values())

    @property
    def trainable(self) -> int:
        """Parameters of the adapter."""
        return sum(value.numel() for value in self.adapter.values())


def build_skeleton(
    path: str | Path, *, rank: int, alpha: int, dropout: float, dtype: str
) -> Skeleton:
    """The model of a folder's config.json with a fresh adapter.

    Raises `UserError` if there is no such file, if it makes no image-text model, or if no LoRA
    targets are found in it.
    """
    config = _read_config(path)
    quantization = _mapping(getattr(config, "quantization_config", None))
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            base: Any = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
            base.requires_grad_(False)
            owner = _owners(base)
            lora = LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=lora_targets(base),
                task_type="CAUSAL_LM",
            )
            adapted = get_peft_model(base, lora)
    except _BAD_CONFIG as error:
        raise UserError(
            f"no model can be built from {Path(path) / 'config.json'}: {_line(error)}"
        ) from error
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    adapter = {
        _LORA.sub(r".lora_\1", name): torch.empty(p.shape, device="meta")
        for name, p in sorted(trainable.items())
    }
    return Skeleton(
        config=config,
        base=base,
        components=_count(owner),
        adapter=adapter,
        trainable_components=_homes(adapted, trainable, owner),
        layer_targets=_by_target(adapter),
        quantization=quantization,
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
    except _BAD_CONFIG as error:
        raise UserError(f"{file} cannot be read as a model's config: {_line(error)}") from error


def _line(error: BaseException) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else repr(error)
    return first if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first}"


def _mapping(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value if isinstance(value, Mapping) else value.to_dict())


# -- counting --------------------------------------------------------------------------------


def _owners(base: Any) -> dict[int, tuple[str, nn.Parameter]]:
    """Each parameter once, with the part that it belongs to.

    A shared matrix belongs to the embeddings. The vision tower is what has the vision config for
    its own; what is in no other part is the connector.
    """
    owner: dict[int, tuple[str, nn.Parameter]] = {}

    def claim(part: str, module: Any) -> None:
        for parameter in module.parameters() if module is not None else ():
            owner.setdefault(id(parameter), (part, parameter))

    for module in _vision_modules(base):
        claim("vision tower", module)
    claim("embeddings", base.get_input_embeddings())
    claim("output head", base.get_output_embeddings())
    claim("language model", decoder_of(base))
    claim("connector", base)
    return owner


def _vision_modules(base: Any) -> list[nn.Module]:
    """The modules that are built from the vision config."""
    vision = getattr(base.config, "vision_config", None)
    if vision is None:
        return []
    return [m for m in base.modules() if type(getattr(m, "config", None)) is type(vision)]


def _count(owner: Mapping[int, tuple[str, nn.Parameter]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part, parameter in owner.values():
        counts[part] += parameter.numel()
    return {part: counts[part] for part in COMPONENTS}


def _homes(
    adapted: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    owner: Mapping[int, tuple[str, nn.Parameter]],
) -> dict[str, int]:
    """Adapter parameters by the part that the adapted module belongs to."""
    counts: Counter[str] = Counter()
    for name, parameter in trainable.items():
        module: Any = adapted.get_submodule(name.split(".lora_")[0])
        counts[owner[id(module.base_layer.weight)][0]] += parameter.numel()
    return {part: counts[part] for part in COMPONENTS}


def _by_target(adapter: Params) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, value in adapter.items():
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
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
            if ".lora_" not in name:
                yield name.replace(".base_layer.", "."), tensor


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
