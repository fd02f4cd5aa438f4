"""A page in a real browser: Chromium without a window, its console watched."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WATCH = """<head><script>window.faults = [];
window.addEventListener("error", e => window.faults.push(e.message), true);
console.error = console.warn = (...words) => window.faults.push(words.join(" "));</script>"""
AROUND = """<script>
window.addEventListener("load", function () {
  var out = [];
  function say(name, value) { out.push(name + " " + value); }
  %s
  say("wide", document.documentElement.scrollWidth > innerWidth);
  say("errors", window.faults.length + " " + window.faults.join(";"));
  document.title = out.join("|");
});
</script></body>"""


@functools.cache
def chromium() -> str | None:
    """The program; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def tried(page: Path, script: str, folder: Path, *, width: int) -> list[str]:
    """What a script said of a page that is `width` pixels wide; at the end, whether anything is
    wider than that, and the errors of the console. folder: for the browser's own files."""
    program = chromium()
    assert program, f"none of {', '.join(NAMES)} is here: install Chromium for these tests"
    text = page.read_text(encoding="utf-8")
    copy = page.parent / f"try-{page.stem}-{width}.html"  # beside the files that it links to
    copy.write_text(text.replace("<head>", WATCH).replace("</body>", AROUND % script))
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    words += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    words += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", copy.as_uri()]
    own = {**os.environ, "HOME": str(folder)}
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=120, env=own)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert title, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    return title[1].split("|")
