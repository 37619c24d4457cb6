"""The command line: options in, one call, output out.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 failed, 2 usage, 3 done but
more samples were rejected than `--max-reject-rate` allows, 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM. What is
slow to import is imported by the command that uses it.
"""

from clipindex.cli.main import commands, main, run

__all__ = ["commands", "main", "run"]
