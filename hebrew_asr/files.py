"""Files that are there whole or not at all, and their hashes."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

UNFINISHED = "unfinished-"  # what the name of a file or folder that is being written begins with
DEMO = Path(__file__).parents[1] / "demo"  # the small world of a checkout
DIGEST = 24  # characters of a digest


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST // 2).hexdigest()


def flush(path: Path) -> None:
    """Waits until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextlib.contextmanager
def whole_or_nothing(target: Path) -> Generator[Path]:
    """A path beside `target`, for a file or for a folder, which takes its place once all in it is on the disk.

    What stands at `target` is replaced. When the block raises, or the machine dies, `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{UNFINISHED}{os.getpid()}-{digest(target.name.encode())}")  # as long for any name
    remove(unfinished)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            flush(path)
        if unfinished.is_dir():
            remove(target)
        unfinished.replace(target)
        flush(target.parent)
    finally:
        remove(unfinished)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put(file: Path, content: str) -> None:
    """Replaces a small file in one step."""
    with whole_or_nothing(file) as unfinished:
        unfinished.write_text(content, encoding="utf-8")


class Appended:
    """A text file that only grows; what the disk does not take is kept, up to a bound, and written when there is room.

    Whole texts are written, or nothing of them.
    """

    MOST = 20_000_000  # characters that are kept, the newest

    def __init__(self, file: Path):
        self.file, self.waiting = file, ""
        self.failures, self.lost = 0, 0  # times that it could not be written, and characters that were not kept

    def write(self, text: str) -> OSError | None:
        """Appends a text, after what is waiting; returns why that is not possible now."""
        self.waiting += text
        size = None
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                size = file.tell()
                file.write(self.waiting)
            self.waiting = ""
        except OSError as error:
            self.failures += 1
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.file, size)
            too_many = max(0, len(self.waiting) - self.MOST)
            self.waiting, self.lost = self.waiting[too_many:], self.lost + too_many
            return error
        return None
