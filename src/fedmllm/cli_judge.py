"""`fedmllm judge`: a language model marks the open answers of runs. Imports no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmllm.errors import UserError

if TYPE_CHECKING:
    from fedmllm.judge import Judge, Work


def judge(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, result files, or a parent.")],
    model: Annotated[str, typer.Option(help="The judge's name at its endpoint.")],
    condition: Annotated[
        list[str] | None, typer.Option(help="Test conditions to judge. [default: both]")
    ] = None,
    second: Annotated[
        int, typer.Option(min=0, help="Answers of each result that are judged twice.")
    ] = 50,
    seed: Annotated[int, typer.Option(help="Which those are.")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it would take.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask without asking me.")] = False,
    price_in: Annotated[
        float | None, typer.Option(min=0, help="Price of a million tokens that are sent.")
    ] = None,
    price_out: Annotated[
        float | None, typer.Option(min=0, help="Price of a million tokens that come back.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 4,
    retries: Annotated[int, typer.Option(min=0, help="Further tries of each request.")] = 5,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds a request may take.")
    ] = 60.0,
    request: Annotated[
        list[str] | None,
        typer.Option(help="name=value: a field of each request; null leaves it out."),
    ] = None,
) -> None:
    """Have a language model mark the open answers of runs; writes judged.json beside each result.

    The environment names the endpoint: FEDMLLM_JUDGE_URL and FEDMLLM_JUDGE_KEY, or else
    OPENAI_BASE_URL and OPENAI_API_KEY. Questions, expected and given answers are sent there.
    """
    from fedmllm.judge import Judge, Scheme, endpoint_from, make_work, parse_fields, write_all
    from fedmllm.judge.run import estimate_lines
    from fedmllm.report import load_results
    from fedmllm.report.write import check_conditions

    check_conditions(condition or [])
    scheme = Scheme(model, parse_fields(request or []), second=second, seed=seed)
    found, problems = load_results(runs)
    work, more = make_work(found, scheme, condition or [])
    for line in [*problems, *more, *estimate_lines(work, price_in=price_in, price_out=price_out)]:
        print(line)
    if plan:
        return
    if work.asks:
        endpoint = endpoint_from(os.environ)
        if not yes:
            _confirm()
        asked = Judge(endpoint, scheme.fields, retries=retries, timeout=timeout)
        try:
            _ask(work, asked, concurrency)
        finally:
            asked.close()
    for path, marks in write_all(work):
        print(*_lines(path, marks), sep="\n")


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise UserError("nobody is here to confirm that: give --yes")
    if not typer.confirm("Ask?"):
        print("nothing was asked")
        raise typer.Exit(1)


def _ask(work: Work, asked: Judge, concurrency: int) -> None:
    """Ask, with a bar on a terminal and else a line for each tenth."""
    from rich.progress import Progress

    from fedmllm.judge import ask_all

    total = len(work.asks)
    with Progress(disable=not sys.stdout.isatty()) as bars:
        bar = bars.add_task("judging", total=total)

        def told(count: int) -> None:
            bars.update(bar, completed=count)
            if bars.disable and count * 10 // total > (count - 1) * 10 // total:
                print(f"{count:,} of {total:,}", flush=True)

        ask_all(work, asked, concurrency=concurrency, told=told)


def _lines(path: Path, marks: dict[str, Any]) -> list[str]:
    lines = [str(path)]
    for condition, found in marks["conditions"].items():
        judged = "–" if found["accuracy"] is None else f"{found['accuracy']:.3f}"
        lines.append(
            f"  {condition}: judged {judged}, exact match {found['exact_match']:.3f}, "
            f"{found['n']:,} answers, {found['unparsable']:,} verdicts unparsable"
        )
    twice = marks["second"]
    if twice["read"]:
        kappa = "undefined" if twice["kappa"] is None else f"{twice['kappa']:.3f}"
        lines.append(
            f"  judged twice: {twice['same']} of {twice['read']} alike, Cohen's kappa {kappa}"
        )
    return lines
