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


def follow_umask(folder: Path) -> None:
    """Gives a folder's files the permissions of any new file; those of safetensors are their owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


@contextlib.contextmanager
def whole_or_nothing(target: Path) -> Generator[Path]:
    """A path beside `target`, for a file or for a folder, which takes its place once all in it is on the disk.

    What stands at `target` is replaced. When the block raises, or the machine dies, `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{UNFINISHED}{os.getpid()}-{target.name}")
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
