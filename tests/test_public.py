"""Tests that tests/golden/public.json lists what users may call, by scripts/list_public.py."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

for module, extra in (("olmo_core", "train"), ("fastapi", "serve"), ("matplotlib", "report")):
    pytest.importorskip(module, reason=f"the extra [{extra}] is not installed")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("list_public", ROOT / "scripts" / "list_public.py")
assert spec is not None and spec.loader is not None
list_public: ModuleType = importlib.util.module_from_spec(spec)
spec.loader.exec_module(list_public)


def committed() -> dict:
    return json.loads((ROOT / "tests" / "golden" / "public.json").read_text(encoding="utf-8"))


def test_what_users_may_call_is_what_is_committed() -> None:
    before = {name: section for name, section in committed().items() if name != "json"}
    assert list_public.difference(before, list_public.callable_names()) == []


@pytest.mark.slow
def test_what_users_may_call_or_read_is_what_is_committed() -> None:
    """Runs in a process of its own without shape checks, which is three times as fast."""
    script = ROOT / "scripts" / "list_public.py"
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    meant = "a change that is meant: python scripts/list_public.py --write, and review the diff"
    assert done.returncode == 0, "\n".join([meant, done.stdout, done.stderr[-2000:]])


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("commands", "train", 3), "-commands > train: --data.cache"),
        (("json", "rorqual eval --json", 0), "-json > rorqual eval --json: bits_per_byte"),
        (("python", "load"), "-python > load"),
        (("options", "optim.lr"), "-options > optim.lr: 0.003"),
    ],
)
def test_what_went_is_a_line(path: tuple, line: str) -> None:
    before = committed()
    after = committed()
    piece = after
    for name in path[:-1]:
        piece = piece[name]
    del piece[path[-1]]
    changed = list_public.difference(before, after)
    assert len(changed) == 1 and changed[0].startswith(line)


def test_keys_of_data_are_no_interface() -> None:
    text = {"a": [{"b": 1}, {"c": {"12": {"d": 2}}}], "config": {"e": 1}}
    assert list_public.keys(text) == ["a", "a[].b", "a[].c", "a[].c.*", "a[].c.*.d", "config"]
