"""How much of training is padding, on the embedded tasks; and that micro-batches by length change
no gradient."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fedmllm.algorithms.base import LocalObjective
from fedmllm.client import Job, LocalPlan, LocalTraining, train_client
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.prompts import render

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "scripts"))

import padding  # noqa: E402
import update_docs  # noqa: E402


def item(name: str, length: int) -> Encoded:
    return Encoded(name, (10,) * (length - 2), (20,) * 2, None)


def batches(mllm: Mllm, lengths, plan: LocalPlan) -> list[list[Encoded]]:
    job = Job("c", [item(f"s{i}", n) for i, n in enumerate(lengths)])
    local = LocalTraining(
        mllm, {}, job, round_=1, seed=0, lr=0.1, plan=plan, objective=LocalObjective()
    )
    return list(local.batches())


def test_a_steps_samples_stay_together_and_are_cut_by_length(mllm: Mllm) -> None:
    lengths = [9, 30, 12, 30, 9, 40, 20, 11, 30, 14]
    whole = batches(mllm, lengths, LocalPlan(batch_size=4, micro_batch=4))
    parts = batches(mllm, lengths, LocalPlan(batch_size=4, micro_batch=2))
    assert [len(step) for step in whole] == [len(step) for step in parts] == [4, 4, 2]
    for drawn, cut in zip(whole, parts, strict=True):
        assert cut == sorted(drawn, key=lambda s: -len(s))  # equals in the order drawn
    assert parts != whole


def test_the_gradient_of_a_step_does_not_know_how_it_was_cut(mllm: Mllm, memes) -> None:
    """Without dropout, one step of SGD on six samples of unequal length."""
    samples = [
        s.masked(keep_image=i % 3 != 1, keep_text=i % 2 == 0) for i, s in enumerate(memes.train)
    ]
    items = [mllm.encode(render(s, memes.task)) for s in samples[:6]]
    rates = [m for m in mllm.model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    before = [m.p for m in rates]
    params = mllm.init_adapter(0)
    found = []
    try:
        for module in rates:
            module.p = 0.0
        for micro in (6, 4, 2):
            plan = LocalPlan(batch_size=6, micro_batch=micro, optimizer="sgd", max_grad_norm=0)
            update, _ = train_client(
                mllm, params, items, client="c", round_=1, seed=0, lr=0.1, plan=plan,
                objective=LocalObjective(),
            )  # fmt: skip
            found.append(torch.cat([value.flatten() for value in update.delta.values()]))
    finally:
        for module, rate in zip(rates, before, strict=True):
            module.p = rate
    for other in found[1:]:
        assert float((found[0] - other).norm() / found[0].norm()) < 1e-5


def test_counting_by_hand(mllm: Mllm) -> None:
    """Passes of 5 and 3, of 2, and of 4 and 4 and 1: 8 + 2 + 9 tokens in 10 + 2 + 12 places."""
    count = padding.Count()
    for lengths in ((5, 3), (2,), (4, 4, 1)):
        count.add([item("s", n) for n in lengths] if min(lengths) > 1 else [*map(_short, lengths)])
    assert count.padding == pytest.approx(1 - 19 / 24)


def _short(length: int) -> Encoded:
    return Encoded("s", (1,) * (length - 1), (2,), None)


@pytest.fixture(scope="module")
def rows(mllm: Mllm) -> dict[tuple, dict]:
    """The benchmark on a part of its samples."""
    found = padding.measure(mllm, train=120)
    return {(r["task"], r["setting"], r["micro_batch"], r["at_once"]): r for r in found}


def test_less_than_a_tenth_is_padding_where_a_step_is_cut(rows) -> None:
    """Two samples in a pass, in every task and setting; the rule is felt where masks are."""
    cut = {key: row for key, row in rows.items() if key[2:] == (2, 1)}
    assert len(cut) == 9
    assert max(row["padding"] for row in cut.values()) < 0.1
    for task in padding.TASKS:
        row = cut[task, "missing-b0.4", 2, 1]
        assert row["padding"] < 0.5 * row["as_drawn"]


def test_less_than_a_tenth_is_padding_where_samples_are_alike(rows) -> None:
    """Whole steps, and four clients in a pass, but for masked samples and the medical domain with
    its flashcards: there a sample's own length decides, and no order of a step's samples helps."""
    alike = [
        row["padding"]
        for (task, setting, micro, _), row in rows.items()
        if task != "medical" and (setting != "missing-b0.4" or micro < padding.BATCH)
    ]
    assert len(alike) == 20
    assert max(alike) < 0.1
    assert max(row["padding"] for row in rows.values()) < 0.4


def test_what_is_committed_is_what_the_benchmark_measures() -> None:
    facts = json.loads((ROOT / "results" / "padding.json").read_text())
    cases = {(r["task"], r["setting"], r["micro_batch"], r["at_once"]) for r in facts["rows"]}
    assert len(cases) == len(facts["rows"]) == 36
    assert "| medical | missing-b0.4 |" in update_docs.padding()
