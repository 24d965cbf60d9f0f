"""What the processes of a distributed test do: functions of this file, run by `launch`."""

import io
import os
import pkgutil
import signal
import socket
import sys
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


def launch(function, *arguments, processes=2):
    """Results of ``function(*arguments)`` in each of a group of processes that find each other through gloo.

    Raises:
        RuntimeError: a process failed; with its traceback.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pipes = [_processes.Pipe(duplex=False) for _ in range(processes)]
    workers = [
        _processes.Process(target=_work, args=(pipe[1], rank, processes, port, function, arguments), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for worker, (_, sender) in zip(workers, pipes, strict=True):
        worker.start()
        sender.close()
    ranks = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
    results = {}
    try:
        while len(results) < processes:
            ready = wait([receiver for receiver, rank in ranks.items() if rank not in results], timeout=120)
            if not ready:
                raise RuntimeError(f"only processes {sorted(results)} of {processes} came to an end in two minutes")
            for receiver in ready:
                rank = ranks[receiver]
                try:
                    results[rank], error = receiver.recv()
                except EOFError:
                    raise RuntimeError(f"process {rank} was killed") from None
                if error is not None:
                    raise RuntimeError(f"process {rank} failed:\n{error}")
    finally:
        for worker in workers:
            if len(results) < processes:
                worker.kill()
            worker.join(30)
    return [results[rank] for rank in range(processes)]


def _work(sender, rank, processes, port, function, arguments):
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    try:
        sender.send((function(*arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    finally:
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


def use_fsdp():
    """Sets this process up as examples/accelerate/fsdp2.yaml does, on a CPU.

    accelerate offers FSDP to accelerators only, torch to CPUs too; so accelerate is told that there are some.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ.update(launch_environment("fsdp2.yaml"))
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


def _kill_at(module, name, calls):
    owner = pkgutil.resolve_name(module)
    original, made = getattr(owner, name), []

    def counted(*args, **kwargs):
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(None)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
