"""A tenth of the soak in benchmarks/texts.py: no hostile file is lost in silence, none ends in a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "texts.py"


@pytest.mark.slow
def test_every_hostile_file_is_read_counted_or_refused():
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, SCRIPT, "--files", "100", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["files"] == 100
    assert result["lost"] == 0, result["reasons"]
    assert set(result["kinds"]["good text"]) == {"read"}
    assert "read" not in result["kinds"]["random bytes"]
    assert done.returncode == 0
