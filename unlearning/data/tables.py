"""Records from CSV and parquet files.

A small file may hold a table that fits into no memory: cells that a reader fills in, rows that repeat, long texts that
are kept once. What a table would take is counted before it is made.
"""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearning.common.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_COLUMNS = 1000
"""Maximum number of columns of a table."""

MAX_RECORDS = 5_000_000
"""Maximum number of records of any file; a record of two bytes takes a hundred times as many in memory."""

MAX_CELLS = 20_000_000
"""Maximum number of values of a parquet file."""

MAX_CELL = 2**31 - 1
"""Maximum length of a cell that the CSV reader takes; the length of a text is checked with the record."""

MAX_BYTES = 500_000_000
"""Number of bytes to which any parquet file may unpack."""

MAX_RATIO = 50
"""Number of times its own size to which a larger parquet file may unpack; texts seldom reach 10."""

_BATCH = 1024  # rows of a parquet file that are read at once


def read_csv(text: str, path: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV or (by the file's name) TSV text with a header.

    Args:
        text: The file's content, with its line breaks as they are.
        path: The file.

    Returns:
        One dictionary per row, every cell as text.

    Raises:
        InputError: There is no header or no row, a row is longer or shorter than the header, a quotation mark is open
            or stands alone in a quoted cell (the message names the line), two columns have one name, or there are more
            than `MAX_COLUMNS`.
    """
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    header: list[str] = []
    rows: list[dict[str, Any]] = []
    try:
        for cells in reader:
            if cells and not header:
                header = _header(cells, path)
            elif cells:
                if len(cells) != len(header):
                    raise InputError(
                        f"{path}, line {line}: broken CSV: has {len(cells)} cells, and the header {len(header)}; put "
                        "quotation marks around texts with commas"
                    )
                check_count(len(rows) + 1, path)
                rows.append(dict(zip(header, cells, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        open_mark = "unexpected end" in str(error)
        reason = "a quotation mark is not closed" if open_mark else str(error)
        raise InputError(f"{path}, line {line}: broken CSV: {reason}; inside a quoted cell write two for one") from None
    finally:
        csv.field_size_limit(limit)
    if not header:
        raise InputError(f"{path}: the file is empty; it should hold a header and rows")
    if not rows:
        raise InputError(f"{path}: there are no rows under the header ({_some(header)})")
    return rows


def check_count(n_records: int, path: Path) -> None:
    """Check that a file does not hold too many records.

    Args:
        n_records: Number of records, at least so far.
        path: The file.

    Raises:
        InputError: There are more than `MAX_RECORDS`.
    """
    if n_records > MAX_RECORDS:
        raise InputError(f"{path}: has more than {MAX_RECORDS} records; take a part of it")


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a parquet file.

    Args:
        path: The file.

    Returns:
        One dictionary per row.

    Raises:
        InputError: The file is cut short, is not a parquet file, has a column twice, or one that Python cannot read
            (texts that are not UTF-8, dates far away), no rows, or unpacks to more than `MAX_CELLS` values or
            `MAX_BYTES` (of a large file, `MAX_RATIO` times its size).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    most = max(MAX_BYTES, MAX_RATIO * path.stat().st_size)
    rows: list[dict[str, Any]] = []
    found = 0
    try:
        metadata = pq.read_metadata(path)
        file = pq.ParquetFile(path, read_dictionary=_check_size(metadata, most, path))
        names = _header(file.schema_arrow.names, path)
        for batch in file.iter_batches(_batch_size(metadata, most)):
            found += sum(map(_decoded_bytes, batch.columns))
            if found > most:
                raise InputError(f"{path}: unpacks to more than {most / 1e9:.1f} GB of text; take a part of it")
            columns = [_values(name, column, path) for name, column in zip(names, batch.columns, strict=True)]
            rows += [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: not a whole parquet file ({reason}); download or write it again") from None
    if not rows:
        raise InputError(f"{path}: there are no rows in it")
    return rows


def _header(names: list[str], path: Path) -> list[str]:
    """Return the names of the columns, checked."""
    names = [name.strip() for name in names]
    if len(names) > MAX_COLUMNS:
        raise InputError(f"{path}: has {len(names)} columns, more than {MAX_COLUMNS}; keep those that are needed")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two columns have one name ({_some(names)}); rename one")
    return names


def _some(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names[:12]) + (", ..." if len(names) > 12 else "")


def _check_size(metadata: "pq.FileMetaData", most: int, path: Path) -> list[str]:
    """Check what a parquet file says of its size, before anything of it is unpacked.

    Returns:
        The columns of texts inside lists and objects. One row may name one long text many times: such columns are read
        as dictionaries, which hold it once, so that it can be counted.
    """
    check_count(metadata.num_rows, path)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    n_cells = sum(chunk.num_values for chunk in chunks)
    if n_cells > MAX_CELLS:
        raise InputError(f"{path}: has {n_cells} values, more than {MAX_CELLS}; take a part of it")
    if sum(group.total_byte_size for group in groups) > most:
        raise InputError(f"{path}: unpacks to more than {most / 1e9:.1f} GB; take a part of it")
    nested = [chunk for chunk in chunks if "." in chunk.path_in_schema and chunk.physical_type == "BYTE_ARRAY"]
    for chunk in nested:
        if "DELTA_BYTE_ARRAY" in chunk.encodings:
            raise InputError(
                f"{path}: column {chunk.path_in_schema} has the encoding DELTA_BYTE_ARRAY, whose size is not known; "
                "write it again as plain texts"
            )
    return sorted({chunk.path_in_schema for chunk in nested})


def _batch_size(metadata: "pq.FileMetaData", most: int) -> int:
    """Return a number of rows that cannot unpack to more than `most` bytes: no text is longer than its chunk."""
    longest = max(
        (
            metadata.row_group(group).column(index).total_uncompressed_size
            for group in range(metadata.num_row_groups)
            for index in range(metadata.num_columns)
        ),
        default=0,
    )
    return max(1, min(_BATCH, most // max(1, longest)))


def _decoded_bytes(array: "pa.Array") -> int:
    """Return the number of bytes of all texts of an array, those of a dictionary as often as they are named."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        if not _is_text(kind.value_type):
            return 0
        return pc.sum(pc.take(pc.cast(pc.binary_length(array.dictionary), "int64"), array.indices)).as_py() or 0
    if _is_text(kind):
        return pc.sum(pc.cast(pc.binary_length(array), "int64")).as_py() or 0
    if pa.types.is_nested(kind):
        below = array.flatten()
        return sum(map(_decoded_bytes, below if isinstance(below, list) else [below]))
    return 0


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return True
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _values(name: str, column: "pa.Array", path: Path) -> list[Any]:
    """Return the values of a column."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raise InputError(f'{path}, column "{name[:40]}": a text in it is not UTF-8; write the file again') from None
    except (ValueError, ArithmeticError, ImportError) as error:  # such as a year that Python does not have
        reason = str(error).splitlines()[0][:200]
        raise InputError(f'{path}, column "{name[:40]}": cannot be read ({reason}); write it as text') from None
