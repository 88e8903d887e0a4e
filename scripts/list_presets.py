"""Writes the table of the presets into docs/presets.md and its Chinese page.

    python scripts/list_presets.py           prints what differs from the pages (exit code 1)
    python scripts/list_presets.py --write   writes it

tests/test_release.py fails where a page is not today's.
"""

import argparse
import difflib
import json
import re
from pathlib import Path

from rorqual import pretrained
from rorqual.costs import costs
from rorqual.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 4096
FIGURES = ("total", "activated", "memory", "flops_per_token", "cache_bytes_per_token")

PAGES = ("docs/presets.md", "docs/zh/presets.md")
TABLE = re.compile(r"(?<=---: \|\n)(\| `.*\n)*")  # its lines, after those of its head


def rows() -> str:
    """Returns the lines of the table."""
    expected = ROOT / "tests" / "golden" / "pretrained.json"
    losses = json.loads(expected.read_text(encoding="utf-8"))
    lines = []
    for name, config in PRESETS.items():
        counted = costs(config, CONTEXT)
        figures = [f"{getattr(counted, figure):,}" for figure in FIGURES]
        trained = f"{losses[name]['nats_per_token']:.3f}" if name in pretrained.names() else ""
        cells = [
            f"`{name}`",
            *figures,
            f"{config.layers} x {config.dim:,}",
            ", ".join(config.parts),
            trained,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "".join(f"{line}\n" for line in lines)


def pages() -> dict[str, str]:
    """Returns the text of each page, with today's table, by its path in the repository."""
    lines = rows()
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in PAGES}
    return {path: TABLE.sub(lambda _: lines, text, count=1) for path, text in texts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    code = 0
    for path, text in pages().items():
        file = ROOT / path
        before = file.read_text(encoding="utf-8")
        if write:
            file.write_text(text, encoding="utf-8")
        elif before != text:
            lines = difflib.unified_diff(before.splitlines(), text.splitlines(), path, "today's")
            print("\n".join(lines))
            code = 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
