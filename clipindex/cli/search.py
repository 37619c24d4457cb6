"""`clipindex search`."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import json_option, model_options, print_result, refuse_options, spec

if TYPE_CHECKING:
    from clipindex.retrieval import Hit, Query

SHEET_COLUMNS = 5
SHEET_SIDE = 180
"""Pixels."""
LABELS_SHOWN = 10
"""Of a row, on the terminal."""


@click.command(short_help="Find the images nearest to a text, an image, or one another.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="What to look for; may be repeated.")
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="An image like which to find others; may be repeated.",
)
@click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="KEY",
    help="A row of DIR like which to find others; SHARD:KEY where several shards have it.",
)
@click.option("--minus", multiple=True, metavar="TEXT", help="What to lead away from; may be repeated.")
@click.option(
    "--queries",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Instead: a file with a text a line, each a query of its own.",
)
@click.option("-k", type=click.IntRange(1, 1_000_000), default=10, show_default=True, help="Rows for each query.")
@click.option(
    "--label",
    "labels",
    type=click.IntRange(-(2**31), 2**31 - 1),
    multiple=True,
    metavar="N",
    help="Only rows with this class number, as their label or among their labels; repeatable.",
)
@click.option("--caption", metavar="WORDS", help="Only rows whose caption contains this, whatever its case.")
@click.option("--exact", is_flag=True, help="Look at every row, though there is an index.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.parquet", help="Write all hits to this file.")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Cut the images out of their tars: into this folder, or, where it ends in .png, onto a sheet.",
)
@click.option("--open", "open_sheet", is_flag=True, help="Show the images on a sheet, in the system's own viewer.")
@model_options(required=False)
@json_option
def search(
    folder: Path,
    texts: tuple[str, ...],
    images: tuple[Path, ...],
    keys: tuple[str, ...],
    minus: tuple[str, ...],
    queries: Path | None,
    k: int,
    labels: tuple[int, ...],
    caption: str | None,
    exact: bool,
    out: Path | None,
    save: Path | None,
    open_sheet: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> int:
    """Find the images of an embedding directory that are nearest to a text, an image, or one another.

    Several --text, --image and --key are one query: their vectors are added up, those of --minus subtracted. Where DIR
    has an index, as clipindex index builds it, the search goes through that, else it looks at every row.
    """  # fmt: skip
    context = click.get_current_context()
    if options["model"] is None:
        refuse_options(context, ("pretrained", "random_init", "quick_gelu"), "it belongs to --model, which is missing")
    if queries is not None and (texts or images or keys or minus):
        raise click.UsageError("give --queries or a query, not both")
    if queries is None and not (texts or images or keys):
        raise click.UsageError("give --text, --image, --key or --queries")
    if out is not None and out.suffix != ".parquet":
        raise click.UsageError(f"--out {out}: it is Parquet that is written; let the name end in .parquet")
    if save is not None and save.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".pdf"):
        raise click.UsageError(f"--save {save}: a sheet is a .png; a folder has another name")
    from clipindex.progress import reporting

    started = time.monotonic()
    with reporting("search") as report:
        report(0, 0, "")
        from clipindex import nearest, retrieval

        asked = (
            [retrieval.Query(texts=texts, images=images, keys=keys, minus=minus)]
            if queries is None
            else [retrieval.Query(texts=(line,)) for line in retrieval.read_queries(queries)]
        )
        found = retrieval.search(
            folder,
            asked,
            k=k,
            exact=exact,
            where=nearest.Filter(labels=labels, caption=caption),
            model=spec(options) if options["model"] else None,
            device=options["device"],
            precision=options["precision"],
            on_progress=lambda rows: report(0, 0, f"{rows:,} rows, {rows / (time.monotonic() - started):,.0f}/s"),
        )
    if out is not None:
        retrieval.write_hits(out, asked, found)
        click.echo(f"{sum(map(len, found)):,} hits -> {out}", err=True)
    saved = save is None or _save(folder, save, asked, found)
    saved = (not open_sheet or _open(folder, asked, found)) and saved
    document = [{"query": _named(query), "hits": hits} for query, hits in zip(asked, found, strict=True)]
    print_result(document, as_json, _lines)
    return 0 if saved else 1


def _named(query: "Query") -> str:
    plus = [*query.texts, *map(str, query.images), *query.keys]
    return " + ".join(plus) + "".join(f" - {text}" for text in query.minus)


def _lines(document: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for one in document:
        if len(document) > 1:
            lines.append(f"{one['query']}:")
        lines += [_line(rank, hit) for rank, hit in enumerate(one["hits"], 1)] or ["  no row passes the filter"]
    return lines


def _line(rank: int, hit: "Hit") -> str:
    caption = "" if hit.caption is None else f"  {hit.caption.strip()[:60]!r}"
    label = "" if hit.label is None else f"  label {hit.label}"
    label += "" if hit.labels is None else f"  labels {_cut(hit.labels)}"
    return f"  {rank:>3}  {hit.cosine:.4f}  {hit.key}{label}{caption}  [{hit.shard}]"


def _cut(labels: Sequence[int]) -> str:
    shown = [str(label) for label in labels[:LABELS_SHOWN]] + ["…"] * (len(labels) > LABELS_SHOWN)
    return ",".join(shown) or "none"


def _open(folder: Path, asked: "Sequence[Query]", found: "Sequence[Sequence[Hit]]") -> bool:
    """Whether there was anything to show; without a viewer, it is said where the sheet lies."""
    sheet = Path(tempfile.mkdtemp(prefix="clipindex-")) / "hits.png"
    if not _save(folder, sheet, asked, found):
        return False
    if sheet.exists() and click.launch(str(sheet)):
        click.echo(f"no program here shows images; the sheet is {sheet}", err=True)
    return True


def _save(folder: Path, path: Path, asked: "Sequence[Query]", found: "Sequence[Sequence[Hit]]") -> bool:
    """Whether any image could be had."""
    from clipindex import retrieval
    from clipindex.errors import SourceError
    from clipindex.sheet import Group, Tile, contact_sheet

    images: list[tuple[int, int, Hit, bytes | None]] = []
    why: dict[str, int] = {}
    for at, hits in enumerate(found):
        for rank, hit in enumerate(hits, 1):
            data = None
            try:
                data = retrieval.read_image(folder, hit)
            except SourceError as error:
                why[str(error)] = why.get(str(error), 0) + 1
            images.append((at, rank, hit, data))
    num_saved = len(images) - sum(why.values())
    if num_saved and path.suffix.lower() == ".png":
        groups = [Group(_named(query), []) for query in asked]
        for at, rank, hit, image in images:
            words = f"{rank}  {hit.cosine:.3f}\n{hit.key}" if image else f"{rank}  not readable\n{hit.key}"
            groups[at].tiles.append(Tile(image, words))
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(groups, columns=SHEET_COLUMNS, side=SHEET_SIDE).save(path)
    elif num_saved:
        path.mkdir(parents=True, exist_ok=True)
        for at, rank, hit, image in images:
            if image is not None:
                query = f"{at + 1:03}-" if len(found) > 1 else ""
                (path / f"{query}{rank:03}-{retrieval.file_name(hit, image)}").write_bytes(image)
    for reason, count in why.items():
        click.echo(f"{count:,} images not saved: {reason}", err=True)
    click.echo(f"{num_saved:,} of {len(images):,} images -> {path}" if num_saved else "no image saved", err=True)
    return bool(num_saved) or not images
