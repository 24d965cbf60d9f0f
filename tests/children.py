"""Work in child processes, which may be killed, or find the disk full, at a chosen point."""

import io
import os
import resource
import runpy
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile

from tqdm import tqdm

# Imported once, in a server from which every child is forked.
_processes = get_context("forkserver")
_processes.set_forkserver_preload(
    ["lkq_hf", "lkq_hf.cli", "lkq_hf.training", "lkq_hf.quantization", "lkq_hf.hub", "transformers.models.llama"]
)

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")


class Killed(Exception):
    """The child was killed by a signal."""


def run(function, *arguments, fault=None):
    """``function(*arguments)`` in a child process.

    Args:
        fault: called in the child before: ``killed_at``, ``killed_by_size`` or ``full_disk`` below.

    Raises:
        Killed: the child was killed.
        RuntimeError: it raised; with its traceback.
    """
    receiver, sender = _processes.Pipe(duplex=False)
    child = _processes.Process(target=_work, args=(sender, function, arguments, fault), daemon=True)
    child.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        child.join(60)
        raise Killed(signal.Signals(-child.exitcode).name) from None
    finally:
        receiver.close()
    child.join(60)
    if error is not None:
        raise RuntimeError(error)
    return result


def _work(sender, function, arguments, fault):
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        if fault is not None:
            fault()
        result = function(*arguments), None
    except BaseException:
        result = None, traceback.format_exc()
    sender.send(result)


def _watch(directory, event):
    """Calls ``event()`` before each change below a directory that Python is about to make."""
    directory = str(directory)

    def hook(name, arguments):
        if name == "open":
            path, _, flags = arguments
            if not isinstance(path, str | Path) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif name in CHANGES:
            path = arguments[0]
        else:
            return
        if str(path).startswith(directory):
            event()

    sys.addaudithook(hook)


def killed_at(directory, change):
    """Killed as by the kernel before the change of this number (from 0) below a directory."""
    left = [change]

    def event():
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    _watch(directory, event)


def count_changes(directory, function, *arguments):
    """How many changes below a directory ``function`` makes, in a child of its own."""
    return run(partial(_count, directory, function), *arguments)


def _count(directory, function, *arguments):
    seen = []
    _watch(directory, lambda: seen.append(1))
    function(*arguments)
    return len(seen)


def killed_by_size(size):
    """Killed in the middle of writing the first file that grows beyond ``size`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    _limit(size)


def full_disk(size):
    """Every file is refused more than ``size`` bytes, with an error, as by a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _limit(size)


def _limit(size):
    tqdm.get_lock()  # a semaphore, which is a file to the system
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def command_line(*arguments):
    """``lkq-hf`` with these arguments.

    Raises:
        RuntimeError: it ended with an error; with what it printed.
    """
    from lkq_hf.cli import main

    sys.argv = ["lkq-hf", *map(str, arguments)]
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(printed.getvalue()) from None
    return printed.getvalue()


def script(path, *arguments, typed=""):
    """What ``python path`` with these arguments, and processes that it starts, print to someone who types this."""
    sys.path.insert(0, str(path.parent))
    sys.argv = [*map(str, (path, *arguments))]
    sys.stdin = io.StringIO(typed)
    with TemporaryFile("w+") as printed:
        os.dup2(printed.fileno(), sys.stdout.fileno())
        runpy.run_path(str(path), run_name="__main__")
        sys.stdout.flush()
        printed.seek(0)
        return printed.read()
