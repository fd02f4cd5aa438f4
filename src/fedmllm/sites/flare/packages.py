"""The list of packages that a machine needs, in the versions of this one, for `pip download`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def installed_closure(*names: str) -> dict[str, str]:
    """Packages, what they require and what that requires: versions by name, as installed here.

    What is not installed here is left out; a local label such as ``+cpu`` is dropped, since each
    machine takes the build for its own processor.
    """
    found: dict[str, str] = {}
    waiting = [(canonicalize_name(name), frozenset[str]()) for name in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        try:
            package = distribution(current[0])
        except PackageNotFoundError:
            continue
        found[current[0]] = package.version.split("+")[0]
        for line in package.requires or ():
            needed = Requirement(line)
            asked = [{"extra": extra} for extra in ("", *current[1])]
            if needed.marker is None or any(needed.marker.evaluate(each) for each in asked):
                waiting.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return dict(sorted(found.items()))


def requirements() -> str:
    """requirements.txt of a machine of a federation."""
    found = installed_closure("fedmllm", "nvflare")
    lines = [
        "# What a machine of this federation needs, in the versions of the machine of the kits.",
        *(f"{name}=={version}" for name, version in found.items()),
    ]
    return "\n".join(lines) + "\n"
