"""Write the generated parts of README and docs from the committed results; `--check` compares.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from fedmllm.metrics import mean_and_ci
from fedmllm.report import figures, load_results, markdown_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
DOCS = ("README.md", "docs/embedded-model.md", "docs/embedded-tasks.md", "docs/memory.md")
PICTURE = ROOT / "docs" / "img" / "demo.svg"
NONE = "*Not measured yet.*"
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def runs(folder: str) -> str:
    """The table of a folder of results."""
    if not (RESULTS / folder).is_dir():
        return NONE
    found, problems = load_results([RESULTS / folder])
    if problems:
        raise SystemExit("\n".join(problems))
    return markdown_table(found)


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


def levels() -> str:
    """Mean and spread over seeds of each arm on each embedded task."""
    table: dict[tuple[str, str], list[float]] = {}
    errors: dict[tuple[str, str], list[float]] = {}
    for file in sorted((RESULTS / "levels").glob("*/result.json")):
        result = json.loads(file.read_text())
        task, arm = result["task"]["name"], result["name"].split("-", 1)[1].rsplit("-s", 1)[0]
        metric = result["task"]["metric"]
        table.setdefault((task, arm), []).append(result["metrics"]["both"][metric])
        error = result["metrics"]["both"].get(f"{metric}_se")
        if error is not None:
            errors.setdefault((task, arm), []).append(error)
    if not table:
        return NONE
    lines = ["| task | run | seeds | mean | 95 % interval | largest test s.e. |"]
    lines.append("|---|---|---|---|---|---|")
    for (task, arm), values in sorted(table.items()):
        mean, half = mean_and_ci(values)
        worst = errors.get((task, arm))
        error = f"{max(worst):.4f}" if worst else "–"
        lines.append(f"| {task} | {arm} | {len(values)} | {mean:.3f} | ± {half:.3f} | {error} |")
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


PARTS: dict[str, Callable[[], str]] = {
    "demo": lambda: runs("demo"),
    "easy-vqa": lambda: runs("easy-vqa"),
    "gate": gate,
    "levels": levels,
    "memory": memory,
}


def filled(text: str) -> str:
    """A document with its generated parts written anew."""
    return PART.sub(lambda m: f"{m[1]}{PARTS[m[2]]().strip()}\n{m[3]}", text)


def main(check: bool) -> int:
    """Write, or with `check` say what is out of date (exit code 1)."""
    wanted = {ROOT / name: filled((ROOT / name).read_text()) for name in DOCS}
    if (RESULTS / "demo").is_dir():
        found, _ = load_results([RESULTS / "demo"])
        wanted[PICTURE] = figures.learning_curves_svg(found)
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    for path in stale:
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))
