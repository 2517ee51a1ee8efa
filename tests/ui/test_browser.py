# SPDX-License-Identifier: Apache-2.0
"""The web page in a real headless Chromium, with the embedded checkpoint: upload, run, play, steer, cancel, leave."""

import os
import shutil
import time
from pathlib import Path

import pytest
from support.pages import EXAMPLES
from support.ports import free_port

pytest.importorskip("gradio", reason="the extra 'demo' is not installed")

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.tiny import CHECKPOINT
from dreammover_pipeline.turns import Turn
from dreammover_pipeline.ui.events import CANCELLED
from dreammover_pipeline.ui.serving import serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium on the PATH", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")  # of its own making
DEFAULTS = {"n_frames": 2, "lora_steps": 2, "inversion_steps": 4}
ROBOT = [EXAMPLES / "robot" / "0.png", EXAMPLES / "robot" / "1.png"]
SLOW = 60_000  # milliseconds


@pytest.fixture(scope="module")
def models():
    return DreamMoverPipeline.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def address(models):
    with serving(models, "127.0.0.1", free_port(), 1, DEFAULTS) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # as root there is no sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address):
    page = chromium.new_page(viewport={"width": 1280, "height": 1400})
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("response", lambda answer: page.faults.append(answer.url) if answer.status == 404 else None)
    page.goto(address)
    expect(page.get_by_role("button", name="Make the video")).to_be_visible(timeout=SLOW)
    yield page
    page.close()
    assert page.faults == []


def choose(page, *photos):
    for name, photo in zip(("first", "last"), photos, strict=True):
        page.locator(f"#{name} input[type=file]").set_input_files(photo)
        expect(page.locator(f"#{name} img")).to_be_visible()


def make(page):
    page.get_by_role("button", name="Make the video").click()


def says(page, text):
    expect(page.locator("#status")).to_contain_text(text, timeout=SLOW)


def move(page, slider, share):
    """Drag a slider to a share of its way."""
    bar = page.locator(f"#{slider} input[type=range]")
    box = bar.bounding_box()
    bar.click(position={"x": box["width"] * share, "y": box["height"] / 2})


def type_in(page, number, value):
    field = page.locator(f"#{number} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def test_upload_run_play_and_render_again(page):
    choose(page, *ROBOT)
    page.get_by_label("What the photos show").fill("a robot")
    make(page)
    says(page, "Fitting LoRA")
    says(page, "Done in")
    assert "made 2 frames" in page.locator("#status").inner_text()
    video = page.locator("#video video")
    page.wait_for_function("() => document.querySelector('#video video')?.currentTime > 0", timeout=SLOW)
    assert video.evaluate("video => [video.videoWidth, video.videoHeight, video.error]") == [128, 128, None]

    page.get_by_role("tab", name="Frames").click()
    scrubber = page.locator("#scrubber input[type=range]")
    expect(scrubber).to_have_attribute("max", "3")  # the page hears of the new frames a moment after the video plays
    expect(page.locator("#frame")).to_contain_text("δ = 0.000")
    scrubber.press("ArrowRight")
    expect(page.locator("#frame")).to_contain_text("δ = 0.333")
    move(page, "moment", 0.7)
    says(page, "the photos were known already")
    expect(page.locator("#frame")).to_contain_text("δ = 0.7")

    page.get_by_role("tab", name="Flow and confidence").click()
    for name in ("flow", "matches", "confidence", "occlusion", "sheet"):
        picture = page.locator(f"#{name} img")
        expect(picture).to_be_visible()
        page.wait_for_function(f"() => document.querySelector('#{name} img').naturalWidth > 200")

    move(page, "frames", 0.2)
    says(page, "frames and wrote the video. The photos were known already.")
    move(page, "fps", 0.8)
    says(page, "s: wrote the video. The photos were known already.")


def test_cancel_frees_the_pipeline(page):
    choose(page, *ROBOT)
    page.get_by_role("button", name="More").click()
    type_in(page, "lora-steps", 300)
    make(page)
    says(page, "Fitting LoRA")
    page.locator("#cancel").click()
    says(page, CANCELLED)
    type_in(page, "lora-steps", 0)
    make(page)
    says(page, "Done in")


def test_a_cancelled_job_is_no_error(page, models):
    choose(page, *ROBOT)
    held = []  # Gradio takes the end of a cancelled job for an error where it hears of it before this answer
    page.route("**/gradio_api/cancel", lambda route: held.append((route, route.fetch())))
    with Turn([models.unet]):  # the job waits for its turn, so that it cannot end by itself
        make(page)
        says(page, "Starting")
        page.locator("#cancel").click()
        says(page, CANCELLED)
        error = page.locator("#status").get_by_text("Error")
        expect(error).to_be_attached()
        expect(error).to_be_hidden()
    ((route, answer),) = held
    route.fulfill(response=answer)


def test_bad_uploads_are_refused_in_words(page, tmp_path):
    no_picture, cut, large = (tmp_path / name for name in ("text.png", "cut.png", "large.png"))
    no_picture.write_text("not a picture")
    cut.write_bytes(ROBOT[0].read_bytes()[:3000])
    large.write_bytes(ROBOT[0].read_bytes() + bytes(2**20))
    make(page)
    says(page, "Choose two photos first, or one of the examples.")
    upload = page.locator("#first input[type=file]")
    upload.set_input_files(no_picture)
    expect(page.get_by_text("text.png cannot be read as an image: it is none of JPEG, PNG,")).to_be_visible()
    upload.set_input_files(large)
    expect(page.get_by_text("exceed the maximum allowed size of 1.0 Mb")).to_be_visible()
    upload.set_input_files(cut)
    expect(page.get_by_text("cut.png cannot be read as an image: ")).to_be_visible()


def test_an_example_and_clicked_spots(page):
    page.get_by_text("robot", exact=True).click()
    expect(page.locator("#last img")).to_be_visible()
    page.get_by_role("button", name="Say what belongs together").click()
    spots = [page.locator(f"#spots-{name} img") for name in ("first", "last")]
    spots[1].click()
    expect(page.get_by_text("Click a spot in the first photo before")).to_be_visible()
    for spot in spots:
        before = spot.get_attribute("src")
        spot.click()
        expect(spot).not_to_have_attribute("src", before)
    make(page)
    says(page, "Done in")


def test_a_closed_tab_leaves_no_files(chromium, address):
    context = chromium.new_context()
    page = context.new_page()
    page.goto(address)
    expect(page.get_by_role("button", name="Make the video")).to_be_visible(timeout=SLOW)
    choose(page, *ROBOT)
    source = page.locator("#first img").get_attribute("src")
    folder = Path(source.partition("file=")[2]).parents[2]
    assert folder.is_dir()
    with chromium.new_context() as another:  # knowing where it lies is not enough
        assert another.request.get(source).status == 404
    assert context.request.get(source).status == 200
    context.close()
    deadline = time.monotonic() + 30
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.exists()
