"""That a command run in the test's own process is the program, and leaves the process as it was."""

import logging
import signal
import subprocess
import sys
import warnings

import click
import pytest
import torch
from command_line import run_cli, run_process
from corpus import encoded

from clipindex.cli import commands


@pytest.fixture
def saying():
    """A command that says things in every way there is."""

    @commands.command("say", help="")
    @click.argument("status", type=int)
    def say(status):
        click.echo("ü, by click")
        sys.stdout.write("by Python\n")
        sys.stderr.write("err, by Python\n")
        logging.getLogger("clipindex").info("by the log")
        subprocess.run(["sh", "-c", "echo by a child; echo err, by a child >&2"], check=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(7)
        warnings.simplefilter("ignore")
        return status

    yield
    del commands.commands["say"]


def state():
    root, own = logging.getLogger(), logging.getLogger("clipindex")
    signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    settings = root.level, own.level, torch.get_num_threads(), list(warnings.filters), list(sys.argv)
    return [*root.handlers], signals, settings, sys.stdout, sys.stderr


def test_everything_said_is_found_and_the_process_is_as_it_was(saying, capfd):
    sys.stdout.write("before\n")
    before = state()
    done = run_cli("say", 3)
    assert state() == before
    assert done.returncode == 3
    assert sorted(done.stdout.splitlines()) == ["by Python", "by a child", "ü, by click"]
    lines = sorted(line.split("INFO ")[-1] for line in done.stderr.splitlines())
    assert lines == ["by the log", "err, by Python", "err, by a child"]
    sys.stdout.write("after\n")
    assert capfd.readouterr() == ("before\nafter\n", "")


def test_what_would_be_a_traceback_is_raised(saying, monkeypatch):
    before = state()
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(TypeError):
        run_cli("say", 0)
    monkeypatch.undo()
    assert state() == before


@pytest.mark.parametrize("arguments", [["--version"], ["frobnicate"], ["pack", "photos", "out"], ["pack", "no", "out"]])
def test_a_process_of_its_own_says_the_same(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "0.jpg").write_bytes(encoded())
    here = run_cli(*arguments)
    (tmp_path / "out").rename(tmp_path / "first") if (tmp_path / "out").exists() else None
    there = run_process(*arguments)
    assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)
