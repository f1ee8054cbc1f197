"""The page of costs: as Python's parser and a browser see it, and the contrast of its colors."""

import math
import re
import shutil

import pytest
from conftest import Page

from gpt_lightning.commands.cost_page import cost_page
from gpt_lightning.commands.cost_views import COLORS, LEVELS, Cell

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x1b\n"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


def cells_of(text):
    """Costs rise from character to character; the alternatives are hostile too."""
    likeliest = [("</script>", 0.5), ("space", 0.25), ("\u2028", 0.1)]
    return [Cell(c, i * math.log(2), i > 0, likeliest if i else []) for i, c in enumerate(text)]


def test_the_page_refers_to_nothing_outside_itself():
    html = cost_page("text.txt", "loss 1", cells_of("to be"))
    page = Page(html)
    assert not {"src", "href", "srcset", "action", "data"} & {name for name, _ in page.attributes}
    assert not {"script", "link", "img", "iframe", "base", "object"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", html)
    policy = next(v for _, v in page.attributes if v and "default-src" in v)
    assert "default-src 'none'" in policy


def test_a_hostile_text_is_text():
    page = Page(cost_page(HOSTILE, HOSTILE, cells_of(HOSTILE)))
    assert not {"script", "img"} & set(page.tags)
    assert page.texts["h1"] == [HOSTILE] and page.texts["pre"] == [HOSTILE]
    shown = "".join(page.texts["span"][len(LEVELS) :])
    assert shown == HOSTILE.replace("\x1b", "\\x1b").replace("\n", "↵\n")
    details = [value for name, value in page.attributes if name == "data-cost"]
    assert len(details) == len(HOSTILE) and details[0] == "not predicted"
    assert details[3].startswith("12.50%, 2.079 nats, 3.000 bits\n") and "</script>" in details[3]


def luminance(color):
    """Relative luminance, as WCAG defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_black_text_is_readable_on_every_color():
    for color in COLORS.values():
        assert (luminance(color) + 0.05) / 0.05 >= 4.5  # WCAG AA


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 360])
def test_a_browser_shows_the_details_of_a_character(width, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    path = tmp_path / "page.html"
    text = "to be or not to be, that is the question:\nwhether 'tis nobler\n"
    path.write_text(cost_page("text.txt", "loss  1", cells_of(text)), encoding="utf-8")
    requests, errors = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        view = {"width": width, "height": 700}
        page = browser.new_page(viewport=view, has_touch=True)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        spans = page.locator("#text span")
        assert "".join(spans.all_text_contents()) == text.replace("\n", "↵\n")

        def shown(i):
            """The details that the style sheet adds to a span; "none" if it adds none."""
            script = "span => getComputedStyle(span, '::after').content"
            return spans.nth(i).evaluate(script)

        spans.nth(3).hover()
        assert shown(3).startswith('"12.50%, 2.079 nats, 3.000 bits') and shown(4) == "none"
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert shown(1).startswith('"50.00%')
        spans.nth(4).tap()
        assert shown(4).startswith('"6.25%')
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert requests == [path.as_uri()] and errors == []
