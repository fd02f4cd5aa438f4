"""FedMLLM: federated fine-tuning of multimodal LLMs when parties hold different modalities.

    import fedmllm
    result = fedmllm.run(fedmllm.load_config("experiments/memes-missing.yaml"), out="runs/mine")

Names are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedmllm.imports import collector_at_rest

__version__ = "0.1.0"

_WHERE = {
    "run": "experiment",
    "load_config": "config",
    "make_config": "config",
    "Config": "config",
    "make_plan": "plan",
    "load_dataset": "data",
    "Sample": "data.sample",
    "Task": "data.sample",
    "Mllm": "models.mllm",
    "UserError": "errors",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fedmllm' has no attribute {name!r}")
    with collector_at_rest():
        return getattr(import_module(f"fedmllm.{_WHERE[name]}"), name)
