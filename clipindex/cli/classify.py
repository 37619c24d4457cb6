"""`clipindex classify`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.embed import embed_lines, embed_status, run_embed
from clipindex.cli.options import (
    apply,
    both_ends,
    embed_options,
    json_option,
    model_options,
    print_result,
    refuse_options,
    spec,
    templates_for,
)

if TYPE_CHECKING:
    from clipindex.zeroshot import ClassifySummary, ImagePrediction

class_options = [
    click.option("--classes", type=click.Path(path_type=Path), metavar="FILE",
                 help="Class names, one a line.  [default: classnames.txt beside the tars, where SOURCE is tars]"),
    click.option("--templates", metavar="FILE|NAME",
                 help="Prompts with {c}, one a line; or simple, imagenet-7, imagenet-80."
                      "  [default: those beside SOURCE's classnames.txt, else simple]"),
    click.option("--approximate", is_flag=True,
                 help="For tens of thousands of classes: nearly exact, about twice as fast, and measured."),
    click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes to keep for an image."),
]  # fmt: skip


@click.command(short_help="Classify images by their nearest class prompt.")
@click.argument("source", required=False)
@click.option("--image", "images", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
              help="Classify this image file instead of SOURCE; may be repeated.")  # fmt: skip
@apply(class_options)
@click.option("--out", type=click.Path(path_type=Path), help="Embedding directory to make, where SOURCE is tars.")
@click.option("--predictions", type=click.Path(path_type=Path), help="Where to write.  [default: DIR/predictions]")
@model_options(required=False)
@apply(embed_options)
@json_option
def classify(
    source: str | None,
    images: tuple[Path, ...],
    classes: Path | None,
    templates: str | None,
    approximate: bool,
    top: int,
    out: Path | None,
    predictions: Path | None,
    max_reject_rate: float,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> int:
    """Classify images without training, by their nearest class prompt.

    SOURCE is an embedding directory; or image tars, which are embedded into --out first. With --image, prints the best
    classes of single files.
    """
    context = click.get_current_context()
    folder = None if source is None else Path(source)
    is_embedded = folder is not None and (folder / "dataset.json").is_file()
    if images:
        refuse_options(context, ("out", "predictions", *_EMBEDDING_ONLY), "with --image nothing is embedded or written")
        refuse_options(context, ("approximate",), "single images are classified exactly")
    elif is_embedded:
        refuse_options(context, ("out", *_EMBEDDING_ONLY), f"{source} is embedded already")
    if options["model"] is None:
        refuse_options(context, ("pretrained", "random_init", "quick_gelu"), "it belongs to --model, which is missing")
    classes, templates = _find_classes(None if is_embedded else folder, classes, templates)
    if images:
        if source:
            raise click.UsageError("give SOURCE or --image, not both")
        print_result(_classify_images(images, classes, templates, top, options), as_json, _image_lines)
        return 0
    if source is None or folder is None:
        raise click.UsageError("give a SOURCE to classify, or --image FILE")
    status, shards = 0, None
    if not is_embedded:
        if out is None or options["model"] is None:
            raise click.UsageError(
                f"{source} is no embedding directory; to embed its tars first, give --out and --model"
            )
        embedded, shards = run_embed([source], out, options)
        click.echo("\n".join(embed_lines(embedded)), err=True)
        status = embed_status(embedded, max_reject_rate)
        if embedded.shards_failed or embedded.shards_changed:
            click.echo("not classified: an accuracy over a part of SOURCE would look like one over all of it", err=True)
            return 1
        folder = out
    summary = _classify(folder, classes, templates, top, approximate, shards, predictions, options)
    print_result(summary, as_json, _classify_lines)
    return status


_EMBEDDING_ONLY = (
    *("dtype", "batch_size", "decode_threads", "preprocess", "decode", "max_pixels", "max_bytes", "on_broken_shard"),
    *("refresh", "max_reject_rate"),
)


def _find_classes(data_set: Path | None, classes: Path | None, templates: str | None) -> tuple[Path, str]:
    """Class file and templates: as said, else as a CLIP_benchmark data set keeps them at its root."""
    if classes is None and data_set is not None:
        found = [folder / "classnames.txt" for folder in (data_set, data_set.parent)]
        classes = next((path for path in found if path.is_file()), None)
    if classes is None:
        raise click.UsageError("give --classes FILE with a class name a line; only a local data set brings its own")
    return classes, templates_for(classes, templates)


def _classify(
    folder: Path,
    classes: Path,
    templates: str,
    top: int,
    approximate: bool,
    shards: list[str] | None,
    predictions: Path | None,
    options: dict[str, Any],
) -> "ClassifySummary":
    from clipindex.progress import reporting

    started = time.monotonic()
    with reporting("classify") as report:
        report(0, 0, "loading the model")
        from clipindex import zeroshot

        return zeroshot.classify(
            folder,
            classes=classes,
            templates=templates,
            top=top,
            approximate=approximate,
            model=spec(options) if options["model"] else None,
            shards=shards,
            out=predictions,
            device=options["device"],
            precision=options["precision"],
            on_classes=lambda done: report(
                0, 0, f"{done:,} classes embedded, {done / (time.monotonic() - started):,.0f}/s"
            ),
            on_progress=lambda rows: report(0, 0, f"{rows:,} images, {rows / (time.monotonic() - started):,.0f}/s"),
            on_ranked=lambda rows: report(0, 0, f"mAP, {rows:,} images in two passes"),
        )


def _classify_images(
    images: Sequence[Path], classes: Path, templates: str, top: int, options: dict[str, Any]
) -> list["ImagePrediction"]:
    if options["model"] is None:
        raise click.UsageError("--image needs --model")
    from clipindex import zeroshot
    from clipindex.models import load_model
    from clipindex.prompts import read_classes, read_templates

    names, prompts = read_classes(classes), read_templates(templates)
    loaded = load_model(spec(options))
    where = {"device": options["device"], "precision": options["precision"]}
    classifier = zeroshot.build_classifier(loaded, names, prompts, **where)
    return zeroshot.classify_images(images, loaded, classifier, top=top, **where)


def _classify_lines(summary: "ClassifySummary") -> list[str]:
    lines = [
        f"{summary.rows:,} images, {summary.classes:,} classes x {summary.templates:,} prompts"
        f" in {summary.seconds:,.1f} s ({summary.images_per_s:,.0f} images/s) -> {summary.out}"
    ]
    if summary.agreement is not None:
        found = summary.agreement
        lines.append(
            f"approximate: of {found.rows:,} rows {found.same_top1:.2%} have the same best class as by exact search,"
            f" {found.same_top_k:.2%} the same best {found.k}; probabilities within {found.most_probability_off:.4f}"
        )
    if summary.acc1 is not None:
        acc5 = "" if summary.acc5 is None else f"   acc5 {summary.acc5:.2%}"
        recall = f"   mean per-class recall {summary.mean_per_class_recall:.2%}"
        lines.append(f"acc1 {summary.acc1:.2%}{acc5}{recall}   ({summary.labelled:,} labelled)")
        lines += _per_class_lines(summary)
    if summary.mean_average_precision is not None:
        lines.append(
            f"mAP {summary.mean_average_precision:.2%}   ({summary.multi_labelled:,} with any number of classes)"
        )
        lines += _precision_lines(summary)
    if summary.no_average_precision is not None:
        lines.append(f"no mAP of {summary.multi_labelled:,} rows: {summary.no_average_precision}")
    return lines


def _per_class_lines(summary: "ClassifySummary") -> list[str]:
    """Each class that occurs, worst first; of many, both ends."""
    rows = sorted((row for row in summary.per_class if row["support"]), key=lambda row: row["recall"])
    width = max(len(row["name"]) for row in rows)
    lines = [f"  {row['name']:<{width}}  {row['recall']:>7.2%} of {row['support']:,}" for row in rows]
    return ["recall by class:", *both_ends(lines, f"{summary.out}/metrics.json")]


def _precision_lines(summary: "ClassifySummary") -> list[str]:
    """The same of average precision; how many classes do not occur is said, since they count as 0."""
    rows = sorted(
        (row for row in summary.average_precision if row["support"]), key=lambda row: row["average_precision"]
    )
    width = max((len(row["name"]) for row in rows), default=0)
    lines = [f"  {row['name']:<{width}}  {row['average_precision']:>7.2%} of {row['support']:,}" for row in rows]
    missing = len(summary.average_precision) - len(rows)
    note = [f"  {missing:,} classes do not occur and count as 0"] if missing else []
    return ["average precision by class:", *both_ends(lines, f"{summary.out}/metrics.json"), *note]


def _image_lines(predictions: Sequence["ImagePrediction"]) -> list[str]:
    lines: list[str] = []
    for prediction in predictions:
        width = max(map(len, prediction.classes))
        lines.append(f"{prediction.path}:")
        for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            lines.append(f"  {name:>{width}}: {100 * probability:6.2f}%")
    return lines
