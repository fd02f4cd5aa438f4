"""The list of packages that a machine needs, in the versions of this one, for `pip download`.

fedmllm itself is not in it: no index has it, so it comes as a wheel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedmllm.config import Config

OURS = "fedmllm"
_DATA = {"hf-datasets": "datasets", "easy-vqa": "easy-vqa"}  # data set -> our extra


def extras_of(config: Config) -> tuple[str, ...]:
    """Our extras that an experiment over NVFlare needs."""
    needed = {"nvflare", _DATA.get(config.data["name"], "")}
    needed |= {"4bit"} if config.model.quantization == "nf4" else set()
    return tuple(sorted(needed - {""}))


def installed_closure(name: str, extras: Sequence[str] = ()) -> dict[str, str]:
    """What a package and some of its extras require, and what that requires: pip's lines by name,
    without the package itself.

    Versions are those installed here; a local label such as ``+cpu`` is dropped, since each machine
    takes the build for its own processor. What is not installed here stands as it was asked for.
    """
    found: dict[str, str] = {}
    waiting = [(Requirement(name), frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        asked, wanted = waiting.pop()
        current = canonicalize_name(asked.name)
        if (current, wanted) in seen:
            continue
        seen.add((current, wanted))
        try:
            package = distribution(current)
        except PackageNotFoundError:
            found.setdefault(current, f"{current}{asked.specifier}")
            continue
        found[current] = f"{current}=={package.version.split('+')[0]}"
        for line in package.requires or ():
            needed = Requirement(line)
            under = [{"extra": extra} for extra in ("", *wanted)]
            if needed.marker is None or any(needed.marker.evaluate(each) for each in under):
                waiting.append((needed, frozenset(needed.extras)))
    found.pop(canonicalize_name(name), None)
    return dict(sorted(found.items()))


def requirements(config: Config) -> str:
    """requirements.txt of a machine of a federation."""
    lines = [
        "# What a machine of this federation needs beside fedmllm's own wheel, in the versions of",
        "# the machine of the kits. README.md says how it is installed.",
        *installed_closure(OURS, extras_of(config)).values(),
    ]
    return "\n".join(lines) + "\n"


def wheel() -> str:
    """The name of our own wheel, in the version of this machine."""
    return f"{OURS}-{version(OURS)}-py3-none-any.whl"
