"""Stores tables of rows that are looked up by id: on the device, in host memory or on a disk."""

from rorqual.tables.fp8 import dequantise, quantise, record_bytes
from rorqual.tables.placement import TableConfig, hot_rows, open_table, open_tables
from rorqual.tables.row_file import Damage, RowFile, TableError, verify
from rorqual.tables.row_writer import convert, draw_table, write_rows, write_table
from rorqual.tables.table import Handle, Table

__all__ = [
    "Damage",
    "Handle",
    "RowFile",
    "Table",
    "TableConfig",
    "TableError",
    "convert",
    "dequantise",
    "draw_table",
    "hot_rows",
    "open_table",
    "open_tables",
    "quantise",
    "record_bytes",
    "verify",
    "write_rows",
    "write_table",
]
