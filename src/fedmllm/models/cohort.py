"""Many adapters on one base in one pass: the rows of all clients, each with its own LoRA.

    cohort = Cohort(mllm, adapters, seeds)
    with cohort.training():
        found = cohort.read({0: batch_of_client_0, 2: batch_of_client_2})
        sum(reading.losses.sum() for reading in found.values()).backward()

The frozen base sees one batch. In each LoRA layer of PEFT, A, B and the dropout are replaced for
the time of training by modules that know whose rows are whose; the layer's own forward remains,
so a base in 4 bit works as it does for one adapter.

Shapes: K clients, B rows of all of them, T tokens of the longest row, D and E widths in and out.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fedmllm.models.lora import decoder_of
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded, Reading

_NAME = "default"  # of the adapter in PEFT


def obstacle(mllm: Mllm) -> str | None:
    """Why clients cannot train on this model at the same time; None if they can.

    A full copy (connector, embeddings) is another base for each client. LoRA in the tower sees
    images, not rows. A decoder with dropout of its own draws for the whole batch.
    """
    others = {part for part in mllm.component_of.values() if part != "lora"}
    if others:
        return f"it trains {', '.join(sorted(others))} as well"
    if any(layer.lora_variant for layer in _layers(mllm)):
        return "its adapter is not plain LoRA"
    decoder = decoder_of(mllm.base)
    own = {id(m) for layer in _layers(mllm) for m in layer.lora_dropout.modules()}
    inside = any(isinstance(m, nn.Dropout) and m.p and id(m) not in own for m in decoder.modules())
    rates = [value for key, value in _settings(mllm) if key.endswith(("dropout", "pdrop"))]
    if inside or any(isinstance(rate, float) and rate for rate in rates):
        return "its language model has dropout of its own"
    return None


def _settings(mllm: Mllm) -> list[tuple[str, Any]]:
    return sorted(mllm.base.config.get_text_config().to_dict().items())


def _layers(mllm: Mllm) -> list[LoraLayer]:
    return [module for module in mllm.model.modules() if isinstance(module, LoraLayer)]


@dataclass(frozen=True)
class _Share:
    """A client's part of a batch: its number, its rows [start, stop) and their longest."""

    client: int
    start: int
    stop: int
    width: int


class Cohort:
    """K adapters in training on one base.

    adapters: the trained tensors of each client, by the names of `mllm.trainable`, leaves of
    autograd. seeds: of each client's dropout; its masks are the bits that it would draw alone, by
    `Mllm.training(seed)` and `Mllm.loss_sum` of the same batches.
    Raises ValueError if the model has an `obstacle`.
    """

    def __init__(
        self,
        mllm: Mllm,
        adapters: Sequence[Mapping[str, torch.Tensor]],
        seeds: Sequence[int],
    ) -> None:
        if reason := obstacle(mllm):
            raise ValueError(f"{mllm.name} cannot train many clients at once: {reason}")
        self.mllm, self.adapters = mllm, adapters
        self.shares: list[_Share] = []
        self._states = [_first_state(mllm.device, seed) for seed in seeds]
        self._drawn: dict[nn.Module, list[torch.Tensor]] = {}

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Training mode; PEFT's A, B and dropout are back when it ends."""
        name_of = {id(value): name for name, value in self.mllm.trainable.items()}
        with contextlib.ExitStack() as stack:
            for layer in _layers(self.mllm):
                for part in (layer.lora_A, layer.lora_B):
                    name = name_of[id(part[_NAME].weight)]
                    weights = [adapter[name] for adapter in self.adapters]
                    stack.enter_context(_replaced(part, _Linear(self, weights)))
                rate = getattr(layer.lora_dropout[_NAME], "p", 0.0)
                if rate:
                    stack.enter_context(_replaced(layer.lora_dropout, _Dropout(self, rate)))
            stack.enter_context(self.mllm.training(0))  # the seed of no draw
            yield

    def read(self, batches: Mapping[int, Sequence[Encoded]]) -> dict[int, Reading]:
        """For each client number `Mllm.read` of its samples, all from one pass.

        Clients with as many rows stand together, so that one product serves them.
        """
        order = sorted(batches, key=lambda client: (-len(batches[client]), client))
        self.shares, start = [], 0
        for client in order:
            stop = start + len(batches[client])
            self.shares.append(_Share(client, start, stop, max(map(len, batches[client]))))
            start = stop
        self._drawn = {}
        found = self.mllm.read([item for client in order for item in batches[client]])
        return {each.client: found.rows(each.start, each.stop) for each in self.shares}

    def dropped(self, module: nn.Module, rows_BTD: torch.Tensor, rate: float) -> torch.Tensor:
        """`rows_BTD` with each client's own dropout; what lies beyond a client's width is 0.

        A client's part is what `nn.Dropout` makes of its rows alone, next in its own stream. A
        layer that runs again in the backward pass (gradient checkpointing) draws the same.
        """
        again = self._drawn.get(module)
        states = again or [self._states[share.client] for share in self.shares]
        generator = _generator(rows_BTD.device)
        parts = []
        pieces = rows_BTD.split([share.stop - share.start for share in self.shares])
        for share, state, piece in zip(self.shares, states, pieces, strict=True):
            beyond = rows_BTD.shape[1] - share.width
            own = piece[:, : share.width].clone() if beyond else piece
            generator.set_state(state)
            dropped = nn.functional.dropout(own, rate)
            parts.append(nn.functional.pad(dropped, (0, 0, 0, beyond)) if beyond else dropped)
            if again is None:
                self._states[share.client] = generator.get_state()
        self._drawn[module] = states
        return torch.cat(parts)


class _Linear(nn.Module):
    """A or B of every client, each applied to its own rows."""

    def __init__(self, cohort: Cohort, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.cohort, self.weights = cohort, weights
        self.weight = weights[0].detach()  # PEFT asks for its dtype

    def forward(self, rows_BTD: torch.Tensor) -> torch.Tensor:
        parts = []
        shares = self.cohort.shares
        for _, same in itertools.groupby(shares, key=lambda share: share.stop - share.start):
            held = list(same)
            weights_KED = torch.stack([self.weights[share.client] for share in held])
            part = rows_BTD[held[0].start : held[-1].stop]
            flat = part.reshape(len(held), -1, part.shape[-1])
            parts.append(torch.bmm(flat, weights_KED.mT).reshape(*part.shape[:-1], -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Dropout(nn.Module):
    """Dropout of every client, each from its own stream."""

    def __init__(self, cohort: Cohort, rate: float) -> None:
        super().__init__()
        self.cohort, self.rate = cohort, rate

    def forward(self, rows_BTD: torch.Tensor) -> torch.Tensor:
        return self.cohort.dropped(self, rows_BTD, self.rate)


@contextlib.contextmanager
def _replaced(parts: nn.ModuleDict, module: nn.Module) -> Iterator[None]:
    before = parts[_NAME]
    parts[_NAME] = module
    try:
        yield
    finally:
        parts[_NAME] = before


def _generator(device: torch.device) -> torch.Generator:
    """The generator that dropout reads on a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _first_state(device: torch.device, seed: int) -> torch.Tensor:
    """The generator's state as `Mllm.training(seed)` leaves it."""
    return torch.Generator(device).manual_seed(seed).get_state()
