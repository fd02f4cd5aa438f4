"""Time of a run from a run that was measured: seconds a sample, trained and tested apart.

A measurement counts only if it was made with the same model, dtype, LoRA rank and data set, with
masked views or without as here, on the same processor, accelerator and number of threads. Nothing
else is scaled, and nothing is guessed when there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm.config import CONDITION_NAMES, Config, make_config
from fedmllm.errors import UserError
from fedmllm.evidence import MODALITIES, MOST
from fedmllm.federation import cohort_of
from fedmllm.partition import held_out_count
from fedmllm.report import load_results
from fedmllm.results import hardware

RUNS = Path("runs")


@dataclass(frozen=True)
class Duration:
    """Seconds, and where they come from: the measured run and its seconds a sample."""

    train_seconds: float
    test_seconds: float
    seconds_per_trained_sample: float
    measured_in: str


def trained_samples(config: Config, sizes: Mapping[str, int]) -> int:
    """Samples that all clients of all rounds pass through the model. sizes: samples by client,
    with those held out."""
    training, share = config.training, config.evaluation.held_out
    if config.topology == "zero-shot":
        return 0
    sizes = {client: size - held_out_count(size, share) for client, size in sizes.items()}
    if config.topology != "federated":
        return sum(sizes.values()) * training.rounds * training.local_epochs
    cohorts = (
        cohort_of(list(sizes), training.clients_per_round, seed=config.seed, round_=round_ + 1)
        for round_ in range(training.rounds)
    )
    return training.local_epochs * sum(sizes[client] for cohort in cohorts for client in cohort)


def tested_samples(config: Config, test: int, clients: int) -> int:
    """Readings of test samples that a run answers, on the way and at its end. test: size of the
    test set. Late fusion reads a whole sample's parts too."""
    evaluation, rounds = config.evaluation, config.training.rounds
    whole = 3 if config.strategy.fusion else 1
    final = (len(evaluation.conditions) + (whole - 1) * ("both" in evaluation.conditions)) * test
    if config.topology == "local":
        return final * clients
    due = (rounds - 1) // evaluation.every if evaluation.every and rounds else 0
    due = 0 if config.topology == "zero-shot" else due
    return final + due * whole * min(evaluation.limit or test, test)


def read_besides(config: Config, sizes: Mapping[str, int], test: int) -> int:
    """Readings of samples of which a result's times say nothing, about: those that parties hold
    out, whole and masked test samples for `evaluation.drift`, and for `strategy.evidence` each
    party's through either modality."""
    evaluation = config.evaluation
    found = sum(held_out_count(size, evaluation.held_out) for size in sizes.values())
    if evaluation.drift and config.topology != "local":
        found += len(CONDITION_NAMES) * min(evaluation.limit or test, test)
    if config.strategy.evidence:
        found += len(MODALITIES) * sum(min(size, MOST) for size in sizes.values())
    return found


def estimate_time(
    config: Config, sizes: Mapping[str, int], test: int, measured: str | Path | None = None
) -> Duration | None:
    """The run's time from the newest fitting result, or None if there is none.

    sizes: training samples by client. test: number of test samples. measured: a result, a run
    folder or a parent of such (by default ``runs``, if there are any).
    Raises `UserError` if `measured` is given and holds no result.
    """
    try:
        found, _ = load_results([measured if measured is not None else RUNS])
    except UserError:
        if measured is not None:
            raise
        return None
    rates = fitting_rates(found, config)
    return None if rates is None else rates.duration(config, sizes, test)


@dataclass(frozen=True)
class Rates:
    """Seconds a trained and a tested sample, and the result that they were measured in."""

    train: float
    test: float
    measured_in: str

    def duration(self, config: Config, sizes: Mapping[str, int], test: int) -> Duration:
        """The time of a run over clients of these sizes and a test set of that size."""
        tested = tested_samples(config, test, len(sizes)) + read_besides(config, sizes, test)
        return Duration(
            train_seconds=self.train * trained_samples(config, sizes),
            test_seconds=self.test * tested,
            seconds_per_trained_sample=self.train,
            measured_in=self.measured_in,
        )


def fitting_rates(found: Sequence[Mapping[str, Any]], config: Config) -> Rates | None:
    """The rates of the newest result that was made as the config would be, on such a machine."""
    for result in sorted(found, key=lambda one: str(one.get("started")), reverse=True):
        rates = _rates(config, result)
        if rates is not None:
            return Rates(*rates, measured_in=str(result["_path"]))
    return None


def _rates(config: Config, result: Mapping[str, Any]) -> tuple[float, float] | None:
    """Seconds a trained and a tested sample of a result, or None if it is of something else."""
    try:
        other = make_config({k: v for k, v in result["config"].items() if k != "config_sha256"})
        same = (
            other.model == config.model
            and other.lora.rank == config.lora.rank
            and other.data["name"] == config.data["name"]
            and other.strategy.uses_views == config.strategy.uses_views
            and _machine(result["hardware"]) == _machine(hardware(config.threads, _device(config)))
        )
        if not same or other.topology == "zero-shot":
            return None
        sizes = {client["id"]: client["samples"] for client in result["manifest"]["clients"]}
        test = int(next(iter(result["metrics"].values()))["n"])
        spent = result["time"]
        trained = trained_samples(other, sizes)
        tested = tested_samples(other, test, len(sizes))
        return spent["train_seconds"] / trained, spent["evaluate_seconds"] / tested
    except (UserError, KeyError, TypeError, ValueError, StopIteration, ZeroDivisionError):
        return None


def _machine(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(facts.get(key) for key in ("cpu", "gpu", "threads", "processes"))


def _device(config: Config) -> str:
    import torch

    return config.model.device if torch.cuda.is_available() else "cpu"
