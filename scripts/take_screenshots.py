"""Takes the pictures of the live page and of a report that docs/ shows.

    python scripts/take_screenshots.py runs/demo/engram runs/demo/report.html

It starts `rorqual explore` for the run, opens both pages in Chromium, light and dark, at a width of
1,280 pixels, and writes explore-light.png, explore-dark.png, report-light.png and report-dark.png
to docs/images, each at most 150 kB. It needs playwright, Pillow and a Chromium.
"""

import argparse
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 1280
# Heights that show the parts that a page is worth opening for, and no half of a line.
EXPLORE_HEIGHT = 860
REPORT_HEIGHT = 1000
BYTES = 150_000
COLOURS = (256, 128, 64)
SCHEMES = ("light", "dark")
TIMEOUT = 300_000  # milliseconds, for a machine that does other work besides
# Words that WordNet's glosses use, so that the model of the demo has something to say.
TEXT = (
    "a small North American tree having white flowers and red fruit; the wood is used for furniture"
)
# The token whose lookups are shown, and whose longest n-gram is suppressed.
TOKEN = re.compile(r"^\s*flowers$")


@contextmanager
def explored(run: Path) -> Iterator[str]:
    """Yields the address of the live page of a run, and ends its server afterwards."""
    command = [sys.executable, "-m", "rorqual", "explore", str(run), "--port", "0"]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            printed = ""
            for line in process.stdout:
                printed += line
                if address := re.search(r"http://\S+", line):
                    yield address[0]
                    return
            raise ValueError(f"explore: got no address, expected one; it printed\n{printed}")
        finally:
            process.send_signal(signal.SIGINT)


def show_explore(page: Any, address: str) -> None:
    """Reads TEXT on the live page and suppresses what one token looks up."""
    page.goto(address)
    page.wait_for_selector("#token:not([hidden])")
    page.locator("#ask").fill(TEXT)
    page.get_by_role("button", name="Read", exact=True).click()
    token = page.locator(".token", has_text=TOKEN).first
    token.click()
    page.get_by_role("button", name="Suppress").last.click()
    page.wait_for_selector("#edits li")
    token.click()
    page.wait_for_selector("#guesses .keys span:nth-child(3)")
    # Bars and tints reach their last value by transitions of 0.2 seconds.
    page.wait_for_timeout(500)
    page.mouse.move(0, 0)


def undo(page: Any) -> None:
    """Takes back the edit, since the memory of the server outlives a page."""
    page.get_by_role("button", name="Undo all").click()
    page.wait_for_selector("#edits", state="hidden")


def small(picture: bytes) -> bytes:
    """Returns a PNG of at most BYTES, with as many colours as fit."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    for colours in COLOURS:
        buffer = io.BytesIO()
        reduced = image.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        reduced.save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= BYTES:
            return buffer.getvalue()
    raise ValueError(
        f"got a picture of {buffer.tell():,} bytes with {COLOURS[-1]} colours, "
        f"expected at most {BYTES:,}: take a smaller height"
    )


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("run", type=Path, help="a run folder with a memory and experts")
    parser.add_argument("report", type=Path, help="a page that `rorqual report` wrote")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    from playwright.sync_api import sync_playwright

    with explored(options.run) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        for scheme in SCHEMES:
            for name, height in (("explore", EXPLORE_HEIGHT), ("report", REPORT_HEIGHT)):
                page = browser.new_page(
                    viewport={"width": WIDTH, "height": height}, color_scheme=scheme
                )
                page.set_default_timeout(TIMEOUT)
                if name == "explore":
                    show_explore(page, address)
                else:
                    page.goto(options.report.resolve().as_uri())
                picture = small(page.screenshot())
                path = options.folder / f"{name}-{scheme}.png"
                path.write_bytes(picture)
                print(f"{path}: {len(picture):,} bytes")
                if name == "explore":
                    undo(page)
                page.close()
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
