"""A command's first second and its last: a sign of life, Ctrl-C while the libraries are imported, and the last line.

Every command calls `begin` before its imports, which take seconds; `launch` (hebrew_asr/processes.py) ends it. Imports
nothing but the standard library.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import NoReturn

SILENT_SECONDS = 0.8  # before the first sign: what needs no torch is answered by then
BEAT_SECONDS = 3.0  # from one dot to the next
REPORT_SECONDS = 60.0  # for the launcher to end after a command that failed
IMPORTED = threading.Event()
SIGNS = threading.Thread(target=lambda: beat(), daemon=True)


def begin() -> None:
    """Says what goes on, and from then on with a dot now and then; of several processes only the first says it."""
    signal.signal(signal.SIGINT, interrupted)
    if is_first():
        SIGNS.start()


def beat() -> None:
    if IMPORTED.wait(SILENT_SECONDS):
        return
    say("loading torch and transformers ")
    while not IMPORTED.wait(BEAT_SECONDS):
        say(".")
    say("\n")


def imported() -> None:
    """The imports are done: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is not interrupted:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    IMPORTED.set()
    if SIGNS.is_alive():
        SIGNS.join()


def interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process at once, with a line and no traceback: an import may not let an exception through."""
    say_last("\ninterrupted")
    os._exit(128 + number)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk or a closed pipe behind it ends no command
        os.write(2, text.encode())


def say_last(message: str) -> None:
    """Says once why a command ends, where it is the last thing on the screen: under torchrun, below its own report.

    There it comes from the process of the first machine that is the first to meet it: the launcher may end the others
    before they do.
    """
    if not is_under_torchrun():
        if is_first():
            say(f"{message}\n")
        return
    launcher, began = os.getppid(), time.monotonic()
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0last-line-of-{launcher}")  # until all that hold it have ended
    except OSError:
        return
    if os.environ.get("GROUP_RANK", "0") != "0" or os.fork():
        return
    try:  # a process of its own, which holds nothing but the screen and outlives the launcher by a moment
        os.setsid()
        os.closerange(3, claim.fileno()), os.closerange(claim.fileno() + 1, 4096)
        while is_running(launcher) and time.monotonic() - began < REPORT_SECONDS:
            time.sleep(0.005)
        say(f"{message}\n")
    finally:
        os._exit(0)


def is_running(pid: int) -> bool:
    """Whether a process has not ended, though nobody may have asked how."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
