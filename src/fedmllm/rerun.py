"""A run made again from its result file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmllm.config import make_config
from fedmllm.experiment import Listener, run


def run_again(
    result: dict[str, Any],
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Run the config of a result in the folder `out`, which must not exist unless `resume` or
    `overwrite` (see `experiment.run`); the new result.

    Raises `UserError` if this version cannot read the config, or the run fails on bad input.
    """
    config = make_config(
        result["config"], source=f"the config of {result.get('_path', 'a result')}"
    )
    return run(config, out=out, resume=resume, overwrite=overwrite, listener=listener)
