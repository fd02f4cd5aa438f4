"""The strategies against heterogeneity, put over any algorithm: what clients add to their loss,
what the server keeps for it, and the weights that it makes of the parties' profiles.

    algorithm = with_strategy(algorithm, adaptive=..., alignment=..., classes=2, width=192)

The prompt strategy is in `fedmllm.prompts`, the clients' half of alignment in `fedmllm.alignment`,
profiles in `fedmllm.heterogeneity`. docs/strategies.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fedmllm.algorithms.base import (
    Aggregate,
    Algorithm,
    Alignment,
    Composition,
    Params,
    Proximal,
    ServerState,
)
from fedmllm.algorithms.options import check_not_negative
from fedmllm.alignment import PROTOTYPES, check_alignment
from fedmllm.errors import UserError
from fedmllm.heterogeneity import Standing
from fedmllm.recombination import check_composition

# Of the hand-set weight, in each scenario: the paper's order, aligned < missing < single and mixed
# modalities. That it is all of w in the last two and none in the first is ours.
BY_SCENARIO = {"aligned": 0.0, "missing": 0.5, "cross": 1.0, "hybrid": 1.0}

WEIGHTS: dict[str, Callable[[str, Standing | None], float]] = {
    "fixed": lambda scenario, party: 1.0,
    "scenario": lambda scenario, party: BY_SCENARIO.get(scenario, 1.0),
    "profile": lambda scenario, party: party.index if party else 1.0,  # h_k
}


def party_weights(
    rule: str, w: float, scenario: str, found: Mapping[str, Standing]
) -> dict[str, float]:
    """w_k of each party by a rule of `WEIGHTS`: w times its factor, which is in [0, 1]."""
    return {client: w * WEIGHTS[rule](scenario, each) for client, each in found.items()}


def edge_layers(num_layers: int, given: int | None = None) -> int:
    """s: how many decoder layers at either end the adaptive regularisation leaves free.

    By default L / 7 to the nearest whole number: the paper's 4 of 28, 5 of 32, 1 of 4.
    Raises `UserError` if no layer is left in between.
    """
    found = round(num_layers / 7) if given is None else given
    if not 0 <= 2 * found < num_layers:
        raise UserError(
            f"strategy.edge_layers: {found} at either end leave none of {num_layers} decoder "
            f"layers: give at most {(num_layers - 1) // 2}"
        )
    return found


def with_strategy(
    algorithm: Algorithm,
    *,
    adaptive: Proximal | None = None,
    alignment: Alignment | None = None,
    composition: Composition | None = None,
    classes: int = 0,
    width: int = 0,
    momentum: float = 0.0,
) -> Algorithm:
    """The algorithm with what a strategy adds to its clients and, for prototypes, to its state.

    classes, width: C and D of the prototypes. momentum: beta in P_c = beta P_c + (1 - beta) m_c for
    a class that has a prototype and was seen this round; m_c, the mean over all samples of the
    cohort, is its first prototype, and a class that was not seen keeps what it has.
    Raises `UserError` for a value out of range, or prototypes where there are no classes.
    """
    adaptive, alignment = adaptive or Proximal(), alignment or Alignment()
    composition = composition or Composition()
    check_alignment(alignment)
    check_composition(composition)
    check_not_negative(mu=adaptive.mu, w=adaptive.weight)
    if not 0 <= momentum < 1:
        raise UserError(f"momentum is {momentum}: give a number from 0 to below 1")
    local = replace(
        algorithm.local, adaptive=adaptive, alignment=alignment, composition=composition
    )
    algorithm = replace(algorithm, local=local)
    if not alignment.prototypes:
        return algorithm
    if classes < 1:
        raise UserError(
            "strategy.prototypes: the task has open questions and so no classes to have a "
            "prototype of: use strategy.distillation there"
        )
    if algorithm.aggregation.name != "mean":
        raise UserError(
            "strategy.prototypes: class prototypes are means of what parties send, of which "
            f"aggregation {algorithm.aggregation.name} protects none: leave one of the two off"
        )

    def init(params: Params) -> ServerState:
        state = algorithm.init(params)
        empty = {"mean": torch.zeros(classes, width), "seen": torch.zeros(classes)}
        return replace(state, slots={**state.slots, PROTOTYPES: empty})

    def step(state: ServerState, mean: Aggregate) -> ServerState:
        own = {name: slot for name, slot in state.slots.items() if name != PROTOTYPES}
        if PROTOTYPES not in state.slots:
            raise UserError(
                "the server's state has no prototypes: it was written without them; resume with "
                "that strategy or start a new run"
            )
        after = algorithm.step(replace(state, slots=own), mean)
        moved = merged(state.slots[PROTOTYPES], mean.extra(PROTOTYPES), momentum)
        return replace(after, slots={**after.slots, PROTOTYPES: moved})

    return replace(algorithm, init=init, step=step, broadcast=(*algorithm.broadcast, PROTOTYPES))


def merged(kept: Params, sent: Params, momentum: float) -> Params:
    """The next prototypes from those kept (``mean`` [C, D], ``seen`` [C]) and the cohort's mean
    sums [C, D] and counts [C]."""
    here_C1 = (sent["count"] > 0)[:, None]
    mean_CD = sent["sum"] / sent["count"].clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    beta_C1 = momentum * (kept["seen"] > 0)[:, None].float()
    blended_CD = beta_C1 * kept["mean"] + (1 - beta_C1) * mean_CD
    return {
        "mean": torch.where(here_C1, blended_CD, kept["mean"]),
        "seen": torch.maximum(kept["seen"], here_C1[:, 0].float()),
    }
