"""What a browser makes of a page."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# The browser prints the page when it has loaded, which an open frame puts off until the script is through. What would
# have attacked is noticed: inline scripts are allowed here, as the page's own rules do not.
PROBE = """<script>window.alert = () => { window.attacked = true };
const painted = new Promise(resolve => new PerformanceObserver(list => list.getEntries().forEach(entry =>
  entry.name == "first-contentful-paint" && resolve(entry.startTime))).observe({ type: "paint", buffered: true }));
addEventListener("DOMContentLoaded", async () => {
  const frame = document.body.appendChild(document.createElement("iframe")).contentDocument;
  frame.open();
  const all = (selector, node = document) => [...node.querySelectorAll(selector)];
  const seen = await (async () => { %s })().catch(error => String(error));
  document.body.replaceChildren();
  document.title = JSON.stringify({ seen, attacked: !!window.attacked });
  frame.close() })</script>"""


def look(page: Path, script: str, folder: Path) -> Any:
    """Opens the page in headless Chromium, as narrow as it goes, and returns what the script returns."""
    if not shutil.which("chromium"):
        pytest.skip("no chromium: apt-get install chromium")
    text = page.read_text().replace("default-src 'none'", "script-src 'unsafe-inline'")
    (folder / "probed.html").write_text(text.replace("</head>", PROBE % script + "</head>", 1))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required --dump-dom"
    flags += f" --user-data-dir={folder / 'profile'} --window-size=500,900"
    command = ["chromium", *flags.split(), (folder / "probed.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL)[1]))
    assert not found["attacked"]
    return found["seen"]
