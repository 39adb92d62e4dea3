"""Records from CSV and parquet files."""

from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError

MAX_ROWS = 10_000_000
"""Maximum number of rows of a parquet file."""


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV or (by its name) TSV file with a header.

    Args:
        path: The file.

    Returns:
        One dictionary per row, every cell as text.

    Raises:
        InputError: The file is empty or not UTF-8, has a row longer than its header (the message names the line) or an
            open quotation mark, or two columns have one name.
    """
    import pandas as pd

    try:
        # The header is read as a row, since pandas silently shifts longer rows and renames equal columns.
        cells = pd.read_csv(
            path,
            header=None,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            sep="\t" if path.suffix.lower() == ".tsv" else ",",
        ).values.tolist()
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: the file is empty; it should hold a header and rows") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except (pd.errors.ParserError, ValueError) as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ").splitlines()[0]
        raise InputError(f"{path}: broken CSV: {reason}; put quotation marks around texts with commas") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    header, rows = [name.strip() for name in cells[0]], cells[1:]
    if len(set(header)) < len(header):
        raise InputError(f"{path}: two columns have one name ({', '.join(header)}); rename one")
    if not rows:
        raise InputError(f"{path}: there are no rows under the header ({', '.join(header)})")
    return [dict(zip(header, row, strict=True)) for row in rows]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a parquet file.

    Args:
        path: The file.

    Returns:
        One dictionary per row.

    Raises:
        InputError: The file is cut short, is not a parquet file, has a column twice, texts that are not UTF-8, no rows
            or more than `MAX_ROWS`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names, n_rows = file.schema_arrow.names, file.metadata.num_rows
        # Equal rows take no space: a small file may hold billions.
        readable = len(set(names)) == len(names) and n_rows <= MAX_ROWS
        rows = file.read().to_pylist() if readable else []
    except UnicodeDecodeError:
        raise InputError(f"{path}: a text in it is not UTF-8; write the file again") from None
    except (pa.ArrowException, OSError, ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: not a whole parquet file ({reason}); download or write it again") from None
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two columns have one name ({', '.join(names)[:200]}); rename one")
    if n_rows > MAX_ROWS:
        raise InputError(f"{path}: has {n_rows} rows, more than {MAX_ROWS}; take a part of it")
    if not rows:
        raise InputError(f"{path}: there are no rows in it")
    return rows
