"""What is trained and exchanged: a policy for each component of the model.

    component     what is trained                              policy
    lora          LoRA on the language model's attention       always
    connector     a full copy of what lies between the tower   connector: frozen | full
                  and the language model
    embeddings    a full copy of the token embeddings          embeddings: frozen | full
    vision_lora   LoRA on the vision tower's attention         vision: frozen | lora

Everything that is trained is exchanged, and saved in PEFT's own format: full copies are its
`modules_to_save`. A shared matrix of embeddings and output head stays shared.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fedmllm.errors import UserError, unknown
from fedmllm.models.families import Family
from fedmllm.models.lora import decoder_of, lora_targets

COMPONENTS = ("lora", "connector", "embeddings", "vision_lora")
# the projections of a tower's attention, by their names in transformers
_VISION_LAYER = re.compile(
    r"(?P<block>(?:.*\.)?(?:layers?|blocks)\.\d+\.(?:self_attn|attn|attention))"
    r"\.(?P<leaf>q_proj|k_proj|v_proj|out_proj|o_proj|qkv|proj|projection_layer)"
)


@dataclass(frozen=True)
class Policy:
    """What is trained beside LoRA on the language model's attention; see the module's table."""

    connector: str = "frozen"
    embeddings: str = "frozen"
    vision: str = "frozen"

    @property
    def sees(self) -> bool:
        """Whether training changes what the language model is given of an image."""
        return self.connector != "frozen" or self.vision != "frozen"

    @property
    def keeps(self) -> str:
        """What can be kept of an image: see `features.py`."""
        if self.vision != "frozen":
            return "pixels"
        return "tower" if self.connector != "frozen" else "features"


CHOICES: dict[str, tuple[str, ...]] = {
    "connector": ("frozen", "full"),
    "embeddings": ("frozen", "full"),
    "vision": ("frozen", "lora"),
}


@dataclass(frozen=True)
class PolicySpec:
    """A ready policy: one line for `fedmllm ls`, and its settings, each of which may be changed."""

    summary: str
    options: Mapping[str, str] = field(default_factory=dict)


def _spec(summary: str, policy: Policy) -> PolicySpec:
    return PolicySpec(summary, {f.name: getattr(policy, f.name) for f in fields(policy)})


POLICIES: dict[str, PolicySpec] = {
    "paper": _spec("LoRA on the language model's attention, as the paper counts it", Policy()),
    "reference": _spec(
        "and full copies of connector and token embeddings, as the authors' scripts train",
        Policy(connector="full", embeddings="full"),
    ),
}


def make_policy(name: str = "paper", **changes: str) -> Policy:
    """A ready policy with changes. Raises `UserError` for an unknown name, component or choice."""
    if name not in POLICIES:
        raise UserError(unknown("policy of what is trained", name, POLICIES))
    for component, choice in changes.items():
        if component not in CHOICES:
            raise UserError(unknown("component", component, CHOICES))
        if choice not in CHOICES[component]:
            raise UserError(unknown(f"choice for {component}", choice, CHOICES[component]))
    return Policy(**{**POLICIES[name].options, **changes})


# -- the parts of a model, from its structure ------------------------------------------------


def tower_of(base: Any) -> tuple[str, nn.Module] | None:
    """Name and module of the vision tower: the first that is built from the vision config."""
    vision = getattr(base.config, "vision_config", None)
    if vision is None:
        return None
    built = (
        (name, module)
        for name, module in base.named_modules()
        if type(getattr(module, "config", None)) is type(vision)
    )
    return next(built, None)


def connector_modules(base: Any, entry: Family) -> list[str]:
    """Names of the modules between tower and language model.

    Those of the tower that the family's entry names; else the largest modules that hold
    parameters and nothing of tower, decoder, embeddings and head. A bare parameter between them
    (LLaVA-NeXT's mark of a new line) is not a module and stays frozen.
    """
    name, tower = tower_of(base) or ("", nn.Module())
    if entry.connector:
        return [f"{name}.{child}" for each in entry.connector for child in _modules_at(tower, each)]
    others = {id(m) for part in _others(base, tower) for m in part.modules()}
    found: list[str] = []

    def walk(module: nn.Module, path: str) -> None:
        for child_name, child in module.named_children():
            child_path = f"{path}.{child_name}" if path else child_name
            if id(child) in others:
                continue
            if any(id(m) in others for m in child.modules()):
                walk(child, child_path)
            elif next(child.parameters(), None) is not None:
                found.append(child_path)

    walk(base, "")
    return found


def _modules_at(tower: nn.Module, name: str) -> list[str]:
    """A module's name; of a list of modules, those of its items, which are called in its place."""
    module = tower.get_submodule(name)
    if not isinstance(module, nn.ModuleList):
        return [name]
    return [f"{name}.{i}" for i in range(len(module))]


def _others(base: Any, tower: nn.Module) -> Iterator[nn.Module]:
    """What is not the connector."""
    yield tower
    yield decoder_of(base)
    for part in (base.get_input_embeddings(), base.get_output_embeddings()):
        if part is not None:
            yield part


def vision_targets(base: Any, entry: Family) -> str:
    """A regular expression for the attention projections of the vision tower, and only those.

    Raises `UserError` if there are none.
    """
    found = tower_of(base)
    kept = tuple(connector_modules(base, entry))
    leaves: set[str] = set()
    name, tower = found or ("", nn.Module())
    for inner, module in tower.named_modules():
        matched = _VISION_LAYER.fullmatch(inner)
        if matched and isinstance(module, nn.Linear) and not f"{name}.{inner}".startswith(kept):
            leaves.add(re.sub(r"\d+", r"\\d+", re.escape(inner)))
    if not leaves:
        raise UserError(
            f"trained.vision lora: {type(base).__name__} has no vision tower whose attention is "
            "made of linear layers: leave it frozen"
        )
    return rf"{re.escape(name)}\.({'|'.join(sorted(leaves))})"


# -- the adapter -----------------------------------------------------------------------------


def add_adapter(
    base: Any, entry: Family, policy: Policy, *, rank: int, alpha: int, dropout: float
) -> PeftModel:
    """Put what the policy trains around and into a frozen base, in place.

    Full copies are float32 whatever the base's dtype, as PEFT's LoRA is: an optimiser's small
    steps would be lost in half precision. Raises `UserError` if a component cannot be had.
    """
    targets = lora_targets(base)
    if policy.vision == "lora":
        targets = f"{targets}|{vision_targets(base, entry)}"
    copied: list[str] = []
    if policy.connector == "full":
        copied += connector_modules(base, entry)
        if not copied:
            raise UserError(
                f"trained.connector full: no connector was found in {type(base).__name__}: "
                "leave it frozen"
            )
    if policy.embeddings == "full":
        copied.append(_name_of(base, base.get_input_embeddings()))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=copied or None,
        ensure_weight_tying=policy.embeddings == "full" and _is_tied(base),
        task_type="CAUSAL_LM",
    )
    dtype = base.get_input_embeddings().weight.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers an old name
        model = get_peft_model(base, config)
    for wrapper in _copies(model):
        _keep_in_float32(wrapper.modules_to_save["default"], dtype)
    return model


def _is_tied(base: Any) -> bool:
    head = base.get_output_embeddings()
    return head is not None and head.weight is base.get_input_embeddings().weight


def _name_of(base: Any, wanted: Any) -> str:
    return next(name for name, module in base.named_modules() if module is wanted)


def _copies(model: nn.Module) -> list[ModulesToSaveWrapper]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _keep_in_float32(copy: nn.Module, dtype: torch.dtype) -> None:
    """Compute a copied module in float32 within a model of another dtype."""
    copy.float()
    if dtype == torch.float32:
        return

    def cast(values: Any, to: torch.dtype) -> Any:
        if isinstance(values, torch.Tensor):
            return values.to(to) if values.is_floating_point() else values
        if isinstance(values, tuple | list):
            return type(values)(cast(value, to) for value in values)
        return values

    copy.register_forward_pre_hook(lambda _, args: cast(args, torch.float32))
    copy.register_forward_hook(lambda _, args, out: cast(out, dtype))


def originals(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the full copies start from, under the names of `adapter_parameters`."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key, value in module.original_module.named_parameters()
    }


def materialise(model: nn.Module) -> None:
    """Give what is trained storage on the CPU, all zeros, in a model on the meta device."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.requires_grad:
                empty = torch.zeros(value.shape, dtype=value.dtype, device="cpu")
                module.register_parameter(name, nn.Parameter(empty))


def copied_modules(model: PeftModel) -> dict[str, int]:
    """Names of the modules that are trained as full copies, with their parameters.

    A matrix that two modules share counts for the first.
    """
    base: Any = model.base_model.model
    counted: set[int] = set()
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = {id(p): p.numel() for p in module.modules_to_save.parameters()}
            found[name] = sum(count for key, count in own.items() if key not in counted)
            counted |= set(own)
    return {name: count for name, count in found.items() if count}


def components_of(model: PeftModel, names: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The component of each trained tensor."""
    base: Any = model.base_model.model
    decoder = {id(p) for p in decoder_of(base).parameters()}
    words = {
        id(p)
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
        if module is not None
        for p in module.parameters()
    }

    def kind(name: str, parameter: nn.Parameter) -> str:
        if ".lora_" in name:
            return "lora" if id(parameter) in decoder else "vision_lora"
        return "embeddings" if id(parameter) in words else "connector"

    return {name: kind(name, parameter) for name, parameter in names.items()}


def train_only_what_is_trained(model: PeftModel) -> None:
    """Training mode, but not of the frozen tower: its dropout must not be felt.

    LoRA's own dropout and copied modules inside it do train. So do the layers themselves, without
    what is in them, where activations are computed again: transformers asks them for it.
    """
    model.train()
    found = tower_of(model.base_model.model)
    if found is None:
        return
    found[1].eval()
    for module in found[1].modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()
        elif isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.train()
        elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
