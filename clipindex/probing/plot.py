"""A few-shot curve as a picture."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from clipindex.atomic import atomic_write
from clipindex.probing.few_shot import FewShotCurve

CURVE_PICTURE = "few_shot.png"


def draw_curve(curve: FewShotCurve, path: str | Path) -> None:
    """Write mean accuracies with their deviations over shots, and zero-shot as a line (.png, .svg or .pdf)."""
    path = Path(path)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    shots = [point.shots for point in curve.points]
    axes.errorbar(
        shots,
        [point.mean for point in curve.points],
        yerr=[point.deviation for point in curve.points],
        color="#4e79a7",
        marker="o",
        capsize=4,
        label=f"linear probe, {len(curve.seeds)} draws",
    )
    if curve.zero_shot is not None:
        label = f"zero-shot, {curve.templates} prompt{'s' if curve.templates > 1 else ''} a class"
        axes.axhline(curve.zero_shot, color="#e15759", linestyle="--", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("training rows a class")
    axes.set_ylabel(f"acc1 of {curve.test_rows:,} rows")
    axes.set_title(
        f"{curve.model}: {curve.classes} classes, {curve.features} {curve.vectors} features", loc="left", fontsize=11
    )
    axes.grid(color="#dddddd")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)
