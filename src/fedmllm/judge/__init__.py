"""Accuracy of open answers as a language model judges it, over any OpenAI-compatible endpoint.

    fedmllm judge runs/medical --model NAME

Reads the answers that a run keeps (`answers.jsonl`), asks the endpoint that the environment names,
keeps every reply (`verdicts.jsonl`) and writes `judged.json` beside the result. Loads no model.
"""

from fedmllm.judge.endpoint import Endpoint, Judge, Reply, endpoint_from
from fedmllm.judge.marks import Scheme
from fedmllm.judge.run import (
    Work,
    ask_all,
    estimate_lines,
    make_work,
    parse_fields,
    write_all,
)

__all__ = [
    "Endpoint",
    "Judge",
    "Reply",
    "Scheme",
    "Work",
    "ask_all",
    "endpoint_from",
    "estimate_lines",
    "make_work",
    "parse_fields",
    "write_all",
]
