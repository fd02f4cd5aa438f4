"""A plan as plain data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from fedmllm.models.loading import resolve_dtype
from fedmllm.plan.build import SCHEMA, Plan, size
from fedmllm.plan.structure import weight_bytes
from fedmllm.plan.traffic import Traffic

if TYPE_CHECKING:
    from rich.console import RenderableType


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain data; the keys of `bytes` and `parameters` mean what they mean in a run's result."""
    skeleton, traffic, memory = plan.skeleton, plan.traffic, plan.memory
    model = plan.config.model
    return {
        "schema": SCHEMA,
        "name": plan.config.name,
        "model": {
            "name": model.name,
            "type": skeleton.config.model_type,
            "dtype": resolve_dtype(model.dtype, model.device),
            "device": model.device,
        },
        "parameters": {
            "total": skeleton.loaded,
            "base": skeleton.total,
            "trainable": skeleton.trainable,
            "base_components": skeleton.components,
            "trainable_components": skeleton.by_component(),
            "trainable_modules": skeleton.layer_targets,
        },
        "bytes": {
            "up": traffic.up,
            "down": traffic.down,
            **_once(traffic),
            "per_round": {"up": traffic.round_up, "down": traffic.round_down},
            "per_client_round": traffic.parts,
            "clients_per_round": traffic.cohort,
            "rounds": traffic.rounds,
        },
        "memory": {
            "estimate": True,
            "peak": memory.peak,
            "peak_phase": memory.phase,
            "runtime": memory.runtime,
            "resident": memory.resident,
            "weights": weight_bytes(skeleton, four_bit=plan.load.four_bit),
            "phases": memory.phases,
            "host": memory.host,
            "available": None if plan.capacity is None else asdict(plan.capacity),
            "fits": plan.fits,
            "assumed": asdict(plan.load),
        },
        "time": None if plan.time is None else asdict(plan.time),
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
    }


def _once(traffic: Traffic) -> dict[str, Any]:
    """Bytes before the first round, where there are any, as a run's result has them."""
    if not traffic.once:
        return {}
    parts = {name: dict(zip(WAYS, amount, strict=True)) for name, amount in traffic.once.items()}
    return {"once": {way: {name: part[way] for name, part in parts.items()} for way in WAYS}}


def as_table(plan: Plan) -> RenderableType:
    """Parameters, bytes, memory and time, then what was assumed and what will not work."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    for rows in (_parameters(plan), _bytes(plan), _memory(plan), _time(plan)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    notes = [f"[dim]note[/dim]  {_plain(line)}" for line in plan.notes]
    warnings = [f"[bold red]warning[/bold red]  {_plain(line)}" for line in plan.warnings]
    return Group(table, *notes, *warnings)


Rows = list[tuple[str, str, str]]
WAYS = ("up", "down")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _parameters(plan: Plan) -> Rows:
    skeleton = plan.skeleton
    rows = [("parameters", "base, frozen", f"{skeleton.total:,}")]
    rows += [("", f"  {part}", f"{count:,}") for part, count in skeleton.components.items()]
    rows += [
        ("trainable", f"in all, LoRA of rank {plan.config.lora.rank}", f"{skeleton.trainable:,}")
    ]
    rows += [("", f"  {_plain(name)}", f"{n:,}") for name, n in skeleton.layer_targets.items()]
    return [
        *rows,
        *(
            ("", f"  in all, {component}", f"{count:,}")
            for component, count in skeleton.by_component().items()
            if count
        ),
    ]


def _bytes(plan: Plan) -> Rows:
    traffic = plan.traffic
    clients = f"a round of {traffic.cohort} client{'s' * (traffic.cohort != 1)}"
    rounds = f"a run of {traffic.rounds} round{'s' * (traffic.rounds != 1)}"
    return [
        ("bytes", "a client and round, up", f"{traffic.client_up:,}"),
        *_parts(traffic.parts["up"]),
        ("", "a client and round, down", f"{traffic.client_down:,}"),
        *_parts(traffic.parts["down"]),
        ("", f"{clients}, up", f"{traffic.round_up:,}"),
        ("", f"{clients}, down", f"{traffic.round_down:,}"),
        *(
            ("", f"{name}, once, {way}", f"{count:,}")
            for name, amount in traffic.once.items()
            for way, count in zip(WAYS, amount, strict=True)
            if count
        ),
        ("", f"{rounds}, up", f"{traffic.up:,}"),
        ("", f"{rounds}, down", f"{traffic.down:,}"),
    ]


def _parts(parts: Mapping[str, int]) -> Rows:
    """What a message is made of, if of more than one part."""
    found = [("", f"  {name}", f"{count:,}") for name, count in parts.items() if count]
    return found if len(found) > 1 else []


def _memory(plan: Plan) -> Rows:
    memory, place = plan.memory, "GPU memory" if plan.load.cuda else "main memory"
    rows = [("memory", f"estimated peak, {place}, when {memory.phase}", size(memory.peak))]
    rows += [("", "  libraries" if not plan.load.cuda else "  CUDA", size(memory.runtime))]
    rows += [("", f"  {name}", size(count)) for name, count in memory.resident.items()]
    for phase, terms in memory.phases.items():
        total = size(sum(terms.values()))
        rows.append(("", f"  {phase}" + ("" if phase == memory.phase else " (less)"), total))
        rows += [("", f"    {name}", size(count)) for name, count in terms.items() if count]
    return rows


def _time(plan: Plan) -> Rows:
    if plan.time is None:
        return [("time", "no measurement", "–")]
    source = _plain(plan.time.measured_in)
    return [
        ("time", f"training, by {source}", _clock(plan.time.train_seconds)),
        ("", "testing", _clock(plan.time.test_seconds)),
    ]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {rest:02}s" if minutes else f"{rest} s"
