"""Digests that identify files by name, size, beginning and end, without reading them whole."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megavlm.convert.hf_shapes import is_hf_folder
from megavlm.media.files import File
from megavlm.sources.blend import SampleFile
from megavlm.sources.shards import INDEX, INFO

_ENDS = 1 << 20  # bytes that are read at either end of a file


def digest_of(files: Iterable[File]) -> str:
    """Returns 32 hexadecimal digits computed from the names, sizes, and first and last MiB of the files."""
    found = hashlib.sha256()
    for file in files:
        size = file.size()
        found.update(f"{Path(file.url).name} {size}".encode())
        found.update(file.read(0, min(size, _ENDS)) + file.read(max(0, size - _ENDS), size))
    return found.hexdigest()[:32]


def digest_of_paths(paths: Iterable[Path]) -> str:
    """Returns ``digest_of`` local files, in the order of their names."""
    return digest_of(File(str(path)) for path in sorted(paths))


def digest_of_folders(*folders: Path) -> str:
    """Returns ``digest_of`` the weights in Hugging Face folders and all files in other folders."""
    paths = [
        path
        for folder in folders
        for path in sorted(folder.glob("*.safetensors") if is_hf_folder(folder) else folder.rglob("*"))
        if path.is_file()
    ]
    return digest_of(File(str(path)) for path in paths)


def describe_samples(file: SampleFile) -> str:
    """Words that differ if files were changed: of data files their digest, of a folder of shards its samples."""
    files = [File(name) for name in file.index_files if not name.endswith((INFO, INDEX))]
    return f"{len(file)} samples" + (f", digest {digest_of(files)}" if files else "")
