"""`clipindex retrieval`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import json_option, model_options, print_result, refuse_options, spec

if TYPE_CHECKING:
    from clipindex.caption_retrieval import RetrievalSummary


def _parse_ks(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        ks = tuple(sorted({int(part) for part in value.split(",")}))
    except ValueError:
        ks = (0,)
    if ks[0] < 1:
        raise click.BadParameter(f"{value!r}: write numbers from 1 with commas between, as 1,5,10")
    return ks


@click.command(short_help="Measure recall@k of images by captions, and captions by images.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--k", "ks", default="1,5,10", show_default=True, callback=_parse_ks, help="How far down to look.")
@model_options(required=False)
@json_option
def retrieval(folder: Path, ks: tuple[int, ...], as_json: bool, **options: Any) -> int:  # noqa: ANN401
    """Measure how well captions find their images, and images their captions: recall@k as CLIP_benchmark defines it.

    A caption is a line of a sample's .txt member. Rows without are left out. --model says how to load the model, where
    DIR's own record does not lead to its weights on this machine.
    """
    if options["model"] is None:
        names = ("pretrained", "random_init", "quick_gelu")
        refuse_options(click.get_current_context(), names, "it belongs to --model, which is missing")
    from clipindex.progress import reporting

    with reporting("retrieval") as report:
        report(0, 0, "loading the model")
        from clipindex import caption_retrieval

        started = time.monotonic()
        summary = caption_retrieval.measure_retrieval(
            folder,
            k=ks,
            model=spec(options) if options["model"] else None,
            device=options["device"],
            precision=options["precision"],
            on_captions=lambda done: report(
                0, 0, f"{done:,} captions embedded, {done / max(time.monotonic() - started, 1e-9):,.0f}/s"
            ),
            on_images=lambda done, total: report(done, total, f"{done:,} of {total:,} images compared"),
        )
    print_result(summary, as_json, _lines)
    return 0


def _lines(summary: "RetrievalSummary") -> list[str]:
    ks = [name.partition("@")[2] for name in summary.metrics if name.startswith("image")]
    ways = {"text -> image": "image_retrieval_recall@", "image -> text": "text_retrieval_recall@"}
    lines = [
        f"{summary.images:,} images, {summary.captions:,} captions in {summary.seconds:,.1f} s -> {summary.out}",
        " " * 13 + "".join(f"{f'recall@{k}':>12}" for k in ks),
        *(f"{way}{''.join(f'{summary.metrics[name + k]:>12.2%}' for k in ks)}" for way, name in ways.items()),
    ]
    if summary.rows_without_captions:
        lines.append(f"note: {summary.rows_without_captions:,} rows have no caption and are left out")
    if summary.empty_captions:
        lines.append(f"note: {summary.empty_captions:,} captions are empty lines; CLIP_benchmark counts them too")
    return lines
