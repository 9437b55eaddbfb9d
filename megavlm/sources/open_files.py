"""Opens what data.train names: a file of any format, several files by a pattern, or a folder."""

import glob
import posixpath
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import fsspec

from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.media.files import File, Find, is_folder, is_url
from megavlm.records.foreign import Form, foreign_form
from megavlm.records.records import rename_media
from megavlm.sources.inline import MARK
from megavlm.sources.jsonl import JsonlFile
from megavlm.sources.shards import INFO, ShardFolder
from megavlm.sources.table import SUFFIXES, TableFile

_LOOKED_AT = 8  # records by which the form of a file is told; each record is converted by its own
_DATA = (*SUFFIXES, ".jsonl", ".json")
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_OF_TRAINING, _OF_TESTS = ("train",), ("test", "val", "dev", "eval")


class SampleFile(Protocol):
    """Random access to samples in any storage format. It is pickled to worker processes.

    Attributes:
        path: what was named.
        form: the names of the foreign forms of its records (see ``records.foreign``); None: megavlm's own.
        read_with: the settings of the source with which its records are read.
    """

    path: str
    form: str | None
    read_with: tuple

    def __len__(self) -> int: ...

    @property
    def index_files(self) -> list[str]:
        """The files that change when the samples change."""

    def source(self, index: int) -> str:
        """The location of sample `index`, for messages; never raises."""

    def read(self, index: int) -> tuple[Any, Find]:
        """The parsed record of sample `index`, and the function that locates its media. Raises UserError."""


def open_file(
    path: str | Path,
    access: MediaAccess = ANY_LOCAL_FILE,
    fields: Mapping[str, str] | None = None,
    media: str | None = None,
) -> SampleFile:
    """Open a data file, the files that a pattern matches, or a folder of shards or data files.

    Records of a foreign form are converted as they are read (see ``records.foreign``).

    Args:
        path: a path, a pattern such as ``shards/*.parquet``, or a URL.
        access: which media the records may name.
        fields: for fields that the records call differently, their names in the file.
        media: the folder from which relative paths of pictures and videos start; None: that of the data file.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    return Converted(_opened(str(path), access), dict(fields or {}), media)


def _opened(path: str, access: MediaAccess) -> SampleFile:
    if is_pattern(path):
        return _joined(path, sorted(_matches(path)), access)
    try:
        folder = not path.endswith(".jsonl") and is_folder(path)
        listed = _data_files(path) if folder and not _exists(f"{path.rstrip('/')}/{INFO}") else []
    except UserError:
        raise
    except Exception as error:  # each protocol of fsspec raises its own exceptions
        raise UserError(f"{path} cannot be read: {shortened(error)}") from None
    if folder:
        return _joined(path, listed, access) if listed else ShardFolder(path, access)
    return TableFile(path, access) if path.endswith(SUFFIXES) else JsonlFile(path, access)


def is_pattern(path: str) -> bool:
    """Whether a path names files by a pattern, and is not the name of a file itself."""
    return glob.has_magic(path) and not (not is_url(path) and Path(path).exists())


def _matches(pattern: str) -> list[str]:
    if not is_url(pattern):
        return [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
    system, inside = fsspec.core.url_to_fs(pattern)
    return [system.unstrip_protocol(path) for path in system.glob(inside)]


def _exists(path: str) -> bool:
    try:
        File(path).size()
    except OSError:
        return False
    return True


def _data_files(folder: str) -> list[str]:
    """The data files of a folder, or of ``data/`` in it, as repositories of data sets have them; all of one format."""
    for inner in (folder.rstrip("/"), f"{folder.rstrip('/')}/data"):
        names = {path.rpartition("/")[2]: path for path in _matches(f"{glob.escape(inner)}/*")}
        found = {name: path for name, path in names.items() if name.endswith(_DATA) and name not in _NOT_DATA}
        if any(not name.endswith(".json") for name in found):  # then JSON describes the others
            found = {name: path for name, path in found.items() if not name.endswith(".json")}
        kinds = sorted({posixpath.splitext(name)[1] for name in found})
        of_training, of_tests = (
            [name for name in found if name.startswith(starts)] for starts in (_OF_TRAINING, _OF_TESTS)
        )
        if len(kinds) > 1 or (of_training and of_tests):
            what = f"files of several formats ({', '.join(kinds)})" if len(kinds) > 1 else "files to train and to test"
            raise UserError(
                f"the folder {inner} has {what}: {shortened(', '.join(sorted(found)), 200)}",
                f"name those that are meant by a pattern: {inner}/train*{kinds[-1]}",
            )
        if found:
            return [found[name] for name in sorted(found)]
    return []


def _joined(path: str, found: Sequence[str], access: MediaAccess) -> SampleFile:
    if not found:
        raise UserError(f"no file matches {path}", "give a pattern such as shards/*.parquet that matches data files")
    return Joined(path, [_opened(name, access) for name in found])


class Joined:
    """Several files as one, one after the other."""

    form: str | None = None
    read_with: tuple = ()

    def __init__(self, path: str, files: Sequence[SampleFile]):
        self.path, self._files = path, files
        self._ends = list(accumulate(map(len, files)))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def index_files(self) -> list[str]:
        return [name for file in self._files for name in file.index_files]

    def source(self, index: int) -> str:
        file, inner = self._locate(index)
        return file.source(inner)

    def read(self, index: int) -> tuple[Any, Find]:
        file, inner = self._locate(index)
        return file.read(inner)

    def _locate(self, index: int) -> tuple[SampleFile, int]:
        number = bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)


class Converted:
    """A file whose records are read in megavlm's own form.

    Args:
        file: the file.
        fields: for fields that the records call differently, their names in the file.
        media: the folder from which relative paths of media start; None: that of the data file.
    """

    def __init__(self, file: SampleFile, fields: dict[str, str], media: str | None):
        self.path, self._file, self._fields, self._media = file.path, file, fields, media
        self.read_with = (sorted(fields.items()), media) if fields or media else ()
        found: list[str] = []
        for place in range(min(len(file), _LOOKED_AT)):
            try:
                form = foreign_form(self._renamed(file.read(place)[0]))
            except UserError:
                continue
            found += [form.name] if form is not None and form.name not in found else []
        self.form = ", ".join(found) or None

    def __len__(self) -> int:
        return len(self._file)

    @property
    def index_files(self) -> list[str]:
        return self._file.index_files

    def source(self, index: int) -> str:
        return self._file.source(index)

    def read(self, index: int) -> tuple[Any, Find]:
        record, find = self._file.read(index)
        record = self._renamed(record)
        if (form := foreign_form(record)) is not None:
            record = _converted(record, form, self.source(index))
        if self._media is not None:
            record = rename_media(record, partial(_beside, self._media))
        return record, find

    def _renamed(self, record: Any) -> Any:
        if not self._fields or not isinstance(record, dict):
            return record
        found = {ours: record[theirs] for ours, theirs in self._fields.items() if theirs in record}
        gone = {*self._fields.values(), *found}
        return {name: value for name, value in record.items() if name not in gone} | found


def _converted(record: dict, form: Form, source: str) -> dict:
    try:
        return form.convert(record)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{source}: cannot be read as {form.name}: {type(error).__name__}: {shortened(error)}",
            "docs/data.md shows the forms; data.train[].map gives the names of fields",
        ) from None


def _beside(folder: str, named: str) -> str:
    return named if named.startswith(MARK) or is_url(named) else posixpath.join(folder, named)
