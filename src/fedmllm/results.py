"""What a run writes and what its result file states about where it was made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedmllm import manifest
from fedmllm.evaluation import mean_over

SCHEMA = 1
PACKAGES = ("fedmllm", "torch", "transformers", "peft", "safetensors", "numpy", "scikit-learn")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half a file. A number that is not one is null."""
    draft = path.with_suffix(path.suffix + ".draft")
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    draft.write_text(text + "\n", encoding="utf-8")
    os.replace(draft, path)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> str:
    """Write JSON lines, whole or not at all; the file's SHA-256."""
    draft = path.with_suffix(path.suffix + ".draft")
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    draft.write_bytes(content)
    os.replace(draft, path)
    return hashlib.sha256(content).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(threads: int, device: str) -> dict[str, Any]:
    """Processor, cores, threads used, accelerator."""
    gpu = None
    if device.startswith("cuda"):
        import torch

        gpu = torch.cuda.get_device_name(torch.device(device))
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """The commit of the source tree, with "+" when it has uncommitted changes; None elsewhere."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", __file__)  # not a repository around a venv
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        dirty = _git(here, "status", "--porcelain", "--untracked-files=no", "--", str(here))
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if dirty else "")


def reset_peak_memory(device: str = "cpu") -> None:
    """Begin new peaks, so that a run does not report those of one before it: of this process (Linux
    only), and of the accelerator if the device is one."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_initialized():  # else nothing was allocated yet, and resetting would fail
            torch.cuda.reset_peak_memory_stats(torch.device(device))


def peak_memory_bytes() -> int:
    """Peak resident memory of this process since `reset_peak_memory` (elsewhere: so far)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_accelerator_bytes(device: str) -> int | None:
    """The most that tensors took of the accelerator since `reset_peak_memory`, without what
    PyTorch's allocator holds beyond them; None for a device that is not CUDA."""
    if not device.startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(torch.device(device)))


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(record), allow_nan=False) + "\n")


def mean_metrics(found: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Metrics of the only federation, or their mean over the clients of a local run.

    A mean over clients has no standard error of one test set; its spread stands beside it.
    """
    if len(found) == 1:
        return found[0]
    return {
        condition: {
            name: spread["mean"]
            for name, spread in mean_over([metrics[condition] for metrics in found]).items()
            if not name.endswith("_se")
        }
        for condition in found[0]
    }


def mean_history(histories: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rounds of the only federation, or the mean over clients of a local run."""
    if len(histories) == 1:
        return histories[0]
    merged = []
    for lines in zip(*histories, strict=True):
        mean = {key: sum(line[key] for line in lines) / len(lines) for key in ("loss", "seconds")}
        merged.append({**lines[0], **mean, "clients": [c for x in lines for c in x["clients"]]})
        stated = {name for line in lines for name in line.get("measured", {})}
        if stated:
            merged[-1]["measured"] = {name: _mean_stated(lines, name) for name in sorted(stated)}
        if lines[0]["metrics"]:
            merged[-1]["metrics"] = mean_metrics([line["metrics"] for line in lines])
    return merged


def _mean_stated(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean over the clients that state it."""
    found = [line["measured"][name] for line in lines if name in line.get("measured", {})]
    return float(sum(found) / len(found))


def holdings(held: manifest.Manifest) -> dict[str, Any]:
    """Who holds what, in numbers: per client the samples by modality, by label, and by both
    (`kept`)."""
    clients = []
    for summary in manifest.holdings(held):
        totals = {
            combination: sum(by.get(combination, 0) for by in summary.counts.values())
            for combination in manifest.COMBINATIONS
        }
        clients.append(
            {
                "id": summary.id,
                "samples": summary.samples,
                "image_text": totals["image+text"],
                "image": totals["image"],
                "text": totals["text"],
                "neither": totals["neither"],
                "labels": {label: sum(by.values()) for label, by in summary.counts.items()},
                "kept": {
                    label: {key: count for key, count in by.items() if count}
                    for label, by in summary.counts.items()
                },
            }
        )
    return {"sha256": held.sha256, "clients": clients, "notes": list(held.notes)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=where, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
