"""What an index knows of each of its vectors: a table with an id, a modality and any further columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool

ID, MODALITY = "id", "modality"
_BETWEEN = "\x1f"
_compute: Any = pyarrow.compute  # makes its functions when it is imported, where no type checker sees them


def as_rows(given: pa.Table | Mapping[str, Sequence[Any]], count: int) -> pa.Table:
    """A table with ids as text, and a modality in each row (`""` where none is given).

    Raises:
        ValueError: no ids, another number of rows than vectors, or an id and modality twice.
    """
    table: Any = (
        given if isinstance(given, pa.Table) else pa.table({name: list(column) for name, column in given.items()})
    )
    if ID not in table.column_names:
        raise ValueError(f"rows with the columns {', '.join(table.column_names)}: one must be called {ID!r}")
    if table.num_rows != count:
        raise ValueError(f"{table.num_rows} rows and {count} vectors: give one row for each vector")
    table = table.set_column(table.column_names.index(ID), ID, table[ID].cast(pa.string()))
    if MODALITY not in table.column_names:
        table = table.append_column(MODALITY, pa.array([""] * count, pa.string()))
    if len(keys(table).unique()) < count:
        twice = next(pair for pair in keys(table).value_counts().to_pylist() if pair["counts"] > 1)
        raise ValueError(f"{_shown(twice['values'])} stands in {twice['counts']} rows: an id has one vector a modality")
    return table


def refuse_known(old: pa.Table, new: pa.Table) -> None:
    """Nothing, where the new rows are new.

    Raises:
        ValueError: an id is there already in that modality.
    """
    known = keys(new).filter(is_in(keys(new), keys(old).combine_chunks()))
    if len(known):
        raise ValueError(f"{len(known)} of the rows are in the index already, such as {_shown(known[0].as_py())}: "
                         "remove them first")  # fmt: skip


def keys(rows: pa.Table) -> pa.ChunkedArray:
    """What tells rows apart: their id and modality."""
    return _compute.binary_join_element_wise(rows[ID], rows[MODALITY].cast(pa.string()), _BETWEEN)


def is_in(column: pa.ChunkedArray, values: pa.Array) -> Any:
    """Which cells hold one of the values, as an array of Arrow."""
    return _compute.is_in(column, value_set=values)


def matching(rows: pa.Table, where: Mapping[str, Any]) -> Bool[np.ndarray, " N"]:
    """Which rows have these values in these columns; a list stands for any of its values.

    A value is read as the column's type, so that "3" finds the number 3.

    Raises:
        ValueError: no such column, or a value that cannot be of its type.
    """
    kept = np.ones(rows.num_rows, dtype=bool)
    for name, wanted in where.items():
        if name not in rows.column_names:
            raise ValueError(f"no column {name!r} to filter by; this index has {', '.join(rows.column_names)}")
        column = rows[name]
        values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        try:
            value_set = pa.array(values).cast(column.type)
        except pa.ArrowException as error:
            raise ValueError(f"filter {name}={wanted}: the column holds {column.type}: {error}") from error
        kept &= is_in(column, value_set).to_numpy()
    return kept


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows; a column that some tables lack is empty there.

    Raises:
        ValueError: a column is of different types.
    """
    try:
        return pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise ValueError(f"these rows do not fit those of the index: {error}") from error


def _shown(key: str) -> str:
    id, modality = key.split(_BETWEEN)
    return f"id {id!r}" + (f" ({modality})" if modality else "")
