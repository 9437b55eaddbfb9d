"""Random access to the rows of Parquet and Arrow files, through Arrow files that are memory-mapped."""

import datetime
import decimal
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO

from megavlm.base import heartbeat
from megavlm.base.atomic_files import atomic_open
from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.media.files import File, Find
from megavlm.sources.inline import with_names
from megavlm.sources.line_index import cache_path, turn

SUFFIXES = (".parquet", ".arrow", ".feather")
_ROWS = 64  # rows of a batch: what is read for one row
_COPIED = 1 << 24  # bytes of a remote Arrow file that are copied at a time
_TOLD = 1 << 30  # bytes after which others that wait for the file see progress
_TEXTS = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)


class TableFile:
    """Random access to the rows of a Parquet or Arrow file (of Hugging Face's data sets, too).

    A row is a record: its columns are fields, and columns without a value are left out. Pictures in it are replaced by
    names (see ``inline``). A Parquet or compressed Arrow file is first converted to an Arrow file in the cache
    (``$MEGAVLM_CACHE``, default ``~/.cache/megavlm``), because a row of it cannot be read without those beside it.

    Args:
        path: a path, or a URL that fsspec supports.
        access: which media the rows may name.

    Raises:
        UserError: the file cannot be read, or has no rows; the cache has no room for it.
    """

    form: str | None = None
    read_with: tuple = ()

    def __init__(self, path: str | Path, access: MediaAccess = ANY_LOCAL_FILE):
        self.path, self._access = str(path), access
        try:
            self._arrow = _arrow_file(File(self.path))
            self._batches: Any = _batches(self._arrow)
            sizes = [self._batches[number].num_rows for number in range(len(self._batches))]
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"data file {self.path} does not exist", "give the path or URL of a data file") from None
        except Exception as error:  # of Arrow or fsspec
            raise UserError(f"data file {self.path} cannot be read: {shortened(error)}") from None
        self._ends = list(accumulate(sizes))
        if not self._ends or not self._ends[-1]:
            raise UserError(f"data file {self.path} has no rows")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_batches": None}  # each process maps the file itself

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def index_files(self) -> list[str]:
        """The files that change when the samples change."""
        return [self.path]

    def source(self, index: int) -> str:
        """ "file:row" of sample `index`, with rows from 1."""
        return f"{self.path}:{index + 1}"

    def index_of(self, number: int) -> int:
        """The index of the sample whose ``source`` ends with this number. Raises UserError if there is none."""
        if not 1 <= number <= len(self):
            raise UserError(f"{self.path} has no row {number}")
        return number - 1

    def raw(self, index: int) -> Any:
        """Row `index` with the bytes in it, as JSON has it otherwise."""
        if self._batches is None:
            self._batches = _batches(self._arrow)
        batch = bisect_right(self._ends, index)
        first = self._ends[batch - 1] if batch else 0
        return _plain(self._batches[batch].slice(index - first, 1).to_pylist()[0])

    def read(self, index: int) -> tuple[Any, Find]:
        """The record of row `index`, and the function that locates its media. Raises UserError if unreadable."""
        try:
            find = partial(self._access.find, self.path, self.source(index))
            return with_names(self, index, self.raw(index), find)
        except Exception as error:  # of Arrow
            raise UserError(f"{self.source(index)}: cannot be read: {shortened(error)}") from None


class _Batches:
    """The record batches of an Arrow file, which are read from the mapped file when they are used."""

    def __init__(self, reader: Any):
        self._reader = reader

    def __len__(self) -> int:
        return self._reader.num_record_batches

    def __getitem__(self, number: int) -> Any:
        return self._reader.get_batch(number)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))


def _opened(path: str) -> Any:
    """The record batches of a local Arrow file or stream, one after the other; Hugging Face's data sets are streams."""
    import pyarrow as pa  # imported on first use: most runs read no tables

    options = pa.ipc.IpcReadOptions(use_threads=False)  # threads do not survive the fork of workers
    mapped = pa.memory_map(path)
    try:
        return _Batches(pa.ipc.open_file(mapped, options=options))
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_stream(mapped, options=options)


def _batches(path: str) -> Any:
    """The record batches of a local Arrow file or stream, by their numbers."""
    found = _opened(path)
    return found if isinstance(found, _Batches) else list(found)


def _is_compressed(path: str) -> bool:
    """Whether a local Arrow file or stream is compressed: then its first rows are not in the mapped file itself."""
    import pyarrow as pa

    before = pa.total_allocated_bytes()
    first = next((batch for batch in _opened(path) if batch.num_rows), None)
    return first is not None and pa.total_allocated_bytes() - before > first.nbytes // 2


def _arrow_file(file: File) -> str:
    """The path of a local Arrow file, not compressed, with the rows of a Parquet or Arrow file."""
    is_parquet = file.url.endswith(".parquet")
    if file.local_path and not is_parquet and not _is_compressed(file.url):
        return file.url
    kept = cache_path(file, "tables", ".arrow")
    with turn(kept) as parts:
        if not kept.exists():
            with file.open() as stream:  # what goes wrong here is no matter of the cache
                stream.read(1)
                stream.seek(0)
                try:
                    with atomic_open(kept, "wb") as out:
                        (_convert if is_parquet else _rewrite if file.local_path else _copy)(file, stream, out, parts)
                except OSError as error:
                    if error.filename is None and error.errno is None:  # Arrow's own, about the content
                        raise
                    raise UserError(
                        f"{file} cannot be written to the cache {kept.parent}: {error}",
                        "free some space there (as much as the file has uncompressed), or set MEGAVLM_CACHE to "
                        "another folder",
                    ) from None
    return str(kept) if is_parquet or file.local_path else _arrow_file(File(str(kept)))


def _convert(file: File, stream: BinaryIO, out: Any, parts: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(stream) as rows, pa.ipc.new_file(out, rows.schema_arrow) as writer:
        for batch in rows.iter_batches(_ROWS, use_threads=False):
            writer.write_batch(batch)
            _tell(out.tell(), file, parts)


def _rewrite(file: File, stream: BinaryIO, out: Any, parts: Path) -> None:
    """Writes the rows of a local compressed Arrow file, so that one row can be read without those beside it."""
    import pyarrow as pa

    batches = iter(_opened(file.url))
    first = next(batches)
    with pa.ipc.new_file(out, first.schema) as writer:
        for batch in chain([first], batches):
            for start in range(0, batch.num_rows, _ROWS):
                writer.write_batch(batch.slice(start, _ROWS))
            _tell(out.tell(), file, parts)


def _copy(file: File, stream: BinaryIO, out: Any, parts: Path) -> None:
    while data := stream.read(_COPIED):
        out.write(data)
        _tell(out.tell(), file, parts)


def _tell(written: int, file: File, parts: Path) -> None:
    heartbeat.beat(f"{written:,} bytes of {file} were written to the cache")
    if parts.is_dir():
        (parts / f"{written // _TOLD}").touch()


def _plain(value: Any) -> Any:
    """A value as JSON has it: without fields that have no value, and with times and decimals as text. Bytes stay."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, _TEXTS) else value
