"""A comparison of encoders as a picture, after figure 6 of the CLIP paper (arXiv:2103.00020)."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clipindex.atomic import atomic_write
from clipindex.probing.comparison import Comparison, EncoderResult

COMPARISON_PICTURE = "compare.png"
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito 2008, which the colour-blind tell apart; without yellow, which paper swallows."""
_MARKERS = "osD^vPXph"
_APART = 0.07
"""Between neighbouring encoders along the axis, so that no error bar hides another."""


def draw_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write accuracies over shots, with zero-shot at the left and the probe of all rows at the right.

    Args:
        comparison: What was found.
        path: A .png, .svg or .pdf file.
    """
    path = Path(path)
    encoders = comparison.encoders
    figure = Figure(figsize=(8, 4.6 + 0.24 * len(encoders)), layout="constrained")
    axes = figure.subplots()
    shots = [point.shots for point in encoders[0].few_shot]
    first, last = (math.log2(shots[0]), math.log2(shots[-1])) if shots else (0.0, -0.5)
    ends = (first - 1, last + 1.5)
    for at, encoder in enumerate(encoders):
        style = {"color": _COLORS[at % len(_COLORS)], "marker": _MARKERS[at % len(_MARKERS)]}
        _draw_encoder(axes, encoder, ends, (at - (len(encoders) - 1) / 2) * _APART, style)
    ticks = {last + 1.5: f"all\n{comparison.training_rows:,} rows"}
    ticks |= {math.log2(number): str(number) for number in shots}
    if any(encoder.zero_shot for encoder in encoders):
        ticks[first - 1] = "zero-shot"
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    bars = "± 1 deviation over draws; " if shots and len(comparison.seeds) > 1 else ""
    axes.set_xlabel(f"training rows{' a class' if shots else ''}  ({bars}of all rows Wilson's 95 %)")
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.03))
    axes.set_ylabel(f"acc1 of {comparison.test_rows:,} rows")
    axes.set_title(_title(comparison), loc="left", fontsize=11)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", frameon=False, ncols=1, fontsize=9)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=140)


def _draw_encoder(
    axes: Axes, encoder: EncoderResult, ends: tuple[float, float], aside: float, style: dict[str, str]
) -> None:
    left, right = ends
    full = encoder.probe.accuracy
    points = encoder.few_shot
    places = [math.log2(point.shots) + aside for point in points]
    means = [point.mean for point in points]
    deviations = [point.deviation for point in points]
    if points:
        axes.errorbar(places, means, yerr=deviations, capsize=2.5, markersize=5, linewidth=1.6, **style)
        # A different kind of number of rows: not a class's, so the scale is broken here.
        ending = {"color": style["color"], "linestyle": ":", "linewidth": 1.4}
        axes.plot([places[-1], right + aside], [means[-1], full.acc1], **ending)
    bounds = [[full.acc1 - full.interval[0]], [full.interval[1] - full.acc1]]
    name = f"{encoder.name.removesuffix(f' {encoder.vectors}')}, {encoder.vectors}: {full.acc1:.2%}"
    if encoder.zero_shot is not None:
        name += f", zero-shot {encoder.zero_shot.acc1:.2%}"
        axes.plot([left + aside], [encoder.zero_shot.acc1], marker="*", markersize=13, color=style["color"])
    axes.errorbar(
        [right + aside], [full.acc1], yerr=bounds, capsize=2.5, markersize=7, linestyle="", label=name, **style
    )


def _title(comparison: Comparison) -> str:
    parts = [f"{comparison.classes:,} classes", f"{comparison.features} features"]
    if comparison.seeds:
        parts.append(f"{len(comparison.seeds)} draw{'s' if len(comparison.seeds) > 1 else ''}")
    return f"Linear probes: {', '.join(parts)}"
