"""`clipindex bench`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import json_option

if TYPE_CHECKING:
    from clipindex.bench.run import BenchReport


@click.command(short_help="Measure each stage of embedding beside what bounds it.")
@click.option(
    "--models",
    default="ViT-B-32",
    show_default=True,
    metavar="NAME,…",
    help="open_clip architectures, or anything else that embed takes as --model.",
)
@click.option("--precisions", default="auto", show_default=True, metavar="NAME,…", help="auto, bf16, fp16, fp32.")
@click.option("--batch-sizes", default="", metavar="N,…", help="To encode at.  [default: found by measuring]")
@click.option(
    "--random-init",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    metavar="SEED",
    help="Of the random weights that architectures get; speed does not depend on them.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--images", type=click.IntRange(1), help="Different ones to embed.  [default: 512 on CPU, 16384 on CUDA]")
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=15,
    show_default=True,
    help="That embedding from end to end should take, going over the images as often as that needs.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the drawn images here, and use them again.  [default: a temporary directory]",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the result (.png, .svg or .pdf).")
@json_option
def bench(
    models: str,
    precisions: str,
    batch_sizes: str,
    plot: Path | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> int:
    """Measure what this machine can embed, stage by stage, beside what bounds each stage.

    Draws its own images and needs no weights, so nothing is downloaded.
    """
    from clipindex.bench.run import bench as run_bench
    from clipindex.progress import reporting

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot {plot}: give a name that ends in .png, .svg or .pdf")
    with reporting("bench") as report:
        result = run_bench(
            _listed(models),
            precisions=_listed(precisions),
            batch_sizes=[_batch_size(size) for size in _listed(batch_sizes)],
            **options,
            on_step=lambda step: report(0, 0, step),
        )
    if plot is not None:
        from clipindex.bench.plot import draw

        draw(result, plot)
    if as_json:
        click.echo(json.dumps(result.document(), indent=2))
    else:
        click.echo("\n".join(_bench_lines(result)))
    return 0


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _batch_size(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise click.UsageError(f"--batch-sizes: {text!r} is no number of images")
    return int(text)


def _bench_lines(report: "BenchReport") -> list[str]:
    machine, rows = report.machine, report.measurements
    width = max(len(row.setting) for row in rows)
    lines = [
        f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, torch {machine['packages']['torch']}",
        "",
        f"{'stage':<10}  {'':<{width}}  {'images/s':>10}  {'ceiling':>10}  ratio",
    ]
    for row in rows:
        lines.append(
            f"{row.stage:<10}  {row.setting:<{width}}  {row.images_per_s:>10,.0f}  {row.ceiling_per_s:>10,.0f}"
            f"  {row.of_ceiling:>5.2f}"
        )
    ceilings = dict.fromkeys(f"{row.stage}: {row.ceiling}" for row in rows)
    notes = [f"{row.setting}: {row.note}" for row in rows if row.note]
    memory = f"peak memory {report.peak_memory_bytes / 2**30:.1f} GiB"
    if report.peak_device_memory_bytes:
        memory += f", on the device {report.peak_device_memory_bytes / 2**30:.1f} GiB"
    return [*lines, "", "ceilings", *(f"  {line}" for line in ceilings), "", *notes, memory]
