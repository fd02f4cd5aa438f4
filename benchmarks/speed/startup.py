"""Row `startup`: seconds from the command to what it is there for.

`fedmllm --help` to its end, and `fedmllm run` on the embedded model to the first optimiser step,
each in a new process, files in the page cache. PEFT imports bitsandbytes where that is installed
(the extra `4bit`), so a run is measured with it and without. No alternative: goals are in seconds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, write

HELP = "import sys; sys.argv = ['fedmllm', '--help']; from fedmllm.cli import main; main()"
FIRST_STEP = """
import os, sys, time
from fedmllm.cli import main
import threading
def watch():  # torch is imported by the command itself, not by us before it
    while "torch.optim.optimizer" not in sys.modules:
        time.sleep(0.02)
    while True:
        hook = getattr(sys.modules["torch.optim.optimizer"],
                       "register_optimizer_step_pre_hook", None)
        if hook:
            break
        time.sleep(0.02)
    def stop(*_):
        print(time.time(), flush=True)
        os._exit(0)
    hook(stop)
threading.Thread(target=watch, daemon=True).start()
sys.argv = ["fedmllm", *sys.argv[1:]]
main()
raise SystemExit("error: the run ended without an optimiser step")
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A new process with this package."""
    known = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=known)
    if done.returncode:
        raise SystemExit(f"error: {command[:3]} failed\n{done.stderr[-4000:]}")
    return done


def help_seconds() -> float:
    """`fedmllm --help`."""
    began = time.perf_counter()
    run(sys.executable, "-c", HELP)
    return time.perf_counter() - began


# as if it were not installed, for `find_spec` and `import`
WITHOUT = "import sys; sys.modules['bitsandbytes'] = None\n"


def step_seconds(before: str = "") -> float:
    """`fedmllm run` to its first step, after the code `before`."""
    experiment = str(ROOT / "experiments" / "memes-fedavg.yaml")
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        out = str(Path(folder) / "run")
        done = run(sys.executable, "-c", before + FIRST_STEP, "run", experiment, "--out", out)
    return float(done.stdout.strip().splitlines()[-1]) - began


def main(quick: bool) -> None:
    """Both, after one start for nothing."""
    cases: list[dict[str, Any]] = []
    for name, measure, goal in (
        ("`fedmllm --help`", help_seconds, 0.3),
        ("`fedmllm run` to its first step", partial(step_seconds, WITHOUT), 5.0),
        ("the same with the extra `4bit` installed", step_seconds, 5.0),
    ):
        measure()
        found = [measure() for _ in range(1 if quick else 7)]
        cases.append(
            {"case": name, "goal": goal, "seconds": found, "median": statistics.median(found)}
        )
        print(f"{name}: {cases[-1]['median']:.2f} s, goal {goal} s", flush=True)
    write("startup", cases, what=__doc__ or "", quick=quick)
