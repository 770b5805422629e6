"""Running a command: arguments in, an answer out, and every error as one clear message and an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from warmstart.cli.answers import Exit, UsageError, safe
from warmstart.errors import CheckpointError, WarmStartError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `warmstart` with these arguments (those of the process, if None) and return its exit code.

    0: it fits, is equal, is done. 1: it does not fit, differs, or is not there. 2: what was typed cannot be meant. 3: a
    source cannot be read or an output cannot be written. 130 and 143: stopped by Ctrl-C and by SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _stoppable():
            return _run(args)
    except OSError as error:  # what was to be printed
        _print(f"warmstart: cannot print: {error.strerror}", sys.stderr)
        _forget(sys.stdout)
        return Exit.UNREADABLE
    except _StoppedError as stopped:
        return 128 + stopped.signal
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(args: list[str]) -> int:
    try:
        from warmstart.cli.parsing import parse
    except ModuleNotFoundError as error:
        return _failed(f"the command line needs {error.name}: pip install 'warmstart[cli]'", error, Exit.USAGE, False)
    as_json = "--json" in args
    try:
        command, options = parse(args)
        answer = command(options)
    except SystemExit as done:  # --help and its like
        return done.code if isinstance(done.code, int) else Exit.OK
    except (UsageError, ModuleNotFoundError) as error:
        return _failed(str(error), error, Exit.USAGE, as_json)
    except CheckpointError as error:
        return _failed(str(error), error, Exit.UNREADABLE, as_json)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        message = f"{where}{error.strerror or error}; check the path, its permissions and the space that is left"
        return _failed(message, error, Exit.UNREADABLE, as_json)
    except WarmStartError as error:
        return _failed(str(error), error, Exit.DIFFERS, as_json)
    _print(json.dumps(answer.data, indent=1) if as_json else safe(answer.text), sys.stdout)
    return answer.code


def _failed(message: str, error: Exception, code: Exit, as_json: bool) -> int:
    if isinstance(error, WarmStartError):
        from warmstart.cli.options import as_options

        message = as_options(message)
    _print(safe(f"warmstart: {message}"), sys.stderr)
    if as_json:
        _print(json.dumps({"error": {"kind": type(error).__name__, "message": message}}, indent=1), sys.stdout)
    return code


def _print(text: str, stream: TextIO) -> None:
    """Print, quietly where nobody reads any more (`| head`)."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        _forget(stream)


def _forget(stream: TextIO) -> None:
    """Python flushes what is left once more when it ends: into nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _StoppedError(BaseException):
    def __init__(self, number: int) -> None:
        self.signal = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that what is half written is taken away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StoppedError(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
