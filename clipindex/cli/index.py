"""`clipindex index`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipindex.cli.options import json_option, model_options, parse_bytes, print_result, refuse_options, spec

if TYPE_CHECKING:
    from clipindex.indexing import IndexSummary


@click.command(short_help="Build the FAISS index of a directory, or add what is new.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["auto", "flat", "hnsw", "ivf", "ivfsq", "ivfpq"]),
    default="auto",
    show_default=True,
    help="auto goes by rows and memory.",
)
@click.option(
    "--memory",
    callback=parse_bytes,
    metavar="SIZE",
    help="What the index may take, as 4GB.  [default: half of the machine's]",
)
@click.option(
    "--target-recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Of the ten nearest rows, the share to find.",
)
@click.option("--max-query-ms", type=click.FloatRange(0, min_open=True), help="Most time for a query alone.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Texts, one a line, that must reach the target too: they find other rows than images do.",
)
@click.option("--accept-recall", is_flag=True, help="Publish the index though it misses the target.")
@click.option("--rebuild", is_flag=True, help="Train anew, though there is an index to add to.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is drawn.")
@model_options(required=False)
@json_option
def index(folder: Path, memory: int | None, prompts: Path | None, as_json: bool, **options: Any) -> int:  # noqa: ANN401
    """Build the FAISS index of an embedding directory, or add to it what is new.

    The index appears when its recall has been measured against exact search, and is then what search goes through.
    Shards that are new are added, and those that went or changed are left out, without training anew. --model says how
    to load the model for --prompts, where the directory's own record does not lead to its weights on this machine.
    """
    context = click.get_current_context()
    if prompts is None:
        names = ("model", "pretrained", "random_init", "quick_gelu")
        refuse_options(context, names, "only --prompts are embedded")
    elif options["model"] is None:
        refuse_options(context, ("pretrained", "random_init", "quick_gelu"), "it belongs to --model, which is missing")
    from clipindex.progress import by_steps, reporting

    with reporting("index") as report:
        report(0, 0, "")
        from clipindex import indexing, retrieval

        summary = indexing.build_index(
            folder,
            memory_bytes=memory,
            prompts=retrieval.read_queries(prompts) if prompts is not None else (),
            model=spec(options) if options["model"] else None,
            on_progress=by_steps(report),
            **{name: value for name, value in options.items() if name in _PASSED_ON},
        )
    print_result(summary, as_json, _index_lines)
    return 0


_PASSED_ON = ("kind", "target_recall", "max_query_ms", "accept_recall", "rebuild", "seed", "device",
              "precision")  # fmt: skip


def _index_lines(summary: "IndexSummary") -> list[str]:
    changes = f"{summary.shards_added:,} added, {summary.shards_removed:,} gone" if not summary.is_new else "built anew"
    if not summary.is_new and not summary.shards_added and not summary.shards_removed:
        changes = "nothing new" if not summary.steps else "measured anew"
    effort = [f"{summary.effort.probes:,} {'kept in mind' if summary.kind == 'hnsw' else 'lists'}"]
    if summary.effort.candidates > 1:
        effort.append(f"{summary.effort.candidates} x k candidates")
    looked = f" at {', '.join(effort)} a query" if summary.effort.probes else ""
    lines = [
        f"{summary.rows:,} rows of {summary.shards:,} shards ({changes}) -> {summary.folder}/index",
        f"{summary.kind}, {summary.row_bytes:,} bytes a row, {summary.index_bytes / 1e6:,.1f} MB,"
        f" {summary.seconds:,.1f} s",
    ]
    lines += [
        f"{kind} queries: recall@1 {found.recall_at_1:.4f}, @10 {found.recall_at_10:.4f}, @100"
        f" {found.recall_at_100:.4f}, {found.queries:,} queries{looked}"
        for kind, found in summary.recall.items()
    ]
    lines.append(f"{summary.ms_per_query:,.2f} ms a query alone, {summary.queries_per_s:,.0f} a second at once")
    lines += [f"{kind} queries: recall@10 had drifted to {found:.4f}" for kind, found in summary.drift.items()
              if found < summary.target_recall]  # fmt: skip
    return [*lines, *([f"note: {summary.advice}"] if summary.advice else [])]
