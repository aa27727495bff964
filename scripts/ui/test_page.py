"""A person's way through the page in a real browser: from dropped photos to a downloaded picture, on pocket."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect
from safetensors import safe_open

from coeffdiff.pocket.world.subjects import DEV, write_photos
from coeffdiff.utils.png import read_recipe
from page_process import PageProcess

TOKEN, WORD = "ohwx", DEV[0].class_word
PROMPT = f"a photo of <V> {WORD} on the beach"
Shoot = Callable[[str], None]
_QUICK = {
    "steps": 40,
    "until": 10,  # steps, when it is looked at
    "settings": "training.batch_size=1\ntraining.checkpoint_every=20\nvalidation.every=10\nvalidation.steps=4\n"
    "validation.dino=null\nvalidation.clip=null",
}
_SHOWN = {"steps": 160, "until": 110, "settings": "validation.every=25"}  # for screenshots


def test_from_dropped_photos_to_a_downloaded_picture(page, tmp_path, request):
    """Through a stop, a resume, and the death of the page in the middle of the training."""
    shots: Path | None = request.config.getoption("--screenshots")
    plan = _SHOWN if shots else _QUICK

    def shoot(name: str) -> None:
        if shots:
            shots.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=shots / f"{name}.png", full_page=True)

    server = PageProcess(tmp_path, "--port", "0")
    try:
        page.goto(server.address)
        drop_and_check(page, tmp_path, plan, shoot)
        start_and_watch(page, tmp_path, shoot, until=plan["until"])
        server.kill()
        pid = training_survives(tmp_path)
        server = PageProcess(tmp_path, "--port", str(urlsplit(server.address).port))
        find_stop_and_resume(page, server.address, tmp_path, pid, plan["steps"])
        draw_and_download(page, tmp_path, shoot)
        take_the_adapter(page)
    finally:
        leave(page, server)
        end_training(tmp_path)


def drop_and_check(page: Page, folder: Path, plan: dict, shoot: Shoot) -> None:
    """The check names the photos; what is wrong is one sentence."""
    files = write_photos(DEV[0], folder / "camera", 5, 0, 256)
    page.locator("#check").click()
    expect(page.get_by_text("There are no photos yet")).to_be_visible()
    page.get_by_role("button", name="Close").or_(page.locator(".toast-close")).first.click()
    page.locator("#drop input[type=file]").set_input_files(files)
    expect(page.locator("#drop").get_by_role("link")).to_have_count(len(files))
    fill(page, "token", TOKEN)
    fill(page, "class-word", WORD)
    choose(page, "model", "pocket (small")
    choose(page, "preset", "pocket")
    page.locator("#more").get_by_text("More settings").click()
    fill(page, "steps", str(plan["steps"]))
    fill(page, "settings", plan["settings"])
    page.locator("#check").click()
    expect(page.get_by_text("5 photos:")).to_be_visible()
    expect(page.locator("#photos img")).to_have_count(5)
    kept = folder / "runs" / "photos" / TOKEN
    assert [file.read_bytes() for file in sorted(kept.iterdir())] == [file.read_bytes() for file in files]
    shoot("photos")


def start_and_watch(page: Page, folder: Path, shoot: Shoot, until: int) -> None:
    """Curve and validation pictures grow."""
    tab(page, "Training")
    page.locator("#start").click()
    expect(page.locator("#status")).to_contain_text("Starting")
    expect(page.locator("#start")).to_be_disabled()
    wait_for(lambda: steps_done(folder) >= until, "the training does not get on")
    expect(page.locator("#status")).to_contain_text(re.compile(r"Training: step \d+ of \d+, loss 0\.\d+"))
    expect(page.locator("#curve img")).to_be_visible()
    expect(page.locator("#validation img").first).to_be_visible()
    page.wait_for_timeout(3000)
    shoot("training")


def training_survives(folder: Path) -> int:
    """The page is gone, and steps are still made. Held there, so that it does not end before the page is back."""
    pid = record(folder)["pid"]
    before = steps_done(folder)
    wait_for(lambda: steps_done(folder) >= before + 2, "the training has ended with the page")
    os.kill(pid, signal.SIGSTOP)
    return pid


def find_stop_and_resume(page: Page, address: str, folder: Path, pid: int, steps: int) -> None:
    page.goto(address)
    tab(page, "Training")
    expect(page.locator("#status")).to_contain_text("Training: step")
    expect(page.locator("#start")).to_be_disabled()
    os.kill(pid, signal.SIGCONT)
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped after step")
    stopped = steps_done(folder)
    assert stopped < steps
    assert (folder / "runs" / TOKEN / "checkpoints" / f"step-{stopped:06d}").is_dir()
    tab(page, "Pictures")  # the step that there is; the result takes its place, since nobody chose the step
    expect(page.locator("#adapter input")).to_have_value(f"{TOKEN}, step {stopped}")
    tab(page, "Training")
    page.locator("#resume").click()
    expect(page.locator("#status")).to_contain_text(f"Finished after {steps} steps", timeout=600_000)
    lines = (folder / "runs" / TOKEN / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))


def draw_and_download(page: Page, folder: Path, shoot: Shoot) -> None:
    """What the browser saves is the picture that `coeffdiff sample` makes, with its recipe."""
    tab(page, "Pictures")
    expect(page.locator("#adapter input")).to_have_value(TOKEN)
    fill(page, "prompts", PROMPT)
    fill(page, "denoising", "12")
    for scale in ("0", "0.5", "1"):
        page.locator("#compared").get_by_label(scale, exact=True).check()
    page.locator("#draw").click()
    expect(page.locator("#where")).to_contain_text("6 pictures and their grid in samples/001")
    expect(page.locator("#grid img")).to_be_visible()
    saved = download(page, "#pictures", 1)
    page.wait_for_timeout(1000)
    shoot("pictures")
    recipe = read_recipe(saved)
    assert (recipe["prompt"], recipe["seed"]) == (PROMPT.replace("<V>", TOKEN), 0)
    assert recipe["adapters"][0]["scale"] == 0.5
    subprocess.run(
        [
            *(sys.executable, "-m", "coeffdiff", "sample", "--adapter", f"runs/{TOKEN}", "--prompt", PROMPT),
            *("--scales", "0,0.5,1", "-n", "1", "--steps", "12", "--output", "by-hand"),
        ],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    [by_hand] = (folder / "by-hand").glob("002-*.png")
    assert saved.read_bytes() == by_hand.read_bytes()


def take_the_adapter(page: Page) -> None:
    tab(page, "Adapter")
    expect(page.locator("#table")).to_contain_text("LoRA:")
    page.locator("#zip").click()
    with zipfile.ZipFile(download(page, "#files", 0)) as archive:
        assert f"{TOKEN}/coeff.safetensors" in archive.namelist()
    page.locator("#export").click()
    expect(page.locator("#files")).to_contain_text(".safetensors")
    with safe_open(download(page, "#files", 0), "pt") as file:
        assert file.metadata()["ss_network_module"]


def test_another_address_needs_the_token(page, tmp_path):
    """Every request without it is refused; the printed address opens the page, and leaves the token's place."""
    server = PageProcess(tmp_path, "--port", "0", "--host", "0.0.0.0")
    try:
        address = server.address.replace("0.0.0.0", "127.0.0.1")
        bare = address.partition("?")[0]
        for path in ("", "config", "gradio_api/upload", "gradio_api/file=/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(bare + path, timeout=60)
        page.goto(address)
        expect(page.locator("#token")).to_be_visible()
        assert page.url == bare
        answer = page.request.get(f"{bare}gradio_api/file=/etc/passwd")
        assert answer.status in (403, 404)
    finally:
        leave(page, server)


def leave(page: Page, server: PageProcess) -> None:
    """The browser's page first: what it was still fetching would fail when the server is gone."""
    page.close()
    server.kill()


def fill(page: Page, name: str, text: str) -> None:
    page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def choose(page: Page, name: str, label: str) -> None:
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=label).first.click()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def download(page: Page, box: str, number: int) -> Path:
    with page.expect_download() as begun:
        page.locator(box).get_by_role("link").nth(number).click()
    return begun.value.path()


def record(folder: Path) -> dict:
    return json.loads((folder / "runs" / ".ui" / "training.json").read_text())


def steps_done(folder: Path) -> int:
    log = folder / "runs" / TOKEN / "log.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def wait_for(is_so: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + 600
    while not is_so():
        assert time.monotonic() < end, otherwise
        time.sleep(0.3)


def end_training(folder: Path) -> None:
    """Nothing is left running after a failure."""
    if (folder / "runs" / ".ui" / "training.json").is_file():
        with contextlib.suppress(ProcessLookupError):
            os.kill(record(folder)["pid"], signal.SIGKILL)
