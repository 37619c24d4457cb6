"""`clipindex probe`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import (
    apply,
    both_ends,
    check_picture,
    json_option,
    model_options,
    parse_bytes,
    parse_shots,
    parse_strength,
    print_result,
    refuse_options,
    spec,
    templates_for,
)

if TYPE_CHECKING:
    from clipindex.probing import Evaluation, FewShotCurve, MultiLabelEvaluation, TrainSummary

CONFUSIONS_SHOWN = 5
_MODEL = ("model", "pretrained", "random_init", "quick_gelu", "precision")


device_option = click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
probe_option = click.option("--probe", "probe_folder", type=click.Path(path_type=Path), metavar="PROBE",
                            help="What probe train wrote.  [default: DIR/probe]")  # fmt: skip


@click.group(short_help="Linear probes: classifiers trained on embeddings.")
def probe() -> None:
    """Linear probes: classifiers that are trained on embeddings and their labels."""


train_options = [
    click.option("--label", default="label", show_default=True, metavar="COLUMN",
                 help="Which column has the labels: label, or labels, where rows have any number of classes."),
    click.option("--test", type=click.Path(path_type=Path), metavar="DIR2",
                 help="Another directory of the same model, to test on."),
    click.option("--split", "held_out", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="FRACTION",
                 help="Or test on this fraction of each class of DIR (of its rows, with --label labels), and do not"
                      " train on it."),
    click.option("--c", "c", callback=parse_strength, default="0.316", show_default=True, metavar="C|auto",
                 help="scikit-learn's C; auto searches it as appendix A.3 of the CLIP paper does."),
    click.option("--features", type=click.Choice(["raw", "normalized"]),
                 help="The encoder's output as it was, or brought to unit length."
                      "  [default: raw; normalized for clip-benchmark]"),
    click.option("--pre-projection", is_flag=True,
                 help="Learn from the features before the projection, where DIR was embedded with --features both."),
    click.option("--protocol", type=click.Choice(["clip-benchmark"]),
                 help="CLIP_benchmark's recipe (AdamW) in place of logistic regression at --c."),
    click.option("--balanced", is_flag=True, help="Let every class count alike, however many rows it has."),
    click.option("--shots", callback=parse_shots, metavar="N,N,…",
                 help="Instead of a probe of all rows, a curve: accuracy over training rows a class."),
    click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Draws for each of --shots."),
    click.option("--seed", type=click.IntRange(0, 2**32), default=0, show_default=True,
                 help="Of all that is drawn at random."),
    click.option("--classes", type=click.Path(path_type=Path), metavar="FILE",
                 help="Class names, one a line, in the order of the labels; with --shots, zero-shot is drawn beside."),
    click.option("--templates", metavar="FILE|NAME",
                 help="Prompts for that, as for classify.  [default: those beside the class names, else simple]"),
    click.option("--out", type=click.Path(path_type=Path), help="Where the probe goes.  [default: DIR/probe]"),
    click.option("--plot", type=click.Path(path_type=Path), metavar="FILE",
                 help="Picture of the curve, .png, .svg or .pdf.  [default: few_shot.png in --out]"),
    click.option("--memory", callback=parse_bytes, metavar="SIZE",
                 help="What embeddings may take, as 4GB; more are read in each pass.  [default: a quarter of all]"),
]  # fmt: skip


@probe.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@apply(train_options)
@model_options(required=False)
@json_option
def train(
    folder: Path,
    shots: list[int] | None,
    seeds: int,
    classes: Path | None,
    templates: str | None,
    plot: Path | None,
    memory: int | None,
    protocol: str | None,
    balanced: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> int:
    """Train a linear classifier on an embedding directory with labels.

    It is multinomial logistic regression, as scikit-learn's LogisticRegression(C) defines it; the default is the recipe
    in the README of CLIP. With --label labels each class has a logistic regression of its own against all rows without
    it. Rows without a label are left out. --model says how to load the model for zero-shot, where
    the directory's own record does not lead to its weights on this machine.
    """
    _refuse_what_is_ignored(shots is not None, classes is not None, protocol, options["model"] is not None)
    check_picture(plot)
    shared = {name: value for name, value in options.items() if name not in _MODEL}
    from clipindex.progress import reporting

    with reporting("probe") as report:
        report(0, 0, "reading labels")
        from clipindex import probing

        shared |= {"names": classes, "on_progress": lambda note: report(0, 0, note)}
        if shots is None:
            summary = probing.train_probe(folder, protocol=protocol, balanced=balanced, memory_bytes=memory, **shared)
        else:
            curve = probing.few_shot_curve(
                folder,
                shots,
                seeds=seeds,
                templates=templates_for(classes, templates),
                model=spec(options) if options["model"] else None,
                precision=options["precision"],
                **{**shared, "features": options["features"] or "raw"},
            )
            from clipindex.probing.plot import CURVE_PICTURE, draw_curve

            draw_curve(curve, plot or Path(curve.out) / CURVE_PICTURE)
    if shots is None:
        print_result(summary, as_json, _train_lines)
    else:
        print_result(curve, as_json, _curve_lines)
    return 0


def _refuse_what_is_ignored(is_curve: bool, has_classes: bool, protocol: str | None, has_model: bool) -> None:
    context = click.get_current_context()
    if is_curve:
        refuse_options(context, ("protocol", "balanced", "memory"), "with --shots nothing is trained on all rows")
    else:
        refuse_options(context, ("seeds", "templates", "plot", *_MODEL), "it belongs to --shots, which is missing")
    if not has_classes:
        refuse_options(context, ("templates", *_MODEL), "only --classes needs the model")
    if not has_model:
        refuse_options(context, ("pretrained", "random_init", "quick_gelu"), "it belongs to --model, which is missing")
    if protocol is not None:
        refuse_options(context, ("c",), f"{protocol} knows no C")


@probe.command("eval")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@probe_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Also write all of it to this file.")
@device_option
@json_option
def evaluate(folder: Path, probe_folder: Path | None, out: Path | None, device: str, as_json: bool) -> int:
    """Measure a probe on the labelled rows of an embedding directory."""
    from clipindex.progress import reporting

    with reporting("probe eval") as report:
        report(0, 0, "")
        from clipindex import probing
        from clipindex.atomic import write_json

        probe = probing.read_probe(probe_folder or folder / "probe")
        found = probing.evaluate_probe(
            folder, probe, device=device, on_progress=lambda rows, total: report(rows, total, f"{rows:,} rows read")
        )
    if out is not None:
        write_json(out, dataclasses.asdict(found))
    print_result(found, as_json, _evaluation_lines)
    return 0


@probe.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@probe_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.parquet", required=True, help="Where to write.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes to keep for a row.")
@device_option
@json_option
def predict(folder: Path, probe_folder: Path | None, out: Path, top: int, device: str, as_json: bool) -> int:
    """Write what a probe says of every row of an embedding directory."""
    if out.suffix != ".parquet":
        raise click.UsageError(f"--out {out}: it is Parquet that is written; let the name end in .parquet")
    from clipindex.progress import reporting

    with reporting("probe predict") as report:
        report(0, 0, "")
        from clipindex import probing

        probe = probing.read_probe(probe_folder or folder / "probe")
        rows = probing.write_predictions(
            folder, probe, out, top=top, device=device, on_progress=lambda rows: report(0, 0, f"{rows:,} rows")
        )
    print_result({"out": str(out), "rows": rows}, as_json, lambda done: [f"{done['rows']:,} rows -> {done['out']}"])
    return 0


def _train_lines(summary: "TrainSummary") -> list[str]:
    left_out = f" ({summary.left_out:,} without a label left out)" if summary.left_out else ""
    found = "" if summary.c is None else f", C {summary.c:.4g}"
    lines = [
        f"{summary.rows:,} rows{left_out}, {summary.classes:,} classes, {summary.features} {summary.vectors} features,"
        f" {summary.protocol}{found} in {summary.seconds:,.1f} s -> {summary.out}"
    ]
    if summary.training.get("converged") is False:
        lines.append(
            "not converged: float32 is too coarse for so weak a penalty, or the passes were used up; a smaller --c, or"
            " --features normalized, converges"
        )
    if summary.protocol == "clip-a3" and summary.c is not None and not 1.1e-6 < summary.c < 0.9e6:
        lines.append("this C is the end of the range that was searched: among equals the strongest penalty is taken")
    constant = summary.training.get("constant_classes")
    if constant:
        lines.append(
            f"{len(constant):,} classes, such as {constant[0]}, are those of all rows to learn from or of none: their"
            " probability is the same for every image"
        )
    return lines + (_evaluation_lines(summary.test) if summary.test else [])


def _evaluation_lines(found: "Evaluation | MultiLabelEvaluation") -> list[str]:
    from clipindex.probing import Evaluation

    return _accuracy_lines(found) if isinstance(found, Evaluation) else _ranking_lines(found)


def _ranking_lines(found: "MultiLabelEvaluation") -> list[str]:
    lines = [
        f"mAP {found.mean_average_precision:.2%}   calibration error {found.calibration_error:.4f}"
        f"   ({found.labelled:,} with any number of classes, {found.left_out:,} others left out)"
    ]
    if found.unseen:
        lines.append(
            f"{len(found.unseen):,} labels have no training rows, such as {next(iter(found.unseen))}: they count as 0"
        )
    rows = sorted((row for row in found.per_class if row["support"]), key=lambda row: row["average_precision"])
    missing = len(found.per_class) - len(rows)
    names = [row["name"] or f"label {row['label']}" for row in rows]
    width = max(map(len, names), default=0)
    table = [
        f"  {name:<{width}}  {row['average_precision']:>7.2%} {_share(row['precision'])} {_share(row['recall'])}"
        f" {_share(row['f1'])} of {row['support']:,}"
        for name, row in zip(names, rows, strict=True)
    ]
    note = [f"  {missing:,} classes do not occur and count as 0"] if missing else []
    head = "average precision by class; precision, recall and f1 at a probability of one half:"
    return [*lines, head, *both_ends(table), *note]


def _share(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:>7.2%}"


def _accuracy_lines(found: "Evaluation") -> list[str]:
    def with_interval(what: str, value: float | None) -> str:
        low, high = found.intervals.get(what, (0, 0))
        return "" if value is None else f"{what} {value:.2%} ({low:.2%} to {high:.2%})   "

    lines = [
        f"{with_interval('acc1', found.acc1)}{with_interval('acc5', found.acc5)}"
        f"mean per-class recall {found.mean_per_class_recall:.2%}   calibration error {found.calibration_error:.4f}"
        f"   ({found.labelled:,} labelled, {found.left_out:,} without a label left out)"
    ]
    if found.unseen:
        rows, first = sum(found.unseen.values()), next(iter(found.unseen))
        lines.append(f"{rows:,} rows have labels without training rows, such as {first}: they count as wrong")
    names = {row["label"]: row["name"] or f"label {row['label']}" for row in found.per_class}
    rows_shown = sorted((row for row in found.per_class if row["support"]), key=lambda row: row["recall"])
    width = max(len(names[row["label"]]) for row in rows_shown)
    table = [f"  {names[row['label']]:<{width}}  {row['recall']:>7.2%} of {row['support']:,}" for row in rows_shown]
    wrong = sorted((cell for cell in found.confusion if cell[0] != cell[1]), key=lambda cell: -cell[2])
    taken = [f"  {names[label]}, taken for {names[best]}: {rows:,}" for label, best, rows in wrong[:CONFUSIONS_SHOWN]]
    return [*lines, "recall by class:", *both_ends(table), *(["most often wrong:", *taken] if taken else [])]


def _curve_lines(curve: "FewShotCurve") -> list[str]:
    lines = [
        f"{curve.test_rows:,} test rows, {curve.classes:,} classes, {len(curve.seeds)} draws in {curve.seconds:,.1f} s"
        f" -> {curve.out}"
    ]
    if curve.zero_shot is not None:
        lines.append(f"zero-shot  acc1 {curve.zero_shot:.2%}")
    return lines + [f"{p.shots:>4} shots  acc1 {p.mean:.2%} ± {p.deviation:.2%}" for p in curve.points]
