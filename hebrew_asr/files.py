"""Files that are there whole or not at all, and their hashes."""

import hashlib
import os
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


def put(file: Path, content: str) -> None:
    """Replaces a small file in one step."""
    unfinished = file.with_name(f".{file.name}.{UNFINISHED}{os.getpid()}")
    unfinished.write_text(content)
    flush(unfinished)
    unfinished.replace(file)
