"""Row ids in -> rows out, wherever they live; see tables.py for the interface and shards.py for the files."""

from rorqual.storage.disk import DiskTable
from rorqual.storage.formats import dequantise, quantise, record_bytes
from rorqual.storage.homes import StorageConfig, hot_rows, open_table, open_tables
from rorqual.storage.learning import HostedTable, LearningTable
from rorqual.storage.shards import Damage, TableError, verify
from rorqual.storage.tables import DeviceTable, HostTable, Pending, measure
from rorqual.storage.writing import convert, draw_table, write_rows, write_table

__all__ = [
    "Damage",
    "DeviceTable",
    "DiskTable",
    "HostTable",
    "HostedTable",
    "LearningTable",
    "Pending",
    "StorageConfig",
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
