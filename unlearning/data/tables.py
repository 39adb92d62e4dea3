"""Records from CSV and parquet files."""

from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV (or, by its name, TSV) file with a header, every cell as text.

    Raises:
        InputError: the file is empty, not UTF-8, has rows longer than its header (which line), an open quotation mark,
            or two columns of one name.
    """
    import pandas as pd

    try:
        # The header is read as a row: pandas would shift longer rows, and rename columns, without a word.
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
    except pd.errors.ParserError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
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
    """The rows of a parquet file.

    Raises:
        InputError: the file is cut short or no parquet file, or it has no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(path).read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a whole parquet file ({reason}); download or write it again") from None
    if not rows:
        raise InputError(f"{path}: there are no rows in it")
    return rows
