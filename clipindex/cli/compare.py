"""`clipindex compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import (
    apply,
    check_picture,
    json_option,
    parse_bytes,
    parse_shots,
    parse_strength,
    print_result,
    refuse_options,
    templates_for,
)

if TYPE_CHECKING:
    from clipindex.probing import Comparison


def _shots_or_none(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    return [] if value == "none" else parse_shots(context, parameter, value) or []


compare_options = [
    click.option("--test", "tests", type=click.Path(path_type=Path), multiple=True, metavar="DIR2",
                 help="Test on this directory; once for each DIR, in the same order."),
    click.option("--split", "held_out", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="FRACTION",
                 help="Or on this fraction of each class of the common rows.  [default: 0.2]"),
    click.option("--shots", callback=_shots_or_none, default="1,2,4,8,16", show_default=True, metavar="N,N,…|none",
                 help="Training rows a class of the few-shot probes."),
    click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Draws for each of --shots."),
    click.option("--seed", type=click.IntRange(0, 2**32), default=0, show_default=True,
                 help="Of all that is drawn at random."),
    click.option("--c", "c", callback=parse_strength, default="0.316", show_default=True, metavar="C|auto",
                 help="scikit-learn's C; auto searches it for each encoder, as appendix A.3 of the CLIP paper does."),
    click.option("--features", type=click.Choice(["raw", "normalized"]), default="raw", show_default=True,
                 help="The encoder's output as it was, or brought to unit length."),
    click.option("--pre-projection", is_flag=True,
                 help="Let probes learn from the features before the projection, where DIR was embedded with both."),
    click.option("--projected", is_flag=True,
                 help="With --pre-projection: probes of the features after it as well, so that DIR is compared with"
                      " itself; one DIR is then enough."),
    click.option("--classes", type=click.Path(path_type=Path), metavar="FILE",
                 help="Class names, one a line, in the order of the labels: zero-shot is measured as well."),
    click.option("--templates", metavar="FILE|NAME",
                 help="Prompts for that, as for classify.  [default: those beside the class names, else simple]"),
    click.option("--model", nargs=2, multiple=True, metavar="DIR MODEL",
                 help="For zero-shot: where the model of DIR is, if not where its record says: a weights file,"
                      " hf-hub:ORG/REPO, local-dir:PATH or a model directory; may be repeated."),
    click.option("--out", type=click.Path(path_type=Path), default="compare", show_default=True, metavar="FOLDER",
                 help="Where compare.json and compare.png go; those of an earlier run are replaced."),
    click.option("--plot", type=click.Path(path_type=Path), metavar="FILE",
                 help="The picture, .png, .svg or .pdf.  [default: compare.png in --out]"),
    click.option("--memory", "memory_bytes", callback=parse_bytes, metavar="SIZE",
                 help="What one DIR's embeddings may take, as 4GB; more are read in each pass."
                      "  [default: a quarter of all]"),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N."),
    click.option("--precision", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto", show_default=True,
                 help="Of the text towers."),
]  # fmt: skip


@click.command(short_help="Compare encoders: zero-shot, few-shot and full linear probes.")
@click.argument("folders", metavar="DIR_A DIR_B …", nargs=-1, required=True, type=click.Path(path_type=Path))
@apply(compare_options)
@json_option
def compare(
    folders: tuple[Path, ...],
    tests: tuple[Path, ...],
    seeds: int,
    shots: list[int],
    classes: Path | None,
    templates: str | None,
    model: Sequence[tuple[str, str]],
    out: Path,
    plot: Path | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> int:
    """Compare encoders by embeddings that they made of the same images: zero-shot, few-shot and full linear probes.

    Rows are joined by key, or by shard and key where keys come twice; those that not every DIR has are left out, and
    named. All encoders are trained and tested on the same rows.
    """
    context = click.get_current_context()
    check_picture(plot)
    if not shots:
        refuse_options(context, ("seeds",), "it belongs to --shots, of which there are none")
    if classes is None:
        refuse_options(context, ("templates", "model", "precision"), "only --classes needs the model")
    given = [folder for folder, _ in model]
    twice = next((folder for folder in given if given.count(folder) > 1), None)
    if twice is not None:
        raise click.UsageError(f"--model {twice} is given twice: give one model for a directory")
    from clipindex.progress import reporting

    with reporting("compare") as report:
        report(0, 0, "")
        from clipindex import probing
        from clipindex.probing.compare_plot import COMPARISON_PICTURE, draw_comparison

        found = probing.compare_encoders(
            folders,
            tests=tests,
            shots=shots,
            seeds=seeds,
            names=classes,
            templates=templates_for(classes, templates),
            models=dict(model),
            out=out,
            on_progress=report,
            **options,
        )
        picture = out / COMPARISON_PICTURE
        draw_comparison(found, plot or picture)
        if plot is not None and plot.resolve() != picture.resolve():
            picture.unlink(missing_ok=True)  # of an earlier run, and no picture of this one
    print_result(found, as_json, _lines)
    return 0


def _lines(found: "Comparison") -> list[str]:
    lines = [
        f"{found.training_rows:,} rows to learn from, {found.test_rows:,} to test on, {found.classes:,} classes, joined"
        f" by {found.joined_by}, {found.features} features, in {found.seconds:,.1f} s -> {found.out}",
        *_table(found),
    ]
    if found.unseen:
        rows, first = sum(found.unseen.values()), next(iter(found.unseen))
        lines.append(f"{rows:,} test rows have labels without training rows, such as {first}: they count as wrong")
    lines += [
        f"no zero-shot of {one.name}: {one.no_zero_shot}"
        for one in found.encoders
        if found.templates and one.no_zero_shot
    ]
    best = next(one for one in found.encoders if one.against_best is None)
    for one in found.encoders:
        if one.against_best is not None:
            pair = one.against_best
            lines.append(
                f"full probes: only {best.name} is right on {pair.only_best:,} test rows, only {one.name} on"
                f" {pair.only_this:,} (McNemar's exact p {pair.p:.2g})"
            )
        if not one.probe.converged:
            lines.append(
                f"{one.name}: the full probe has not converged; float32 may be too coarse for so weak a penalty"
            )
    return lines


def _table(found: "Comparison") -> list[str]:
    """A line an encoder, the best of each column with a star."""
    encoders = found.encoders
    full = [one.probe.accuracy for one in encoders]
    measured: dict[str, list[tuple[float | None, str]]] = {
        "zero-shot": [(one.zero_shot.acc1 if one.zero_shot else None, "") for one in encoders],
        **{
            f"{points[0].shots} shot{'s' if points[0].shots > 1 else ''}": [
                (point.mean, f" ± {100 * point.deviation:.2f}") for point in points
            ]
            for points in zip(*(one.few_shot for one in encoders), strict=True)
        },
        "all rows": [(one.acc1, f" ({100 * one.interval[0]:.2f} to {100 * one.interval[1]:.2f})") for one in full],
        "acc5": [(one.acc5, "") for one in full],
    }
    columns = [
        ["directory", *(one.folder for one in encoders)],
        ["model", *(one.name.removesuffix(f" {one.vectors}").removesuffix(f" ({one.folder})") for one in encoders)],
        ["probed", *(one.vectors for one in encoders)],
        ["D", *(str(one.dim) for one in encoders)],
        *([f"{head} ", *_starred(column)] for head, column in measured.items()),
        ["C", *(f"{one.probe.c:.4g}" for one in encoders)],
    ]
    return _aligned([column for column in columns if any(column[1:])])


def _starred(column: Sequence[tuple[float | None, str]]) -> list[str]:
    best = max((value for value, _ in column if value is not None), default=None)
    return ["" if value is None else f"{value:.2%}{more}{'*' if value == best else ' '}" for value, more in column]


def _aligned(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.ljust(width) if at < 3 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
