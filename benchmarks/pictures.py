"""The pictures of README.md and docs/, made anew from a finished build.

    python benchmarks/pictures.py                           # of build/coding-assistant
    python benchmarks/pictures.py build/NAME --into FOLDER

`build.svg` is what `olpack build NAME` prints at its end. `report.png` is the top of the report, `report-desktop.png` the whole page, and
`report-phone.png` its beginning on a phone with dark colours. Chromium draws the report: the command `chromium` (Debian: `apt install
chromium`), which Playwright (`pip install playwright`) drives. A stage that is stale runs first, so the build must be finished.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from io import BytesIO, StringIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parents[1]
COLUMNS = 84
DESKTOP, PHONE = (1280, 540), (390, 1300)  # CSS pixels; the phone has two of its own for each


def terminal(build: Path) -> str:
    """The end of `olpack build NAME` with its colours, as an SVG that fetches nothing."""
    command = [sys.executable, "-m", "olpack", "build", build.name, *(["--out", build.parent.name] if build.parent.name != "build" else [])]
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, cwd=build.parents[1], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    console = Console(record=True, width=COLUMNS, file=StringIO())
    console.print(Text(f"$ olpack build {build.name}", style="bold"))
    console.print(Text.from_ansi(printed))
    page = console.export_svg(title=f"olpack build {build.name}", theme=MONOKAI, unique_id="build")
    return re.sub(r"@font-face \{.*?\}\s*", "", page, flags=re.DOTALL)  # the font of a server on the network; any monospaced font does


def report(browser: Browser, page: Path, size: tuple[int, int], *, whole: bool = False, phone: bool = False) -> bytes:
    """A picture of report.html as PNG: what the window of `size` shows, or the `whole` page."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        device_scale_factor=2 if phone else 1,
        is_mobile=phone,
        color_scheme="dark" if phone else "light",
    )
    try:
        tab = context.new_page()
        tab.goto(page.resolve().as_uri())
        return tab.screenshot(full_page=whole)
    finally:
        context.close()


def small(picture: bytes) -> bytes:
    """The same PNG with a palette of 64 colours, which is a third of the size."""
    buffer = BytesIO()
    Image.open(BytesIO(picture)).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", nargs="?", type=Path, default=Path("build/coding-assistant"), help="the folder of a finished build")
    parser.add_argument("--into", type=Path, default=ROOT / "docs", help="folder of the pictures")
    options = parser.parse_args()
    build, page = options.build.resolve(), options.build / "compare/report.html"
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not page.is_file():
        parser.error(f"{page} does not exist: run `olpack build {build.name}` first")
    if not chromium:
        parser.error("Chromium is missing: apt install chromium")
    with sync_playwright() as player:
        # Chromium has no sandbox for root, and the page is olpack's own: its content security policy allows no script.
        browser = player.chromium.launch(executable_path=chromium, chromium_sandbox=os.geteuid() != 0)
        pictures = {
            "build.svg": terminal(build).encode(),
            "report.png": small(report(browser, page, DESKTOP)),
            "report-desktop.png": small(report(browser, page, DESKTOP, whole=True)),
            "report-phone.png": small(report(browser, page, PHONE, phone=True)),
        }
        browser.close()
    for name, content in pictures.items():
        (options.into / name).write_bytes(content)
        print(f"{options.into / name}  {len(content):,} bytes")


if __name__ == "__main__":
    main()
