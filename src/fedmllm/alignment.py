"""What alignment adds to a client's loss: class prototypes, masked views, weights of samples.

For a sample i of class y_i with hidden state h_i where its answer is decided (`Mllm.read`), its
token losses' mean l_i, and a masked view v(i) where it has both modalities:

    c_i l_i + lambda_p D(h_i, P) + lambda_d T(i, v(i)) + lambda_v l_v(i)

D pulls h_i to the prototype P_y of its class (Tan et al., "FedProto", AAAI 2022, with prototypes
of hidden states), T the view to the whole sample, whose side is a constant (self-distillation), and
the last term learns the answer from the view (modality dropout). c_i is 1 for a sample with both
modalities, else `incomplete`. A term that does not apply to a sample is 0; sums go over the
samples of a step, divided by their number, like the loss itself.

Shapes: A tokens of an answer, C classes, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from fedmllm.algorithms.base import Alignment, Params
from fedmllm.errors import UserError, unknown
from fedmllm.models.passes import Encoded, Reading
from fedmllm.rng import uniform

PROTOTYPES = "prototypes"  # the slot's name, in broadcasts and in updates
ANSWERS = {"mean": "sum", "seen": "count"}  # what an update has in place of the slot's tensors


def _cosine(h_D: torch.Tensor, means_CD: torch.Tensor, seen_C: torch.Tensor, y: int, t: float):
    return 1 - functional.cosine_similarity(h_D, means_CD[y], dim=0)


def _squared(h_D: torch.Tensor, means_CD: torch.Tensor, seen_C: torch.Tensor, y: int, t: float):
    return (h_D - means_CD[y]).square().mean()


def _contrastive(
    h_D: torch.Tensor, means_CD: torch.Tensor, seen_C: torch.Tensor, y: int, t: float
) -> torch.Tensor:
    near_C = functional.cosine_similarity(h_D[None], means_CD, dim=1) / t
    near_C = near_C.masked_fill(~seen_C, float("-inf"))
    return -near_C.log_softmax(0)[y]


PROTOTYPE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cosine": _cosine,  # 1 - cos(h, P_y)
    "squared": _squared,  # ||h - P_y||^2 / D
    "contrastive": _contrastive,  # -log softmax_c(cos(h, P_c) / temperature) at y, over known c
}


def _logits(view: Reading, i: int, item: Encoded, teacher: _Teacher) -> torch.Tensor:
    log_q_AV = view.logits[i].float().log_softmax(-1)
    log_p_AV = teacher.logits.float().log_softmax(-1)
    total = functional.kl_div(log_q_AV, log_p_AV, reduction="sum", log_target=True)
    return total / len(item.answer)


def _hidden(view: Reading, i: int, item: Encoded, teacher: _Teacher) -> torch.Tensor:
    h_D = view.hidden[i][item.deciding].float()
    return 1 - functional.cosine_similarity(h_D, teacher.hidden, dim=0)


DISTILLATION_TARGETS: dict[str, Callable[..., torch.Tensor]] = {
    "logits": _logits,  # KL(whole || view), mean over the answer's tokens
    "hidden": _hidden,  # 1 - cos(h_view, h_whole)
}


@dataclass(frozen=True)
class _Teacher:
    """The whole sample's side, without gradient: logits [A, V], hidden state [D]."""

    logits: torch.Tensor
    hidden: torch.Tensor


def check_alignment(given: Alignment) -> None:
    """Raises `UserError` for a form that there is none of or a weight out of range."""
    if given.prototype_loss not in PROTOTYPE_LOSSES:
        raise UserError(unknown("prototype loss", given.prototype_loss, PROTOTYPE_LOSSES))
    if given.distillation_target not in DISTILLATION_TARGETS:
        what = "distillation target"
        raise UserError(unknown(what, given.distillation_target, DISTILLATION_TARGETS))
    for name in ("prototypes", "distillation", "views", "incomplete"):
        if getattr(given, name) < 0:
            raise UserError(f"{name} is {getattr(given, name)}: give a number from 0 up")
    if given.temperature <= 0:
        raise UserError(f"temperature is {given.temperature}: give a number above 0")


@dataclass
class Terms:
    """The terms of one client's round.

    broadcast: the server's slots; with prototypes on, ``prototypes`` holds ``mean`` [C, D] and
    ``seen`` [C], 1 for a class that has one. epoch: the present one; prototypes are summed over
    the last alone, so that each sample counts once (one that stands in for others, as often).
    Raises ValueError if the prototypes are missing.
    """

    given: Alignment
    broadcast: Mapping[str, Params]
    client: str
    round: int
    seed: int
    last_epoch: int
    epoch: int = 0
    _teachers: list[_Teacher] = field(default_factory=list)
    _totals: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    _own: Params | None = None
    _means: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not self.given.prototypes:
            return
        if PROTOTYPES not in self.broadcast:
            raise ValueError("prototypes are asked for and the server sent none")
        mean_CD = self.broadcast[PROTOTYPES]["mean"]
        self._own = {"count": torch.zeros(len(mean_CD)), "sum": torch.zeros_like(mean_CD)}

    @property
    def reads_views(self) -> bool:
        """Whether masked views are read at all."""
        return bool(self.given.distillation or self.given.views)

    def loss(self, batch: Sequence[Encoded], found: Reading) -> torch.Tensor:
        """The sum over whole samples of their terms; `found` is the reading of `batch`."""
        losses = found.losses
        if self.given.incomplete != 1:
            factors = [1.0 if item.complete else self.given.incomplete for item in batch]
            losses = losses * torch.tensor(factors, device=losses.device)
        total = losses.sum()
        if self.given.prototypes:
            total = total + self._to_prototypes(batch, found)
        if self.reads_views:
            self._teachers = [
                _Teacher(logits.detach(), hidden[item.deciding].detach().float())
                for item, logits, hidden in zip(batch, found.logits, found.hidden, strict=True)
                if item.views
            ]
        return total

    def views(self, batch: Sequence[Encoded]) -> list[Encoded]:
        """One masked view of each sample that has any, drawn by (client, round, epoch, sample)."""
        if not self.reads_views:
            return []
        return [self._drawn(item) for item in batch if item.views]

    def view_loss(self, views: Sequence[Encoded], found: Reading) -> torch.Tensor:
        """The sum over the `views` of the batch whose `loss` was asked for last."""
        total = found.losses.new_zeros(())
        distance = DISTILLATION_TARGETS[self.given.distillation_target]
        for i, (item, teacher) in enumerate(zip(views, self._teachers, strict=True)):
            near = functional.cosine_similarity(
                found.hidden[i][item.deciding].detach().float(), teacher.hidden, dim=0
            )
            self._note("view_cosine", near)
            if self.given.distillation:
                term = distance(found, i, item, teacher)
                self._note("distillation_loss", term)
                total = total + self.given.distillation * term
            if self.given.views:
                self._note("view_loss", found.losses[i])
                total = total + self.given.views * found.losses[i]
        return total

    def finish(self) -> tuple[dict[str, Params], dict[str, float]]:
        """What goes back to the server: sums and counts of hidden states by class, and means of
        the terms for the record."""
        extra = {} if self._own is None else {PROTOTYPES: self._own}
        return extra, {name: float(total) / n for name, (total, n) in self._totals.items()}

    def _to_prototypes(self, batch: Sequence[Encoded], found: Reading) -> torch.Tensor:
        total = found.losses.new_zeros(())
        distance = PROTOTYPE_LOSSES[self.given.prototype_loss]
        sent = self.broadcast[PROTOTYPES]
        if self._means is None:
            self._means = sent["mean"].to(found.losses.device)
        seen_C = sent["seen"].to(found.losses.device) > 0
        for item, hidden_AD in zip(batch, found.hidden, strict=True):
            y, h_D = class_of(item), hidden_AD[item.deciding].float()
            self._collect(y, h_D)
            if sent["seen"][y] > 0:
                term = distance(h_D, self._means, seen_C, y, self.given.temperature)
                self._note("prototype_loss", term)
                total = total + self.given.prototypes * term
        return total

    def _collect(self, y: int, h_D: torch.Tensor) -> None:
        if self._own is not None and self.epoch == self.last_epoch:
            self._own["count"][y] += 1
            self._own["sum"][y] += h_D.detach().cpu()

    def _drawn(self, item: Encoded) -> Encoded:
        draw = uniform(self.seed, "view", self.client, self.round, self.epoch, item.id)
        return item.views[int(draw * len(item.views))]

    def _note(self, name: str, value: torch.Tensor) -> None:
        total, n = self._totals.get(name, (torch.zeros_like(value.detach()), 0))
        self._totals[name] = (total + value.detach(), n + 1)


def class_of(item: Encoded) -> int:
    """The class of a multiple-choice sample. Raises ValueError for an open question."""
    return item.options.index(item.answer)
