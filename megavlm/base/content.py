"""Digests by which data and models are recognised at another path."""

import hashlib
from pathlib import Path

_ENDS = 1 << 20  # bytes that are read at either end of a file
_MOST_READ = 64  # files of a folder of which bytes are read; of the others, only names and sizes count


def content_digest(path: Path) -> str | None:
    """32 hexadecimal digits computed from a file or folder, wherever it is; None if it is neither, or unreadable.

    Of a file, the size and the first and last MiB count; of a folder, the relative names and the sizes of all files and
    the bytes of up to 64 of them.
    """
    found = hashlib.sha256()
    try:
        if path.is_file():
            found.update(_of_file(path))
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            for number, file in enumerate(files):
                found.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
                if number % -(-len(files) // _MOST_READ) == 0:
                    found.update(_of_file(file))
        else:
            return None
    except OSError:
        return None
    return found.hexdigest()[:32]


def _of_file(path: Path) -> bytes:
    found = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        found.update(str(size).encode())
        for start in (0, max(0, size - _ENDS)):
            file.seek(start)
            found.update(file.read(_ENDS))
    return found.digest()
