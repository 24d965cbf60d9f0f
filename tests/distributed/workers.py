"""What the processes of a distributed test do: functions of this file, run by `launch`."""

import io
import os
import pkgutil
import signal
import socket
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

# Imported once, in a server from which every worker is forked.
_processes = get_context("forkserver")
_processes.set_forkserver_preload(["lkq_hf", "lkq_hf.training", "lkq_hf.quantization", "transformers.models.llama"])
# A process that was forked from one that has looked for GPUs cannot use them.
_processes_on_gpus = get_context("spawn")


class Group:
    """Processes that find each other through torch.distributed, and do one call after another.

    Args:
        processes: how many.
        gpus: whether each is to have a GPU of its own; otherwise they are on CPUs.
        seconds: how long a call may take.
    """

    def __init__(self, processes=2, gpus=False, seconds=120):
        self.context = _processes_on_gpus if gpus else _processes
        self.size, self.seconds = processes, seconds
        self._workers, self._pipes = [], []

    def __enter__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(self.size):
            here, there = self.context.Pipe()
            self._workers.append(self.context.Process(target=_work, args=(there, rank, self.size, port), daemon=True))
            self._workers[-1].start()
            self._pipes.append(here)
            there.close()
        return self

    def __exit__(self, *_):
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(10)
            worker.kill()
        self._workers, self._pipes = [], []

    def __call__(self, function, *arguments):
        """Results of ``function(*arguments)`` in each process.

        Raises:
            RuntimeError: a process failed; with its traceback. All of them are started anew by the next call.
        """
        if not self._workers:
            self.__enter__()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = {}
        try:
            while len(results) < self.size:
                waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
                ready = wait(waiting, timeout=self.seconds)
                if not ready:
                    raise RuntimeError(
                        f"only processes {sorted(results)} of {self.size} came to an end in {self.seconds} seconds"
                    )
                for pipe in ready:
                    rank = self._pipes.index(pipe)
                    try:
                        results[rank], error = pipe.recv()
                    except (EOFError, ConnectionResetError):
                        raise RuntimeError(f"process {rank} was killed") from None
                    if error is not None:
                        raise RuntimeError(self._killed() or f"process {rank} failed:\n{error}")
        except RuntimeError:
            for worker in self._workers:
                worker.kill()
            self.__exit__()
            raise
        return [results[rank] for rank in range(self.size)]

    def _killed(self):
        """Which process was killed, if one was: the others fail because of it, and may say so first."""
        wait([worker.sentinel for worker in self._workers], timeout=1)
        gone = [rank for rank, worker in enumerate(self._workers) if worker.exitcode is not None]
        return f"process {gone[0]} was killed" if gone else None


def launch(function, *arguments, processes=2):
    """Results of ``function(*arguments)`` in each of a new group of processes on CPUs."""
    with Group(processes) as group:
        return group(function, *arguments)


def _work(pipe, rank, processes, port):
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    while True:
        try:
            function, arguments = pipe.recv()
            answer = function(*arguments), None
        except EOFError:  # The group has no more work.
            break
        except BaseException:
            answer = None, traceback.format_exc()
        pipe.send(answer)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch_environment(config):
    """What `accelerate launch` adds to the environment for a file of examples/accelerate."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = Path(__file__).parents[2] / "examples" / "accelerate" / config
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    )
    environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def use_fsdp(gpus=False):
    """Sets this process up as examples/accelerate/fsdp2.yaml does.

    accelerate offers FSDP to accelerators only, torch to CPUs too; so without GPUs accelerate is told that there are
    some.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ.update(launch_environment("fsdp2.yaml"))
    if gpus:
        return
    original = PartialState.__init__

    def several_accelerators(state, *args, **kwargs):
        original(state, *args, **kwargs)
        state._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    PartialState.__init__ = several_accelerators


def sharded_command_line(*arguments):
    """:func:`command_line` under FSDP2."""
    use_fsdp()
    return command_line(*arguments)


def command_line(*arguments, kill=None):
    """Exit code and output of ``lkq-hf`` in this process.

    Args:
        kill: ``(rank, module, function, calls)``: that process is killed, as by the kernel, when it calls a function
            more often.
    """
    from lkq_hf.cli import main

    if kill is not None and int(os.environ.get("RANK", 0)) == kill[0]:
        _kill_at(*kill[1:])
    sys.argv = ["lkq-hf", *map(str, arguments)]
    printed, code = io.StringIO(), 0
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def killed_command_line(*arguments, kill):
    """:func:`command_line` by two processes, one of which is killed."""
    with pytest.raises(RuntimeError, match=f"process {kill[0]} was killed"):
        launch(partial(command_line, kill=kill), *arguments)


def _kill_at(module, name, calls, after=None):
    """Kills this process when it calls a function once more than ``calls`` times and the file ``after`` exists."""
    owner = pkgutil.resolve_name(module)
    original, made = getattr(owner, name), []

    def counted(*args, **kwargs):
        if len(made) == calls:
            while after is not None and not after.exists():  # another process writes it
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(None)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
