"""Several runs on several processes, one thread each, one base per process."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fedmllm.config import Config
from fedmllm.experiment import Listener

_EVENTS: Any = None  # the queue to the parent; set once in each worker
_MODELS: dict[str, Any] = {}  # a worker loads a base once


def run_many(
    configs: Sequence[Config], out: Path, *, processes: int, listener: Listener
) -> dict[str, dict[str, Any]]:
    """Run experiments in order of the list on `processes` processes; results by name.

    Each run's folder is out/NAME and is replaced. After the first failure those that run end,
    no other starts, and the failure is raised.
    """
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, dict[str, Any]] = {}
    pump = _Pump(events, listener)
    try:
        with ProcessPoolExecutor(
            max_workers=min(processes, len(configs)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(events,),
        ) as pool:
            names: dict[Future[dict[str, Any]], str] = {
                pool.submit(_run_one, config, out / config.name): config.name for config in configs
            }
            try:
                for future in as_completed(names):
                    results[names[future]] = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        pump.stop()  # the workers have ended: all their events are there
    return results


class _Pump:
    """A thread that hands the workers' events to the listener."""

    def __init__(self, events: Any, listener: Listener) -> None:
        self._events, self._listener = events, listener
        self._stopped = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Hand on what is left; raises what the listener raised."""
        self._stopped.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _loop(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=0.1)
            except queue.Empty:
                if self._stopped.is_set():
                    return
                continue
            try:
                self._listener(event)
            except Exception as error:
                self._error = self._error or error


def _start_worker(events: Any) -> None:
    global _EVENTS
    _EVENTS = events
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent() -> None:
    """A worker whose parent was killed has nobody to work for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_one(config: Config, folder: Path) -> dict[str, Any]:
    from fedmllm.experiment import load_model, run

    key = repr((config.model, config.lora, config.trained))
    if key not in _MODELS:
        _MODELS[key] = load_model(config)
    return run(config, out=folder, overwrite=True, listener=_tell, mllm=_MODELS[key])


def _tell(event: Mapping[str, Any]) -> None:
    _EVENTS.put(dict(event))
