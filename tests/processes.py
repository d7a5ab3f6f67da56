"""Run a function in two processes that talk by gloo, and give back what each returns."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 300.0
"""Processes that take longer hang."""


def both(task: Callable[..., Any], folder: Path, *arguments: Any, world: int = 2) -> list[Any]:
    """What `task(*arguments)` returns in each of the processes; whatever one raises is raised here.

    The function is found by its name, so it stands at the top of a file.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(rank, world, port, task, folder, arguments)) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    _wait(workers, task.__name__)
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _wait(workers: list[SpawnProcess], name: str) -> None:
    """Wait for all to end, but not for the others when one has failed."""
    stop = time.monotonic() + SECONDS
    # asked once a turn: waiting for none of them, when the last ends between two questions, would take all the time
    while running := [worker.sentinel for worker in workers if worker.is_alive()]:
        connection.wait(running, timeout=stop - time.monotonic())
        late = time.monotonic() > stop
        if late or any(worker.exitcode for worker in workers):
            for worker in workers:
                worker.kill()
        if late:
            raise TimeoutError(f"{name} hangs: the processes do not make the same calls in the same order")


def _work(rank: int, world: int, port: int, task: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    try:
        torch.save(task(*arguments), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # an orderly end would wait for the other
