"""Read files that have an end, and write files that are either whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
"""Flag of `os.open` for a file in a folder from elsewhere: what is there must not be a link to a file outside."""


def finite(path: Path) -> Path:
    """Return a path that can be read to its end; raise an OSError for a device, such as /dev/zero."""
    if path.is_char_device():
        raise OSError(errno.EINVAL, "it is a device, not a file", str(path))
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or absent, even if the process is killed; a link in its place is replaced."""
    temporary = path.with_name(f".{path.name[:200]}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed, or a link that somebody left
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
