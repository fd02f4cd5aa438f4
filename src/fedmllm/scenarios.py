"""The four modality scenarios: which client keeps which modality of which sample.

Xu et al., "FedMLLM", arXiv 2411.14717. Every draw derives from (seed, what it is for, client or
sample id). The draws are thresholds on one number each, so settings are nested: with one seed,
a text lost at beta 0.3 is lost at beta 0.5 too, and the image clients of 3:7 are among those of
5:5. Two settings then differ by the setting and not by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fedmllm.errors import UserError, chosen
from fedmllm.rng import uniform

Keep = tuple[bool, bool]
"""(keeps the image, keeps the text)"""
BOTH, IMAGE_ONLY, TEXT_ONLY, NEITHER = (True, True), (True, False), (False, True), (False, False)


@dataclass(frozen=True)
class Assignment:
    """What a scenario decides.

    clients: client -> what the client as such holds; `NEITHER` in hybrid means that it keeps one
        modality per sample. keep: (client, sample id) -> what it keeps of that sample.
    notes: what a reader of the manifest should know.
    """

    clients: Mapping[str, Keep]
    keep: Callable[[str, str], Keep]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScenarioSpec:
    """A registry entry.

    options: the scenario's options with their defaults. check: option -> function that returns
    the value in its canonical form or raises `UserError`.
    assign: (clients, seed=, per_client=, **options) -> Assignment.
    """

    summary: str
    assign: Callable[..., Assignment]
    options: Mapping[str, object] = field(default_factory=dict)
    check: Mapping[str, Callable[[object], object]] = field(default_factory=dict)


class Setting(NamedTuple):
    """One of the protocol's twelve settings."""

    scenario: str
    options: Mapping[str, object]
    alpha: float


def assign(
    scenario: str,
    clients: Sequence[str],
    *,
    options: Mapping[str, object] | None = None,
    seed: int,
    per_client: bool = False,
) -> Assignment:
    """Apply a scenario by name to named clients.

    per_client: in hybrid, a client that draws neither modality keeps one for all its samples
    (domains made of an image pool and a text pool) instead of one per sample.
    Raises `UserError` for an unknown scenario or option, or a value out of range.
    """
    checked = check_options(scenario, options or {})
    return SCENARIOS[scenario].assign(clients, seed=seed, per_client=per_client, **checked)


def check_options(scenario: str, options: Mapping[str, object]) -> dict[str, object]:
    """The scenario's options in canonical form, defaults filled in. Raises `UserError`."""
    spec = chosen("scenario", scenario, SCENARIOS, options, of=f"scenario {scenario!r}")
    return {k: spec.check[k](options.get(k, default)) for k, default in spec.options.items()}


def _aligned(clients: Sequence[str], *, seed: int, per_client: bool) -> Assignment:
    return Assignment(dict.fromkeys(clients, BOTH), lambda client, sample: BOTH)


def _missing(clients: Sequence[str], *, seed: int, per_client: bool, beta: float) -> Assignment:
    def keep(client: str, sample: str) -> Keep:
        return (
            uniform(seed, "missing-image", sample) >= beta,
            uniform(seed, "missing-text", sample) >= beta,
        )

    return Assignment(dict.fromkeys(clients, BOTH), keep)


def _cross(clients: Sequence[str], *, seed: int, per_client: bool, images: int | str) -> Assignment:
    count, notes = _image_clients(images, len(clients))
    ranked = sorted(clients, key=lambda client: uniform(seed, "cross", client))
    held = {client: IMAGE_ONLY if i < count else TEXT_ONLY for i, client in enumerate(ranked)}
    held = {client: held[client] for client in clients}
    return Assignment(held, lambda client, sample: held[client], notes)


def _hybrid(clients: Sequence[str], *, seed: int, per_client: bool, p: float) -> Assignment:
    def client_keep(client: str) -> Keep:
        drawn = (
            uniform(seed, "hybrid-image", client) < p,
            uniform(seed, "hybrid-text", client) < p,
        )
        return _one_of_two(seed, client) if drawn == NEITHER and per_client else drawn

    held = {client: client_keep(client) for client in clients}

    def keep(client: str, sample: str) -> Keep:
        return _one_of_two(seed, sample) if held[client] == NEITHER else held[client]

    return Assignment(held, keep)


def _one_of_two(seed: int, name: str) -> Keep:
    return IMAGE_ONLY if uniform(seed, "hybrid-one", name) < 0.5 else TEXT_ONLY


def _image_clients(images: int | str, clients: int) -> tuple[int, tuple[str, ...]]:
    """How many clients hold images, from a count or a ratio that `_check_images` has passed."""
    if isinstance(images, int):
        if images > clients:
            raise UserError(
                f"images is {images}, but there are {clients} clients: give a number up to that, "
                "or a ratio in quotes, '3:7' (YAML reads a bare 3:7 as the number 187)"
            )
        return images, ()
    a, b = map(int, images.split(":"))
    exact = clients * a / (a + b)
    low, high = (1, clients - 1) if a and b and clients > 1 else (0, clients)
    count = min(max(int(exact + 0.5), low), high)
    if count == exact:
        return count, ()
    return count, (f"images {images} of {clients} clients is rounded to {count}",)


def _check_share(name: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{name} is {value!r}: give a probability from 0 to 1")
        return float(value)

    return check


def _check_images(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(":")]
        whole = all(part.isascii() and part.isdigit() for part in parts)
        if len(parts) == 2 and whole and any(map(int, parts)):
            return f"{int(parts[0])}:{int(parts[1])}"
    raise UserError(
        f"images is {value!r}: give the number of clients that hold images, e.g. 3, "
        "or images to texts, e.g. '3:7'"
    )


SCENARIOS: dict[str, ScenarioSpec] = {
    "aligned": ScenarioSpec("every sample keeps image and text", _aligned),
    "missing": ScenarioSpec(
        "each sample loses its text and, independently, its image with probability beta",
        _missing,
        {"beta": 0.3},
        {"beta": _check_share("beta")},
    ),
    "cross": ScenarioSpec(
        "each client holds images only or texts only",
        _cross,
        {"images": "5:5"},
        {"images": _check_images},
    ),
    "hybrid": ScenarioSpec(
        "each client holds each modality with probability p; one at random if it draws neither",
        _hybrid,
        {"p": 0.8},
        {"p": _check_share("p")},
    ),
}

SETTINGS: dict[str, Setting] = {
    **{f"aligned-a{alpha}": Setting("aligned", {}, alpha) for alpha in (5.0, 1.0, 0.5)},
    **{f"missing-b{beta}": Setting("missing", {"beta": beta}, 0.5) for beta in (0.3, 0.4, 0.5)},
    **{
        f"cross-i{i}t{10 - i}": Setting("cross", {"images": f"{i}:{10 - i}"}, 0.5)
        for i in (3, 5, 7)
    },
    **{f"hybrid-p{p}": Setting("hybrid", {"p": p}, 0.5) for p in (0.8, 0.7, 0.6)},
}
