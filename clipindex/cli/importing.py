"""`clipindex import`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import MAX_REJECT_RATE, apply, json_option, print_result, spec_options

if TYPE_CHECKING:
    from clipindex.exchange import ImportSummary


@click.command("import")
@click.argument("source", metavar="SOURCE")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Embedding directory.")
@click.option("--ids", metavar="FILE", help="Whose vectors they are, for a .npy file: a text with an id a line, Parquet"
              " with a column key, or a .npy of strings.")  # fmt: skip
@apply(spec_options(required=True))
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True,
              help="Of the embedding column.")  # fmt: skip
@click.option("--refresh", is_flag=True, help="Import again the files that changed since.")
@click.option("--max-reject-rate", type=click.FloatRange(0, 1), default=MAX_REJECT_RATE, show_default=True,
              help="Exit with status 3 where more of the vectors are rejects.")  # fmt: skip
@json_option
def import_embeddings(source: str, out: Path, max_reject_rate: float, as_json: bool, **options: Any) -> int:  # noqa: ANN401
    """Take over vectors that another program made.

    SOURCE is a folder that clip-retrieval wrote (img_emb/*.npy, metadata/*.parquet), or one .npy file. --model must
    name the model that made them: nothing in the vectors can prove it. Files that are done already are passed over.
    """
    from clipindex.progress import reporting

    with reporting("import") as report:
        report(0, 0, "loading the model")
        from clipindex import exchange

        summary = exchange.import_embeddings(
            source, out, **options, on_progress=lambda rows, share: report(share, 1, f"{rows:,} vectors")
        )
    print_result(summary, as_json, _lines)
    return _status(summary, max_reject_rate)


def _status(summary: "ImportSummary", max_reject_rate: float) -> int:
    for file, why in summary.shards_failed.items():
        click.echo(f"failed: {why}" if file in why else f"failed: {file}: {why}", err=True)
    for file in summary.shards_changed:
        click.echo(f"changed: {file} differs from what its rows were made of; --refresh imports it again", err=True)
    if summary.shards_failed:
        return 1
    if summary.reject_rate > max_reject_rate:
        share = f"{summary.reject_rate:.1%} of the vectors"
        click.echo(f"{share} are rejects, above --max-reject-rate {max_reject_rate:g}", err=True)
        return 3
    return 0


def _lines(summary: "ImportSummary") -> list[str]:
    stages = ", ".join(f"{count:,} at {stage}" for stage, count in summary.rejects_by_stage.items())
    lines = [
        f"{summary.rows:,} rows + {summary.rejects:,} rejects = {summary.samples:,} vectors"
        f" in {summary.seconds:,.1f} s ({summary.vectors_per_s:,.0f}/s)",
        f"{summary.shards_imported:,} files imported, {summary.shards_done_before:,} done before,"
        f" {len(summary.shards_failed):,} failed, {len(summary.shards_changed):,} changed since -> {summary.out}",
    ]
    if summary.shards_done_elsewhere:
        lines.append(f"{summary.shards_done_elsewhere:,} files were done by another run meanwhile")
    if summary.shards_there:
        file, shard = next(iter(summary.shards_there.items()))
        lines.append(
            f"{len(summary.shards_there):,} files have rows that are there already, such as {file} (shard {shard}):"
            " passed over"
        )
    if summary.normalised:
        lines.append(f"{summary.normalised:,} vectors were not of unit length; they are now, and norm has their length")
    if stages:
        lines.append(f"rejects: {stages}; why: {summary.out}/rejects")
    return lines
