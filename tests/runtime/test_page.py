"""The page of rcod-serve in a real Chromium: drop, drag, compare, keyboard, phone, errors.

Skipped where Playwright or a Chromium is not installed. RCOD_SCREENSHOTS=DIR keeps what it saw.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcod_runtime.bundle import default_bundle_path
from rcod_runtime.image_io import write_image
from tests.runtime.test_serve import Server

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
PHOTO = Path(__file__).parents[2] / "docs" / "photo.png"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--no-first-run", "--disable-component-update")  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The embedded model."""
    opened = Server(default_bundle_path(), "--max-pixels", "400000")
    yield opened
    opened.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """Any error in the page's script, and any request to elsewhere, fails the test."""
    opened = browser.new_page(viewport={"width": 1100, "height": 900})
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda r: wrong.append(r.url) if not allowed(r.url, server) else None)
    opened.goto(f"http://127.0.0.1:{server.port}/")
    yield opened
    opened.close()
    assert wrong == []


def allowed(url: str, server: Server) -> bool:
    return url.startswith((f"http://127.0.0.1:{server.port}/", "blob:", "data:"))


def seen(page: Any, name: str) -> None:
    if folder := os.environ.get("RCOD_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def said(page: Any, words: str) -> None:
    page.locator("#said", has_text=words).wait_for(timeout=60_000)


def test_a_photo_is_sharpened_compared_and_saved(page: Any, tmp_path: Path) -> None:
    seen(page, "empty")
    page.set_input_files("#file", PHOTO)
    said(page, "neutral: 512 x 512 px")
    assert page.evaluate("document.getElementById('after').naturalWidth") == 512
    box = page.locator("#pair").bounding_box()
    bar = page.locator("#bar").bounding_box()
    page.mouse.move(bar["x"] + bar["width"] / 2, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 120, steps=5)
    page.mouse.up()
    assert abs(int(page.get_attribute("#bar", "aria-valuenow")) - 25) <= 1
    seen(page, "neutral")
    page.focus("#bar")
    sides = []
    for key in ("Home", "End"):  # the result alone, the photo alone
        page.keyboard.press(key)
        shot = Image.open(io.BytesIO(page.locator("#pair").screenshot())).convert("L")
        sides.append(np.asarray(shot.resize((48, 48)), np.float64).ravel())
    assert np.corrcoef(*sides)[0, 1] > 0.9, "both show the same place"
    page.select_option("#zoom", "400 %")
    assert page.locator("#pair").bounding_box()["width"] == pytest.approx(2048, abs=2)
    seen(page, "zoomed")
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "photo_x4_0.5.png"
    download.value.save_as(tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes().startswith(b"\x89PNG")


def test_the_knob_works_by_keyboard_and_a_level_seen_before_is_there_at_once(page: Any) -> None:
    page.set_input_files("#file", PHOTO)
    said(page, "neutral: 512")
    page.focus("#realism")
    page.keyboard.press("Home")
    said(page, "fidelity: 512")
    page.keyboard.press("End")
    said(page, "realism: 512")
    assert page.inner_text("#value") == "realism"
    seen(page, "realism")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.keyboard.press("Home")
    said(page, "fidelity: 512")
    assert not [url for url in requests if "upscale" in url]
    page.focus("#bar")
    for key, value in (("Home", "0"), ("ArrowRight", "2"), ("PageUp", "22"), ("End", "100")):
        page.keyboard.press(key)
        assert page.get_attribute("#bar", "aria-valuenow") == value
    page.click("#adaptive")
    said(page, "adaptive: 512")
    assert page.get_attribute("#adaptive", "aria-pressed") == "true"


def test_a_large_photo_shows_progress_and_can_be_stopped(page: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    write_image(tmp_path / "large.png", noise)
    page.set_input_files("#file", tmp_path / "large.png")
    page.locator("#progress").wait_for(state="visible", timeout=60_000)
    seen(page, "progress")
    page.click("#stop")
    said(page, "stopped")
    assert not page.is_visible("#progress") and not page.is_visible("#stop")
    page.set_input_files("#file", PHOTO)
    said(page, "neutral: 512")


def test_what_cannot_be_read_is_said_in_the_servers_words(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not an image")
    page.set_input_files("#file", tmp_path / "notes.png")
    said(page, "expected an image (PNG, JPEG")
    assert page.get_attribute("#said", "class") == "wrong"
    seen(page, "error")


def test_it_fits_a_phone(browser: Any, server: Server) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 800}, device_scale_factor=2, has_touch=True,
        is_mobile=True,
    )  # fmt: skip
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.set_input_files("#file", PHOTO)
    said(page, "neutral: 512")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, #realism, #bar')].filter(e =>"
        " e.checkVisibility() && e.getBoundingClientRect().height < 44).map(e => e.id)"
    )
    assert small == [], "too small for a finger"
    seen(page, "phone")
    context.close()
