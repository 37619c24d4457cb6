"""The benchmark as a picture: a bar for each measurement, a tick for its ceiling."""

from pathlib import Path

from matplotlib.figure import Figure

from clipindex.bench.run import BenchReport

_COLOURS = {
    "read": "#4e79a7",
    "decode": "#f28e2b",
    "copy": "#b07aa1",
    "encode": "#59a14f",
    "write": "#9c755f",
    "end to end": "#e15759",
}
_ROW_INCHES = 0.42


def draw(report: BenchReport, path: Path) -> None:
    """Write the picture; its format is that of the path's suffix (.png, .svg, .pdf)."""
    rows = report.measurements
    figure = Figure(figsize=(11, 1.5 + _ROW_INCHES * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(
        places, [row.images_per_s for row in rows], color=[_COLOURS[row.stage] for row in rows], height=0.62, zorder=2
    )
    for place, row in zip(places, rows, strict=True):
        axes.plot([row.ceiling_per_s] * 2, [place - 0.4, place + 0.4], color="#222222", linewidth=2, zorder=3)
        at = max(row.images_per_s, row.ceiling_per_s) * 1.12
        axes.text(at, place, f"{row.images_per_s:,.0f}/s, {100 * row.of_ceiling:.0f} %", va="center", fontsize=9)
    axes.set_yticks(places, [f"{row.stage}: {row.setting}" for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(row.images_per_s for row in rows) / 2, max(row.ceiling_per_s for row in rows) * 12)
    axes.set_xlabel("images/s (bar: measured, line: ceiling)")
    axes.grid(axis="x", color="#dddddd", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    machine = report.machine
    axes.set_title(
        f"clipindex bench: {machine.get('gpu') or machine['cpu']}, {machine['cores']} cores", loc="left", fontsize=11
    )
    figure.savefig(path, dpi=120)
