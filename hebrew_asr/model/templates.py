"""A checkpoint's chat template, a program that may come from anyone, rendered within bounds of time and memory."""

import contextlib
import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hebrew_asr.errors import InputError

CPU_SECONDS = 5  # that a template may take; the base model's takes 0.01
WALL_SECONDS = 60.0  # on a machine with much else to do
MORE_BYTES = 1 << 30  # of memory than the process has
MOST_BYTES = 1 << 20  # of what it writes


def rendered(render: Callable[[], list[str]], name: str) -> list[str]:
    """What `render` returns, run in a process of its own; raises InputError that names the checkpoint.

    A thread could not be ended, and a signal would reach the main thread alone.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + MORE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            answer: dict[str, Any]
            try:
                answer = {"texts": render()}
            except Exception as error:
                answer = {"problem": " ".join(f"{type(error).__name__} {error}".split())[:500]}
            with os.fdopen(writing, "w") as pipe:
                json.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        answer = json.loads(read_all(reading))
    except ValueError:
        limit = f"{CPU_SECONDS} s of computing and {MORE_BYTES >> 20} MB"
        answer = dict[str, Any](problem=f"it does not end within {limit}")
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if "problem" in answer:
        raise InputError(
            f"the chat template of {name} cannot be used: {answer['problem']}. Take the checkpoint from where it was"
            " trained, or put the chat_template.jinja of Qwen3-ASR in its place"
        )
    return answer["texts"]


def read_all(descriptor: int) -> bytes:
    """What comes through a pipe until it is closed, within bounds."""
    content, end = b"", time.monotonic() + WALL_SECONDS
    while len(content) <= MOST_BYTES and select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return content
        content += part
    return b""
