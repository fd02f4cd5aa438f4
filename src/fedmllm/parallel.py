"""Several runs on several processes: one thread each, one base per process, a dead process
costs its run only.

A worker keeps what its runs have in common (`experiment.Shared`) as long as the base stays the
same; the next run of an idle worker is one that shares its base and then its data, if there is
one, and of those the longest, so that all end together.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fedmllm.config import Config
from fedmllm.errors import UserError
from fedmllm.experiment import Listener, Shared
from fedmllm.processes import Child


@dataclass(frozen=True)
class Job:
    """A run to be made. resume: go on with what lies in the folder, which is else replaced.
    work: how long it takes, in any unit; the longest is started first."""

    config: Config
    folder: Path
    resume: bool = False
    work: float = 0.0

    @property
    def base(self) -> str:
        """Jobs of one base can share a loaded model."""
        return repr((self.config.model, self.config.lora, self.config.trained))

    @property
    def data(self) -> str:
        """Jobs of one data set can share its samples."""
        return Shared.data_key(self.config)


@dataclass(frozen=True)
class Failure:
    """Why a job has no result. detail: the traceback, empty for a user's mistake."""

    reason: str
    detail: str = ""
    user: bool = False


def run_many(
    configs: Sequence[Config], out: Path, *, processes: int, listener: Listener
) -> dict[str, dict[str, Any]]:
    """Run experiments on `processes` processes; results by name.

    Each run's folder is out/NAME and is replaced. The first failure is raised and ends the others.
    """
    jobs = [Job(c, out / c.name, work=-i) for i, c in enumerate(configs)]  # in their order
    found: dict[str, dict[str, Any]] = {}
    for job, outcome in run_jobs(jobs, processes=processes, listener=listener):
        if isinstance(outcome, Failure):
            if outcome.user:
                raise UserError(outcome.reason)
            raise RuntimeError(f"{job.config.name}: {outcome.reason}\n{outcome.detail}")
        found[job.config.name] = outcome
    return found


def default_processes(devices: Sequence[str] = (), *, accelerated: bool = False) -> int:
    """How many runs at a time where nobody says: one a device; without devices one a core that
    this process may use (its affinity), but one alone where runs would share an accelerator."""
    if devices:
        return len(devices)
    if accelerated:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def rough_work(config: Config) -> float:
    """A guess at how long a run takes, where nothing was measured: passes over the training set,
    and one for each test of an adapter."""
    training, clients = config.training, config.partition.clients
    if config.topology == "zero-shot":
        return 1.0
    if config.topology == "local":
        return training.rounds * training.local_epochs + clients
    share = training.clients_per_round / clients if config.topology == "federated" else 1.0
    return training.rounds * training.local_epochs * min(share, 1.0) + 1.0


def run_jobs(
    jobs: Sequence[Job],
    *,
    processes: int,
    listener: Listener | None = None,
    devices: Sequence[str] = (),
) -> Iterator[tuple[Job, dict[str, Any] | Failure]]:
    """Run every job and yield each with its result, or why it has none, as it ends.

    devices: accelerators by CUDA's numbers, one to each process in turn. listener: called in this
    process with the runs' events. Closing the iterator ends the workers.
    """
    waiting = list(jobs)
    workers: list[_Worker] = []
    try:
        for i in range(min(processes, len(waiting))):
            workers.append(_Worker(devices[i % len(devices)] if devices else None))
            workers[-1].give(_next(waiting, workers[-1]))
        while any(worker.job for worker in workers):
            busy = {worker.pipe: worker for worker in workers if worker.job}
            for pipe in wait(list(busy)):
                yield from _hear(busy[pipe], waiting, listener)  # type: ignore[index]
    finally:
        for worker in workers:
            worker.end(at_work=worker.job is not None)


def _hear(
    worker: _Worker, waiting: list[Job], listener: Listener | None
) -> Iterator[tuple[Job, dict[str, Any] | Failure]]:
    """One message of a worker, or its end; an idle worker gets its next job."""
    job = worker.job
    assert job is not None
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, OSError):
        kind, value = "ended", Failure(worker.epitaph())
        worker.start()
    if kind == "event":
        if listener is not None:
            listener(value)
        return
    worker.job = None
    if waiting:
        worker.give(_next(waiting, worker))
    yield job, value


def _next(waiting: list[Job], worker: _Worker) -> Job:
    """Take the job that fits what the worker has loaded best, and of those the longest."""
    groups: dict[tuple[str, str], float] = {}
    for job in waiting:
        groups[job.base, job.data] = groups.get((job.base, job.data), 0.0) + job.work
    best = max(
        waiting,
        key=lambda job: (
            job.base == worker.base,
            job.base == worker.base and job.data == worker.data,
            groups[job.base, job.data],
            job.work,
        ),
    )
    waiting.remove(best)
    return best


class _Worker(Child):
    """A process that runs one job after another. base, data: what it has loaded."""

    def __init__(self, device: str | None) -> None:
        self.job: Job | None = None
        super().__init__(_work, device=device)

    def start(self) -> None:
        """Begin, or begin again after the process has died."""
        self.base = self.data = ""
        super().start()

    def give(self, job: Job) -> None:
        """Have it run a job."""
        self.job, self.base, self.data = job, job.base, job.data
        with contextlib.suppress(OSError):  # it has died: reading its pipe says so
            self.pipe.send(job)


# -- in the worker -----------------------------------------------------------------------------


def _work(pipe: Connection) -> None:
    """Run what comes until the pipe closes."""
    loaded: dict[str, Shared] = {}
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            outcome: Any = _run_one(job, loaded, pipe)
        except UserError as error:
            outcome = Failure(str(error), user=True)
        except Exception as error:
            loaded.clear()  # an adapter may be half set, or memory full
            outcome = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        pipe.send(("ended", outcome))


def _run_one(job: Job, loaded: dict[str, Shared], pipe: Connection) -> dict[str, Any]:
    from fedmllm.experiment import load_model, run

    def tell(event: Mapping[str, Any]) -> None:
        pipe.send(("event", dict(event)))

    if job.base not in loaded:
        loaded.clear()  # two bases may not fit into memory
        loaded[job.base] = Shared(load_model(job.config))
    return run(
        job.config,
        out=job.folder,
        resume=job.resume,
        overwrite=not job.resume,
        listener=tell,
        shared=loaded[job.base],
    )
