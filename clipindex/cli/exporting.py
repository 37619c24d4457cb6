"""`clipindex export`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clipindex.cli.options import json_option, print_result

if TYPE_CHECKING:
    from clipindex.exchange import ExportSummary


@click.command("export")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["npy", "parquet", "arrow"]), required=True,
              help="npy, with metadata, for clip-retrieval and autofaiss; Parquet with lists, for Spark and others;"
              " Arrow, for Hugging Face datasets.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float16", "float32"]),
              help="Of the vectors.  [default: float32 of parquet, else that of DIR]")  # fmt: skip
@click.option("--shards", multiple=True, metavar="NAME", help="Only this shard, or those like train-*; repeatable.")
@click.option("--pre-projection", is_flag=True,
              help="The features before the projection in the place of the embeddings.")  # fmt: skip
@json_option
def export_embeddings(
    folder: Path,
    out: Path,
    form: str,
    dtype: str | None,
    shards: tuple[str, ...],
    pre_projection: bool,
    as_json: bool,
) -> None:
    """Write an embedding directory's rows for other tools.

    OUT is a new folder. A run that was stopped goes on where it was.
    """
    from clipindex.progress import reporting

    with reporting("export") as report:
        report(0, 0, "")
        from clipindex import exchange

        summary = exchange.export_embeddings(
            folder,
            out,
            format=form,
            dtype=dtype,
            shards=shards,
            pre_projection=pre_projection,
            on_progress=lambda rows, total: report(rows, total, f"{rows:,} rows"),
        )
    print_result(summary, as_json, _lines)


def _lines(summary: "ExportSummary") -> list[str]:
    before = f", {summary.shards_done_before:,} of them by an earlier run" if summary.shards_done_before else ""
    lines = [f"{summary.rows:,} rows of {summary.shards:,} shards{before} -> {summary.out} in {summary.seconds:,.1f} s"]
    if summary.shards_empty:
        lines.append(f"{summary.shards_empty:,} shards have no rows and no file")
    return lines
