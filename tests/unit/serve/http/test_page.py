"""The page at /: one file, open to everyone, in front of routes that want the key; and in a browser it asks both sides
and shows what they said.
"""

import asyncio
import re
import socket
import threading
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from pi_ray.config import ServeConfig
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.http.api import create_api
from pi_ray.serve.http.keys import key_digest
from pi_ray.serve.http.page import get_page
from tests.browser import Browser

KEY = "a-secret-key"
FULL, MINE = ["k", "4 – <b>", " not bold</b>"], ["k4", " & k5"]


class TwoAnswers:
    """The base model with the full prompt says FULL, an adapter says MINE."""

    base = "smollm2-135m"

    def __init__(self):
        self.asks = []
        self.gate = None
        self.refuses = False

    async def models(self):
        return ["smollm2-135m", "colours", "shapes"]

    async def complete(self, ask):
        self.asks.append(ask)
        if self.refuses:
            raise RefusedError(429, "all slots and the queue are taken; come back later", "rate_limit_error")
        yield {
            "model": ask.model, "fingerprint": ask.model, "prompt": "full",
            "prompt_tokens": 681 if ask.full_prompt else 28, "saved": 0,
        }
        pieces = FULL if ask.full_prompt else MINE
        for piece in pieces:
            yield {"text": piece}
            while self.gate:
                await asyncio.sleep(0.01)
        yield {"finish": "stop", "completion_tokens": len(pieces) + 1}


@contextmanager
def serving(backend, key=""):
    """The API over `backend` on a free port, in a thread."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    api = create_api(backend, ServeConfig(full_prompt=True), key_digest(key))
    server = uvicorn.Server(uvicorn.Config(api, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.size(1280, 900)
        yield opened


def text_of(browser, *names):
    return [browser.run(f"document.getElementById('{name}').textContent") for name in names]


def ask(browser, query, adapter="colours"):
    browser.until("!document.getElementById('adapter').disabled")
    browser.run(
        f"document.getElementById('adapter').value = '{adapter}'; document.getElementById('query').value = '{query}'; "
        "document.getElementById('ask').click()"
    )


def test_page_loads_no_resources_and_its_csp_allows_only_its_own_script():
    html = get_page().body.decode()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://""", html)
    assert html.count("<script>") == 1 and not re.search(r"\son\w+=", html)
    policy = get_page().headers["Content-Security-Policy"]
    assert (
        "default-src 'none'" in policy
        and "connect-src 'self'" in policy
        and "script-src 'sha256-" in policy
        and "unsafe-eval" not in policy
    )


def test_page_is_public_and_models_need_the_key():
    api = create_api(TwoAnswers(), ServeConfig(), key_digest(KEY))

    async def get(path):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://localhost") as http:
            return await http.get(path)

    shown = asyncio.run(get("/"))
    assert (
        shown.status_code == 200
        and shown.headers["content-type"].startswith("text/html")
        and "Content-Security-Policy" in shown.headers
    )
    assert asyncio.run(get("/v1/models")).status_code == 401


def test_browser_shows_both_answers_and_their_tokens(browser):
    backend = TwoAnswers()
    with serving(backend) as url:
        browser.open(url)
        ask(browser, "what is <red>?", "shapes")
        browser.until("document.getElementById('verdict').textContent")
        assert text_of(browser, "full-answer", "adapter-answer") == ["".join(FULL), "".join(MINE)]
        assert text_of(browser, "full-in", "full-out", "adapter-in", "adapter-out") == ["681", "4", "28", "3"]
        assert all(
            figure.replace(",", "").isdigit()
            for figure in text_of(browser, "full-first", "full-all", "adapter-first", "adapter-all")
        )
        assert "The adapter read 28 tokens instead of 681 (96% fewer)" in text_of(browser, "verdict")[0]
        assert [(a.model, a.query, a.full_prompt) for a in backend.asks] == [
            ("shapes", "what is <red>?", False), ("shapes", "what is <red>?", True),
        ]
        assert browser.run("document.getElementById('key-field').hidden")
    assert browser.errors == []


def test_browser_streams_answers_and_can_stop_them(browser):
    backend = TwoAnswers()
    backend.gate = True
    with serving(backend) as url:
        browser.open(url)
        ask(browser, "wait")
        browser.until(f"document.getElementById('adapter-answer').textContent === '{MINE[0]}'")
        assert browser.run("document.getElementById('ask').disabled") and not browser.run(
            "document.getElementById('stop').hidden"
        )
        browser.run("document.getElementById('stop').click()")
        browser.until("!document.getElementById('ask').disabled")
        assert text_of(browser, "adapter-answer", "full-answer", "verdict") == [f"{MINE[0]}stopped", "", ""]
        assert len(backend.asks) == 1


def test_browser_shows_a_refusal_in_place_of_the_answer(browser):
    backend = TwoAnswers()
    backend.refuses = True
    with serving(backend) as url:
        browser.open(url)
        ask(browser, "x")
        browser.until("!document.getElementById('ask').disabled")
        assert text_of(browser, "full-answer") == ["all slots and the queue are taken; come back later"]
    browser.errors.clear()  # the browser's console notes every status above 399


def test_browser_asks_for_a_key_only_after_401_and_stores_it_nowhere(browser):
    with serving(TwoAnswers(), KEY) as url:
        browser.open(url)
        browser.until("!document.getElementById('key-field').hidden")
        enter = (
            "document.getElementById('key').value = '{}'; "
            "document.getElementById('key').dispatchEvent(new Event('change'))"
        )
        browser.run(enter.format("wrong"))
        browser.until("document.getElementById('problem').textContent.includes('not known')")
        browser.run(enter.format(KEY))
        ask(browser, "what is red?")
        browser.until("document.getElementById('verdict').textContent")
        assert (
            browser.run("localStorage.length + sessionStorage.length + document.cookie.length + location.search.length")
            == 0
        )
    browser.errors.clear()


def test_page_fits_a_phone_and_labels_every_field(browser, tmp_path):
    with serving(TwoAnswers()) as url:
        browser.size(360, 740)
        browser.open(url)
        ask(browser, "what is red?")
        browser.until("document.getElementById('verdict').textContent")
        assert browser.run("document.documentElement.scrollWidth") <= 360
        assert (
            browser.run(
                "[...document.querySelectorAll('select, input, textarea')].filter(field => !field.labels.length).length"
            )
            == 0
        )
        assert browser.shot(tmp_path / "phone.png").stat().st_size > 10_000
        browser.size(1280, 900)
