"""The page at the bedside, in a browser: every state, by keyboard too; nothing from elsewhere."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from serving import film, in_thread, make, noise, wait

from edgekd.serve import model as device

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="pip install 'edgekd[serve]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgekd[onnxruntime]'")
api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome")
                 if (p := shutil.which(n))), None)  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")]
TOKEN = "0123456789abcdef-wanted"
VIEW = {"width": 1024, "height": 600}
DONE = ":not([data-map])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def opened(folder):
    """open a bundle made with these settings."""

    def open_it(name, **more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            return device.open_bundle(make(folder / f"{name}.edgekd", **more))

    return open_it


@pytest.fixture(scope="module")
def model(opened):
    return opened("tiny")


@pytest.fixture(scope="module")
def client(model, folder):
    with in_thread(model, folder, max_bytes=2_000_000) as (found, _):
        yield found


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def tab(browser):
    """(page, what it asked for, what went wrong in it)."""
    context = browser.new_context(viewport=VIEW)
    page = context.new_page()
    asked, wrong = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: wrong.append(m.text) if "Failed to load" not in m.text else None)
    page.set_default_timeout(15_000)
    yield page, asked, wrong
    context.close()
    assert wrong == []


def enter(page, client, state="empty"):
    page.goto(client.url)
    page.locator(f"body[data-state={state}]").wait_for()


def give(page, data, state, name="Roentgen^Wilhelm.png", kind="image/png"):
    """Choose a file, and wait for what becomes of it."""
    page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": data})
    page.locator(f"body[data-state={state}]{DONE}").wait_for()


def pixels(page, selector):
    """(H, W, 3) of what is seen of an element."""
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB"))


def fits(page, selector):
    """Whether all of an element is in view without scrolling."""
    box = page.locator(selector).bounding_box()
    return box["y"] >= 0 and box["y"] + box["height"] <= VIEW["height"] and box["x"] >= 0


def test_an_answer_its_map_and_the_slider(tab, client, model):
    page, asked, _ = tab
    enter(page, client)
    data = film()
    give(page, data, "answer")
    (own,) = model.answer([model.see(data)])
    p = own.probabilities[own.label]
    assert page.locator("#label").inner_text() == own.label
    assert page.locator("#sure").inner_text() == f"{100 * p:.1f} %"
    assert page.locator("#classes tr").count() == 3
    first = page.locator("#classes tr").first.inner_text().split()
    assert first == [own.label, f"{100 * p:.1f}", "%"]
    assert page.locator("#told").inner_text() == f"Answer: {own.label}, {100 * p:.1f} %"
    page.locator("#overlay").wait_for()
    for selector in ("#answer", "#stage", "#controls", "#drop", ".use"):
        assert fits(page, selector), selector
    slider = page.get_by_label("Map opacity")
    seen = {}
    for value in (0, 50, 100):
        slider.fill(str(value))
        assert page.locator("#percent").inner_text() == f"{value} %"
        seen[value] = pixels(page, "#stage").astype(int)
    page.evaluate("document.getElementById('overlay').hidden = true")
    np.testing.assert_array_equal(seen[0], pixels(page, "#stage"))
    half, whole = (abs(seen[v] - seen[0]).max() for v in (50, 100))
    assert 20 < half < whole
    assert all(u.startswith((client.url, "data:")) for u in asked)


def test_the_map_of_another_class(tab, client):
    page, asked, _ = tab
    enter(page, client)
    give(page, film(), "answer")
    before = page.locator("#overlay").get_attribute("src")
    other = next(c for c in ("nodule", "normal") if c != page.locator("#label").inner_text())
    page.get_by_label("Class").select_option(other)
    page.get_by_text(f"what speaks for {other}").or_(page.get_by_text("No map")).wait_for()
    # a screen reader says so
    assert page.locator("#caption").get_attribute("aria-live") == "polite"
    assert asked[-1].startswith(("data:", f"{client.url}/explain?label={other}"))
    assert page.locator("#overlay").get_attribute("src") != before


def test_what_is_unusual_is_a_warning(tab, client):
    page, *_ = tab
    enter(page, client)
    give(page, noise(), "warning")
    assert "unlike what the model learnt from" in page.locator("#warnings").inner_text()
    assert page.locator("#told").inner_text().startswith("Unusual image: do not rely on the answer")
    assert fits(page, "#answer")
    give(page, film(), "answer")
    assert not page.locator("#unusual").is_visible()


def test_an_abstention(tab, opened, tmp_path):
    page, *_ = tab
    with in_thread(opened("unsure", abstain_below=1.0), tmp_path) as (client, _):
        enter(page, client)
        give(page, film(), "abstained")
        assert page.locator("#label").inner_text() == "No answer"
        assert page.locator("#sure").inner_text() == ""
        assert "an answer needs 1" in page.locator("#why-not").inner_text()
        assert page.locator("#told").inner_text().startswith("No answer.")
        assert fits(page, "#answer")


def test_dicom(tab, client):
    pytest.importorskip("pydicom", reason="pip install 'edgekd[dicom]'")
    from data.test_dicom import made as dicom_file

    page, *_ = tab
    enter(page, client)
    page.locator("#file").set_input_files(
        {"name": "IM0001", "mimeType": "application/octet-stream", "buffer": dicom_file()}
    )
    page.locator(f":is([data-state=answer], [data-state=warning]){DONE}").wait_for()
    page.locator("#picture").wait_for()
    assert pixels(page, "#stage").std() > 10


def test_no_name_of_a_file_is_shown_or_sent(tab, client):
    page, asked, _ = tab
    sent = []
    page.on("request", lambda r: sent.append((str(r.headers), r.post_data_buffer or b"")))
    enter(page, client)
    give(page, film(), "answer")
    assert "Roentgen" not in page.content() + "".join(asked) + "".join(h for h, _ in sent)
    assert not any(b"Roentgen" in body for _, body in sent)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x89PNG\r\n\x1a\n torn", "Corrupt or truncated image"),
        (b"GIF89a", "Not a JPEG, PNG or DICOM image"),
        (bytes(2_000_001), "This file has 2.0 MB, and this server takes 2 MB."),
    ],
)
def test_an_error_says_what_is_wrong_and_the_next_image_is_answered(tab, client, data, words):
    page, *_ = tab
    enter(page, client)
    give(page, film(), "answer")
    give(page, data, "error")
    alert = page.get_by_role("alert")
    assert alert.inner_text().startswith("No answer\n")
    assert words in alert.inner_text()
    assert not page.locator("#answer").is_visible()  # of the image before
    assert not page.locator("#picture").is_visible()
    assert not page.locator("#again").is_visible()  # it would be refused again
    give(page, film(), "answer")
    assert alert.inner_text() == ""


def test_too_busy_and_trying_again(tab, client):
    page, *_ = tab
    enter(page, client)
    busy = {"status": 503, "json": {"error": "too many images are waiting: ask again in a second"}}
    page.route("**/predict", lambda route: route.fulfill(**busy))
    give(page, film(), "busy")
    assert page.get_by_role("alert").inner_text().startswith("Too busy to answer\nToo many images")
    page.unroute("**/predict")
    page.get_by_role("button", name="Try again").focus()
    page.keyboard.press("Enter")
    page.locator(f"body[data-state=answer]{DONE}").wait_for()
    assert not page.locator("#again").is_visible()
    assert page.evaluate("document.activeElement.id") == "file"  # not lost with the button


def test_a_server_that_is_gone(tab, model, tmp_path):
    page, *_ = tab
    with in_thread(model, tmp_path) as (client, _):
        enter(page, client)
    give(page, film(), "error")
    assert page.get_by_role("alert").inner_text().startswith("Not connected\nThe server cannot be")
    assert page.get_by_role("button", name="Try again").is_visible()


def test_a_map_that_fails_leaves_the_answer(tab, client):
    page, *_ = tab
    enter(page, client)
    late = {"status": 504, "json": {"error": "no answer within 30 s"}}
    page.route("**/explain?*", lambda route: route.fulfill(**late))
    give(page, film(), "answer")
    assert page.locator("#caption").inner_text() == "No map: no answer within 30 s"
    assert page.locator("#label").is_visible()
    assert page.locator("#opacity").is_disabled()


def test_an_undefined_map(tab, model, tmp_path, monkeypatch):
    page, *_ = tab
    monkeypatch.setattr(model, "why", lambda *_, **__: None)
    with in_thread(model, tmp_path) as (client, _):
        enter(page, client)
        give(page, film(), "answer")
        assert page.locator("#caption").inner_text().startswith("No map: nothing in this image")
        assert page.locator("#picture").is_visible()
        assert not page.locator("#overlay").is_visible()


def hold(page, path):
    """What the page asks of a path from now on; it waits."""
    held = []
    page.route(path, lambda route: held.append(route))
    return held


def choose(page, data):
    page.locator("#file").set_input_files({"name": "x", "mimeType": "image/png", "buffer": data})


DROP = """([bytes, n]) => {
    const data = new DataTransfer();
    const file = new File([new Uint8Array(bytes)], "x.png", {type: "image/png"});
    for (let i = 0; i < n; i++) data.items.add(file);
    document.body.dispatchEvent(
      new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
  }"""


def test_an_answer_that_is_cut_off_is_no_answer(tab, client):
    page, *_ = tab
    enter(page, client)
    torn = {"status": 200, "content_type": "application/json", "body": '{"label": "nod'}
    page.route("**/predict", lambda route: route.fulfill(**torn))
    give(page, film(), "error")
    assert page.get_by_role("alert").inner_text().endswith("\nThe answer did not arrive whole.")
    page.unroute("**/predict")
    page.route("**/explain?*", lambda route: route.fulfill(**torn))
    page.get_by_role("button", name="Try again").click()
    page.locator(f"body[data-state=answer]{DONE}").wait_for()
    assert page.locator("#caption").inner_text() == "No map: The answer did not arrive whole"


def test_a_map_that_is_left_while_it_arrives_says_nothing(tab, client):
    page, *_ = tab
    enter(page, client)
    give(page, film(), "answer")
    page.evaluate("""() => {
        const whole = window.fetch;
        window.fetch = async (path, how) => {
          window.fetch = whole;
          return {ok: true, json: () => new Promise((_, fails) => how.signal.addEventListener(
            "abort", () => fails(new DOMException("", "AbortError"))))};
        };
      }""")
    held = hold(page, "**/explain?*")
    page.get_by_label("Class").select_option("normal")
    page.get_by_label("Class").select_option("opacity")
    wait(lambda: page.wait_for_timeout(20) or held)
    assert "undefined" not in page.locator("#caption").inner_text()
    held[0].continue_()
    page.locator(f"body{DONE}").wait_for()


def test_a_map_that_is_left_does_not_end_the_drawing_of_the_next(tab, client):
    page, *_ = tab
    enter(page, client)
    give(page, film(), "answer")
    held = hold(page, "**/explain?*")
    for n, label in enumerate(("normal", "opacity"), 1):
        page.get_by_label("Class").select_option(label)
        wait(lambda n=n: page.wait_for_timeout(20) or len(held) == n)
    page.wait_for_timeout(200)
    assert page.get_by_text("Drawing what it looks at").is_visible()
    assert page.locator("body").get_attribute("data-map") == "drawing"
    held[1].continue_()
    page.locator(f"body{DONE}").wait_for()
    assert "opacity" in page.locator("#caption").inner_text()
    page.unroute("**/explain?*")
    held = hold(page, "**/explain?*")  # and another image ends it
    page.get_by_label("Class").select_option("normal")
    wait(lambda: page.wait_for_timeout(20) or held)
    give(page, b"x", "error")


def test_the_latency_is_said_as_it_was_measured(tab, client):
    page, *_ = tab
    told = client.get("/model")[2]
    latency = {"p50_ms": 4.25, "p95_ms": None, "machine": "a PC", "on_device": False}
    page.route("**/model", lambda route: route.fulfill(json=told | {"latency": latency}))
    enter(page, client)
    assert page.locator("#latency").inner_text() == "fp32: p50 4.3 ms, on a PC"
    latency |= {"p95_ms": 5.125, "on_device": True}
    page.locator("details").evaluate("e => e.open = true")
    words = "p50 4.25 ms, measured on a PC, which is not the profile's device"
    assert page.get_by_text(words, exact=True).is_visible()
    enter(page, client)
    here = "fp32: p50 4.3 ms, p95 5.1 ms, on this kind of device"
    assert page.locator("#latency").inner_text() == here
    page.locator("details").evaluate("e => e.open = true")
    assert page.get_by_text("p50 4.25 ms, p95 5.13 ms, measured on a PC", exact=True).is_visible()


def test_two_files_end_what_is_under_way(tab, client):
    page, *_ = tab
    enter(page, client)
    held = hold(page, "**/predict")
    choose(page, film())
    wait(lambda: page.wait_for_timeout(20) or held)
    page.evaluate(DROP, [list(film()), 2])
    page.locator("body[data-state=error]").wait_for()
    held[0].continue_()
    page.wait_for_timeout(500)
    assert page.locator("body").get_attribute("data-state") == "error"
    assert not page.locator("#answer").is_visible()


def test_loading_is_told(tab, client):
    page, *_ = tab
    enter(page, client)
    held = hold(page, "**/predict")
    choose(page, film())
    page.locator("body[data-state=loading]").wait_for()
    assert page.get_by_role("status").inner_text() == "The model looks at the image…"
    wait(lambda: page.wait_for_timeout(20) or held)
    held[0].continue_()
    page.locator(f"body[data-state=answer]{DONE}").wait_for()


def test_a_token_is_asked_for_and_kept_for_this_tab_alone(tab, model, tmp_path):
    page, *_ = tab
    with in_thread(model, tmp_path, token=TOKEN) as (client, _):
        enter(page, client, "locked")
        field = page.get_by_label("This server wants a token")
        assert field.evaluate("e => e === document.activeElement")
        assert not page.locator("#drop").is_visible()
        field.fill("another-token-that-is-wrong")
        page.keyboard.press("Enter")
        page.get_by_text("Wrong token").wait_for()
        field.fill("0123456789–abcdef")  # no header can have it
        page.keyboard.press("Enter")
        page.get_by_text("A token has plain letters, digits and signs alone").wait_for()
        assert page.locator("body").get_attribute("data-state") == "locked"
        field.fill(TOKEN)
        page.get_by_role("button", name="Continue").focus()
        page.keyboard.press("Enter")
        page.locator("body[data-state=empty] #drop").wait_for()
        assert page.evaluate("document.activeElement.id") == "file"
        give(page, film(), "answer")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.reload()
        page.locator("body[data-state=empty] #drop").wait_for()


def test_by_keyboard_alone(tab, client):
    page, *_ = tab
    chosen = []
    # Early: the browser has to hear that choosers are handed over before one opens.
    page.on("filechooser", lambda found: chosen.append(found))
    enter(page, client)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.keyboard.press("Enter")
    wait(lambda: page.wait_for_timeout(20) or chosen)
    chosen[0].set_files({"name": "x.png", "mimeType": "image/png", "buffer": film()})
    page.locator(f"body[data-state=answer]{DONE}").wait_for()
    page.locator("#opacity").wait_for()
    order = []
    page.locator("#opacity").focus()
    for _ in range(3):
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert order == ["opacity", "of", "file"]
    page.locator("#opacity").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#percent").inner_text() == "60 %"
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.get_by_text("sha256").last.is_visible()


def test_what_is_dropped_is_asked(tab, client):
    page, *_ = tab
    enter(page, client)
    page.evaluate(DROP, [list(film()), 1])
    page.locator(f"body[data-state=answer]{DONE}").wait_for()
    page.evaluate(DROP, [list(film()), 2])
    page.locator("body[data-state=error]").wait_for()
    assert "One image at a time, 2 were dropped" in page.get_by_role("alert").inner_text()


def test_every_control_has_a_name_and_every_text_enough_contrast(tab, client):
    page, *_ = tab
    enter(page, client)
    for data, state in ((noise(), "warning"), (film(), "answer"), (b"x", "error")):
        give(page, data, state)
        page.locator("details").evaluate("e => e.open = true")
        unnamed = page.evaluate("""
            [...document.querySelectorAll("input, select, button, img:not([hidden])")]
            .filter(e => !(e.labels && e.labels.length) && !e.textContent.trim() && !e.alt)
            .map(e => e.outerHTML)""")
        assert unnamed == []
        assert page.evaluate(CONTRAST) == []


# Texts whose contrast with what is behind them is below 4.5, as WCAG 2.1 AA asks.
CONTRAST = """(() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.5) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(".unseen, noscript, option")) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(e.outerHTML.slice(0, 90));
  }
  return poor;
})()"""
