"""`clipindex pack`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import json_option, print_result

if TYPE_CHECKING:
    from clipindex.packing import PackSummary


@click.command(short_help="Pack images into WebDataset shards.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--split",
    default="train",
    show_default=True,
    help="Folder below OUT for the shards; CIFAR: which to read.",
)
@click.option("--kind", type=click.Choice(["folder", "cifar", "csv"]), help="What SOURCE is.  [default: looks at it]")
@click.option(
    "--classes",
    "classnames",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Class names in label order.  [default: sorted names of the source]",
)
@click.option("--templates", metavar="FILE|NAME", help="Prompts with {c} to put beside the class names.")
@click.option("--max-samples", type=click.IntRange(1), default=10_000, show_default=True, help="Most samples a shard.")
@click.option("--max-bytes", type=click.IntRange(1), default=1_000_000_000, show_default=True, help="Largest shard.")
@click.option("--coarse", is_flag=True, help="Label CIFAR-100 by its 20 superclasses.")
@click.option("--overwrite", is_flag=True, help="Replace a split that is there.")
@json_option
def pack(source: Path, out: Path, templates: str | None, as_json: bool, **options: Any) -> int:  # noqa: ANN401
    """Pack images into WebDataset shards, laid out as CLIP_benchmark's data sets are.

    SOURCE is a folder of images (class = subfolder), CIFAR-10 or CIFAR-100 as downloaded (folder or .tar.gz), or a CSV
    with a header: path, and optionally label and caption.
    """
    from clipindex import packing
    from clipindex.progress import reporting
    from clipindex.prompts import read_templates

    with reporting("pack") as report:
        summary = packing.pack(
            source,
            out,
            **options,
            templates=read_templates(templates) if templates else None,
            on_progress=lambda done, total: report(done, total or 0, f"{done:,} images"),
        )
    print_result(summary, as_json, _pack_lines)
    return 0


def _pack_lines(summary: "PackSummary") -> list[str]:
    lines = [
        f"{summary.num_samples:,} samples + {summary.num_rejects:,} rejects, {len(summary.classes):,} classes"
        f" -> {summary.num_shards:,} shards, {summary.num_bytes:,} bytes in {summary.split_dir}"
    ]
    lines += [f"note: {note}" for note in summary.notes]
    lines += [f"reject: {reject.name}: {reject.reason}" for reject in summary.first_rejects]
    return lines + ([f"all rejects: {summary.rejects_path}"] if summary.rejects_path else [])
