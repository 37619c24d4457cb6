"""Options that several commands share, and how every command ends."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from clipindex.types import ModelSpec

Command = TypeVar("Command", bound=Callable[..., Any])


MAX_REJECT_RATE = 0.1
"""Crawled corpora reject a few in a hundred; one in ten means that something else is wrong."""


def model_options(*, required: bool) -> Callable[[Command], Command]:
    """Which model, on what device, in which precision."""
    return apply([*spec_options(required=required), *device_options])


def spec_options(*, required: bool) -> list[Callable[[Command], Command]]:
    """Which model."""
    return [
        click.option(
            "--model",
            required=required,
            help="open_clip architecture, hf-hub:ORG/REPO, local-dir:PATH, a model directory, timm:BACKBONE, or demo.",
        ),
        click.option("--pretrained", help="Tag, or a local .safetensors/.pt file, for an architecture name."),
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
    ]


device_options = [
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
embed_options = [
    click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True,
                 help="Of the embedding column."),
    click.option("--batch-size", type=click.IntRange(1), help="Images at once.  [default: found by measuring]"),
    click.option("--decode-threads", type=click.IntRange(1), help="Decoding threads.  [default: one a core]"),
    click.option("--preprocess", type=click.Choice(["exact", "fast"]), default="exact", show_default=True,
                 help="fast decodes large JPEGs at a fraction of their size: pixels move by under 1/255 on average."),
    click.option("--decode", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
                 help="Where ordinary JPEGs are decoded; auto takes cuda if that is faster and as exact as asked."),
    click.option("--max-pixels", type=click.IntRange(1, 178_956_970), default=178_956_970, show_default=True,
                 help="Larger images are rejects, by their header."),
    click.option("--max-bytes", type=click.IntRange(1, 256 << 20), default=256 << 20, show_default=True,
                 help="Images of more encoded bytes are rejects."),
    click.option("--on-broken-shard", type=click.Choice(["fail", "salvage"]), default="fail", show_default=True,
                 help="salvage publishes what came before the break of a tar, with the break recorded."),
    click.option("--refresh", is_flag=True, help="Embed again the tars that changed since."),
    click.option("--max-reject-rate", type=click.FloatRange(0, 1), default=MAX_REJECT_RATE, show_default=True,
                 help="Exit with status 3 where more of the samples are rejects."),
]  # fmt: skip


CLASSES_SHOWN = 10
"""At each end of a long list of classes on the terminal."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def apply(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help page."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def refuse_options(context: click.Context, names: Sequence[str], why: str) -> None:
    """An option that would be ignored is a mistake to be told."""
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} does not apply: {why}")


def parse_bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A number of bytes out of '4GB', '512 MiB' or '1e9'."""
    if value is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?)B?\s*", value, re.IGNORECASE)
    try:
        number = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError, OverflowError):
        number = 0
    if number < 1:
        raise click.BadParameter(f"{value!r} is no size; write 4GB, 512MB or 16GiB")
    return number


def parse_strength(context: click.Context, parameter: click.Parameter, value: str) -> float | None:
    """A number, or auto, which is None."""
    try:
        return None if value == "auto" else float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from None


def parse_shots(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Numbers with commas between."""
    try:
        return None if value is None else [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list such as 1,2,4,8,16") from None


def check_picture(plot: Path | None) -> None:
    """Refuse a name that says no format, before the work is done."""
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot {plot}: let the name end in .png, .svg or .pdf")


def templates_for(classes: Path | None, templates: str | None) -> str:
    """Templates as said, else those that a CLIP_benchmark data set has beside its classes, else the simple one."""
    if classes is None:
        return "simple"
    beside = classes.parent / "zeroshot_classification_templates.txt"
    prompts = templates or (str(beside) if beside.is_file() else "simple")
    logging.getLogger("clipindex").info("classes: %s, prompts: %s", classes, prompts)
    return prompts


def spec(options: dict[str, Any]) -> "ModelSpec":
    """The model that was asked for."""
    from clipindex.types import ModelSpec

    return ModelSpec(
        name=options["model"],
        pretrained=options["pretrained"],
        random_init=options["random_init"],
        quick_gelu=options["quick_gelu"],
    )


def both_ends(lines: list[str], where: str = "") -> list[str]:
    """The first and last lines of a long table, and how many are between, with the file that has them, if any."""
    if len(lines) <= 2 * CLASSES_SHOWN:
        return lines
    left_out = f"  … {len(lines) - 2 * CLASSES_SHOWN:,} more" + (f" in {where}" if where else "")
    return [*lines[:CLASSES_SHOWN], left_out, *lines[-CLASSES_SHOWN:]]


def _plain(value: Any) -> Any:  # noqa: ANN401 - what json cannot write by itself
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def print_result(result: Any, as_json: bool, lines: Callable[[Any], list[str]]) -> None:  # noqa: ANN401
    """A summary, or whatever holds some, on standard output: as JSON, or as `lines` puts it for a person."""
    if as_json:
        click.echo(json.dumps(result, indent=2, default=_plain))
    else:
        click.echo("\n".join(lines(result)))
