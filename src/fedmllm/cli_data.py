"""`fedmllm data`: where to get a dataset, and whether the files are whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmllm.errors import UserError, problem_list, unknown

if TYPE_CHECKING:
    from rich.table import Table

    from fedmllm.data.check import Checked
    from fedmllm.data.dataset import DatasetSpec

app = typer.Typer(
    help="Where to get a dataset, and whether its files are whole.", no_args_is_help=True
)


@app.command()
def info(name: Annotated[str, typer.Argument(help="A dataset of `fedmllm ls`.")]) -> None:
    """Say where to get a dataset, its licence and citation, and how its files must lie."""
    spec = _spec(name)
    lines = [("", spec.summary), ("get it", spec.source), ("licence", spec.licence)]
    lines.append(("cite", spec.citation))
    if spec.files is not None:
        counts = [f"{what} {count:,}" for what, count in spec.files.published.items()]
        lines.append(("unpack", spec.files.unpack))
        lines.append(("published", f"{', '.join(counts) or 'no counts'} ({spec.files.counted_by})"))
        lines.append(("check", f"fedmllm data check {name} FOLDER"))
        lines.append(("use", f"data.name={name} data.root=FOLDER"))
    options = ", ".join(f"data.{option}={value!r}" for option, value in spec.options.items())
    lines.append(("options", options))
    print(name)
    for head, text in lines:
        if text:
            print(f"  {head:10}{text}")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A dataset of `fedmllm ls` that comes as files.")],
    root: Annotated[Path, typer.Argument(help="The folder or archive.", show_default=False)],
    images: Annotated[bool, typer.Option(help="Decode every image.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Count, compare with the published counts, and list every problem. Exit code 1 if any."""
    import json

    from rich.console import Console
    from rich.progress import Progress

    from fedmllm.data.check import check as check_files

    spec = _spec(name)
    with Progress(console=Console(stderr=True), disable=json_, transient=True) as bars:
        task = bars.add_task("reading", total=None)  # unpacks a tar archive the first time
        found = check_files(
            name,
            spec,
            root,
            images=images,
            progress=lambda done, total: bars.update(
                task, description="images", completed=done, total=total
            ),
        )
    if json_:
        print(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        _show(found)
    if not found.ok:
        raise typer.Exit(1)


def _spec(name: str) -> DatasetSpec:
    from fedmllm.data import DATASETS

    if name not in DATASETS:
        raise UserError(unknown("dataset", name, DATASETS))
    return DATASETS[name]


def _show(found: Checked) -> None:
    from rich.console import Console

    console = Console()
    console.print(_counts(found))
    console.print(f"images decoded: {found.images_checked:,}", highlight=False)
    if found.notes:
        text = problem_list(found.notes, most=5).replace("problem", "remark", 1)
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    verdict = "nothing is wrong" if found.ok else problem_list(found.problems)
    console.print(verdict, highlight=False, markup=False, soft_wrap=True)


def _counts(found: Checked) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", "found", "published", box=None)
    for name in list(dict.fromkeys([*sorted(found.counts), *found.published])):
        published = found.published.get(name)
        told = "" if published is None else f"{published:,}"
        count = found.counts.get(name)
        table.add_row(escape(name), "not there" if count is None else f"{count:,}", told)
    return table
