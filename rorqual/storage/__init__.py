"""Row ids in -> rows out, wherever they live; see tables.py for the interface and disk.py for the files."""

from rorqual.storage.disk import DTYPES, DiskTable, TableError, write_table
from rorqual.storage.tables import DeviceTable, HostTable, Pending, measure

__all__ = ["DTYPES", "DeviceTable", "DiskTable", "HostTable", "Pending", "TableError", "measure", "write_table"]
