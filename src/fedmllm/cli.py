"""The command line: `fedmllm run | plan | bench | ls | data | predict | judge | report | compare |
rerun | cache | deploy | demo`.

Heavy modules are imported inside the commands, so that `--help` answers at once. A `UserError`
is printed without a traceback and exits with code 2.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmllm import cli_data, cli_deploy, cli_judge
from fedmllm.errors import UserError
from fedmllm.imports import collector_at_rest

if TYPE_CHECKING:
    from rich.console import Console

# Quiet, offline and one thread per process unless the user says otherwise. Set before torch and
# transformers are imported.
for _name, _value in {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

# what a system refuses, wherever it happens: no permission, read-only, full, a file for a folder
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
)

app = typer.Typer(
    name="fedmllm",
    help="Federated fine-tuning of multimodal LLMs when the parties hold different modalities.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_deploy.app, name="deploy")


@app.command()
def run(
    experiment: Annotated[
        Path, typer.Argument(help="A YAML file, e.g. experiments/memes-fedavg.yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, e.g. training.rounds=5 setting=cross-i5t5."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. [default: runs/NAME]", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last round.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run folder that exists.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that train clients and read test samples side by side, each with the "
            "base in memory; same results. [default: 1, or one a device]",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs, one a process in turn: 0,1.", show_default=False)
    ] = None,
) -> None:
    """Run one experiment and write its folder: result, curves, manifest, adapter."""
    with collector_at_rest(our_process=True):
        from fedmllm.config import load_config
        from fedmllm.experiment import run as run_experiment
        from fedmllm.progress import RunProgress
        from fedmllm.report import load_results, summary_table, write_report

    config = load_config(experiment, overrides or [])
    folder = out or Path("runs") / config.name
    with RunProgress() as progress:
        run_experiment(
            config,
            out=folder,
            resume=resume,
            overwrite=overwrite,
            listener=progress.listen,
            processes=processes,
            devices=_listed(devices),
        )
    found, problems = load_results([folder])
    page = write_report(found, folder / "report.html", title=config.title or config.name)
    _console().print(summary_table(found, width=_console().width))
    for problem in problems:
        _console().print(problem, soft_wrap=True)
    _console().print(f"report  {page}\nresult  {folder / 'result.json'}", soft_wrap=True)


@app.command()
def plan(
    experiment: Annotated[
        Path, typer.Argument(help="A YAML file, e.g. experiments/memes-fedavg.yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. training.rounds=5 lora.rank=16.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to fit into, e.g. 24GB. [default: what is free]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the longest sample. [default: max_length]")
    ] = None,
    slices: Annotated[
        int | None, typer.Option(min=1, help="Of the largest image. [default: the model's most]")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Runs to take the time from. [default: runs]")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what an experiment will take: parameters, bytes, memory, time. Reads no weights."""
    import json

    with collector_at_rest(our_process=True):
        from fedmllm.config import load_config
        from fedmllm.plan import make_plan, parse_size

    made = make_plan(
        load_config(experiment, overrides or []),
        memory=None if memory is None else parse_size(memory),
        tokens=tokens,
        slices=slices,
        measured=measured,
    )
    if json_:
        print(json.dumps(made.to_json(), indent=1))
    else:
        _console().print(made.to_table(), highlight=False, soft_wrap=True)


@app.command()
def bench(
    grid: Annotated[Path, typer.Argument(help="A grid file, e.g. experiments/grids/mini.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for every cell, e.g. model.device=cuda.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the runs go. [default: runs/NAME]")
    ] = None,
    plan_: Annotated[bool, typer.Option("--plan", help="Only say what would be run.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at the same time. [default: one a device of --devices; else one a core, "
            "one in all with model.device other than cpu]",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs, one a process in turn: 0,1.", show_default=False)
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A part of an axis: seed=0 or dataset=memes,crisis.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A variable of the grid: name=value.")
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Results to judge times from. [default: results]")
    ] = None,
) -> None:
    """Run a grid of experiments: what is missing or stale, on several processes.

    Exit code 1 if a cell failed; the others have run.
    """
    with collector_at_rest(our_process=True):
        from fedmllm.bench import load_grid, processes_for, run_grid
        from fedmllm.bench.table import ended_lines, plan_lines

    found = load_grid(grid, overrides or [], only=only or [], variables=set_ or [])
    sources = measured or [Path("results")]
    names = _listed(devices)
    count = processes or processes_for(found, names)
    if plan_:
        for line in plan_lines(found, out=out, measured=sources, processes=count):
            print(line)
        return
    try:
        ended = run_grid(found, out=out, processes=count, devices=names, measured=sources)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        raise typer.Exit(130) from None
    for line in ended_lines(ended, out or found.out):
        print(line)
    if ended.failed:
        raise typer.Exit(1)


@app.command()
def ls() -> None:
    """List datasets, models, scenarios, settings, algorithms, topologies and prompt styles."""
    from rich.table import Table

    from fedmllm.listing import sections

    console = _console()
    for title, lines in sections():
        console.print(f"[bold]{title}[/bold]")
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        for name, summary in lines:
            table.add_row(f"  {name}", summary)
        console.print(table, highlight=False)


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder of a run, e.g. runs/x/adapter.")],
    image: Annotated[Path | None, typer.Option(help="An image file.")] = None,
    text: Annotated[str | None, typer.Option(help="The text of the sample.")] = None,
    question: Annotated[
        str | None,
        typer.Option(help="A free question, instead of the adapter's own task."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Answer for one image and/or text with a trained adapter."""
    with collector_at_rest(our_process=True):
        from fedmllm.predict import predict as answer

    answer_, options = answer(adapter, image=image, text=text, question=question, device=device)
    console = _console()
    console.print(f"[bold]{answer_}[/bold]", highlight=False)
    for option, probability in options:
        console.print(f"  {probability:.3f}  {option}", highlight=False)


def _listed(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


app.command()(cli_judge.judge)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, result files, or a parent.")],
    out: Annotated[
        list[Path] | None,
        typer.Option(help="What to write: .html, .md, .tex or .csv. [default: report.html]"),
    ] = None,
    title: Annotated[str, typer.Option(help="Its title.")] = "FedMLLM runs",
    condition: Annotated[
        list[str] | None, typer.Option(help="Test conditions of the tables. [default: both]")
    ] = None,
    per_run: Annotated[
        bool, typer.Option("--per-run", help="A row a run, not means over seeds.")
    ] = False,
    figures: Annotated[
        Path | None, typer.Option(help="A folder for all figures as SVG files.")
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Figures as PNG files too.")] = False,
) -> None:
    """Make tables, figures and an HTML page from result files (no model is loaded)."""
    from fedmllm.report import load_results, summary_table, write_figures, write_tables
    from fedmllm.report.arms import boards
    from fedmllm.report.write import check_conditions, check_suffix

    pages = out or [Path("report.html")]
    for path in pages:
        check_suffix(path, per_run=per_run)
    check_conditions(condition or [])
    found, problems = load_results(runs)
    problems += boards(found)[1]
    console = _console()
    if len(found) <= 40:
        console.print(summary_table(found, width=console.width))
    for problem in problems:
        console.print(problem, soft_wrap=True, markup=False)
    for path in pages:
        write_tables(
            found,
            path,
            title=title,
            problems=problems,
            conditions=condition or ["both"],
            per_run=per_run,
        )
        console.print(f"report  {path}", soft_wrap=True)
    if figures is not None:
        for path in write_figures(found, figures, png=png):
            console.print(f"figure  {path}", soft_wrap=True)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A result file or run folder.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Say what differs between two runs: config, environment, every number."""
    from fedmllm.report.compare import compare_lines, load_one

    for line in compare_lines(load_one(first), load_one(second)):
        print(line)


@app.command()
def rerun(
    result: Annotated[Path, typer.Argument(help="A result file or run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to run it. [default: runs/NAME-rerun]")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Differences up to this count as agreement.")
    ] = 1e-6,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last round.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run folder that exists.")
    ] = False,
) -> None:
    """Run a result's config again and say whether the numbers agree; exit code 1 if not."""
    with collector_at_rest(our_process=True):
        from fedmllm.progress import RunProgress
        from fedmllm.report.compare import agreement_lines, load_one
        from fedmllm.rerun import run_again

    old = load_one(result)
    folder = out or Path("runs") / f"{old['name']}-rerun"
    with RunProgress() as progress:
        new = run_again(old, folder, resume=resume, overwrite=overwrite, listener=progress.listen)
    agree, lines = agreement_lines(old, new, tolerance)
    for line in lines:
        print(line)
    if not agree:
        raise typer.Exit(1)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all that it lists.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show or clear the image features that model.feature_cache=disk has kept."""
    from fedmllm import cli_cache

    cli_cache.clear() if clear else cli_cache.show(as_json=json_)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs and the report go.")] = Path(
        "runs/demo"
    ),
    processes: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 2,
) -> None:
    """Six runs on the embedded model and meme task: what modality heterogeneity costs."""
    with collector_at_rest(our_process=True):
        from fedmllm.demo import run_demo

    run_demo(out, processes=processes)


def _console() -> Console:
    from rich.console import Console

    return Console()


def main() -> None:
    """Entry point of the `fedmllm` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _REFUSED or error.filename is None:
            raise
        what = f"{error.filename}: {error.strerror}"
        print(f"error: {what}. Free it, or choose another place", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
