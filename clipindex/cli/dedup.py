"""`clipindex dedup`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import json_option, print_result

if TYPE_CHECKING:
    from clipindex.duplicates import DuplicateSummary


@click.command(short_help="Find near-duplicates, and say which of each group to keep.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Cosine from which on two rows are nearly the same.",
)
@click.option(
    "--target-recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.99,
    show_default=True,
    help="Share of such pairs to find.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Where groups.parquet goes.  [default: DIR/duplicates]")
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda or cuda:N; auto is CUDA where there is one."
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    show_default=True,
    help="Of products; what they leave open is computed again in float32.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
              help="Of the sample that is compared with exact search.")  # fmt: skip
@json_option
def dedup(folder: Path, as_json: bool, **options: Any) -> int:  # noqa: ANN401
    """Group the rows of an embedding directory that are nearly the same, and say which of each group to keep.

    DIR needs an index that knows all of its rows; see clipindex index. Rows are joined where their cosine reaches the
    threshold, and groups are what hangs together so. The largest image of each is the one to keep.
    """
    from clipindex.progress import by_steps, reporting

    with reporting("dedup") as report:
        report(0, 0, "")
        from clipindex import duplicates

        summary = duplicates.find_duplicates(folder, on_progress=by_steps(report), **options)
    print_result(summary, as_json, _dedup_lines)
    return 0


def _dedup_lines(summary: "DuplicateSummary") -> list[str]:
    found = (
        f"{summary.recall:.4f} of the pairs found, by exact search for {summary.checked:,} rows that have any"
        if summary.checked
        else "no row of the sample that was searched exactly has any"
    )
    return [
        f"{summary.duplicates:,} of {summary.rows:,} rows could go: {summary.groups:,} groups at a cosine of"
        f" {summary.threshold:g}, the largest of {summary.largest:,} rows -> {summary.out}/groups.parquet",
        f"{found}; {summary.seconds:,.1f} s",
    ]
