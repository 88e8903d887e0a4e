"""Row ids in -> rows out, wherever they live; see tables.py for the interface and shards.py for the files."""

from rorqual.storage.disk import DiskTable
from rorqual.storage.formats import dequantise, quantise, record_bytes
from rorqual.storage.shards import Damage, TableError, verify, write_table
from rorqual.storage.tables import DeviceTable, HostTable, Pending, measure

__all__ = [
    "Damage",
    "DeviceTable",
    "DiskTable",
    "HostTable",
    "Pending",
    "TableError",
    "dequantise",
    "measure",
    "quantise",
    "record_bytes",
    "verify",
    "write_table",
]
