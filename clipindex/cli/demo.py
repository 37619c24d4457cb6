"""`clipindex demo`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clipindex.cli.options import json_option, print_result

if TYPE_CHECKING:
    from clipindex.demo import DemoStep, DemoSummary


@click.command(short_help="See all of it work on shipped images, without a network.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("clipindex-demo"),
    show_default=True,
    help="Directory to make; an earlier demo there is replaced.",
)
@json_option
def demo(out: Path, as_json: bool) -> int:
    """See all of it work on shipped images and a shipped model, without a network."""
    from clipindex.demo import run_demo

    if not as_json:
        click.echo(
            "real images -> WebDataset tars -> CLIP embeddings in Parquet -> zero-shot classes (no training on them)\n"
        )
    summary = run_demo(out, (lambda step: None) if as_json else (lambda step: click.echo("\n".join(_step_lines(step)))))
    print_result(summary, as_json, _demo_lines)
    return 0


def _step_lines(step: "DemoStep") -> list[str]:
    lines = [
        f"{step.name}: {step.about}",
        f"  embed     {step.rows:>4} rows + {step.rejects} rejects = {step.samples} samples,"
        f" {step.images_per_s:,.0f} images/s",
    ]
    if step.classified is not None and step.classified.acc1 is not None:
        found = step.classified
        lines.append(f"  classify  {found.acc1:>6.2%} right at first guess among {found.classes} classes")
    return [*lines, ""]


def _demo_lines(summary: "DemoSummary") -> list[str]:
    return [
        f"done in {summary.seconds} s. Look at:",
        f"  {summary.sheet}   images and what they were taken for",
        *(f"  {summary.out}/{step.name}/   {_what_lies(step)}" for step in summary.steps),
    ]


def _what_lies(step: "DemoStep") -> str:
    return "embeddings/*.parquet" + (", predictions/*.parquet, predictions/metrics.json" if step.classified else "")
