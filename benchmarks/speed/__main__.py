"""What is faster than what, and by how much: `make bench-speed`.

    python benchmarks/speed                       # every row, written to results/speed/ROW.json
    python benchmarks/speed training server       # some
    python benchmarks/speed training --quick      # a look: small, written to runs/speed-quick

Each row runs in processes of its own, with one thread unless it says otherwise. Alternatives are
written here, as fast as they can be in their manner. Only numbers from a quiet machine are to be
committed. docs/performance.md is made from the files. Rows that need Flower look for its
interpreter in FLOWER_PYTHON (see `make bench-speed`) and are left out without it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(_name, _value)

ROWS = (
    "startup",
    "server",
    "training",
    "evaluation",
    "clients",
    "arithmetic",
    "flower_run",
    "nvflare_run",
    "grid",
)


def main() -> None:
    """Rows in processes of their own, or one row here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small, not for results/")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args()
    if given.here:  # one row, or a part of it with words of its own
        importlib.import_module(given.rows[0]).main(given.quick, *given.rows[1:], *rest)
        return
    if rest or set(given.rows) - set(ROWS):
        parser.error(f"choose from {', '.join(ROWS)}")
    failed = []
    for row in given.rows or ROWS:
        command = [sys.executable, str(Path(__file__).parent), row, "--here"]
        if subprocess.run([*command, *(["--quick"] if given.quick else [])]).returncode:
            failed.append(row)
    if failed:
        raise SystemExit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
