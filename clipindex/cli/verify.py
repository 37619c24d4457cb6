"""`clipindex verify`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import json_option, model_options, print_result, refuse_options, spec

if TYPE_CHECKING:
    from clipindex.verification import VerifySummary

FAULTS_SHOWN = 20


@click.command(short_help="Check a directory: every sample is a row or a reject.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, metavar="[SHARDS]...")
@click.option("--deep", is_flag=True, help="Read the tars again too, and embed some of their images anew.")
@click.option("--sample", type=click.IntRange(1), default=256, show_default=True,
              help="Rows to embed anew with --deep, drawn at random.")  # fmt: skip
@model_options(required=False)
@json_option
def verify(folder: Path, sources: tuple[str, ...], deep: bool, sample: int, as_json: bool, **options: Any) -> int:  # noqa: ANN401
    """Check an embedding directory: its files, and that every sample is a row or a reject.

    With SHARDS, as for embed, each of those tars must be there; without, shards that are missing cannot be known.

    Exits with status 1 where there is any fault, and names what to delete or to run again. --model says how to load the
    model with --deep, where the directory's own record does not lead to its weights on this machine.
    """
    context = click.get_current_context()
    if not deep:
        names = ("sample", "model", "device", "precision", "pretrained", "random_init", "quick_gelu")
        refuse_options(context, names, "only --deep embeds anything")
    elif options["model"] is None:
        refuse_options(context, ("pretrained", "random_init", "quick_gelu"), "it belongs to --model, which is missing")
    from clipindex.progress import reporting

    with reporting("verify") as report:
        report(0, 0, "")
        from clipindex import verification

        started = time.monotonic()
        summary = verification.verify(
            folder,
            sources,
            deep=deep,
            sample=sample,
            model=spec(options) if options["model"] else None,
            device=options["device"],
            precision=options["precision"],
            on_progress=lambda rows, total: report(
                rows, total, f"{rows:,} rows, {rows / max(time.monotonic() - started, 1e-9):,.0f}/s"
            ),
        )
    print_result(summary, as_json, _verify_lines)
    return 1 if summary.faults else 0


def _verify_lines(summary: "VerifySummary") -> list[str]:
    how = "read with their tars" if summary.deep else "read"
    lines = [
        f"{summary.rows:,} rows + {summary.rejects:,} rejects = {summary.samples:,} samples,"
        f" {summary.shards:,} shards {how} in {summary.seconds:,.1f} s"
    ]
    if summary.least_cosine is not None:
        lines.append(f"{summary.embedded_again:,} images embedded anew: cosine {summary.least_cosine:.5f} at worst")
    lines += [f"note: {note}" for note in summary.notes[:FAULTS_SHOWN]]
    lines += [f"fault: {fault.path}: {fault.what}; {fault.remedy}" for fault in summary.faults[:FAULTS_SHOWN]]
    if len(summary.faults) > FAULTS_SHOWN:
        lines.append(f"{len(summary.faults) - FAULTS_SHOWN:,} faults more; --json names them all")
    count = len(summary.faults)
    return [*lines, f"{count:,} fault{'s' if count > 1 else ''}" if count else "no fault"]
