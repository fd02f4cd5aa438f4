"""Row `training`: samples a second, against a loop in the authors' manner.

That loop: for each client and round a Hugging Face `Trainer` built anew, every image through the
vision tower in every step, batches of one accumulated to four, or batches of eight; logits at every
token. It is spared: reading, drawing and tokenising (its tensors lie ready), checkpoints, logs,
and a second model (it sets the adapter on the one that is there). Both see the same samples in
the same order and make the same optimiser steps, on one thread, with the same dropout rate. The
second case of each pair has the batch of the project's default on both sides.

Ours is timed as a run does it: `run_round` with its defaults, every image seen before; what comes
before the rounds (tokenising, for ours the images through the tower) stands apart as
`start_seconds`, of both.
A check beforehand, without dropout: the losses of a round must agree.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import Took, compare, tell, timed, write

from fedmllm.algorithms import make_algorithm
from fedmllm.algorithms.base import Params, ServerState, StreamingMean, Update
from fedmllm.client import LocalPlan
from fedmllm.config import Config, make_config
from fedmllm.data import load_dataset
from fedmllm.experiment import federations, load_model, make_manifest
from fedmllm.federation import InProcessRunner, cohort_of, run_round
from fedmllm.models.features import FeatureCache
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.prompts import Prompted, render
from fedmllm.rng import stream

LIMIT = 32  # samples of a party
LR = 1e-3
SEED = 0
IGNORED = -100
AGREE = 1e-3  # relative, of the losses of the check


def config(dropout: float = 0.05) -> Config:
    """Ten parties of the embedded memes: five hold pictures, five texts."""
    return make_config(
        {
            "name": "speed",
            "data": "memes",
            "setting": "cross-i5t5",
            "partition": {"clients": 10},
            "lora": {"dropout": dropout},
        }
    )


def prompts(made: Config) -> dict[str, list[Prompted]]:
    """Every party's samples, in words."""
    dataset = load_dataset(**made.data)
    held = federations(made, dataset, make_manifest(made, dataset))[0].samples
    return {
        client: [render(sample, dataset.task, made.prompt) for sample in samples[:LIMIT]]
        for client, samples in held.items()
    }


Rows = list[dict[str, torch.Tensor]]


def tensors(mllm: Mllm, prompted: Sequence[Prompted]) -> Rows:
    """What the authors' manner reads from its data set: ids, labels, pixels."""
    rows = []
    for one in prompted:
        item = mllm.encode(one)
        ids = torch.tensor(item.prompt + item.answer)
        labels = ids.clone()
        labels[: len(item.prompt)] = IGNORED
        row = {"input_ids": ids, "labels": labels}
        if one.sample.image is not None:
            _, inputs = mllm.family.read(mllm.processor, one.sample.image.open())
            names = ("pixel_values", "pixel_attention_mask")
            row |= {name: torch.as_tensor(inputs[name])[0] for name in names if name in inputs}
        rows.append(row)
    return rows


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    """A padded batch; a party has pictures in all of its samples or in none."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for b, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[b, :length], labels[b, :length] = row["input_ids"], row["labels"]
        mask[b, :length] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    pixels = [name for name in rows[0] if name.startswith("pixel")]
    return batch | {name: torch.stack([row[name] for row in rows]) for name in pixels}


def train_there(mllm: Mllm, rows: Rows, *, micro: int, steps: int, folder: str) -> float:
    """A client's round by a new Trainer: its mean loss. The adapter stays in the model."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class InOrder(Trainer):
        """The order is drawn before, as ours is."""

        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = InOrder(mllm.model, arguments, collate, rows)
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # a batch's loss is the mean of its micro-batches'
    return float(trainer.train().training_loss)


def round_there(
    mllm: Mllm,
    held: dict[str, Rows],
    cohort: list[str],
    state: ServerState,
    *,
    micro: int,
    steps: int,
) -> tuple[ServerState, float]:
    """One round of FedAvg: client after client, then the mean."""
    algorithm = make_algorithm("fedavg", num_clients=len(held))
    mean, losses = StreamingMean(algorithm.weighting), []
    with tempfile.TemporaryDirectory() as folder:
        for client in cohort:
            mllm.set_adapter(state.params)
            rows = held[client]
            order = stream(SEED, "order", client, state.round + 1, 0).permutation(len(rows))
            ordered = [rows[i] for i in order]
            losses.append(train_there(mllm, ordered, micro=micro, steps=steps, folder=folder))
            delta = difference(mllm.get_adapter(), state.params)
            mean.fold(Update(client, len(rows), delta))
    return algorithm.step(state, mean), sum(losses) / len(losses)


def difference(new: Params, old: Params) -> Params:
    """What a client sends."""
    return {name: new[name] - old[name] for name in old}


def rounds_here(
    mllm: Mllm, held: dict[str, list[Encoded]], cohorts: list[list[str]], *, batch: int
) -> list[float]:
    """Rounds of ours; their losses."""
    made = config().training
    algorithm = make_algorithm("fedavg", num_clients=len(held))
    state, losses = algorithm.init(mllm.init_adapter(SEED)), []
    plan = LocalPlan(batch_size=batch, micro_batch=min(batch, made.micro_batch))
    runner = InProcessRunner(
        mllm, held.__getitem__, plan, SEED, clients_at_once=made.clients_at_once
    )
    for cohort in cohorts:
        state, record = run_round(runner, algorithm, state, cohort, lr=LR)
        losses.append(record.loss)
    return losses


def rounds_there(
    mllm: Mllm, held: dict[str, Rows], cohorts: list[list[str]], *, micro: int, steps: int
) -> list[float]:
    """The same rounds in the authors' manner."""
    state = make_algorithm("fedavg", num_clients=len(held)).init(mllm.init_adapter(SEED))
    losses = []
    for cohort in cohorts:
        state, loss = round_there(mllm, held, cohort, state, micro=micro, steps=steps)
        losses.append(loss)
    return losses


def check(made: dict[str, list[Prompted]], clients: int) -> dict[str, Any]:
    """Losses of one round of both without dropout, batch 1 x 4: the same work."""
    mllm = load_model(config(dropout=0.0))
    some = {client: made[client] for client in sorted(made)[:clients]}
    here = {client: [mllm.encode(one) for one in items] for client, items in some.items()}
    there = {client: tensors(mllm, items) for client, items in some.items()}
    ours = rounds_here(mllm, here, [list(some)], batch=4)[0]
    theirs = rounds_there(mllm, there, [list(some)], micro=1, steps=4)[0]
    if abs(ours / theirs - 1) > AGREE:
        raise SystemExit(f"error: the losses of a round part: ours {ours}, theirs {theirs}")
    return {"loss_ours": ours, "loss_theirs": theirs, "tolerance": AGREE}


@dataclass(frozen=True)
class Pair:
    """One repetition of a case: seconds of the rounds, of what comes before them, and losses."""

    rounds: dict[str, Took]
    start: dict[str, Took]
    losses: dict[str, list[float]]


def pair(
    mllm: Mllm,
    made: dict[str, list[Prompted]],
    cohorts: list[list[str]],
    *,
    batch: int,
    micro: int,
    steps: int,
) -> Pair:
    """Ours, then theirs, from samples in words."""
    used = sorted({client for cohort in cohorts for client in cohort})
    mllm.features = FeatureCache()  # no image was seen yet
    here, start_here = timed(lambda: {c: [mllm.encode(p) for p in made[c]] for c in used})
    there, start_there = timed(lambda: {c: tensors(mllm, made[c]) for c in used})
    held = {c: here.get(c, []) for c in made}
    rows = {c: there.get(c, []) for c in made}
    ours, seconds = timed(lambda: rounds_here(mllm, held, cohorts, batch=batch))
    theirs, slower = timed(lambda: rounds_there(mllm, rows, cohorts, micro=micro, steps=steps))
    return Pair(
        {"ours": seconds, "trainer": slower},
        {"ours": start_here, "trainer": start_there},
        {"ours": ours, "trainer": theirs},
    )


def measure(
    mllm: Mllm, made: dict[str, list[Prompted]], *, sampled: int, rounds: int, repeats: int
) -> list[dict[str, Any]]:
    """Both batches of one size of cohort."""
    cohorts = [cohort_of(list(made), sampled, seed=SEED, round_=r + 1) for r in range(rounds)]
    count = sum(len(made[client]) for cohort in cohorts for client in cohort)
    cases = []
    for batch, micro, steps, goal in ((4, 1, 4, 10.0), (8, 8, 1, 3.0)):
        tries = [
            pair(mllm, made, cohorts, batch=batch, micro=micro, steps=steps) for _ in range(repeats)
        ]
        cases.append(
            compare(
                f"{sampled} of 10 clients, theirs {micro} × {steps}",
                [one.rounds for one in tries],
                count=count,
                unit="samples",
                goals={"trainer": goal},
                start_seconds={
                    way: [one.start[way].wall for one in tries] for way in tries[0].start
                },
                losses=tries[0].losses,
                rounds=rounds,
            )
        )
        tell(cases[-1])
    return cases


def main(quick: bool) -> None:
    """All cases."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    made = prompts(config())
    agreed = check(made, clients=2 if quick else 4)
    mllm = load_model(config())
    cases = []
    for sampled, rounds in ((2, 1 if quick else 4), (10, 1)):
        if not (quick and sampled == 10):
            repeats = 1 if quick else 3
            cases += measure(mllm, made, sampled=sampled, rounds=rounds, repeats=repeats)
    for case in cases:
        case["check"] = agreed
    write("training", cases, what=__doc__ or "", quick=quick)
