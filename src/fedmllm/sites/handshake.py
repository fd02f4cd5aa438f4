"""What server and site agree on before any training, and how they say that they do not.

Both sides state the same facts of themselves and compare: the server sends its own with the first
task, the site answers with its own and with what it finds wrong, and the server judges as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fedmllm.data.sample import Task
from fedmllm.errors import UserError
from fedmllm.sites.digests import layout_digest
from fedmllm.sites.wire import PROTOCOL


class RefusedError(UserError):
    """A refusal in words that may be told to the other side: it names no file and no sample."""


# fact -> what it is called in a message and what to do about it
_SAME = {
    "config_sha256": ("experiment", "put the same experiment file into both folders"),
    "base_sha256": ("base model", "use the same weights"),
    "tokenizer_sha256": ("tokenizer", "use the tokenizer files that came with the weights"),
    "manifest_sha256": (
        "manifest",
        "compare the splits: `fedmllm data split --verify`",
    ),
}


def differences(server: Mapping[str, Any], site: Mapping[str, Any]) -> list[str]:
    """Why server and site cannot train together, a sentence each; empty if they can.

    A manifest is compared where both have one. The site's ``samples`` may be None where it does
    not reveal them.
    """
    if server.get("protocol") != site.get("protocol"):
        return [
            f"protocol: the server speaks {server.get('protocol')!r} (fedmllm "
            f"{server.get('version')}), the site {site.get('protocol')!r} (fedmllm "
            f"{site.get('version')}): install the same version"
        ]
    found = []
    for fact, (what, remedy) in _SAME.items():
        ours, theirs = server.get(fact), site.get(fact)
        if fact == "manifest_sha256" and None in (ours, theirs):
            continue
        if ours != theirs:
            found.append(
                f"{what}: the server has {_short(ours)}, the site {_short(theirs)}: {remedy}"
            )
    found += layout_problem(server.get("layout"), site.get("layout"))
    samples = site.get("samples")
    if samples is not None and (type(samples) is not int or samples < 1):
        found.append(f"samples: the site has {samples}: at least 1 is needed to train")
    return found


def malformed(site: Mapping[str, Any]) -> list[str]:
    """What a site states of itself in a form that it cannot have, a sentence each."""
    found = []
    problems, reveal = site.get("problems", []), site.get("reveal")
    if not isinstance(problems, list):
        found.append(f"problems: {problems!r} is no list")
    if not isinstance(reveal, Mapping) or any(
        type(reveal.get(what)) is not bool for what in ("samples", "metrics")
    ):
        found.append(f"reveal: {reveal!r} does not say yes or no of samples and of metrics")
    if type(site.get("held_out")) is not bool:
        found.append("held_out: the site does not say whether it has held any samples out")
    if not isinstance(site.get("manifest_sha256", 0), str | None):
        found.append("manifest: the site states no hash of it, nor that it has none")
    if "samples" not in site:
        found.append("samples: the site does not say how many it has, nor that it hides that")
    return found + _task_problem(site.get("task"))


def _task_problem(task: Any) -> list[str]:
    if not isinstance(task, Mapping):
        return ["task: the site states none"]
    texts = {item.name for item in fields(Task)} - {"classes"}
    classes = task.get("classes")
    if task.keys() != {*texts, "classes"} or not all(isinstance(task[t], str) for t in texts):
        return [f"task: {sorted(task)} are not the texts and classes of one"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return [f"task: classes are {classes!r}, not a list of names"]
    return []


def layout_problem(ours: Any, theirs: Any) -> list[str]:
    """How two adapters differ, in a sentence, or nothing."""
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return ["adapter: no layout was given"]
    if layout_digest(dict(ours)) == layout_digest(dict(theirs)):
        return []
    names = sorted(ours.keys() ^ theirs.keys())
    if names:
        what = f"{len(names)} tensors are with one of the two only, e.g. {names[0]}"
    else:
        name = next(n for n in sorted(ours) if str(ours[n]) != str(theirs[n]))
        what = f"{name} is {ours[name]} at the server, {theirs[name]} at the site"
    return [f"adapter: {what}: use the same lora and trained sections"]


def common(version: str) -> dict[str, Any]:
    """The facts that are the same for every party of this version."""
    return {"protocol": PROTOCOL, "version": version}


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
