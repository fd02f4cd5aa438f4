"""What `fedmllm ls` prints: the names a config can use, one line each."""

from __future__ import annotations

from fedmllm.algorithms import ALGORITHMS
from fedmllm.algorithms.aggregation import AGGREGATIONS
from fedmllm.data import DATASETS
from fedmllm.models import MODELS
from fedmllm.models.components import POLICIES
from fedmllm.scenarios import SCENARIOS, SETTINGS

TOPOLOGIES = {
    "federated": "the clients train one adapter together",
    "centralised": "one party holds all samples: the upper anchor",
    "local": "each client trains alone: mean and spread over clients",
    "zero-shot": "the base model, untouched",
}
PROMPTS = {
    "plain": "the prompt names the modalities that the sample has",
    "agnostic": "the paper's prompt strategy: every sample reads the same whatever it holds",
}

STRATEGIES = {
    "mu": "adaptive regularisation: a proximal term on the middle layers, weighed by party",
    "aggregation": "less weight for the updates of parties whose modalities diverge",
    "sampling": "the same of their chance to be drawn for a round",
    "prototypes": "representations are pulled to the class means of all parties",
    "distillation": "a masked view of a whole sample is pulled to the whole",
    "views": "the masked view's own answer is learnt",
    "incomplete": "factor on the loss of samples that lack a modality",
    "recombine": "such samples are completed by others of their party and answer",
    "fusion": "a whole test sample's answer from its parts as well, by who held what",
    "mixtures": "parties without images complete their texts with means of others' image features",
    "evidence": "only what tells the class by itself is filled in, by a test of all parties",
    "resample": "whole samples of the party take the place of such samples",
}


def sections() -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, [(name, one line)]) for each registry."""
    settings = ", ".join(SETTINGS)
    return [
        ("datasets  data.name", [(n, s.summary) for n, s in DATASETS.items()]),
        ("models  model.name", [(n, s.summary) for n, s in MODELS.items()]),
        ("scenarios  scenario.name", [(n, s.summary) for n, s in SCENARIOS.items()]),
        ("settings  setting", [("the paper's twelve", settings)]),
        ("algorithms  algorithm.name", [(n, s.summary) for n, s in ALGORITHMS.items()]),
        ("aggregations  aggregation.name", [(n, s.summary) for n, s in AGGREGATIONS.items()]),
        ("trained  trained.name", [(n, s.summary) for n, s in POLICIES.items()]),
        ("topologies  topology", list(TOPOLOGIES.items())),
        ("strategies  prompt", list(PROMPTS.items())),
        ("strategies  strategy.KEY", list(STRATEGIES.items())),
    ]
