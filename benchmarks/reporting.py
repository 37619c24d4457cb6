"""How every benchmark ends: a table for people, then one line of JSON, kept under results/ when asked."""

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clipindex.bench.machine import describe_machine

RESULTS = Path(__file__).parent / "results"

Row = dict[str, str | float | int]


def said(error: BaseException) -> str:
    """What an error says, in a row's one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows --save."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="HARDWARE", help="keep the result as results/<theme>_HARDWARE_<date>.json")
    return parser


def finish(
    theme: str, rows: Sequence[Row], save: str | None, folder: Path = RESULTS, device: torch.device | None = None
) -> None:
    """Print the rows as a table and as JSON; keep the JSON where `save` names the hardware."""
    _print_table(rows)
    print(json.dumps(keep(theme, rows, save, folder, device)), flush=True)


def keep(
    theme: str, rows: Sequence[Row], save: str | None, folder: Path = RESULTS, device: torch.device | None = None
) -> dict[str, Any]:
    """Keep what there is until now in `folder`, where `save` names the hardware; in any case the document."""
    document: dict[str, Any] = {
        "theme": theme,
        "date": datetime.date.today().isoformat(),
        **describe_machine(device),
        "rows": rows,
    }
    if save:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{theme}_{save}_{document['date']}.json"
        path.write_text(json.dumps(document, indent=2) + "\n")
    return document


def _print_table(rows: Sequence[Row]) -> None:
    if not rows:
        print("no rows")
        return
    names = list(rows[0])
    cells = [
        [f"{row[name]:,.4g}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows
    ]
    widths = [max(len(name), *(len(line[at]) for line in cells)) for at, name in enumerate(names)]
    for line in [names, ["-" * width for width in widths], *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
