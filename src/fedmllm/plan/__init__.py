"""What an experiment will cost, before any weights are read.

    plan = make_plan(load_config("experiments/memes-fedavg.yaml"), memory=24 * 10**9)
    plan.to_json()

Exact: parameters, adapter and bytes, which are those of a run's result. Estimated: peak memory
(`plan.memory`, docs/memory.md). Measured or absent: time (`plan.timing`). The model's folder
needs no more than its config.json; its image processor's settings say how images are cut.
"""

from __future__ import annotations

from fedmllm.plan.build import Plan, make_plan, parse_size

__all__ = ["Plan", "make_plan", "parse_size"]
