"""Features of images on disk: memory-mapped, shared by the processes of a machine.

A file of safetensors for each image: the tensors, how they make up an `ImageFeatures`, for which
image and model they are, and a digest of all this. A reader takes a file only if everything is as
it should be; else the file is removed and the image seen again. So nothing that other processes
do, a kill or a full disk can put a wrong number into a run.

Kept on disk are only images with a digest of their bytes as key (``sha256:``): drawings are named
by what is drawn, which says nothing about the code that draws.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils import ModelOutput

import fedmllm
from fedmllm.models import feature_files as files
from fedmllm.models.components import tower_of
from fedmllm.models.families import Family
from fedmllm.models.features import ImageFeatures, device_of, dtype_of
from fedmllm.models.lora import decoder_of
from fedmllm.models.replay import Blank, NotRecordedError

SCHEMA = 1
SMALL = 2**16  # bytes: smaller entries are copied, since a process may hold some 65,000 mappings
_LOG = logging.getLogger("fedmllm")
_KEY = re.compile(r"sha256:([0-9a-f]{64})")
_PACKAGES = ("torch", "transformers", "Pillow", "torchvision", "numpy", "safetensors")
_DAMAGED = (
    *(SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError),
    *(AttributeError, ImportError, RuntimeError),
)


class FeatureStore:
    """Entries of one model below a folder. identity: what their numbers depend on; asked once,
    when the first image is. limit_bytes: of all models together."""

    def __init__(
        self,
        folder: Path,
        identity: Callable[[], Mapping[str, Any]],
        *,
        name: str = "",
        limit_bytes: int = 20 * 10**9,
    ) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.name = name
        self._identity = identity
        self._sound: set[tuple[int, int, int]] = set()  # files that this process has checked
        self._writes = True
        self._total: int | None = None  # bytes of all entries, as of the last look at them
        self._since = 0  # bytes written since

    @cached_property
    def facts(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **self._identity()}

    @cached_property
    def model(self) -> str:
        """A digest of `facts`, which names the model's folder."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:24]

    def path(self, key: str) -> Path | None:
        """Where an image's entry lies; None for an image that is not kept on disk."""
        found = _KEY.fullmatch(key)
        if found is None:
            return None
        return self.folder / self.model / found[1][:2] / f"{found[1]}{files.SUFFIX}"

    def holds(self, key: str) -> bool:
        """Whether there is an entry, be it whole or damaged."""
        path = self.path(key)
        return path is not None and path.exists()

    def get(self, key: str) -> ImageFeatures | None:
        """An image's features, or None: memory-mapped, or copied where there is little of them.
        A damaged entry is removed."""
        path = self.path(key)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                seen = (facts.st_dev, facts.st_ino, facts.st_size)
                how = {"check": seen not in self._sound, "copy": facts.st_size < SMALL}
                found = read_entry(file, self.model, key, **how)
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            return None
        except _DAMAGED:
            files.remove(path)
            return None
        self._sound.add(seen)
        files.mark_used(path)
        return found

    def put(self, key: str, value: ImageFeatures) -> None:
        """Keep an image's features. What cannot be written is told once, and left in memory."""
        path = self.path(key)
        if path is None or not self._writes or path.exists():
            return
        try:
            content = entry_bytes(value, self.model, key)
        except NotRecordedError:
            return
        if len(content) > self.limit_bytes:
            return
        try:
            self._describe()
            files.write_whole(path, content)
        except OSError as error:
            self._writes = False
            _LOG.warning(
                "image features are kept in memory only: %s cannot be written to (%s); "
                "XDG_CACHE_HOME chooses another place, model.feature_cache=memory does without",
                self.folder,
                error.strerror or error,
            )
            return
        self._bound(len(content))

    def _describe(self) -> None:
        file = self.folder / self.model / files.FACTS
        if not file.exists():
            facts = {"name": self.name, **self.facts}
            files.write_whole(file, (json.dumps(facts, indent=1) + "\n").encode())

    def _bound(self, written: int) -> None:
        """Keep the limit. Others may write too, so what there is is counted now and then."""
        self._since += written
        if (
            self._total is None
            or self._total + self._since > self.limit_bytes
            or self._since > self.limit_bytes / 16
        ):
            self._total, self._since = files.trim(self.folder, self.limit_bytes), 0


def store_for(
    base: Any, processor: Any, entry: Family, keeps: str, *, name: str, limit_bytes: int
) -> FeatureStore | None:
    """The store of a model in the user's cache folder; none where pixels are kept, and none for a
    model with code of its own, which nothing in its files names."""
    if keeps == "pixels" or not type(base).__module__.startswith(("transformers.", "fedmllm.")):
        return None
    return FeatureStore(
        files.features_folder(),
        lambda: identity(base, processor, entry, keeps),
        name=name,
        limit_bytes=limit_bytes,
    )


# -- what the numbers depend on ------------------------------------------------------------------


def identity(base: Any, processor: Any, entry: Family, keeps: str) -> dict[str, str]:
    """Everything that can change what is kept of an image, but the image.

    The weights are those in memory of what the image passes (tower, connector unless it is
    trained), whatever folder or hub name they came from and however large the base is; the language
    model's do not matter, so that fine-tuned versions of it share entries.
    """
    device = device_of(base)
    return {
        "keeps": keeps,
        "model": f"{type(base).__module__}.{type(base).__qualname__}",
        "config": _digest(_json(_config(base))),
        "weights": weights_of_vision(base, entry, keeps),
        "processor": _digest(_json(_processor(processor))),
        "dtype": dtype_of(base),
        "device": _device_name(device),
        "code": _own_code(),
        **{name: _version(name) for name in _PACKAGES},
    }


def weights_of_vision(base: Any, entry: Family, keeps: str) -> str:
    """Digest of the parameters and buffers that an image passes, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_vision_tensors(base, entry, keeps)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def _vision_tensors(base: Any, entry: Family, keeps: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Of the tower without its connector, or of all but language model, embeddings and head."""
    found = tower_of(base)
    root = found[0] if found else "\0"  # no module's name
    connector = tuple(f"{root}.{name}." for name in entry.connector)
    parts = (decoder_of(base), base.get_input_embeddings(), base.get_output_embeddings())
    others = {id(m) for part in parts if part is not None for m in part.modules()}
    for path, module in base.named_modules():
        inside = path == root or path.startswith(f"{root}.")
        if keeps == "tower" and (not inside or f"{path}.".startswith(connector or "\0")):
            continue
        if id(module) in others:
            continue
        own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for tensors in own:
            for name, tensor in tensors:
                yield f"{path}.{name}", tensor


def _config(base: Any) -> dict[str, Any]:
    """The whole configuration, without names and versions that say nothing of numbers."""
    left_out = ("_name_or_path", "transformers_version", "architectures")
    facts = {k: v for k, v in base.config.to_dict().items() if k not in left_out}
    parts = (base.config, getattr(base.config, "vision_config", None))
    attention = [str(getattr(part, "_attn_implementation", None)) for part in parts]
    return {**facts, "attention": attention}


def _processor(processor: Any) -> dict[str, Any]:
    tokenizer, images = processor.tokenizer, processor.image_processor
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "processor": processor.to_dict(),
        "images": images.to_dict(),
        "classes": [f"{type(x).__module__}.{type(x).__qualname__}" for x in (processor, images)],
        "image_token": processor.image_token,
        "tokens": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab()),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)} {torch.version.cuda}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _own_code() -> str:
    """Digest of this package's code between an image's bytes and its features."""
    root = Path(fedmllm.__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*(root / "models").rglob("*.py"), root / "data" / "images.py"]):
        digest.update(f"{file.relative_to(root)} {_digest(file.read_text())}\n".encode())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _json(facts: Any) -> str:
    return json.dumps(facts, sort_keys=True, default=str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -- one entry -----------------------------------------------------------------------------------


def entry_bytes(value: ImageFeatures, model: str, key: str) -> bytes:
    """The file of an image. Raises `NotRecordedError` if it holds what a file cannot."""
    tensors: dict[str, torch.Tensor] = {}
    parts = {
        "words": value.words,
        "features": value.features,
        "deepstack": value.deepstack,
        "inputs": dict(value.inputs),
        "listed": value.listed,
        "pixels": dict(value.pixels),
        "recorded": value.recorded,
    }
    tree = json.dumps({"kind": _class_name(value.kind), "parts": _to_json(parts, tensors)})
    metadata = {"model": model, "image": key, "tree": tree}
    return save(tensors, {**metadata, "sha256": _content_digest(metadata, tensors)})


def read_entry(
    file: BinaryIO, model: str, key: str, *, check: bool = True, copy: bool = False
) -> ImageFeatures:
    """An image's features, memory-mapped unless `copy`. check: compare the digest, which reads
    it all.

    Raises one of many exceptions if the file is damaged, or of another image or model.
    """
    # safetensors opens a name twice, and another process may replace the file in between
    with safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if copy:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = metadata.pop("sha256")
    if (metadata["model"], metadata["image"]) != (model, key):
        raise ValueError("an entry of another image or model")
    if check and _content_digest(metadata, tensors) != expected:
        raise ValueError("a damaged entry")
    tree = json.loads(metadata["tree"])
    return ImageFeatures(kind=_class_named(tree["kind"]), **_from_json(tree["parts"], tensors))


def _content_digest(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_json(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A tree as JSON, its tensors by name in `tensors`: every container as [kind, content]."""
    if isinstance(tree, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return ["tensor", name]
    if isinstance(tree, Blank):
        value = None if tree.value != tree.value else tree.value
        return ["blank", [list(tree.shape), str(tree.dtype).removeprefix("torch."), value]]
    if isinstance(tree, ModelOutput):
        fields = {key: _to_json(value, tensors) for key, value in tree.items()}
        return ["output", [_class_name(type(tree)), fields]]
    if type(tree) in (tuple, list):
        return [type(tree).__name__, [_to_json(value, tensors) for value in tree]]
    if type(tree) is dict:
        return ["dict", {key: _to_json(value, tensors) for key, value in tree.items()}]
    if tree is None or isinstance(tree, bool | int | float | str):
        return ["plain", tree]
    raise NotRecordedError(f"a {type(tree).__name__} cannot be kept in a file")


def _from_json(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    kind, content = tree
    if kind == "tensor":
        return tensors[content]
    if kind == "blank":
        shape, dtype, value = content
        found = getattr(torch, dtype)
        return Blank(tuple(shape), found, *(() if value is None else (value,)))
    if kind == "output":
        fields = {key: _from_json(value, tensors) for key, value in content[1].items()}
        return _class_named(content[0])(**fields)
    if kind in ("tuple", "list"):
        values = [_from_json(value, tensors) for value in content]
        return tuple(values) if kind == "tuple" else values
    if kind == "dict":
        return {key: _from_json(value, tensors) for key, value in content.items()}
    if kind == "plain":
        return content
    raise ValueError(f"an unknown part {kind!r}")


def _class_name(kind: type) -> str:
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not _is_output(kind) or not name.startswith(("transformers.", "fedmllm.")):
        raise NotRecordedError(f"{name} is no output of a model of transformers")
    return name


def _class_named(name: str) -> type:
    """An output class of transformers or of ours: a file must not name anything else."""
    module, _, attribute = name.partition(":")
    if not module.startswith(("transformers.", "fedmllm.")):
        raise ValueError(f"{name} is no output of a model of transformers")
    kind = getattr(importlib.import_module(module), attribute)
    if not _is_output(kind):
        raise ValueError(f"{name} is no output of a model of transformers")
    return kind


def _is_output(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, ModelOutput)
