"""Commands in new processes that need not import torch and transformers, which costs ten seconds of CPU each time.

A server imports once what commands need and forks a process for each that is asked for; of several processes one is
told its rank as torchrun tells it. For tests that are not about the start of a process: those use
`test_main_command.command`. What libraries read from the environment when they are imported is the server's, but for
the address and the cache of the Hub's client.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from huggingface_hub import constants

ROOT = Path(__file__).parent.parent
NOTICE_SECONDS = 1.0  # before a launcher ends the others, which may be about to end by themselves
GRACE_SECONDS = 30.0  # for the other ranks to end after one that failed
PRELOADED = [
    *("train_hebrew_asr_enhanced", "train_round2_gradual", "evaluate_hebrew_asr", "scripts.audit_corpus"),
    *("scripts.train_domain", "scripts.train_round3_gspo", "transformers.models.qwen3_asr.modeling_qwen3_asr"),
]


def become(script: str, arguments: list[str], environment: dict[str, str], output: tuple[str, str]) -> None:
    """What a process does: it becomes `python script arguments`, which writes to two files."""
    multiprocessing.set_start_method(None, force=True)  # the default, not this process's own
    os.setsid()
    for descriptor, file in enumerate(output, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if "HF_ENDPOINT" in environment:
        address = environment["HF_ENDPOINT"]
        constants.ENDPOINT, constants.HF_HUB_CACHE = address, environment["HF_HUB_CACHE"]
        constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def forked(
    script: str | Path, *arguments: object, processes: int | None = None, env: dict | None = None, timeout: int = 400
) -> subprocess.CompletedProcess[str]:
    """Runs a script as `command` does; with `processes`, as torchrun does: after one that failed the others are ended.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds, when all have been ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    line = [str(ROOT / script), *map(str, arguments)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    with tempfile.TemporaryDirectory() as folder:
        output = (f"{folder}/stdout", f"{folder}/stderr")
        for file in output:
            Path(file).touch()
        running = []
        for rank in range(processes or 1):
            ranks = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes else {}
            environment = {**os.environ, **(env or {}), **ranks}
            running.append(context.Process(target=become, args=(line[0], line[1:], environment, output)))
        for process in running:
            process.start()
        status, end = 0, time.monotonic() + timeout
        left = {process.sentinel: process for process in running}
        try:
            while left and (ended := wait(list(left), max(0, end - time.monotonic()))):
                for sentinel in ended:
                    process = left.pop(sentinel)
                    process.join()
                    if process.exitcode and not status:
                        status, end = process.exitcode, min(end, time.monotonic() + GRACE_SECONDS)
                        wait(list(left), NOTICE_SECONDS)
                        for other in left.values():
                            other.terminate()
        finally:
            for process in left.values():
                process.kill()
                process.join()
        said = [Path(file).read_text() for file in output]
    if left:
        raise subprocess.TimeoutExpired(line, timeout, *said)
    return subprocess.CompletedProcess(line, 1 if status and processes else status, *said)
