"""The program: its commands, its exit status, what signals do to it."""

import contextlib
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from clipindex.allocator import share_one_arena
from clipindex.cli import (
    bench,
    classify,
    compare,
    dedup,
    demo,
    embed,
    exporting,
    importing,
    index,
    pack,
    probe,
    retrieval,
    search,
    verify,
)
from clipindex.errors import ClipindexError, UsageError
from clipindex.version import __version__

_GOING_ON = ("embed", "import", "export")
"""Commands that are done by the shard, and leave out what is done already."""


def main() -> None:
    """Run the program and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit status."""
    share_one_arena()  # before a library is loaded whose threads would have their own
    _set_up_logging()
    stopped_by: list[int] = []
    _stop_on(signal.SIGTERM, stopped_by)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
        _stop_on(signal.SIGHUP, stopped_by)
    try:
        return commands.main(list(arguments), prog_name="clipindex", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UsageError as error:
        _say(f"error: {error}")
        return 2
    except ClipindexError as error:
        _say(f"error: {error}")
        return 1
    except (OSError, _Terminated) as error:
        if stopped_by:  # on its way up, a bar may have met a terminal that has gone
            _say(f"terminated: {_how_to_go_on(arguments)}")
            return 128 + stopped_by[0]
        assert isinstance(error, OSError)  # a full disk, a missing right: the system's words, without the traceback
        _say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        return 1
    except (click.Abort, KeyboardInterrupt):
        _say(f"interrupted: {_how_to_go_on(arguments)}")
        return 128 + signal.SIGINT


def _how_to_go_on(arguments: Sequence[str]) -> str:
    if next(iter(arguments), None) in _GOING_ON:
        return "published shards are kept; run again to go on"
    return "run again to start over"


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # who should read it may have gone
        click.echo(message, err=True)


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, travelling up the stack like KeyboardInterrupt so that everything is closed on its way."""


def _stop_on(number: signal.Signals, stopped_by: list[int]) -> None:
    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        stopped_by.append(number)
        raise _Terminated

    signal.signal(number, stop)


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
    """Turn image corpora into CLIP embeddings worth keeping; classify with them, search them, train on them.

    WebDataset tars go in; Parquet shards of embeddings come out, a row or a recorded reject for every sample. Runs that
    were stopped go on where they were.
    """


for command in (
    pack.pack,
    embed.embed,
    verify.verify,
    classify.classify,
    index.index,
    search.search,
    dedup.dedup,
    probe.probe,
    compare.compare,
    retrieval.retrieval,
    importing.import_embeddings,
    exporting.export_embeddings,
    demo.demo,
    bench.bench,
):
    commands.add_command(command)
