"""The console of a command: a full disk, a closed pipe or a narrow encoding behind it does not end the command.

A progress bar on it never stands still.
"""

import errno
import os
import re
import sys
import threading
from typing import Any, TextIO

from tqdm import tqdm

TICK_SECONDS = 1.0
MOST_BYTES = 1_000_000  # of text that is kept while it cannot be written; the newest
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # what a terminal acts on


def visible(text: str) -> str:
    """`text` with control and direction characters written out, but for line breaks and tabs."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escaped(text: str) -> str:
    """`visible`, with line breaks written out too."""
    return visible(text).replace("\n", "\\n").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


class Console:
    """Writes to a descriptor at once; what it does not take waits for the next text, up to a bound."""

    def __init__(self, stream: TextIO):
        stream.flush()
        self.stream, self.descriptor = stream, stream.fileno()
        self.encoding, self.errors = stream.encoding or "utf-8", "backslashreplace"
        self.waiting = b""
        self.lost = 0  # bytes that were too many to be kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._send(self.waiting + text.encode(self.encoding, self.errors))
        return len(text)

    def flush(self) -> None:
        if self.waiting:
            self._send(self.waiting)

    def _send(self, content: bytes) -> None:
        try:
            while content:
                content = content[os.write(self.descriptor, content) :]
                if not content and self.lost:
                    content = b"warning: %d bytes of the console's text could not be written\n" % self.lost
                    self.lost = 0
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read it is gone
                content = b""
        too_many = max(0, len(content) - MOST_BYTES)
        self.waiting, self.lost = content[too_many:], self.lost + too_many


def use_console() -> None:
    """Has this process's two streams outlive what is behind them."""
    if not isinstance(sys.stdout, Console):
        sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)


class Bar(tqdm):
    """A progress bar whose clock goes on while one batch or one step takes long."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.closed = threading.Event()
        super().__init__(*args, **kwargs)
        if not self.disable:
            threading.Thread(target=self.tick, daemon=True).start()

    def tick(self) -> None:
        while not self.closed.wait(TICK_SECONDS):
            self.refresh()

    def close(self) -> None:
        self.closed.set()
        super().close()
