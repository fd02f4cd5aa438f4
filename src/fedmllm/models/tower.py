"""A frozen tower that is not needed for now leaves memory.

Its weights go to a file without a name, which the system removes with the process, and are mapped
from there: they take main memory only while they are used, and are the same bits. On an
accelerator they leave its memory, and come back by themselves for an image that turns up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def to_file(parts: Sequence[nn.Module]) -> int:
    """Put the weights of frozen modules into a mapped file; returns their bytes.

    A matrix that two modules share stays shared. Weights that are packed (4 bit) stay in memory.
    Raises OSError if the file for them (in TMPDIR) cannot be written.
    """
    places = list(_weights(parts))
    whole = {id(weight): weight for _, _, weight in places}
    if not whole:
        return 0
    tensors = {str(key): w.detach().cpu().contiguous() for key, w in whole.items()}
    with tempfile.TemporaryDirectory(prefix="fedmllm-") as folder:
        file = Path(folder) / "tower.safetensors"
        save_file(tensors, file)
        with safe_open(file, framework="pt") as opened:
            mapped = {key: nn.Parameter(opened.get_tensor(str(key)), False) for key in whole}
    for module, name, weight in places:
        module._parameters[name] = mapped[id(weight)]
    return sum(weight.nbytes for weight in whole.values())


def to_device(parts: Sequence[nn.Module], device: torch.device) -> None:
    """Bring the weights back to an accelerator; on the CPU they are read where they lie."""
    if device.type != "cpu":
        for part in parts:
            part.to(device)


def _weights(parts: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Plain frozen parameters with numbers in them; buffers are small and stay."""
    for part in parts:
        for module in part.modules():
            for name, weight in module._parameters.items():
                if type(weight) is nn.Parameter and not weight.requires_grad and weight.numel():
                    yield module, name, weight
