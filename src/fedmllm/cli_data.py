"""`fedmllm data`: where to get a dataset, whether its files are whole, and who holds what.

Heavy modules are imported inside the commands, as in `fedmllm.cli`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmllm.errors import UserError, problem_list, unknown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedmllm.data.check import Checked
    from fedmllm.data.dataset import DatasetSpec
    from fedmllm.manifest import Manifest

app = typer.Typer(
    help="Where to get a dataset, whether its files are whole, who holds what.",
    no_args_is_help=True,
    add_completion=False,
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
        print(json.dumps(found.to_json(), indent=1))  # ASCII, whatever the terminal takes
    else:
        _show_checked(found)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def split(
    name: Annotated[str, typer.Argument(help="A dataset, see `fedmllm ls`.")],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ROOT KEY=VALUE",
            help="The data folder, if it needs one, then options of the dataset, e.g. train=400, "
            "or any config key, e.g. scenario.beta=0.4.",
            show_default=False,
        ),
    ] = None,
    scenario: Annotated[str | None, typer.Option(help="Default: aligned.")] = None,
    setting: Annotated[
        str | None, typer.Option(help="One of the paper's twelve, in place of scenario and alpha.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: 0.")] = None,
    clients: Annotated[int | None, typer.Option(help="Default: 10.")] = None,
    partition: Annotated[str | None, typer.Option(help="Default: dirichlet.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Default: 0.5.")] = None,
    out: Annotated[Path, typer.Option(help="The manifest to write.")] = Path("manifest.json"),
    picture: Annotated[
        Path | None, typer.Option(help="SVG or PNG. Default: beside the manifest.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="A folder for one conversation file per party.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a manifest or an export that exists.")
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option(help="Write nothing: say whether this manifest is also the split here."),
    ] = None,
) -> None:
    """Say who holds what: the manifest with its hash, a table and a picture."""
    asked = {
        "scenario.name": scenario,
        "setting": setting,
        "seed": seed,
        "partition.clients": clients,
        "partition.name": partition,
        "partition.alpha": alpha,
    }
    given = {key: value for key, value in asked.items() if value is not None}
    root, options = _root_and_options(rest or [])
    if verify is not None:
        _verify(verify, name, root, [*options, *(f"{k}={v}" for k, v in given.items())])
        return
    if out.is_dir():
        raise UserError(f"{out} is a folder: give --out a file")
    from fedmllm import manifest as manifests
    from fedmllm.export import check_folder
    from fedmllm.export import export as write_export
    from fedmllm.report.split import check_picture, save_picture

    picture = check_picture(picture or out.with_suffix(".svg"))
    if export is not None:
        check_folder(export, overwrite=overwrite)
    held, dataset = _split(name, root, [*options, *_overrides(given)])
    _check_out(out, held, overwrite=overwrite)
    if export is not None:
        with _writing(export):
            write_export(held, dataset, export, overwrite=overwrite)
    with _writing(out):
        manifests.save(held, out)
    with _writing(picture):
        save_picture(manifests.holdings(held), picture)
    _show(held)
    lines = [f"manifest  {out}", f"picture   {picture}"]
    lines += [f"export    {export}"] if export is not None else []
    print("\n".join([*lines, f"sha256    {held.sha256}"]))


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Make the folder; what the system refuses becomes a `UserError` that names the file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{file} cannot be written ({reason}): choose another place") from error


def _root_and_options(words: list[str]) -> tuple[str | None, list[str]]:
    """The folder, which may stand first, and overrides; a bare key is the dataset's option."""
    root = words.pop(0) if words and ("=" not in words[0] or Path(words[0]).exists()) else None
    odd = next((word for word in words if "=" not in word), None)
    if odd is not None:
        raise UserError(f"{odd!r} is not KEY=VALUE: give one folder, first, then options")
    sections = ("data.", "scenario.", "partition.")
    whole = ("seed=", "scenario=", "setting=", "partition=")
    return root, [w if w.startswith((*sections, *whole)) else f"data.{w}" for w in words]


def _overrides(given: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def _split(name: str, root: str | None, overrides: list[str]) -> tuple[Manifest, Any]:
    """The manifest and dataset that `fedmllm run` would have with the same keys."""
    from fedmllm.config import make_config
    from fedmllm.data import load_dataset
    from fedmllm.experiment import make_manifest

    config = make_config(_raw(name, root), overrides, source="data split")
    dataset = load_dataset(**config.data)
    return make_manifest(config, dataset), dataset


def _raw(name: str, root: str | None) -> dict[str, Any]:
    # nothing is trained, so no cohort needs to fit the clients
    data = {"name": name} | ({"root": root} if root is not None else {})
    return {"name": "split", "topology": "zero-shot", "data": data}


def _check_out(out: Path, held: Manifest, *, overwrite: bool) -> None:
    from fedmllm import manifest as manifests

    if overwrite or not out.exists() or manifests.load(out).sha256 == held.sha256:
        return
    raise UserError(
        f"{out} holds another manifest: give another --out, or --overwrite to replace it"
    )


def _show(held: Manifest) -> None:
    from fedmllm.manifest import holdings
    from fedmllm.report.split import split_tables

    console = _console()
    for table in split_tables(holdings(held), width=console.width):
        console.print(table, highlight=False)
        console.print()
    for note in held.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _verify(file: Path, name: str, root: str | None, overrides: list[str]) -> None:
    """Split this machine's data as the manifest says, and compare."""
    from fedmllm import manifest as manifests
    from fedmllm.config import make_config
    from fedmllm.data import load_dataset

    theirs = manifests.load(file)
    odd = [item for item in overrides if not item.startswith("data.")]
    if odd:
        raise UserError(
            f"--verify takes scenario, seed and partition from {file}: leave out {odd[0]!r}"
        )
    config = make_config(_raw(name, root), overrides, source="data split")
    dataset = load_dataset(**config.data)
    ours = manifests.build_manifest(name, dataset, **manifests.request(theirs))
    found = manifests.differences(theirs, ours)
    if not found:
        print(f"the same split\nsha256    {ours.sha256}")
        return
    import numpy

    print(f"another split: {file} (first) and the data here (second) differ in")
    print("\n".join(f"  {line}" for line in found[:20]))
    if len(found) > 20:
        print(f"  … and {len(found) - 20} more")
    print(f"sha256    {theirs.sha256}\nhere      {ours.sha256} (numpy {numpy.__version__})")
    raise typer.Exit(1)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _spec(name: str) -> DatasetSpec:
    from fedmllm.data import DATASETS

    if name not in DATASETS:
        raise UserError(unknown("dataset", name, DATASETS))
    return DATASETS[name]


def _show_checked(found: Checked) -> None:
    console = _console()
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
