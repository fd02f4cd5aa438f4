"""Write the generated parts of README and docs from the committed results; `--check` compares.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import benchmark_tables
import strategy_tables
from pretrain.curriculum import PHASES

from fedmllm.metrics import mean_and_ci
from fedmllm.report import figures, load_results, markdown_table
from fedmllm.report.grid_tables import grid_tables, markdown_grid

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
DOCS = (
    "README.md",
    "docs/architecture.md",
    "docs/benchmark.md",
    "docs/deployment.md",
    "docs/embedded-model.md",
    "docs/embedded-tasks.md",
    "docs/memory.md",
    "docs/performance.md",
    "docs/strategies.md",
    "docs/strategies-results.md",
)
PICTURE = ROOT / "docs" / "img" / "demo.svg"
GAINS = ROOT / "docs" / "img" / "strategies.svg"
NONE = "*Not measured yet.*"
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def runs(folder: str) -> str:
    """The table of a folder of results."""
    if not (RESULTS / folder).is_dir():
        return NONE
    return markdown_table(checked(RESULTS / folder))


def checked(folder: Path) -> list[dict]:
    """The results of a folder, if all of them are as they were written."""
    found, problems = load_results([folder]) if folder.is_dir() else ([], [])
    if problems:
        raise SystemExit("\n".join(problems))
    return found


def grid(folder: str) -> str:
    """The tables of a grid's results, each under its name."""
    tables, left_out = grid_tables(checked(RESULTS / folder))
    if left_out:
        raise SystemExit("\n".join(left_out))
    lines = markdown_grid(tables).splitlines()
    return "\n".join(f"**{line[4:]}**" if line.startswith("### ") else line for line in lines)


def gate() -> str:
    """The embedded model's gate, a line a kind of question."""
    file = RESULTS / "embedded-gate.json"
    if not file.exists():
        return NONE
    facts = json.loads(file.read_text())
    gate, needed = facts["gate"], facts["needed"]
    lines = ["| question | accuracy | n | needed |", "|---|---|---|---|"]
    for kind, line in gate["open"].items():
        lines.append(f"| {kind} | {line['accuracy']:.3f} | {line['n']:,} | {needed['open']:.2f} |")
    line = gate["choice"]
    lines.append(
        f"| choice by letter, all kinds | {line['accuracy']:.3f} | {line['n']:,} "
        f"| {needed['choice']:.2f} |"
    )
    for kind, line in gate["choice_by_kind"].items():
        lines.append(f"| choice by letter: {kind} | {line['accuracy']:.3f} | {line['n']:,} | |")
    for kind, line in gate["easy_vqa_zero_shot"].items():
        lines.append(f"| easy-vqa, zero-shot: {kind} | {line['accuracy']:.3f} | {line['n']:,} | |")
    verdict = "passed" if gate["passed"] else "**not passed**"
    return "\n".join([*lines, "", f"The gate is {verdict}."])


def level_results() -> dict[tuple[str, str], dict[int, dict]]:
    """The level runs' results by task and arm, then by seed."""
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for result in checked(RESULTS / "levels"):
        task, arm = result["task"]["name"], result["name"].rsplit("-s", 1)[0]
        arm = arm.removeprefix(f"{task}-")
        found.setdefault((task, arm), {})[result["seed"]] = result
    return found


def headline(result: dict, suffix: str = "") -> float:
    """The task's metric under the run's first test condition: nan if it is not there."""
    condition = result["config"]["evaluation"]["conditions"][0]
    return result["metrics"][condition].get(f"{result['task']['metric']}{suffix}", math.nan)


def levels(*tasks: str) -> str:
    """Mean and spread over seeds of each arm on each task."""
    found = {key: runs for key, runs in level_results().items() if key[0] in tasks}
    if not found:
        return NONE
    lines = ["| task | run | seeds | mean | 95 % interval | largest test s.e. |"]
    lines.append("|---|---|---|---|---|---|")
    for (task, arm), by_seed in sorted(found.items(), key=_level_order):
        mean, half = mean_and_ci([headline(r) for r in by_seed.values()])
        errors = [headline(r, "_se") for r in by_seed.values()]
        error = "–" if any(map(math.isnan, errors)) else f"{max(errors):.4f}"
        spread = "–" if math.isnan(half) else f"± {half:.3f}"
        lines.append(f"| {task} | {arm} | {len(by_seed)} | {mean:.3f} | {spread} | {error} |")
    return "\n".join(lines)


EMBEDDED = ("memes", "crisis", "medical")
ARM_ORDER = ("zero-shot", "local", "fedavg-missing", "fedavg-aligned", "centralised")


def _level_order(item: tuple[tuple[str, str], dict]) -> tuple[str, int, str]:
    (task, arm), _ = item
    return task, ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER), arm


GAPS = (
    ("centralised", "fedavg-aligned"),
    ("fedavg-aligned", "local"),
    ("fedavg-aligned", "zero-shot"),
    ("fedavg-aligned", "fedavg-missing"),
    ("fedavg-cross", "local"),
    ("fedavg-cross", "zero-shot"),
)


def level_gaps(*tasks: str) -> str:
    """What one arm has over another, paired over seeds."""
    found = level_results()
    lines = ["| task | difference | seeds | mean | 95 % interval | in each seed |"]
    lines.append("|---|---|---|---|---|---|")
    for task in tasks:
        for more, less in GAPS:
            one, other = found.get((task, more), {}), found.get((task, less), {})
            gaps = [headline(one[s]) - headline(other[s]) for s in sorted(one.keys() & other)]
            if gaps:
                mean, half = mean_and_ci(gaps)
                each = ", ".join(f"{gap:+.3f}" for gap in gaps)
                spread = "–" if math.isnan(half) else f"± {half:.3f}"
                lines.append(
                    f"| {task} | {more} − {less} | {len(gaps)} | {mean:+.3f} | {spread} | {each} |"
                )
    return "\n".join(lines) if len(lines) > 2 else NONE


def pretraining() -> str:
    """The language stage's log at the end of each of its phases."""
    file = RESULTS / "pretraining" / "language.jsonl"
    if not file.exists():
        return NONE
    log = [json.loads(line) for line in file.read_text().splitlines()]
    ends = [phase.until for phase in PHASES[:-1]] + [log[-1]["step"]]
    kinds = ("exist", "match", "colour_of", "count", "reading", "naming", "rule")
    lines = ["| step | seconds | loss | " + " | ".join(kinds) + " | by letter |"]
    lines.append("|---" * (4 + len(kinds)) + "|")
    for row in (row for row in log if row["step"] in ends):
        letters = [v for k, v in row.items() if k.startswith("choice_")]
        shown = [f"{row[k]:.2f}" if k in row else "–" for k in kinds]
        lines.append(
            f"| {row['step']:,} | {row['seconds']:,.0f} | {row['loss']:.3f} | "
            + " | ".join(shown)
            + f" | {sum(letters) / len(letters):.2f} |"
        )
    return "\n".join(lines)


def memory() -> str:
    """Planned and measured peak memory, a line a case."""
    file = RESULTS / "memory.json"
    if not file.exists():
        return NONE
    facts = json.loads(file.read_text())
    lines = ["| case | planned MB | measured MB | ratio | ratio without holes in the heap |"]
    lines.append("|---|---:|---:|---:|---:|")
    for case in facts["cases"]:
        planned, measured = case["planned_bytes"] / 1e6, case["measured_bytes"] / 1e6
        ratios = f"{case['ratio']:.2f} | {case['ratio_live']:.2f}"
        lines.append(f"| {case['name']} | {planned:,.0f} | {measured:,.0f} | {ratios} |")
    machine, versions = facts["hardware"], facts["versions"]
    about = f"{machine['cpu']}, one thread, torch {versions['torch']}, seed {facts['seed']}."
    return "\n".join([*lines, "", about])


def features() -> str:
    """What kept image features save, a line a model and policy."""
    file = RESULTS / "features.json"
    if not file.exists():
        return NONE
    facts = json.loads(file.read_text())
    lines = ["| tower | trained | in memory | and written to disk | second run, from disk |"]
    lines.append("|---|---|---:|---:|---:|")
    for case in facts["cases"]:
        shown = [
            f"{case['pixels_over'][f'wall_{way}']:.2f} ({case['pixels_over'][f'cpu_{way}']:.2f})"
            for way in ("memory", "cold", "warm")
        ]
        lines.append(f"| {case['model']} | {case['trained']} | {' | '.join(shown)} |")
    case, machine = facts["cases"][0], facts["hardware"]
    about = (
        f"{case['images']} images, {case['samples_trained']} samples trained, medians of "
        f"{len(case['runs']['pixels'])}; {machine['cpu']}, one thread, torch "
        f"{facts['versions']['torch']}."
    )
    return "\n".join([*lines, "", about])


def padding() -> str:
    """The share of padding in training, a line a task and setting."""
    file = RESULTS / "padding.json"
    if not file.exists():
        return NONE
    facts = json.loads(file.read_text())
    found = {(r["task"], r["setting"], r["micro_batch"], r["at_once"]): r for r in facts["rows"]}
    ways = sorted({key[2:] for key in found}, key=lambda way: (-way[0], way[1]))
    heads = [f"{micro} of a client, {n} client{'s' * (n > 1)}" for micro, n in ways]
    lines = [
        "| task | setting | " + " | ".join(heads) + " |",
        "|---|---" + "|---:" * len(ways) + "|",
    ]
    for task, setting in dict.fromkeys(key[:2] for key in found):
        rows = [found[task, setting, *way] for way in ways]
        shares = [_padding_cell(row, facts["batch_size"]) for row in rows]
        lines.append(f"| {task} | {setting} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _padding_cell(row: dict, batch_size: int) -> str:
    """Percent; in brackets what it would be without an order, where there is one."""
    drawn = f" ({100 * row['as_drawn']:.0f})" if row["micro_batch"] < batch_size else ""
    return f"{100 * row['padding']:.0f}{drawn}"


SPEED = {  # row of benchmarks/speed -> what it is about
    "training": "training against a loop in the authors' manner",
    "evaluation": "scoring options against one `generate` call a question",
    "server": "server step against Flower's",
    "flower_run": "25 rounds against Flower's simulator",
    "nvflare_run": "25 rounds against NVFlare's simulator",
    "grid": "36 runs against the same commands before",
}


def speed_facts(row: str) -> dict | None:
    """What a row of the speed benchmark measured, None if it was not run."""
    file = RESULTS / "speed" / f"{row}.json"
    return json.loads(file.read_text()) if file.exists() else None


def speed_rows() -> str:
    """Ratios, a line a case and alternative; rows that are not there are named."""
    head = "| case | ours | against | its | times faster | goal | reached |"
    tables = []
    for row, about in SPEED.items():
        facts = speed_facts(row)
        if facts is None:
            tables.append(f"**`{row}`**: {about}. {NONE}")
            continue
        lines = [f"**`{row}`**: {about}.", "", head, "|---|---:|---|---:|---:|---:|---|"]
        shown = [case for case in facts["cases"] if not case.get("memory_only")]
        lines += [line for case in shown for line in _speed_lines(case)]
        tables.append("\n".join([*lines, "", _speed_about(facts)]))
    return "\n\n".join(tables)


def _speed_lines(case: dict) -> list[str]:
    unit, rates = case["unit"], case["per_second"]
    ours = f"{_short(rates['ours'])} {unit}/s"
    lines = []
    for way, found in case["ratio"].items():
        goal = found["goal"]
        reached = "" if goal is None else "yes" if found["wall"] >= goal else "no"
        asked = "" if goal is None else f"{goal:g}"
        lines.append(
            f"| {case['case']} | {ours} | {way} | {_short(rates[way])} {unit}/s "
            f"| {found['wall']:.1f} | {asked} | {reached} |"
        )
    if not lines:
        why = case.get("not_measured") or "nothing to compare with"
        lines.append(f"| {case['case']} | {ours} | not measured: {why} | | | | |")
    return lines


def _short(rate: float) -> str:
    """A rate in three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _speed_about(facts: dict) -> str:
    machine = facts["hardware"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, torch {facts['versions']['torch']}; load of "
        f"the machine before: {facts['load_before']:.1f}; commit {facts['commit']}."
    )


def speed_memory() -> str:
    """The server's peak memory, in adapters."""
    facts = speed_facts("server")
    if facts is None:
        return NONE
    lines = ["| case | ours | Flower | goal |", "|---|---:|---:|---:|"]
    for case in facts["cases"]:
        peak = case["peak_adapters"]
        missing = "" if case.get("memory_only") else "not measured"
        other = f"{peak['Flower']:.1f}" if "Flower" in peak else missing
        lines.append(f"| {case['case']} | {peak['ours']:.1f} | {other} | 4 |")
    return "\n".join(lines)


def speed_clients() -> str:
    """Seconds a round and memory by the number of simulated clients."""
    facts = speed_facts("clients")
    if facts is None:
        return NONE
    lines = ["| clients | s a round, images new | over ten | s a round, images kept | over ten "]
    lines[0] += "| peak MB | over ten |"
    lines.append("|---:" * 7 + "|")
    for case in facts["cases"]:
        over = case["over_ten"]
        lines.append(
            f"| {case['clients']:,} | {case['median']['cold']:.2f} | {over['cold']:.2f} "
            f"| {case['median']['warm']:.2f} | {over['warm']:.2f} "
            f"| {case['peak_bytes'] / 1e6:,.0f} | {over['peak']:.2f} |"
        )
    goal = facts["cases"][0]["goal"]
    return "\n".join([*lines, "", f"Goal: at most {goal:g}. {_speed_about(facts)}"])


def speed_startup() -> str:
    """Seconds to the end of `--help` and to the first step."""
    facts = speed_facts("startup")
    if facts is None:
        return NONE
    lines = ["| what | s | goal |", "|---|---:|---:|"]
    lines += [f"| {c['case']} | {c['median']:.2f} | {c['goal']:g} |" for c in facts["cases"]]
    return "\n".join([*lines, "", _speed_about(facts)])


def speed_arithmetic() -> str:
    """What each stage computes and moves."""
    facts = speed_facts("arithmetic")
    if facts is None:
        return NONE
    found = facts["cases"][0]
    lines = [
        "| stage | GFLOP | ms | GFLOP/s | share of the matrix rate |",
        "|---|---:|---:|---:|---:|",
    ]
    for stage in found["stages"]:
        lines.append(
            f"| {stage['stage']} | {stage['flops'] / 1e9:.3f} | {stage['seconds'] * 1e3:.1f} "
            f"| {stage['flops_per_second'] / 1e9:.1f} | {stage['share_of_rate']:.0%} |"
        )
    tokens, read = found["tokens"], found["read_bytes_per_second"]
    return "\n".join(
        [
            *lines,
            "",
            f"Matrix rate of one thread: {found['rate_square'] / 1e9:.0f} GFLOP/s on 1,024 x 1,024,"
            f" {found['rate_own_layers'] / 1e9:.0f} on the tokens of a batch by the model's own"
            f" width. Memory is read at {read / 1e9:.1f} GB/s. Samples have"
            f" {tokens['memes']:.0f} tokens (memes) and {tokens['crisis']:.0f} (crisis); the"
            f" decoder's weights are {found['weight_bytes'] / 1e6:.1f} MB, an update is"
            f" {found['update_bytes']['up'] / 1e6:.2f} MB each way. {_speed_about(facts)}",
        ]
    )


def network_facts() -> dict | None:
    """What the benchmark of the network measured, None if it was not run."""
    file = RESULTS / "network.json"
    return json.loads(file.read_text()) if file.exists() else None


def network_rounds() -> str:
    """Seconds a round beyond training, start and end of a job, a line a case."""
    facts = network_facts()
    if facts is None:
        return NONE
    lines = [
        "| sites | adapter | s a round | of it exchange | job start | result | job end | load |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in facts["cases"]:
        if "not_measured" in case:
            sites, size = case["case"].split("x")
            lines.append(
                f"| {sites} | {size} MB | not measured: {case['not_measured']} | | | | | |"
            )
            continue
        lines.append(
            f"| {case['sites']} | {_megabytes(case)} | {case['median_round_seconds']:.1f} "
            f"| {case['median_exchange_seconds']:.1f} | {case['start_seconds']:.0f} s "
            f"| {case['finish_seconds']:.1f} s | {case['leave_seconds']:.0f} s "
            f"| {case['load_before']:.1f} |"
        )
    return "\n".join([*lines, "", _network_about(facts)])


def _megabytes(case: dict) -> str:
    return f"{case['adapter_bytes'] / 1e6:.3g} MB"


def _network_about(facts: dict) -> str:
    machine, versions = facts["hardware"], facts["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores for all processes together, torch "
        f"{versions['torch']}, NVFlare {versions['nvflare']}, {facts['date']}."
    )


def network_memory() -> str:
    """Peak memory by process, and above that at the smallest adapter, in adapters."""
    facts = network_facts()
    if facts is None:
        return NONE
    roles = ("site job", "trainer", "all of a site", "server job")
    lines = ["| sites | adapter | " + " | ".join(roles) + " | a site above its base | goal |"]
    lines.append("|---:" * (len(roles) + 3) + "|---:|")
    measured = [case for case in facts["cases"] if "not_measured" not in case]
    base = {case["sites"]: case for case in reversed(measured)}  # the smallest adapter
    for case in measured:
        peak, size = case["peak_bytes"], case["adapter_bytes"]
        shown = [f"{peak[role] / 1e6:,.0f} MB" for role in roles]
        floor = base[case["sites"]]
        above = "–"
        if case is not floor:
            grown = peak["all of a site"] - floor["peak_bytes"]["all of a site"]
            above = f"{grown / (size - floor['adapter_bytes']):.2f} adapters"
        goal = str(MOST_ADAPTERS) if size > 2e8 else ""  # it was set for 300 MB
        lines.append(
            f"| {case['sites']} | {_megabytes(case)} | {' | '.join(shown)} | {above} | {goal} |"
        )
    return "\n".join([*lines, "", *_goal(measured, base), _network_about(facts)])


def _goal(cases: list[dict], base: dict[int, dict]) -> list[str]:
    """Where the goal was met and where not."""
    words = []
    for case in cases:
        floor = base[case["sites"]]
        if case is floor or case["adapter_bytes"] <= 2e8:
            continue
        grown = case["peak_bytes"]["all of a site"] - floor["peak_bytes"]["all of a site"]
        above = grown / (case["adapter_bytes"] - floor["adapter_bytes"])
        kept = "met" if above <= MOST_ADAPTERS else "**missed**"
        words.append(f"{kept} with {case['sites']} sites ({above:.2f})")
    if not words:
        return []
    return [f"The goal of {MOST_ADAPTERS} adapters at a site at 300 MB: {', '.join(words)}.", ""]


MOST_ADAPTERS = 4  # above its base, at a site: the goal
LINKS = {"100 Mbit/s": 12.5e6, "1 Gbit/s": 125e6}  # bytes a second, each way
SIZED_ROUNDS = (25, 100)


def network_seconds(case: dict, *, rounds: int, link: float) -> float:
    """A run's seconds beyond training: rounds (o + 2 s a / L) + start + end, where o is the
    measured round on loopback, s the sites, a the adapter's bytes, L the server's link."""
    through = 2 * case["sites"] * case["adapter_bytes"] / link
    around = case["start_seconds"] + case["finish_seconds"] + case["leave_seconds"]
    return rounds * (case["median_round_seconds"] + through) + around


def network_sizing() -> str:
    """Bytes and hours by adapter, sites, rounds and link."""
    facts = network_facts()
    if facts is None:
        return NONE
    head = ["a round moves", *(f"{r} rounds move" for r in SIZED_ROUNDS)]
    head += [f"{r} rounds at {name}" for r in SIZED_ROUNDS for name in LINKS]
    lines = ["| sites | adapter | " + " | ".join(head) + " |"]
    lines.append("|---:" * (len(head) + 2) + "|")
    for case in facts["cases"]:
        if "not_measured" in case:
            continue
        moved = 2 * case["sites"] * case["adapter_bytes"] / 1e9
        hours = [
            f"{network_seconds(case, rounds=rounds, link=link) / 3600:.2g} h"
            for rounds in SIZED_ROUNDS
            for link in LINKS.values()
        ]
        bytes_ = [_gigabytes(count * moved) for count in (1, *SIZED_ROUNDS)]
        cells = " | ".join([*bytes_, *hours])
        lines.append(f"| {case['sites']} | {_megabytes(case)} | {cells} |")
    return "\n".join(lines)


def _gigabytes(count: float) -> str:
    return f"{count:,.0f} GB" if count >= 100 else f"{count:.2g} GB"


def eight_billion() -> str:
    """Counts, bytes and memory of a federation over an 8-billion model."""
    file = RESULTS / "deployment-8b.json"
    if not file.exists():
        return NONE
    facts = json.loads(file.read_text())
    exact, sites, rounds = facts["exact"], facts["sites"], facts["rounds"]
    lines = [
        f"| {facts['model']}, {sites} sites, {rounds} rounds | |",
        "|---|---:|",
        f"| parameters | {exact['parameters']:,} |",
        f"| of them trained and exchanged | {exact['trainable']:,} |",
        f"| adapter | {exact['adapter_bytes'] / 1e6:.1f} MB |",
        f"| a round, all sites, up / down | {_each_way(exact, 'round')} |",
        f"| the run, up / down | {_each_way(exact, 'run')} |",
        "",
        "| machine | estimated peak | of it weights | main memory beside a GPU |",
        "|---|---:|---:|---:|",
    ]
    for machine, found in facts["machines"].items():
        host = found["host_bytes"]
        beside = "–" if host is None else f"{host / 1e9:.1f} GB"
        peak, weights = found["peak_bytes"] / 1e9, found["weights_bytes"] / 1e9
        lines.append(f"| {machine} | {peak:.1f} GB | {weights:.1f} GB | {beside} |")
    server, versions = facts["server_without_tests"], facts["versions"]
    libraries = f"{server['libraries'] / 1e6:,.0f} MB are libraries"
    about = (
        f"Samples of {facts['tokens']:,} tokens, images of {facts['slices']} slices, one sample at "
        "a time; on a GPU main memory holds the whole base once, while it is loaded. A server that "
        "does not test: its process with shapes and first adapter took "
        f"{server['peak_bytes'] / 1e6:,.0f} MB (measured, with a small tokenizer), of which "
        f"{libraries}; add what it keeps of adapters, as in the table of memory above. "
        f"{facts['hardware']['cpu']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}."
    )
    return "\n".join([*lines, "", about])


def _each_way(exact: dict, of: str) -> str:
    return f"{exact[f'{of}_up'] / 1e9:.2f} / {exact[f'{of}_down'] / 1e9:.2f} GB"


def strategies_cost() -> str:
    """Time of each strategy against plain training, taken side by side."""
    file = RESULTS / "strategies-cost.json"
    if not file.exists():
        return NONE
    facts = json.loads(file.read_text())
    lines = ["| strategy | a round | tests | to the end of the first |", "|---|---:|---:|---:|"]
    for row in facts["rows"]:
        start = row["start"] / row["plain_round"]
        lines.append(
            f"| {row['strategy']} | {row['round']:.2f} | {row['tests']:.2f} | {start:+.1f} |"
        )
    about = (
        f"{facts['repeats']} repetitions; {facts['hardware']['cpu']}, torch "
        f"{facts['versions']['torch']}."
    )
    return "\n".join([*lines, "", about])


STUDIES = ("strategies", "strategies-large")
STUDY: dict[str, Callable[[str], str]] = {  # tables of a grid of strategies
    "plain": lambda name: strategy_tables.plain_table(strategy_tables.load(name)),
    "scenarios": lambda name: strategy_tables.scenario_table(strategy_tables.load(name)),
    "gaps": lambda name: strategy_tables.gap_table(strategy_tables.load(name)),
    "best": lambda name: strategy_tables.best_table(strategy_tables.load(name)),
    "gains": lambda name: strategy_tables.gain_table(strategy_tables.load(name)),
    "gains-no-image": lambda name: strategy_tables.gain_table(
        strategy_tables.load(name), "image_withheld"
    ),
    "gains-no-text": lambda name: strategy_tables.gain_table(
        strategy_tables.load(name), "text_withheld"
    ),
    "recovery": lambda name: strategy_tables.recovery_table(strategy_tables.load(name)),
    "cost": lambda name: strategy_tables.cost_table(strategy_tables.load(name)),
    "drift": lambda name: strategy_tables.drift_table(strategy_tables.load(name)),
}
PARTS: dict[str, Callable[[], str]] = {
    "eight-billion": eight_billion,
    "network-rounds": network_rounds,
    "network-memory": network_memory,
    "network-sizing": network_sizing,
    "speed-rows": speed_rows,
    "speed-memory": speed_memory,
    "speed-clients": speed_clients,
    "speed-startup": speed_startup,
    "speed-arithmetic": speed_arithmetic,
    "demo": lambda: runs("demo"),
    "easy-vqa": lambda: levels("easy-vqa") + "\n\n" + level_gaps("easy-vqa"),
    "features": features,
    "gate": gate,
    "mini": lambda: benchmark_tables.scenario_table(strategy_tables.load("mini")),
    "mini-settings": lambda: grid("mini"),
    "mini-time": lambda: benchmark_tables.time_table(
        strategy_tables.load("mini"), strategy_tables.load("mini-quick", "mini")
    ),
    "memory": memory,
    "padding": padding,
    "levels": lambda: levels(*EMBEDDED),
    "level-gaps": lambda: level_gaps(*EMBEDDED),
    "pretraining": pretraining,
    "strategies-later": lambda: strategy_tables.best_table(
        strategy_tables.later(strategy_tables.load("strategies"), 5)
    ),
    "strategies-cost-of-time": strategies_cost,
    "strategies-short": lambda: strategy_tables.best_table(
        strategy_tables.short(strategy_tables.load("strategies"))
    ),
    "strategies-without-memes": lambda: strategy_tables.best_table(
        strategy_tables.without(strategy_tables.load("strategies"), "memes")
    ),
    "strategies-swapped": lambda: strategy_tables.swapped_table(
        strategy_tables.load("strategies"), strategy_tables.load("swapped")
    ),
    "strategies-evidence": lambda: strategy_tables.evidence_table(
        strategy_tables.load("strategies")
    ),
    **{f"{grid}-{part}": partial(table, grid) for grid in STUDIES for part, table in STUDY.items()},
}


def filled(text: str) -> str:
    """A document with its generated parts written anew."""
    return PART.sub(lambda m: f"{m[1]}{PARTS[m[2]]().strip()}\n{m[3]}", text)


def main(check: bool) -> int:
    """Write, or with `check` say what is out of date (exit code 1)."""
    wanted = {ROOT / name: filled((ROOT / name).read_text()) for name in DOCS}
    if (RESULTS / "demo").is_dir():
        found = checked(RESULTS / "demo")
        wanted[PICTURE] = figures.learning_curves_svg(found)
    if gains := strategy_tables.gain_svg(strategy_tables.load("strategies")):
        wanted[GAINS] = gains
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    for path in stale:
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))
