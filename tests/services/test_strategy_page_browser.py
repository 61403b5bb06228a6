"""The page of an audit in a real browser: nothing that was written runs or asks for anything, and it fits a phone."""

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hostile_texts import TEXTS
from run_rows import fresh_rng
from strategy_runs import chains, fit_chains, line, lines_of, metric_rows, write_run

from tutorloop.cluster.recording.strategy_audit import audit
from tutorloop.cluster.recording.strategy_page import POLICY, write_audit
from tutorloop.lab.strategies.problems import STUDENT, work

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --disable-default-apps --virtual-time-budget=5000"
DARK = "--blink-settings=preferredColorScheme=0"
PHONE, DESK = 390, 1280
SECONDS = 120

pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium is installed")

PROBE = """<!doctype html><iframe id=f style="width:%dpx;height:800px;border:0" src="/strategies.html"></iframe>
<pre id=found></pre><script>
document.getElementById("f").onload = () => {
  const page = document.getElementById("f").contentDocument, root = page.documentElement;
  const measured = {closed: root.scrollWidth};
  page.querySelectorAll("details").forEach(own => own.open = true);
  const wide = [...page.querySelectorAll("body *")].filter(own => {
    const box = own.getBoundingClientRect();
    return box.right > root.clientWidth + 1 && !own.closest(".scroll") && box.width > 0;
  });
  const hidden = [...page.querySelectorAll("*")].filter(own => {
    const scrolls = own.scrollWidth > own.clientWidth + 1 && getComputedStyle(own).overflowX == "auto";
    return scrolls && own.tabIndex < 0;
  });
  const names = [...page.querySelectorAll("[role=region]")].map(own => own.getAttribute("aria-label"));
  measured.open = root.scrollWidth;
  measured.wide = wide.map(own => own.outerHTML.slice(0, 200));
  measured.unreachable = hidden.map(own => own.outerHTML.slice(0, 200));
  measured.unnamed = names.filter(name => !name).length;
  measured.summaries = [...page.querySelectorAll("summary")].filter(own => own.tabIndex < 0).length;
  measured.back = getComputedStyle(page.body).backgroundColor;
  measured.ink = getComputedStyle(page.body).color;
  measured.title = page.title;
  document.getElementById("found").textContent = JSON.stringify(measured);
};
</script>"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with the page of a hostile run; its address, and the paths that were asked for."""
    place, rng = tmp_path_factory.mktemp("served"), fresh_rng()
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(place / "page"))
    (place / "page").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    payloads = payloads_of(url)
    problems = chains(int(rng.integers(1000)))
    lines = lines_of(problems, rng)[:60]
    names = list(problems)[: len(payloads)]
    mixed = {
        name: "\n\n".join(f"{step} {text[:600]}" for step in work(problems[name], "columns", STUDENT).split("\n"))
        for name, text in zip(names, payloads, strict=True)
    }
    fit_chains(place / "strategies", problems, mixed)
    for name, text in zip(names, payloads, strict=True):
        question = f"What is {problems[name].expression}?"
        lines.append(line(f"{text[:300]}", name, question, mixed[name], step=12, passed=bool(rng.random() < 0.5)))
    rows = metric_rows(rng)
    rows[0]["warnings"] = payloads
    run = write_run(place / "run<script>document.title='run'<", place / "strategies", lines, rows)
    write_audit(audit(run), place / "page")
    yield place / "page", url, asked
    server.shutdown()
    server.server_close()


def payloads_of(url: str) -> list[str]:
    """What would change the title, add an element or ask the server for /hit, were it not text."""
    doing = "document.title='pwned';document.body.append(document.createElement('marquee'))"
    return [
        f"<script>{doing}</script>",
        f"</style><script>{doing}</script>",
        f'</title></head><body onload="{doing}">',
        f'<img src="{url}/hit-img" onerror="{doing}">',
        f"'\"><svg onload={doing}><animate onbegin={doing} attributeName=x>",
        f'<iframe src="{url}/hit-frame"></iframe><object data="{url}/hit-object"></object>',
        f'<link rel="stylesheet" href="{url}/hit-link"><style>@import url({url}/hit-import);*{{display:none}}</style>',
        f'<meta http-equiv="refresh" content="0;url={url}/hit-meta"><base href="{url}/hit-base/">',
        f'<form action="{url}/hit-form"><input autofocus onfocus="{doing}"><button>',
        f"<details open ontoggle={doing}><summary><table><tr><td>",
        "<!-- <textarea> <title> <noscript> <plaintext>",
        *TEXTS[:14],
    ]


def browse(tmp_path, address: str, *options: str) -> str:
    """The document as the browser has it once it has loaded."""
    command = [BROWSER, *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}", *options, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert "<body" in done.stdout, done.stderr
    return done.stdout


def hits(asked: list[str]) -> set[str]:
    return {path for path in asked if "hit" in path}


def ran(document: str) -> bool:
    return "<title>pwned" in document or "<marquee" in document


def test_nothing_that_was_written_runs_or_is_fetched(served, tmp_path):
    page, url, asked = served
    asked.clear()
    for address in (f"{url}/strategies.html", (page / "strategies.html").as_uri()):
        document = browse(tmp_path, address)
        assert not ran(document) and re.search(r"<title>tutorloop strategies: run&lt;script&gt;", document)
        for tag in ("script", "img", "iframe", "object", "link", "base", "form", "input", "marquee", "textarea"):
            assert f"<{tag}" not in document, tag
        assert document.count("<body") == document.count("<style") == document.count("<main") == 1
        assert "&lt;script&gt;document.title='pwned'" in document
    assert not hits(asked)
    assert set(asked) <= {"/strategies.html", "/favicon.ico"}


def test_the_policy_would_stop_what_were_not_escaped(served, tmp_path):
    """The same page with the texts as markup: the policy holds alone. Without it they do run."""
    page, url, asked = served
    payloads = payloads_of(url)
    markup = "".join(payloads[number] for number in (0, 3, 5, 6))
    written = (page / "strategies.html").read_text().replace("<main>", f"<main>{markup}", 1)
    assert POLICY in written
    (page / "raw.html").write_text(written)
    asked.clear()
    assert not ran(browse(tmp_path, f"{url}/raw.html")) and not hits(asked)
    (page / "bare.html").write_text(written.replace(POLICY, ""))
    assert ran(browse(tmp_path, f"{url}/bare.html"))
    assert {"/hit-img", "/hit-link", "/hit-frame"} <= hits(asked)


@pytest.mark.parametrize(("width", "theme"), [(PHONE, ""), (DESK, ""), (PHONE, DARK)])
def test_it_fits_and_is_reached_by_keyboard_in_either_theme(served, tmp_path, width, theme):
    page, url, _ = served
    (page / "probe.html").write_text(PROBE % width)
    document = browse(tmp_path, f"{url}/probe.html", "--window-size=1400,900", *filter(None, [theme]))
    measured = json.loads(html.unescape(re.search(r"<pre id=\"found\">(.*?)</pre>", document, re.DOTALL)[1]))
    assert measured["title"].startswith("tutorloop strategies: run<script>")
    assert measured["closed"] <= width and measured["open"] <= width, measured
    assert not measured["wide"] and not measured["unreachable"], measured
    assert measured["unnamed"] == measured["summaries"] == 0
    dark = measured["back"], measured["ink"]
    assert dark == (("rgb(20, 23, 26)", "rgb(230, 232, 235)") if theme else ("rgb(255, 255, 255)", "rgb(28, 32, 36)"))
