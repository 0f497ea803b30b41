"""The explorer in a real browser: no errors in its console, the keyboard moves what it should, its
pages fit 400 and 1280 pixels, and what is saved opens without a network.
"""

import re
import shutil
import threading
from pathlib import Path

import pytest

server = pytest.importorskip(
    "ebwm_scale.exploring.server", reason="the extra explore is not installed"
)
uvicorn = pytest.importorskip("uvicorn", reason="the package uvicorn is not installed")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the package playwright is not installed"
)

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]
TOKEN = server.new_token()
TIMEOUT_MS = 60_000


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # Chromium's own sandbox needs a user who is not root, as containers have.
        opened = started.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"], timeout=TIMEOUT_MS
        )
        yield opened
        opened.close()


@pytest.fixture
def address(opened):
    """address("text", ...): where a command line's explorer is served."""
    running = []

    def serve(*arguments):
        listening = server.listen(0)
        app = server.application(opened(*arguments), TOKEN)
        own = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=own.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((own, thread, listening))
        return f"http://127.0.0.1:{listening.getsockname()[1]}/{TOKEN}/"

    yield serve
    for own, thread, listening in running:
        own.should_exit = True
        thread.join(20)
        listening.close()


@pytest.fixture
def page(browser):
    """A page that fails its test if its console shows anything, or if it asks another host."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(TIMEOUT_MS)
    opened = context.new_page()
    problems = []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: _check_host(request.url, problems))
    opened.expected = []
    yield opened
    context.close()
    for said in opened.expected:
        problems = [problem for problem in problems if said not in problem]
    assert problems == []


def _check_host(url, problems):
    if not url.startswith(("http://127.0.0.1:", "file://", "data:")):
        problems.append(url)


def table_of(page):
    return page.locator("[data-position]:visible tbody").first.inner_text()


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_prompt_is_typed_and_its_steps_looked_at(page, address, tmp_path):
    page.goto(address("text", "--against", "plain", "--max-new", "3"))
    page.get_by_label("Prompt", exact=True).fill("abc <b>")
    page.get_by_role("button", name="Think").click()
    page.wait_for_selector("[data-position]:visible")
    assert page.locator("[data-position]:visible").count() == 1
    before = table_of(page)

    # The slider by keyboard: another state, told in words.
    slider = page.locator("[data-position]:visible input[type=range]").first
    said = page.locator("[data-position]:visible output").first
    assert "after step 3" in said.inner_text()
    slider.focus()
    page.keyboard.press("Home")
    assert "before the first step" in said.inner_text() and table_of(page) != before
    here = page.locator("[data-position]:visible .plane .mark.now")
    assert here.get_attribute("data-mark") == "0"  # on the path in the plane of energies
    page.keyboard.press("End")
    assert "one more than asked for" in said.inner_text()
    page.keyboard.press("ArrowLeft")
    assert table_of(page) == before
    assert slider.get_attribute("aria-valuetext") == said.inner_text()

    # The animation ends by itself.
    page.locator("[data-position]:visible .play").first.click()
    playwright.expect(said).to_contain_text("one more than asked for", timeout=TIMEOUT_MS)

    # Positions by keyboard.
    shown = page.locator("[data-position]:visible")
    here = int(shown.get_attribute("data-position"))
    page.locator("input[name=position]:checked").focus()
    page.keyboard.press("ArrowLeft")
    assert int(shown.get_attribute("data-position")) == here - 1

    # Another prompt, another table; hostile text stays text.
    page.get_by_label("Prompt", exact=True).fill("<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Think").click()
    cut = page.get_by_text("The prompt of 28 tokens is cut to its last 16")
    playwright.expect(cut).to_be_visible(timeout=TIMEOUT_MS)
    page.wait_for_load_state()
    assert page.locator("img").count() == 0 and table_of(page) != before
    assert page.get_by_label("Prompt", exact=True).input_value() == "<img src=x onerror=alert(1)>"

    page.set_viewport_size({"width": 400, "height": 900})
    assert fits(page)

    # What is saved opens from a disk, without a network.
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save this page").click()
    saved = tmp_path / "saved.html"
    waiting.value.save_as(saved)
    now = table_of(page)
    page.context.set_offline(True)
    page.goto(saved.as_uri())
    assert table_of(page) == now and page.locator("form").count() == 0
    page.locator("[data-position]:visible input[type=range]").first.focus()
    page.keyboard.press("Home")
    assert table_of(page) != now


OTHERS = {
    "text": ("--against", "plain", "--prompt", "abc " * 9),
    "mazes": ("--against", "plain_mazes"),
    "hops": (),
    "world": ("--against", "plain_world", "--num-starts", "2", "--budget", "6"),
    "video": ("--against", "plain_video"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_pages_fit_small_and_large_screens_and_both_colours(name, page, opened, tmp_path):
    path = Path(tmp_path / "page.html")
    path.write_text(opened(name, *OTHERS[name]).page(served=False))
    page.goto(path.as_uri())
    grounds = set()
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            assert fits(page)
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    unnamed = "[...document.querySelectorAll('svg[role=img]')].filter((e) => !e.ariaLabel).length"
    assert page.evaluate(unnamed) == 0
    unlabelled = "[...document.images].filter((e) => !e.hasAttribute('alt')).length"
    assert page.evaluate(unlabelled) == 0
    broken = "[...document.images].filter((e) => e.complete && !e.naturalWidth).length"
    assert page.evaluate(broken) == 0


def test_instances_of_a_task_are_stepped_through(page, address):
    page.goto(address("mazes", "--instances", "4"))
    first = page.locator("article h3").inner_text()
    page.get_by_role("button", name="Next instance").click()
    heading = page.get_by_role("heading", name="Instance 2 of 4")
    playwright.expect(heading).to_be_visible(timeout=TIMEOUT_MS)
    assert page.locator("article h3").inner_text() != first
    assert page.locator("figure.state").count() > 4
    assert re.search(r"energy −?\d", page.locator("article").inner_text())
    page.get_by_label("steps, 1 to 64").fill("2")
    page.keyboard.press("Enter")
    pictures = page.locator("figure.state")
    playwright.expect(pictures).to_have_count(5, timeout=TIMEOUT_MS)  # 1, 2 and 3 steps
    assert "Instance 2 of 4" in page.locator("main").inner_text()

    # The states one at a time, by keyboard, and another shade.
    slider = page.get_by_label("moment", exact=True)
    large = page.locator(".large.state:visible use")
    slider.focus()
    page.keyboard.press("Home")
    assert large.get_attribute("href") == "#panel0"
    page.keyboard.press("ArrowRight")
    assert large.get_attribute("href") == "#panel1" and large.count() == 1
    shade = page.locator("figure.state .shade.energy").first
    assert not shade.is_visible()
    page.get_by_label("its own energy").check()
    assert shade.is_visible() and not page.locator("figure.state .shade.chance").first.is_visible()


def shown_images(root):
    """The pictures of a reel that can be seen."""
    return [image.get_attribute("src") for image in root.locator("img:visible").all()]


def test_a_world_is_looked_at_acted_in_and_planned(page, address, tmp_path):
    page.goto(address("world", "--against", "plain_world", "--budget", "6"))
    reel = page.locator(".start .reel").first
    slider = reel.locator("input[type=range]")
    said = reel.locator("output")
    assert "after step 3, energy" in said.inner_text()
    before = shown_images(reel)
    slider.focus()
    page.keyboard.press("Home")
    assert "before the first step, energy" in said.inner_text()
    first = shown_images(reel)
    assert first != before and len(first) == len(before) == 3  # candidate, difference, truth
    assert first[2] == before[2]

    # An action is chosen by keyboard, and its film moves.
    panel = page.locator("[data-panel=action]:visible")
    assert panel.count() == 1
    heading = panel.locator("h4").inner_text()
    page.locator("input[name=shown_action]:checked").focus()
    page.keyboard.press("ArrowLeft")
    assert panel.count() == 1 and panel.locator("h4").inner_text() != heading
    film = panel.locator("input[type=range]")
    still = shown_images(panel)
    film.focus()
    page.keyboard.press("End")
    assert shown_images(panel) != still

    # A plan played as a film: it ends by itself.
    plan = page.locator(".reel").last
    plan.locator(".play").click()
    last = plan.locator("input[type=range]").get_attribute("max")
    playwright.expect(plan.locator("input[type=range]")).to_have_value(last, timeout=TIMEOUT_MS)
    assert f"{last} ahead" in plan.locator("output").inner_text()

    # Another action, typed, and the next episode.
    page.get_by_label("an action of your own").fill("1 0.5")
    page.get_by_role("button", name="Next episode").click()
    playwright.expect(page.get_by_text("episode 1 of 0 to")).to_be_visible(timeout=TIMEOUT_MS)
    assert "yours: 1, 0.5" in page.locator(".pad").inner_text()
    page.set_viewport_size({"width": 400, "height": 900})
    assert fits(page)

    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save this page").click()
    saved = tmp_path / "saved.html"
    waiting.value.save_as(saved)
    page.context.set_offline(True)
    page.goto(saved.as_uri())
    assert page.locator("form").count() == 0
    reel = page.locator(".start .reel").first
    now = shown_images(reel)
    reel.locator("input[type=range]").focus()
    page.keyboard.press("Home")
    assert shown_images(reel) != now


def test_hostile_fields_of_a_world_stay_text(page, address):
    page.goto(address("world", "--budget", "6"))
    page.get_by_label("an action of your own").fill("<img src=x onerror=alert(1)>")
    with page.expect_response(lambda response: response.request.method == "POST") as waiting:
        page.get_by_role("button", name="Think").click()
    assert waiting.value.status == 400
    alert = page.get_by_role("alert")
    playwright.expect(alert).to_contain_text("the action is", timeout=TIMEOUT_MS)
    assert page.locator("img[src=x]").count() == 0
    page.expected.append("400 (Bad Request)")  # which Chromium tells its console
