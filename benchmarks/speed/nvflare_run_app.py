"""NVFlare's half of row `nvflare_run`: ROUNDS. All ten clients keep a process of their own, since
one that is swapped out would load the model again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import flower_run as job
import nvflare_job
from nvflare.collab import CollabRecipe
from nvflare.recipe.sim_env import SimEnv


def main(rounds: int) -> None:
    """The simulation; its facts on the last line."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        recipe = CollabRecipe(
            "engine",
            server=nvflare_job.Server(rounds, str(out)),
            client=nvflare_job.Client(),
            min_clients=job.CLIENTS,
            sync_task_timeout=600,
        )
        recipe.run(SimEnv(num_clients=job.CLIENTS, workspace_root=str(Path(folder) / "work")))
        facts = json.loads(out.read_text())
    print(json.dumps({**facts, "nvflare": version("nvflare")}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
