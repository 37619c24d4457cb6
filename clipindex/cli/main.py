"""The program: its commands, its exit status, what signals do to it."""

import contextlib
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from clipindex.cli import bench, classify, demo, embed, pack, verify
from clipindex.errors import ClipindexError, UsageError
from clipindex.version import __version__


def main() -> None:
    """Run the program and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit status."""
    _set_up_logging()
    _stop_on(signal.SIGTERM)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
        _stop_on(signal.SIGHUP)
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
    except _Terminated as terminated:
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            click.echo("terminated: published shards are kept; run again to go on", err=True)
        return 128 + terminated.number


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, travelling up the stack like KeyboardInterrupt so that everything is closed on its way."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop_on(number: signal.Signals) -> None:
    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        raise _Terminated(number)

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
    """Turn image corpora into CLIP embeddings worth keeping, and classify with them.

    WebDataset tars go in; Parquet shards of embeddings come out, a row or a recorded reject for every sample. Runs that
    were stopped go on where they were.
    """


for command in (pack.pack, embed.embed, verify.verify, classify.classify, demo.demo, bench.bench):
    commands.add_command(command)
