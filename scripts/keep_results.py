"""Copy the result files of finished runs into results/, where they are committed, and what a
benchmark says of runs that stand in other places too.

python scripts/keep_results.py runs/demo results/demo
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from fedmllm.report.shared import read_shared, write_shared


def keep(run: Path, target: Path) -> Path:
    """Copy one run's result.json, and judged.json if there is one, to target/NAME."""
    folder = target / run.name
    folder.mkdir(parents=True, exist_ok=True)
    if (run / "judged.json").exists():
        shutil.copy(run / "judged.json", folder)
    return Path(shutil.copy(run / "result.json", folder / "result.json"))


def main(source: Path, target: Path) -> None:
    """Copy every run below `source`."""
    for file in sorted(source.glob("**/result.json")):
        print(keep(file.parent, target))
    entries, fault = read_shared(source)
    if fault:
        raise SystemExit(fault)
    kept = {name: entry for name, entry in entries.items() if (target / name).is_dir()}
    write_shared(target, kept, list(kept))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
