"""The command line: its way to a command, and the exit codes.

Owns: what is said when something went wrong. Promises: a mistake is one line on stderr that says
what to do, exit code 2, and leaves nothing behind; a program whose flags are plain is started
without the parser of all commands, because its start waits for this. Called by the script
`concordia` and by `python -m concordia.cli`. The commands are cli_commands'; it does no work.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from concordia import cli_run
from concordia.errors import ConcordiaError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        asked = cli_run.plain(words, os.environ)
        if asked is not None:
            _end(cli_run.start(asked))
        from concordia.cli_commands import invoke

        invoke(words)
    except ConcordiaError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.exit(1)  # whoever read our output has gone


def _end(code: int) -> NoReturn:
    """At once: whoever waits for the program waits for this, and to take an interpreter down takes
    longer than all else behind a program.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    os._exit(code)


def _fail(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"concordia: {' '.join(message.split())}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
