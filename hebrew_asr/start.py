"""A command's first second: a sign of life, and Ctrl-C, while the libraries are imported.

Every command calls `begin` before its imports, which take seconds; `launch` (hebrew_asr/processes.py) ends it. Imports
nothing but the standard library.
"""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import NoReturn

BEAT_SECONDS = 3.0  # from one dot to the next
IMPORTED = threading.Event()


def begin() -> None:
    """Says what goes on, and from then on with a dot now and then; of several processes only the first says it."""
    signal.signal(signal.SIGINT, interrupted)
    if is_first():
        say("loading torch and transformers ")
        threading.Thread(target=beat, daemon=True).start()


def beat() -> None:
    while not IMPORTED.wait(BEAT_SECONDS):
        say(".")


def imported() -> None:
    """The imports are done: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is not interrupted:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    IMPORTED.set()
    if is_first():
        say("\n")


def interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process at once, with a line and no traceback: an import may not let an exception through."""
    if is_first():
        say("\ninterrupted\n")
    os._exit(128 + number)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk or a closed pipe behind it ends no command
        os.write(2, text.encode())


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
