"""Files that are there whole or not at all, and files of lines.

Standard library only: launch/supervise.py needs it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import IO, Any


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add ``line`` to a file of lines; one that was cut short before it stays a line of its own."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        cut = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        os.write(fd, cut * b"\n" + line.encode() + b"\n")
    finally:
        os.close(fd)


def read_records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines, in order; a line that is none is left out."""
    with open(path, "rb") as f:
        for line in f:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # cut by a kill or a full disk, or damaged
            if isinstance(record, dict):
                yield record


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write that takes the name ``path`` once it is complete and on the disk.

    ``mode``: "w" (UTF-8) or "wb". Where writing fails, what stood at ``path`` stays.
    """
    part = f"{os.fspath(path)}.{os.getpid()}.new"
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
