"""The report's page in a real headless browser: on a phone, in the dark, on paper."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mowmerge.evals import page
from tests.evals.reporting import made

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PHONE = 390
MEASURE = """
const page = document.querySelector('iframe').contentDocument;
const root = page.documentElement, style = page.defaultView.getComputedStyle(page.body);
const small = [...page.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height);
document.body.textContent = JSON.stringify({
  width: root.scrollWidth, over: [...page.querySelectorAll('main > *')].filter(
    e => e.getBoundingClientRect().right > root.clientWidth + 1).length,
  paper: style.backgroundColor, ink: style.color, text: Math.min(...small),
  sections: page.querySelectorAll('section').length});
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no chromium"),
]


def browse(folder: Path, file: Path, *options: str) -> tuple[str, str]:
    """The page's document when it has loaded, and what the browser logged."""
    profile = f"--user-data-dir={folder / 'profile'}"
    ran = subprocess.run(
        [BROWSER, "--headless=new", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", profile,
         "--enable-logging=stderr", *options, file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return ran.stdout, ran.stderr


@pytest.fixture
def written(tmp_path: Path) -> str:
    return page.render(made(tmp_path / "zoo")[0])


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_runs_over_and_nothing_complains(
    tmp_path: Path, written: str, dark: bool
) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<!doctype html><body><iframe style='width:{PHONE}px;height:4000px;border:0'"
        f' srcdoc="{html.escape(written)}"></iframe>'
        f"<script>addEventListener('load', () => {{{MEASURE}}})</script></body>",
        encoding="utf-8",
    )
    scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
    found, log = browse(tmp_path, frame, scheme, "--dump-dom")
    told = re.search(r'\{"width.*\}', found)
    assert told is not None, found[-500:]
    measured = json.loads(told[0])
    assert measured["width"] == PHONE
    assert measured["over"] == 0
    assert measured["sections"] == 10
    assert measured["text"] > 9  # a line of text, in pixels
    light = [int(c) for c in re.findall(r"\d+", measured["paper"])[:3]]
    ink = [int(c) for c in re.findall(r"\d+", measured["ink"])[:3]]
    assert (sum(light) < 150) == dark
    assert (sum(ink) > 450) == dark
    assert "CONSOLE" not in log


def test_it_prints(tmp_path: Path, written: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(written, encoding="utf-8")
    _, log = browse(tmp_path, file, f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "CONSOLE" not in log
