"""`clipindex embed`, and embedding on the way to something else."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import apply, embed_options, json_option, model_options, print_result

if TYPE_CHECKING:
    from clipindex.embed_job import EmbedSummary
    from clipindex.pipeline import Progress
    from clipindex.store import Plan


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SHARDS...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Embedding directory.")
@model_options(required=True)
@click.option(
    "--features",
    type=click.Choice(["projected", "pre-projection", "both"]),
    default="projected",
    show_default=True,
    help="Of a CLIP tower, before or after its last linear layer; texts need projected.",
)
@apply(embed_options)
@json_option
def embed(sources: tuple[str, ...], out: Path, max_reject_rate: float, as_json: bool, **options: Any) -> int:  # noqa: ANN401
    """Embed the images of WebDataset tars into Parquet shards.

    SHARDS are paths, folders, globs, brace ranges ({000..999}.tar), s3:// https:// hf:// URLs, or @FILE with one of
    these a line. Shards that are done already are passed over.
    """
    summary, _ = run_embed(sources, out, options)
    print_result(summary, as_json, embed_lines)
    return embed_status(summary, max_reject_rate)


def run_embed(sources: Sequence[str], out: Path, options: dict[str, Any]) -> tuple["EmbedSummary", list[str]]:
    """The summary, and the names of the shards that the sources name."""
    names: list[str] = []
    with _embed_reporting() as (on_plan, on_progress):
        from clipindex import embed_job

        def note_names(plan: "Plan") -> None:
            names.extend(shard.name for shard in (*plan.done, *plan.changed, *plan.todo))
            on_plan(plan)

        summary = embed_job.embed(sources, out, **options, on_plan=note_names, on_progress=on_progress)
    return summary, sorted(names)


def embed_status(summary: "EmbedSummary", max_reject_rate: float) -> int:
    """The exit status of a run, after saying what did not go well."""
    for url, why in summary.shards_failed.items():
        click.echo(f"failed: {why}" if url in why else f"failed: {url}: {why}", err=True)
    for url, why in summary.shards_salvaged.items():
        click.echo(f"salvaged: {url}: {why.replace(f'{url}: ', '')}", err=True)
    for url in summary.shards_changed:
        click.echo(f"changed: {url} differs from what its rows were made of; --refresh embeds it again", err=True)
    if summary.shards_failed:
        return 1
    if summary.reject_rate > max_reject_rate:
        share = f"{summary.reject_rate:.1%} of the samples"
        click.echo(f"{share} are rejects, above --max-reject-rate {max_reject_rate:g}", err=True)
        return 3
    return 0


@contextlib.contextmanager
def _embed_reporting() -> Iterator[tuple[Callable[["Plan"], None], Callable[["Progress"], None]]]:
    from clipindex.progress import reporting

    num_shards, num_bytes, started = 0, 0, 0.0
    with reporting("embed") as report:
        report(0, 0, "loading the model")

        def on_plan(plan: "Plan") -> None:
            nonlocal num_shards, num_bytes, started
            num_shards, num_bytes = len(plan.todo), sum(shard.size for shard in plan.todo)
            started = time.monotonic()
            logging.getLogger("clipindex").info(
                "%d shards to embed, %d done before, %d changed since",
                num_shards,
                len(plan.done),
                len(plan.changed),
            )

        def on_progress(now: "Progress") -> None:
            counts = now.counts
            images = counts.rows + counts.rejects
            rate = images / max(time.monotonic() - started, 1e-9)
            note = f"{images:,} images, {rate:,.0f}/s, {counts.rejects:,} rejects, shards {counts.shards}/{num_shards}"
            report(counts.bytes, num_bytes, note)

        yield on_plan, on_progress


def embed_lines(summary: "EmbedSummary") -> list[str]:
    """A run in a few lines for a person."""
    stages = ", ".join(f"{count:,} at {stage}" for stage, count in summary.rejects_by_stage.items())
    lines = [
        f"{summary.rows:,} rows + {summary.rejects:,} rejects = {summary.samples:,} samples"
        f" in {summary.seconds:,.1f} s ({summary.images_per_s:,.0f} images/s, {summary.precision} on {summary.device})",
        f"{summary.shards_embedded:,} shards embedded, {summary.shards_done_before:,} done before,"
        f" {len(summary.shards_failed):,} failed, {len(summary.shards_changed):,} changed since -> {summary.out}",
    ]
    if summary.shards_done_elsewhere:
        lines.append(f"{summary.shards_done_elsewhere:,} shards were done by another run meanwhile")
    if stages:
        lines.append(f"rejects: {stages}; why: {summary.out}/rejects")
    if summary.samples:
        busy = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in summary.stages.busy.items())
        lines.append(f"bound by {summary.stages.bound_by}; at work: {busy}")
        there = f", {summary.decoded_on_device:,} images there" if summary.decoded_on_device else ""
        lines.append(f"decoded on {summary.decode} ({summary.decode_reason}){there}")
        lines.append(f"the encoder waited {summary.stages.device_waited_s:,.1f} s for images")
    return lines
