"""Row ids in -> rows out, wherever they live; see tables.py for the interface and shards.py for the files."""

from rorqual.tables.disk_table import DiskTable
from rorqual.tables.fp8 import dequantise, quantise, record_bytes
from rorqual.tables.placement import TableConfig, hot_rows, open_table, open_tables
from rorqual.tables.row_file import Damage, TableError, verify
from rorqual.tables.row_writer import convert, draw_table, write_rows, write_table
from rorqual.tables.table import DeviceTable, Handle, HostTable, measure
from rorqual.tables.trainable import HostedTable, LearningTable

__all__ = [
    "Damage",
    "DeviceTable",
    "DiskTable",
    "Handle",
    "HostTable",
    "HostedTable",
    "LearningTable",
    "TableConfig",
    "TableError",
    "convert",
    "dequantise",
    "draw_table",
    "hot_rows",
    "measure",
    "open_table",
    "open_tables",
    "quantise",
    "record_bytes",
    "verify",
    "write_rows",
    "write_table",
]
