"""The command line: options in, one call, output out.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 failed, 2 usage, 3 done but
more samples were rejected than `--max-reject-rate` allows, 130 and 143 after SIGINT and SIGTERM. Whatever is slow to
import is imported by the command that uses it.
"""

import contextlib
import dataclasses
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from clipindex.errors import ClipindexError, UsageError
from clipindex.version import __version__

if TYPE_CHECKING:
    from clipindex.bench.run import BenchReport
    from clipindex.demo import DemoStep, DemoSummary
    from clipindex.embed_job import EmbedSummary, Plan
    from clipindex.packing import PackSummary
    from clipindex.pipeline import Progress
    from clipindex.types import ModelSpec
    from clipindex.zeroshot import ClassifySummary, ImagePrediction

Command = TypeVar("Command", bound=Callable[..., Any])

CLASSES_SHOWN = 10
"""At each end of a long list of classes on the terminal."""
MAX_REJECT_RATE = 0.1
"""Crawled corpora reject a few in a hundred; one in ten means that something else is wrong."""


def main() -> None:
    """Run the program and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit status."""
    _set_up_logging()
    _stop_on_sigterm()
    try:
        return commands.main(list(arguments), prog_name="clipindex", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UsageError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except ClipindexError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except OSError as error:  # a full disk, a missing right: the system's own words, without the traceback
        click.echo(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", err=True)
        return 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: published shards are kept; run again to go on", err=True)
        return 128 + signal.SIGINT
    except _Terminated:
        click.echo("terminated: published shards are kept; run again to go on", err=True)
        return 128 + signal.SIGTERM


class _Terminated(BaseException):
    """SIGTERM, travelling up the stack like KeyboardInterrupt so that everything is closed on its way."""


def _stop_on_sigterm() -> None:
    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at the moment: a progress bar stands in for it to keep lines above itself."""

    @property
    def stream(self) -> Any:  # noqa: ANN401
        return sys.stderr

    @stream.setter
    def stream(self, value: object) -> None:
        """The base class sets one at the start."""


def _set_up_logging() -> None:
    terminal = sys.stderr.isatty()
    logging.basicConfig(
        handlers=[_CurrentStderr()],
        level=logging.WARNING,
        format="%(message)s" if terminal else "%(asctime)s %(levelname)s %(message)s",
        force=True,
    )
    logging.getLogger("clipindex").setLevel(logging.INFO)
    # Of an image's own oddities Pillow warns once a process, without naming the image; they end as rows or rejects.
    warnings.filterwarnings("ignore", module="PIL")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="clipindex")
def commands() -> None:
    """Turn image corpora into CLIP embeddings worth keeping, and classify with them.

    WebDataset tars go in; Parquet shards of embeddings come out, a row or a recorded reject for every sample. Runs that
    were stopped go on where they were.
    """


def _model_options(*, required: bool) -> Callable[[Command], Command]:
    options = [
        click.option(
            "--model",
            required=required,
            help="open_clip architecture, hf-hub:ORG/REPO, local-dir:PATH, a model directory, or demo.",
        ),
        click.option("--pretrained", help="open_clip tag, or a local .safetensors/.pt file, for an architecture name."),
        click.option(
            "--random-init",
            type=click.IntRange(0, 2**63 - 1),
            metavar="SEED",
            help="Random weights instead of trained ones.",
        ),
        click.option(
            "--quick-gelu/--no-quick-gelu",
            default=None,
            help="Activation of a weights file that does not say.",
        ),
        *_device_options,
    ]
    return _apply(options)


_device_options = [
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:N, several with commas between; auto is all CUDA devices, else the CPU.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
        default="auto",
        show_default=True,
        help="Of weights and activations; auto is bf16 where the device multiplies it, else fp32.",
    ),
]
_embed_options = [
    click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True,
                 help="Of the embedding column."),
    click.option("--batch-size", type=click.IntRange(1), help="Images at once.  [default: found by measuring]"),
    click.option("--decode-threads", type=click.IntRange(1), help="Decoding threads.  [default: one a core]"),
    click.option("--preprocess", type=click.Choice(["exact", "fast"]), default="exact", show_default=True,
                 help="fast decodes large JPEGs at a fraction of their size: pixels move by under 1/255 on average."),
    click.option("--refresh", is_flag=True, help="Embed again the tars that changed since."),
    click.option("--max-reject-rate", type=click.FloatRange(0, 1), default=MAX_REJECT_RATE, show_default=True,
                 help="Exit with status 3 where more of the samples are rejects."),
]  # fmt: skip
_class_options = [
    click.option("--classes", type=click.Path(path_type=Path), metavar="FILE",
                 help="Class names, one a line.  [default: classnames.txt of SOURCE]"),
    click.option("--templates", metavar="FILE|NAME",
                 help="Prompts with {c}, one a line; or simple, imagenet-7, imagenet-80."
                      "  [default: those beside SOURCE's classnames.txt, else simple]"),
    click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes to keep for an image."),
]  # fmt: skip
_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def _apply(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@commands.command()
@click.argument("sources", nargs=-1, required=True, metavar="SHARDS...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Embedding directory.")
@_model_options(required=True)
@_apply(_embed_options)
@_json_option
def embed(sources: tuple[str, ...], out: Path, max_reject_rate: float, as_json: bool, **options: Any) -> int:  # noqa: ANN401
    """Embed the images of WebDataset tars into Parquet shards.

    SHARDS are paths, folders, globs, brace ranges ({000..999}.tar), s3:// https:// hf:// URLs, or @FILE with one of
    these a line. Shards that are done already are passed over.
    """
    summary, _ = _embed(sources, out, options)
    _print_result(summary, as_json, _embed_lines)
    return _embed_status(summary, max_reject_rate)


@commands.command()
@click.argument("source", required=False)
@click.option("--image", "images", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
              help="Classify this image file instead of SOURCE; may be repeated.")  # fmt: skip
@_apply(_class_options)
@click.option("--out", type=click.Path(path_type=Path), help="Embedding directory to make, where SOURCE is tars.")
@click.option("--predictions", type=click.Path(path_type=Path), help="Where to write.  [default: DIR/predictions]")
@_model_options(required=False)
@_apply(_embed_options)
@_json_option
def classify(
    source: str | None,
    images: tuple[Path, ...],
    classes: Path | None,
    templates: str | None,
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
        _refuse_options(
            context, ("out", "predictions", *_EMBEDDING_ONLY), "with --image nothing is embedded or written"
        )
    elif is_embedded:
        _refuse_options(context, ("out", *_EMBEDDING_ONLY), f"{source} is embedded already")
    if options["model"] is None:
        _refuse_options(context, ("pretrained", "random_init", "quick_gelu"), "it belongs to --model, which is missing")
    classes, templates = _find_classes(None if is_embedded else folder, classes, templates)
    if images:
        if source:
            raise click.UsageError("give SOURCE or --image, not both")
        _print_result(_classify_images(images, classes, templates, top, options), as_json, _image_lines)
        return 0
    if source is None or folder is None:
        raise click.UsageError("give a SOURCE to classify, or --image FILE")
    status, shards = 0, None
    if not is_embedded:
        if out is None or options["model"] is None:
            raise click.UsageError(
                f"{source} is no embedding directory; to embed its tars first, give --out and --model"
            )
        embedded, shards = _embed([source], out, options)
        click.echo("\n".join(_embed_lines(embedded)), err=True)
        status = _embed_status(embedded, max_reject_rate)
        if embedded.shards_failed or embedded.shards_changed:
            click.echo("not classified: an accuracy over a part of SOURCE would look like one over all of it", err=True)
            return 1
        folder = out
    summary = _classify(folder, classes, templates, top, shards, predictions, options)
    _print_result(summary, as_json, _classify_lines)
    return status


_EMBEDDING_ONLY = ("dtype", "batch_size", "decode_threads", "preprocess", "refresh", "max_reject_rate")


def _refuse_options(context: click.Context, names: Sequence[str], why: str) -> None:
    """An option that would be ignored is a mistake to be told."""
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} does not apply: {why}")


def _embed(sources: Sequence[str], out: Path, options: dict[str, Any]) -> tuple["EmbedSummary", list[str]]:
    """The summary, and the names of the shards that the sources name."""
    from clipindex import embed_job

    names: list[str] = []
    with _embed_reporting() as (on_plan, on_progress):

        def note_names(plan: "Plan") -> None:
            names.extend(shard.name for shard in (*plan.done, *plan.changed, *plan.todo))
            on_plan(plan)

        summary = embed_job.embed(sources, out, **options, on_plan=note_names, on_progress=on_progress)
    return summary, sorted(names)


def _embed_status(summary: "EmbedSummary", max_reject_rate: float) -> int:
    for url, why in summary.shards_failed.items():
        click.echo(f"failed: {why}" if url in why else f"failed: {url}: {why}", err=True)
    for url in summary.shards_changed:
        click.echo(f"changed: {url} differs from what its rows were made of; --refresh embeds it again", err=True)
    if summary.shards_failed:
        return 1
    return 3 if summary.reject_rate > max_reject_rate else 0


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


def _find_classes(data_set: Path | None, classes: Path | None, templates: str | None) -> tuple[Path, str]:
    """Class file and templates: as said, else as a CLIP_benchmark data set keeps them at its root."""
    if classes is None and data_set is not None:
        found = [folder / "classnames.txt" for folder in (data_set, data_set.parent)]
        classes = next((path for path in found if path.is_file()), None)
    if classes is None:
        raise click.UsageError("give --classes FILE with a class name a line; only a local data set brings its own")
    beside = classes.parent / "zeroshot_classification_templates.txt"
    prompts = templates or (str(beside) if beside.is_file() else "simple")
    logging.getLogger("clipindex").info("classes: %s, prompts: %s", classes, prompts)
    return classes, prompts


def _classify(
    folder: Path,
    classes: Path,
    templates: str,
    top: int,
    shards: list[str] | None,
    predictions: Path | None,
    options: dict[str, Any],
) -> "ClassifySummary":
    from clipindex import zeroshot
    from clipindex.progress import reporting

    started = time.monotonic()
    with reporting("classify") as report:
        report(0, 0, "loading the model")
        return zeroshot.classify(
            folder,
            classes=classes,
            templates=templates,
            top=top,
            model=_spec(options) if options["model"] else None,
            shards=shards,
            out=predictions,
            device=options["device"],
            precision=options["precision"],
            on_classes=lambda done: report(0, 0, f"{done:,} classes embedded"),
            on_progress=lambda rows: report(0, 0, f"{rows:,} images, {rows / (time.monotonic() - started):,.0f}/s"),
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
    loaded = load_model(_spec(options))
    where = {"device": options["device"], "precision": options["precision"]}
    classifier = zeroshot.build_classifier(loaded, names, prompts, **where)
    return zeroshot.classify_images(images, loaded, classifier, top=top, **where)


def _spec(options: dict[str, Any]) -> "ModelSpec":
    from clipindex.types import ModelSpec

    return ModelSpec(
        name=options["model"],
        pretrained=options["pretrained"],
        random_init=options["random_init"],
        quick_gelu=options["quick_gelu"],
    )


def _print_result(result: Any, as_json: bool, lines: Callable[[Any], list[str]]) -> None:  # noqa: ANN401
    if as_json:
        document = [dataclasses.asdict(r) for r in result] if isinstance(result, list) else dataclasses.asdict(result)
        click.echo(json.dumps(document, indent=2, default=str))
    else:
        click.echo("\n".join(lines(result)))


def _embed_lines(summary: "EmbedSummary") -> list[str]:
    stages = ", ".join(f"{count:,} at {stage}" for stage, count in summary.rejects_by_stage.items())
    lines = [
        f"{summary.rows:,} rows + {summary.rejects:,} rejects = {summary.samples:,} samples"
        f" in {summary.seconds:,.1f} s ({summary.images_per_s:,.0f} images/s, {summary.precision} on {summary.device})",
        f"{summary.shards_embedded:,} shards embedded, {summary.shards_done_before:,} done before,"
        f" {len(summary.shards_failed):,} failed, {len(summary.shards_changed):,} changed since -> {summary.out}",
    ]
    if stages:
        lines.append(f"rejects: {stages}; why: {summary.out}/rejects")
    if summary.samples:
        busy = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in summary.stages.busy.items())
        lines.append(
            f"bound by {summary.stages.bound_by}; at work: {busy};"
            f" the encoder waited {summary.stages.device_waited_s:,.1f} s for images"
        )
    return lines


def _classify_lines(summary: "ClassifySummary") -> list[str]:
    lines = [
        f"{summary.rows:,} images, {summary.classes:,} classes x {summary.templates:,} prompts"
        f" in {summary.seconds:,.1f} s ({summary.images_per_s:,.0f} images/s) -> {summary.out}"
    ]
    if summary.acc1 is not None:
        acc5 = "" if summary.acc5 is None else f"   acc5 {summary.acc5:.2%}"
        recall = f"   mean per-class recall {summary.mean_per_class_recall:.2%}"
        lines.append(f"acc1 {summary.acc1:.2%}{acc5}{recall}   ({summary.labelled:,} labelled)")
        lines += _per_class_lines(summary)
    return lines


def _per_class_lines(summary: "ClassifySummary") -> list[str]:
    """Each class that occurs, worst first; of many, both ends."""
    rows = sorted((row for row in summary.per_class if row["support"]), key=lambda row: row["recall"])
    width = max(len(row["name"]) for row in rows)
    lines = [f"  {row['name']:<{width}}  {row['recall']:>7.2%} of {row['support']:,}" for row in rows]
    if len(rows) > 2 * CLASSES_SHOWN:
        left_out = f"  … {len(rows) - 2 * CLASSES_SHOWN:,} more in {summary.out}/metrics.json"
        lines = [*lines[:CLASSES_SHOWN], left_out, *lines[-CLASSES_SHOWN:]]
    return ["recall by class:", *lines]


def _image_lines(predictions: Sequence["ImagePrediction"]) -> list[str]:
    lines: list[str] = []
    for prediction in predictions:
        width = max(map(len, prediction.classes))
        lines.append(f"{prediction.path}:")
        for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            lines.append(f"  {name:>{width}}: {100 * probability:6.2f}%")
    return lines


@commands.command()
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
@_json_option
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
    _print_result(summary, as_json, _pack_lines)
    return 0


@commands.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("clipindex-demo"),
    show_default=True,
    help="Directory to make; an earlier demo there is replaced.",
)
@_json_option
def demo(out: Path, as_json: bool) -> int:
    """See all of it work on shipped images and a shipped model, without a network."""
    from clipindex.demo import run_demo

    if not as_json:
        click.echo(
            "real images -> WebDataset tars -> CLIP embeddings in Parquet -> zero-shot classes (no training on them)\n"
        )
    summary = run_demo(out, (lambda step: None) if as_json else (lambda step: click.echo("\n".join(_step_lines(step)))))
    _print_result(summary, as_json, _demo_lines)
    return 0


@commands.command()
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
@click.option("--images", type=click.IntRange(1), help="To embed end to end.  [default: 512 on CPU, 16384 on CUDA]")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the drawn images here, and use them again.  [default: a temporary directory]",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the result (.png, .svg or .pdf).")
@_json_option
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


def _pack_lines(summary: "PackSummary") -> list[str]:
    lines = [
        f"{summary.num_samples:,} samples + {summary.num_rejects:,} rejects, {len(summary.classes):,} classes"
        f" -> {summary.num_shards:,} shards, {summary.num_bytes:,} bytes in {summary.split_dir}"
    ]
    lines += [f"note: {note}" for note in summary.notes]
    lines += [f"reject: {reject.name}: {reject.reason}" for reject in summary.first_rejects]
    return lines + ([f"all rejects: {summary.rejects_path}"] if summary.rejects_path else [])


def _step_lines(step: "DemoStep") -> list[str]:
    lines = [
        f"{step.name}: {step.about}",
        f"  embed     {step.rows:>4} rows + {step.rejects} rejects = {step.samples} samples,"
        f" {step.images_per_s:,.0f} images/s",
    ]
    if step.classified is not None and step.classified.acc1 is not None:
        found = step.classified
        lines.append(f"  classify  {found.acc1:>4.0%} right at first guess among {found.classes} classes")
    return [*lines, ""]


def _demo_lines(summary: "DemoSummary") -> list[str]:
    return [
        f"done in {summary.seconds} s. Look at:",
        f"  {summary.sheet}   images and what they were taken for",
        *(f"  {summary.out}/{step.name}/   {_what_lies(step)}" for step in summary.steps),
    ]


def _what_lies(step: "DemoStep") -> str:
    return "embeddings/*.parquet" + (", predictions/*.parquet, predictions/metrics.json" if step.classified else "")
