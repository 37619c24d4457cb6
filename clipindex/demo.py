"""The whole way on shipped images with the shipped model, without a network."""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from clipindex.embed_job import embed
from clipindex.errors import UsageError
from clipindex.sheet import Group, Tile, contact_sheet
from clipindex.store import read_embeddings
from clipindex.urls import read_range
from clipindex.zeroshot import ClassifySummary, classify

DATA = Path(__file__).parent / "demo_data"
CLASSIFIED = {
    "digits": "handwritten digits, 8 x 8 pixels",
    "shapes": "colour-shape pairs never seen in training",
}
SHEET_FILE = "predictions.png"

_MARKER = "demo.json"
BATCH_SIZE = 64
"""Said, because measuring it would take longer than these few images do."""

_SIDE = 64
_COLUMNS = 12
_ROWS_PER_SET = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoStep:
    """One data set, embedded and, where it has classes, classified."""

    name: str
    about: str
    samples: int
    rows: int
    rejects: int
    images_per_s: float
    classified: ClassifySummary | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSummary:
    """What the demo did and where it left it."""

    out: str
    steps: list[DemoStep]
    sheet: str
    """A picture of some images with what they were taken for."""
    seconds: float


def run_demo(out: str | Path, on_step: Callable[[DemoStep], None] = lambda step: None) -> DemoSummary:
    """Embed and classify the shipped images below `out`, afresh each time.

    Raises:
        UsageError: `out` holds something that no demo made.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).exists():
            raise UsageError(f"{folder} holds something else; give an empty or new directory with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).write_text("{}\n")
    started = time.perf_counter()
    steps = []
    for name, about in {**CLASSIFIED, "photos": "photographs in many formats, embedded only"}.items():
        steps.append(_step(name, about, folder / name))
        on_step(steps[-1])
    _draw_sheet(folder)
    summary = DemoSummary(
        out=str(folder),
        steps=steps,
        sheet=str(folder / SHEET_FILE),
        seconds=round(time.perf_counter() - started, 1),
    )
    (folder / _MARKER).write_text(json.dumps({"seconds": summary.seconds}) + "\n")
    return summary


def _step(name: str, about: str, folder: Path) -> DemoStep:
    source = DATA / f"wds_{name}"
    embedded = embed(str(source), folder, model="demo", batch_size=BATCH_SIZE)
    classified = None
    if (source / "classnames.txt").exists():
        classified = classify(
            folder,
            classes=source / "classnames.txt",
            templates=source / "zeroshot_classification_templates.txt",
        )
    return DemoStep(
        name=name,
        about=about,
        samples=embedded.samples,
        rows=embedded.rows,
        rejects=embedded.rejects,
        images_per_s=embedded.images_per_s,
        classified=classified,
    )


def _draw_sheet(folder: Path) -> None:
    """Images cut out of their tars by offset, with the class each was taken for; wrong ones in red."""
    tiles: list[Tile] = []
    for name in CLASSIFIED:
        for data, predicted, right in _spread(list(_predictions(folder / name))):
            tiles.append(Tile(data, predicted.replace(" ", "\n"), "black" if right else "red"))
    contact_sheet([Group("", tiles)], columns=_COLUMNS, side=_SIDE).save(folder / SHEET_FILE)


def _spread(found: list[tuple[bytes, str, bool]]) -> list[tuple[bytes, str, bool]]:
    """As many as fit a block of the sheet, the same ones each time."""
    return random.Random(0).sample(found, min(len(found), _ROWS_PER_SET * _COLUMNS))


def _predictions(folder: Path) -> Iterator[tuple[bytes, str, bool]]:
    """Image bytes, best class name, and whether it is right, for each labelled row."""
    for batch in read_embeddings(folder, ("tar_offset", "tar_size")):
        predicted = pq.read_table(folder / "predictions" / f"{batch.shard.name}.parquet")
        rows = predicted.slice(batch.first_row, len(batch.embedding)).to_pylist()
        places = zip(*(batch.columns[column].to_pylist() for column in ("tar_offset", "tar_size")), strict=True)
        for row, (offset, size) in zip(rows, places, strict=True):
            yield (
                read_range(batch.shard.url, offset, size),
                row["class_name"][0],
                row["class_id"][0] == row["label"],
            )
