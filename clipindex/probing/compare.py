"""Several encoders on the same rows: zero-shot, few-shot and full linear probes of embeddings that are joined by key.

The same rows are held out, drawn as shots and validated on for every directory; see `shared_task`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clipindex.atomic import check_folder, write_json
from clipindex.devices import choose_device
from clipindex.errors import UsageError
from clipindex.logistic import Fit, Linear, block_rows
from clipindex.metrics import ClassificationCounts, mcnemar
from clipindex.probing.comparison import Accuracy, Comparison, EncoderResult, FullProbe, Paired
from clipindex.probing.encoders import Encoder, check_directories, check_tests, choose_encoders, embed_names
from clipindex.probing.evaluation import Ranked, count
from clipindex.probing.few_shot import count_drawn, few_shot_points, fit_shots
from clipindex.probing.protocols import README_C, Setting, check_c, fit_at
from clipindex.probing.rows import Held, Ids
from clipindex.probing.shared_task import Aligned, SharedTask, align, pose_shared_task
from clipindex.probing.task import check_choices, low_precision, name_classes, read_names
from clipindex.probing.train import validation_split
from clipindex.prompts import read_templates
from clipindex.store import read_dataset
from clipindex.types import ModelSpec

COMPARISON_FILE = "compare.json"
SHOTS = (1, 2, 4, 8, 16)
"""As in figure 6 of the CLIP paper (arXiv:2103.00020)."""

HELD_OUT = 0.2
"""Fraction of the common rows that is tested on, unless the user says otherwise."""

Hits = npt.NDArray[np.bool_]


def compare_encoders(
    folders: Sequence[str | Path],
    *,
    tests: Sequence[str | Path] = (),
    held_out: float | None = None,
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
    seed: int = 0,
    c: float | None = README_C,
    features: str = "raw",
    pre_projection: bool = False,
    projected: bool = False,
    names: str | Path | Sequence[str] | None = None,
    templates: str = "simple",
    models: Mapping[str | Path, str | ModelSpec] | None = None,
    out: str | Path = "compare",
    device: str = "auto",
    precision: str = "auto",
    memory_bytes: int | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Comparison:
    """Measure embedding directories of the same images, as zero-shot classifiers and by linear probes.

    The process's memory allocator is tuned; see `allocator.share_one_arena`.

    Args:
        folders: Two or more directories, of any models, or one with `projected`. Rows that not all have are left out,
            and said.
        tests: Directories to test on, one for each of `folders`, of its model, in that order.
        held_out: Or the fraction of each class to test on; a fifth by default.
        shots: Rows a class of the few-shot probes; none for no such probes.
        seeds: How many draws of them.
        seed: Of all that is drawn; the first one's of the draws.
        c: scikit-learn's C; None to search it for each probe of each directory.
        features: 'raw' or 'normalized'.
        pre_projection: Let probes learn from the features before the projection, where a directory holds both kinds.
        projected: Beside these, from those after it as well: such a directory is compared with itself.
        names: Class names, or a file with one a line, whose place is the label: for zero-shot.
        templates: Its prompts, as in `zeroshot.classify`.
        models: For some of `folders`, how to load the model for that, where the directory's record does not lead to its
            weights on this machine: a model, or a weights file or another place of the one that is recorded.
        out: Where compare.json goes.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        precision: Of the text towers.
        memory_bytes: What the embeddings of one directory may take; see `rows.hold_if_fits`.
        on_progress: Called with directories done, directories in all, and what is being done.

    Raises:
        UsageError: Options contradict each other.
        ClassesError: Labels differ between directories, a class has too few rows, or names do not fit the labels.
        FingerprintError: A test directory, or a model, is of another model than its directory.
        ModelError: A model that zero-shot needs cannot be loaded.
        StoreError: Directories have no row in common, or a file is damaged.
    """
    started = time.perf_counter()
    paths, test_paths = [Path(folder) for folder in folders], [Path(folder) for folder in tests]
    check_directories(paths, test_paths)
    check_folder(Path(out))
    _check_numbers(shots, seeds, c)
    check_choices(features, held_out, is_tested_elsewhere=bool(tests))
    datasets = [read_dataset(folder) for folder in paths]
    encoders = choose_encoders(paths, datasets, projected=projected, pre_projection=pre_projection)
    check_tests(test_paths, datasets, encoders)
    settings = _Settings(
        features=features,
        shots=tuple(sorted(set(shots))),
        draws=tuple(range(seed, seed + seeds)) if shots else (),
        seed=seed,
        c=c,
        device=choose_device(device),
        memory_bytes=memory_bytes,
        on_note=lambda done, note: on_progress(done, len(encoders), note),
    )
    settings.on_note(0, "reading keys and labels")
    task = pose_shared_task(paths, test_paths, HELD_OUT if held_out is None else held_out, seed)
    searched = _check_rows(task, settings)
    prompts, known = read_templates(templates), None if names is None else read_names(names)
    name_classes(task.classes, known)
    texts = embed_names(
        paths,
        [dataset.model for dataset in datasets],
        known,
        [*task.classes, *task.unseen],
        prompts,
        models or {},
        precision,
        settings.device,
        lambda note: settings.on_note(0, note),
    )
    measured = [_measure(task, done, one, texts[one.at], searched, settings) for done, one in enumerate(encoders)]
    comparison = _summarise(Path(out), task, measured, 0 if known is None else len(prompts), settings, started)
    write_json(Path(out) / COMPARISON_FILE, asdict(comparison))
    return comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """How each directory is measured."""

    features: str
    shots: tuple[int, ...]
    draws: tuple[int, ...]
    seed: int
    c: float | None
    device: torch.device
    memory_bytes: int | None
    on_note: Callable[[int, str], None]
    """Called with the number of encoders done, and what is being done."""


def _check_numbers(shots: Sequence[int], seeds: int, c: float | None) -> None:
    if shots and (min(shots) < 1 or seeds < 1):
        raise UsageError("give at least one seed and numbers of shots of at least 1")
    check_c(c)


def _check_rows(task: SharedTask, settings: _Settings) -> tuple[Ids, Ids] | None:
    """Refuse too few rows before anything is fitted; what a search of C trains on and validates on, if there is one."""
    if settings.shots:
        count_drawn(task.class_ids[task.training], task.classes, settings.shots, settings.c)
    return validation_split(task.class_ids, task.training, settings.seed) if settings.c is None else None


def _measure(
    task: SharedTask,
    done: int,
    encoder: Encoder,
    text: Linear | str,
    searched: tuple[Ids, Ids] | None,
    settings: _Settings,
) -> tuple[EncoderResult, Hits]:
    """Train and test all probes of an encoder; which test rows its full one gets right [n]."""
    started = time.perf_counter()

    def say(note: str) -> None:
        settings.on_note(done, f"{encoder.name}: {note}")

    say("reading")
    where = (encoder.vectors, settings.features, settings.device, settings.memory_bytes)
    own = align(task.joined, encoder.at, task.class_ids, *where, may_hold=True)
    linears, strengths = _few_shot(task, own, settings, say)
    fitted = _fit_full(task, own, searched, settings, say)
    say("testing")
    tested = own
    if task.tested is not task.joined:
        tested = align(task.tested, encoder.at, task.tested_ids, *where, may_hold=False)
    num_classes = len(task.classes) + len(task.unseen)
    of_probe, right = _test(task, tested, [*linears, (fitted.weights, fitted.intercept)], num_classes, settings)
    result = EncoderResult(
        folder=task.joined.sides[encoder.at].folder,
        name=encoder.name,
        model=encoder.model.spec,
        fingerprint=encoder.model.fingerprint,
        dim=encoder.model.dim,
        vectors=encoder.model.features,
        zero_shot=None if isinstance(text, str) else _zero_shot(task, encoder.at, text, settings),
        no_zero_shot=text if isinstance(text, str) else None,
        few_shot=few_shot_points(settings.shots, [_accuracy(one).acc1 for one in of_probe[:-1]], strengths),
        probe=FullProbe(
            accuracy=_accuracy(of_probe[-1]),
            c=fitted.c,
            passes=fitted.passes,
            converged=fitted.converged,
            in_memory=isinstance(own.rows, Held),
        ),
        against_best=None,
        seconds=round(time.perf_counter() - started, 3),
    )
    return result, right


def _few_shot(
    task: SharedTask, own: Aligned, settings: _Settings, say: Callable[[str], None]
) -> tuple[list[Linear], list[float]]:
    if not settings.shots:
        return [], []
    return fit_shots(
        own.rows,
        own.numbers(task.training),
        task.class_ids[task.training],
        task.classes,
        settings.shots,
        settings.draws,
        settings.c,
        settings.device,
        say,
    )


def _fit_full(
    task: SharedTask,
    own: Aligned,
    searched: tuple[Ids, Ids] | None,
    settings: _Settings,
    say: Callable[[str], None],
) -> Fit:
    """The probe of all training rows."""
    setting = Setting(
        num_classes=len(task.classes),
        balanced=False,
        low=low_precision(settings.device),
        device=settings.device,
        on_pass=say,
    )
    own_searched = None if searched is None else (own.ascending(searched[0]), own.ascending(searched[1]))
    return fit_at(own.rows, own.ascending(task.training), settings.c, own_searched, setting)[0]


def _test(
    task: SharedTask, tested: Aligned, linears: Sequence[Linear], num_classes: int, settings: _Settings
) -> tuple[list[ClassificationCounts], Hits]:
    """What each classifier gets right, and which rows [n] the last does, in their common order."""
    parts: list[Hits] = []

    def on_ranked(labels: Ids, ranked: list[Ranked]) -> None:
        parts.append(ranked[-1][0][:, 0] == labels)

    passes = tested.rows.passes(tested.ascending(task.test), block_rows(num_classes, settings.device))
    counts = count(passes, linears, num_classes, on_ranked=on_ranked)
    right = np.empty(len(task.test), np.bool_)
    right[np.argsort(tested.numbers(task.test))] = np.concatenate(parts)
    return counts, right


def _zero_shot(task: SharedTask, at: int, text: Linear, settings: _Settings) -> Accuracy:
    """Of the projected embeddings of a directory, whatever probes learn from."""
    where = ("embedding", "normalized", settings.device, settings.memory_bytes)
    tested = align(task.tested, at, task.tested_ids, *where, may_hold=False)
    passes = tested.rows.passes(tested.ascending(task.test), block_rows(len(text[1]), settings.device))
    (counts,) = count(passes, [text], len(text[1]))
    return _accuracy(counts)


def _accuracy(counts: ClassificationCounts) -> Accuracy:
    overall = counts.overall()
    return Accuracy(
        acc1=float(overall["acc1"] or 0),
        interval=counts.intervals()["acc1"],
        acc5=overall["acc5"],
        mean_per_class_recall=float(overall["mean_per_class_recall"] or 0),
    )


def _pair_with_best(measured: Sequence[tuple[EncoderResult, Hits]]) -> list[EncoderResult]:
    """The results, each but the best with the test rows that only it or only the best gets right."""
    best = max(range(len(measured)), key=lambda at: (measured[at][0].probe.accuracy.acc1, -at))
    of_best = measured[best][1]
    results = []
    for at, (result, right) in enumerate(measured):
        only_best, only_this = int((of_best & ~right).sum()), int((right & ~of_best).sum())
        pair = Paired(only_best=only_best, only_this=only_this, p=mcnemar(only_best, only_this))
        results.append(result if at == best else replace(result, against_best=pair))
    return results


def _summarise(
    out: Path,
    task: SharedTask,
    measured: Sequence[tuple[EncoderResult, Hits]],
    num_templates: int,
    settings: _Settings,
    started: float,
) -> Comparison:
    results = _pair_with_best(measured)
    both = (task.joined,) if task.tested is task.joined else (task.joined, task.tested)
    return Comparison(
        out=str(out),
        joined_by=task.joined.by,
        sides=tuple(side for joined in both for side in joined.sides),
        unlabelled=sum(joined.unlabelled for joined in both),
        classes=len(task.classes),
        training_rows=len(task.training),
        test_rows=len(task.test),
        test=task.source,
        unseen=task.unseen,
        features=settings.features,
        templates=num_templates,
        seed=settings.seed,
        seeds=settings.draws,
        best=next(result.folder for result in results if result.against_best is None),
        encoders=tuple(results),
        seconds=round(time.perf_counter() - started, 3),
    )
