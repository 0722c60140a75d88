"""The page, as `sdattn-fast ui` serves it, in a real Chromium: drawn, loaded, refused, and nothing asked elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("selenium")

import gradio
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from sdattn_fast import Program, SalienceDropout, apply
from sdattn_fast.cli import main
from sdattn_fast.files import ProgramFile
from sdattn_fast.ui.page import _errors_on_page

PROMPT = "a large green triangle and a large yellow circle on a black background"
WORDS = "large green triangle large (2) yellow circle black background"
FILE = ProgramFile(Program(SalienceDropout(0.4), renormalize="content"), guidance_scale=3.0, num_inference_steps=3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio", "ignore:.*(no_silent_downcasting|copy keyword)")
def test_a_program_is_loaded_and_drawn_and_bad_input_refused(
    url: str, browser: Any, shapes: Any, tmp_path: Path
) -> None:
    def find(selector: str) -> Any:
        return browser.find_element(By.CSS_SELECTOR, selector)

    browser.get(url)
    until(lambda: "a large blue square" in find("#phrases").text)
    replace_text(find("#prompt textarea"), PROMPT)
    until(lambda: "a large yellow circle" in find("#phrases").text)

    FILE.save(tmp_path / "mine.json")
    find("input[type=file][accept='.json']").send_keys(str(tmp_path / "mine.json"))
    until(lambda: find("[aria-label='number input for Steps']").get_attribute("value") == "3")
    next(b for b in browser.find_elements(By.CSS_SELECTOR, "button") if b.text.startswith("Salience dropout")).click()
    until(lambda: find("[aria-label='number input for Share dropped, 0: off']").get_attribute("value") == "0.4")

    find("#draw").click()
    # What memory was taken comes last: seconds, ms a step, share of stock, MiB, CLIP, what the detector sees.
    row = r"\n\d+\.\d\d\n\d+\.\d\n\d+\.\d\d\n\d+\.\d\n-?0\.\d{3}\n\w+"
    until(lambda: re.search(rf"stock{row}(.|\n)*patched{row}", find("#cost").text))

    def drawn() -> Any:
        noise = torch.Generator().manual_seed(0)
        return shapes(PROMPT, num_inference_steps=3, guidance_scale=3.0, generator=noise).images[0]

    assert np.array_equal(shown(find("#stock img")), drawn())
    with apply(shapes, FILE, seed=0):
        assert np.array_equal(shown(find("#patched img")), drawn())
    for name in ("#stock-maps", "#patched-maps"):
        assert " ".join(find(name).text.split()) == WORDS
        assert len(browser.find_elements(By.CSS_SELECTOR, f"{name} button img")) == len(
            WORDS.replace(" (2)", "").split()
        )

    # Saved again, it is what was loaded.
    next(b for b in browser.find_elements(By.CSS_SELECTOR, "button") if b.text.startswith("Save the program")).click()
    until(lambda: (tmp_path / "program.json").exists())
    assert ProgramFile.load(tmp_path / "program.json") == FILE

    replace_text(find("#prompt textarea"), " ")
    find("#draw").click()
    until(lambda: "prompt: expected some words" in find(".toast-body").text)
    requests = requests_of(browser)
    assert len(requests) > 20 and [request for request in requests if not request.startswith(url)] == []


def test_a_files_text_is_no_html(url: str, browser: Any, tmp_path: Path) -> None:
    """Nothing of it is fetched, and no control is marked for good."""
    content = json.dumps({"format": "sdattn-fast program", "version": 1, "<img src=http://127.0.0.1:9/x.png>": 1})
    (tmp_path / "mine.json").write_text(content)
    browser.get(url)
    until(lambda: browser.find_element(By.CSS_SELECTOR, "#draw"))
    browser.find_element(By.CSS_SELECTOR, "input[type=file][accept='.json']").send_keys(str(tmp_path / "mine.json"))
    until(lambda: "got also '<img src=http" in browser.find_element(By.CSS_SELECTOR, ".toast-body").text)
    assert [request for request in requests_of(browser) if not request.startswith(url)] == []
    assert not [e for e in browser.find_elements(By.CSS_SELECTOR, ".error") if e.text == "Error"]


def test_an_error_is_text() -> None:
    with pytest.raises(gradio.Error) as error, _errors_on_page():
        raise ValueError("heads: expected JSON, got '<img src=x>'")
    assert error.value.message == "heads: expected JSON, got '&lt;img src=x&gt;'" and not error.value.print_exception


def test_a_model_of_ones_own(build: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    build("sd15").save_pretrained(tmp_path / "tiny")
    with serving(monkeypatch, capsys, "--model", str(tmp_path / "tiny")) as (url, page):
        with urllib.request.urlopen(f"{url}config") as answer:
            config = answer.read().decode()
        assert "No CLIP is loaded" in config and "the detector sees" not in config and "Examples" not in config
        draw = next(component for component in page.fns.values() if component.name == "drawn")
        values = {component: 2 if component.label == "Steps" else component.value for component in draw.inputs}
        *_, last = draw.fn(values)
    shown_values = {component.label or component.elem_id: value for component, value in last.items()}
    assert [row[0] for row in shown_values["Cost"]] == ["stock", "patched"] and len(shown_values["Cost"][0]) == 5
    assert shown_values["Stock"].size == shown_values["Patched"].size == (32, 32)
    assert [word for _, word in shown_values["stock-maps"]] == ["red", "car", "blue", "bench"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--port", "0"], "expected a port, 1 to 65535, got 0"),
        (["--port", "{taken}"], "port: cannot listen on 127.0.0.1:{taken}; name another with --port"),
        (["--clip", "/nowhere"], "clip: expected a folder or hub id, and there is no folder /nowhere"),
    ],
)
def test_bad_arguments(arguments: list[str], says: str, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = str(server.getsockname()[1])
        with pytest.raises(SystemExit) as exit:
            main(["ui", "--no-browser", *(argument.format(taken=taken) for argument in arguments)])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says.format(taken=taken) in err and err.count("\n") == 1


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What `condition` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except (NoSuchElementException, StaleElementReferenceException):
            pass
        time.sleep(0.05)
    raise TimeoutError("the page did not get there")


def replace_text(field: Any, text: str) -> None:
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


def shown(image: Any) -> Any:
    with urllib.request.urlopen(image.get_attribute("src")) as answer:
        return Image.open(io.BytesIO(answer.read()))


def requests_of(browser: Any) -> list[str]:
    """All that the browser asked the network for, but for its own pages."""
    urls = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(message["params"]["request"]["url"])
        elif message["method"] == "Network.webSocketCreated":
            urls.append(message["params"]["url"])
    return [url for url in urls if not url.startswith(("chrome:", "data:", "blob:"))]


@pytest.fixture
def url(monkeypatch: Any, capsys: Any) -> Iterator[str]:
    """The page's address."""
    with serving(monkeypatch, capsys) as (url, _):
        yield url


@contextlib.contextmanager
def serving(monkeypatch: Any, capsys: Any, *arguments: str) -> Iterator[tuple[str, Any]]:
    """(the page's address, the page), served by the command line in threads of this process."""
    served: list[Any] = []
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda blocks: served.append(blocks))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SystemExit) as exit:
        main(["ui", "--no-browser", "--port", str(port), *arguments])
    assert exit.value.code == 0
    try:
        assert f"http://127.0.0.1:{port}/ is the page" in capsys.readouterr().out
        yield f"http://127.0.0.1:{port}/", served[0]
    finally:
        served[0].close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Debian's Chromium. Without it the test is skipped, and says so; in CI it fails."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "Chromium is not installed: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1400",
        f"--user-data-dir={tmp_path / 'chromium'}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
