"""report.html: made from answers with known scores, and opened in a real Chromium without a window."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.command_line import UserError
from util.results import report as reports
from util.results.answer import print_before_and_after, print_scores
from util.results.answer_files import Answer, read_file, write_answers
from util.results.report import report
from util.results.suited import choose
from util.vision import Budget

ROOT = Path(__file__).resolve().parent.parent
MEDIA = ROOT / "test_data" / "media"
MADE_FROM = {
    "model": "a/model",
    "data": "0123",
    "budget": {"max_pixels": 50176, "video_max_frames": 16},
    "max_new_tokens": 9,
}
HOSTILE = "</script><script>document.title = 'taken'</script><img src=http://evil.invalid/x onerror=\"document.title = 'taken'\"><!--"
LONG = "A sentence that goes on. " * 100
REFERENCE_BOX = "<|box_start|>(389,362),(610,656)<|box_end|>"


def image(name: str) -> dict:
    return {"type": "image", "image": str(MEDIA / name)}


VIDEO = {"type": "video", "video": str(MEDIA / "0006_motion_0.mp4")}

# kind, question, media, reference, before, after; by exact match:
TEN = [
    ("colour", "What colour?", [image("0000_colour_0.png")], "yellow", "blue", "yellow"),  # better
    ("colour", "What colour, again?", [image("0000_colour_0.png")], "yellow", "yellow", "yellow"),  # right
    ("motion", "Which way does it move?", [VIDEO], "right", "left", "right"),  # better
    ("box", "Where is the cross?", [image("0005_box_0.png")], REFERENCE_BOX, "(0,0),(100,100)", "(389,362),(600,650)"),
    ("odd", "Is this safe? " + HOSTILE, [], "no", HOSTILE, HOSTILE + "!"),  # wrong both times
    ("odd", "Say nothing.", [], "well", "well", ""),  # worse
    ("odd", "ما هو لون الدائرة؟", [], "红色\u2028😀", "blau", "红色\u2028😀"),  # better
    ("odd", "Tell a story.", [], "short", LONG, LONG),  # wrong both times
    ("odd", "Who is there?", [image("gone.png")], "nobody", "nobody", "somebody"),  # worse
    ("several", "Which one?", [image("0009_several_images_0.png"), image("0009_several_images_1.png")], "2", "2", "2"),
]
COUNTS = {"all": 10, "better": 3, "worse": 2, "same": 5, "wrong": 5, "right": 5}
WANTED_ROWS = {"all": list(range(10)), "better": [0, 2, 6], "worse": [5, 8], "same": [1, 3, 4, 7, 9],
               "wrong": [3, 4, 5, 7, 8], "right": [0, 1, 2, 6, 9]}  # fmt: skip


def answers_of(samples: list[tuple], column: int) -> list[Answer]:
    return [
        Answer(
            f"data.json, sample {i}", sample[0], sample[1], sample[2], sample[3], sample[4 + column], 1.5 - column, []
        )
        for i, sample in enumerate(samples)
    ]


def questions_of(answers: list[Answer]) -> list[tuple]:
    return [(answer.kind, answer.reference) for answer in answers]


def write_columns(folder: Path, samples: list[tuple], names: tuple = ("before", "after")) -> list[Path]:
    for column, name in enumerate(names):
        write_answers(folder / f"{name}.jsonl", MADE_FROM, answers_of(samples, column))
    return [folder / f"{name}.jsonl" for name in names]


def facts_of(page: Path) -> dict:
    """The JSON in a page, as another HTML parser finds it."""
    from html.parser import HTMLParser

    class Finder(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag, attributes):
            self.inside = ("id", "facts") in attributes

        def handle_data(self, data):
            self.text += data if self.inside else ""

    finder = Finder()
    finder.feed(page.read_text(encoding="utf-8"))
    return json.loads(finder.text)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What a run leaves, as far as the report reads it: 20 steps, and a last line that was cut off."""
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "model": "a/model",
        "learning_rate": 1e-5,
        "launched_by": ["secret-host", 1],
        "versions": {"torch": "2"},
    }
    (folder / "training_config.json").write_text(json.dumps(settings))
    lines = [{"step": step, "loss": 3 / step} for step in range(1, 21)] + [{"step": 20, "eval_loss": 0.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "lo')
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory, run) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report(write_columns(folder, TEN), folder / "report.html", ["exact_match", "box_iou"], str(run))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that logs every request."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(f"no {'chromedriver' if chromium else 'Chromium'} on PATH")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser):
    """A function (page, hash, width, height, dark) that opens a page anew and returns the browser."""

    def open_page(page: Path, fragment: str = "", width: int = 1280, height: int = 900, dark: bool = False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get("about:blank")
        browser.get_log("performance"), browser.get_log("browser")  # reading a log empties it
        browser.get(page.as_uri() + fragment)
        return browser

    return open_page


def counts(browser) -> dict[str, int]:
    """The numbers on the filter buttons."""
    script = "return [...document.querySelectorAll('#filters button')].map(b => [b.id.slice(5), b.querySelector('.count').textContent])"
    return {name: int(text.replace(",", "")) for name, text in browser.execute_script(script)}


def shown(browser) -> list[int]:
    """Numbers of the questions in the page."""
    return [int(n) for n in browser.execute_script("return [...document.querySelectorAll('.row')].map(r => r.dataset.row)")]  # fmt: skip


def click(browser, name: str) -> None:
    browser.execute_script(f"document.getElementById('show-{name}').click()")


def write(browser, text: str) -> None:
    script = "const s = document.getElementById('search'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    browser.execute_script(script, text)


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


# ---- ten questions with known scores --------------------------------------------------------------------------------


def test_filters_show_what_they_say(page, open_page):
    browser = open_page(page)
    assert counts(browser) == COUNTS
    for name, wanted in WANTED_ROWS.items():
        click(browser, name)
        assert shown(browser) == wanted, name
        assert counts(browser) == COUNTS, "the counts are of what the search and the kind leave"
    browser.execute_script(
        "const k = document.getElementById('kind'); k.value = 'odd'; k.dispatchEvent(new Event('change'))"
    )
    assert counts(browser) == {"all": 5, "better": 1, "worse": 2, "same": 2, "wrong": 4, "right": 1}
    assert shown(browser) == [6]


def test_another_metric_gives_other_counts(page, open_page):
    """By box IoU one question is measured at all."""
    browser = open_page(page, "#metric=box_iou")
    assert counts(browser) == {"all": 10, "better": 1, "worse": 0, "same": 9, "wrong": 1, "right": 0}
    click(browser, "better")
    assert shown(browser) == [3]
    iou = (600 - 389) * (650 - 362) / ((610 - 389) * (656 - 362))
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.mark [aria-hidden]')].map(m => m.textContent)"
    )
    assert marks == ["✗", f"{iou:.2f}"]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("what COLOUR", [0, 1]),
        ("blau", [6]),  # in the answer before
        ("红色", [6]),
        ("0006_motion", [2]),  # a file name
        ("onerror", [4]),
        ("colour again", [1]),  # words anywhere
        ("no such words", []),
    ],
)
def test_search(page, open_page, text, rows):
    browser = open_page(page)
    write(browser, text)
    assert shown(browser) == rows
    assert counts(browser)["all"] == len(rows)
    if not rows:
        browser.execute_script("document.querySelector('.nothing button').click()")
        assert shown(browser) == list(range(10))


def test_the_scores_are_those_of_the_terminal(page, open_page, capsys):
    columns = {name: answers_of(TEN, column) for column, name in enumerate(("before", "after"))}
    print_scores(columns, choose(["exact_match", "box_iou"], questions_of(columns["before"])))
    printed = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    told = {name: cells for name, *cells in printed if len(cells) == 2}
    browser = open_page(page)
    script = "return [...document.querySelectorAll('#scores tbody tr:not(.by)')].map(r => [...r.cells].map(c => [c.firstChild?.textContent, c.querySelector('small')?.textContent]))"
    found = {cells[0][0]: cells[1:] for cells in browser.execute_script(script)}
    assert set(found) == set(told) - {"before", "questions"}
    for name, cells in found.items():
        assert [text for text, _ in cells[:2]] == told[name], name
    assert [text for text, _ in found["exact match"][:3]] == ["40.0%", "50.0%", "+10.0"]
    spans = [span for _, span in found["exact match"][:2]]
    assert spans == ["16.8 to 68.7", "23.7 to 76.3"], "Wilson's intervals of 4 and 5 of 10, from tables"
    print_before_and_after(
        columns["before"], columns["after"], choose(["exact_match"], questions_of(columns["before"])), 0
    )
    said = capsys.readouterr().out
    for words in ("3 answers became better, 2 became worse, 5 stayed as they were",):
        assert words in said
        assert words in browser.execute_script("return document.querySelector('header').textContent")


def test_the_interval_of_a_difference_is_of_pairs():
    """Of 100 questions 30 became right and 10 wrong: +20 points, by the normal approximation +- 1.96 * 0.06."""
    before, after = [0.0] * 30 + [1.0] * 10 + [1.0] * 60, [1.0] * 30 + [0.0] * 10 + [1.0] * 60
    told = reports.difference(before, after)
    assert told["text"] == "+20.0"
    low, high = (float(word) for word in told["span"].split(" to "))
    error = 100 * ((0.4 - 0.2**2) / 100) ** 0.5
    assert low == pytest.approx(20 - 1.96 * error, abs=1.1)
    assert high == pytest.approx(20 + 1.96 * error, abs=1.1)
    told = reports.difference([0.0] * 9, [1.0] * 9)
    assert told["text"] == "+100.0"
    assert 50 < float(told["span"].split(" to ")[0]) < 80, "9 questions do not show that all become right"
    assert reports.difference([None], [None]) == {"value": None}


def test_text_is_never_markup(page, open_page):
    browser = open_page(page)
    texts = browser.execute_script(
        "return [...document.querySelectorAll('[data-row=\"4\"] .text')].map(t => t.textContent)"
    )
    assert texts == ["Is this safe? " + HOSTILE, "no", HOSTILE, HOSTILE + "!"]
    assert "taken" not in browser.title
    assert browser.execute_script("return document.querySelectorAll('img:not([src^=\"data:image/webp\"])').length") == 0
    # And if it were markup one day, the page's own rules would still not let it run.
    browser.execute_script(
        "document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=\"document.title = 'taken'\">`)"
    )
    time.sleep(0.3)
    assert "taken" not in browser.title


def test_nothing_is_requested(page, open_page):
    browser = open_page(page)
    click(browser, "better")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls, "the log works"
    assert {url.split(":")[0] for url in urls} <= {"file", "data"}
    assert [url for url in urls if url.startswith("file:")] == [page.as_uri()]
    assert browser.get_log("browser") == []


def test_pictures_boxes_and_what_is_not_there(page, open_page):
    browser = open_page(page)
    wait = "const done = arguments[0]; Promise.all([...document.images].map(i => i.decode())).then(() => done(null), e => done(String(e)))"
    assert browser.execute_async_script(wait) is None
    of = "return [...document.querySelectorAll('[data-row=\"{}\"] {}')]"
    sizes = "{}.map(i => [i.naturalWidth, i.naturalHeight])"
    with Image.open(MEDIA / "0000_colour_0.png") as original:
        assert browser.execute_script(sizes.format(of.format(0, "img"))) == [list(original.size)]
    assert len(browser.execute_script(of.format(9, "img"))) == 2
    lost = browser.execute_script("return document.querySelector('[data-row=\"8\"] .lost').textContent")
    assert lost.startswith("image not readable: ")
    assert "gone.png" in lost
    places = browser.execute_script(of.format(3, "rect[data-of]") + ".map(r => [r.dataset.of, ...['x', 'y', 'width', 'height'].map(n => +r.getAttribute(n))])")  # fmt: skip
    assert places == [["reference", 389, 362, 221, 294], ["before", 0, 0, 100, 100], ["after", 389, 362, 211, 288]]
    legend = browser.execute_script(of.format(3, ".legend > span") + ".map(s => s.textContent)")
    assert legend == ["reference", "before", "after"]
    drawn = "const r = document.querySelector('[data-row=\"3\"] rect[data-of=reference]').getBoundingClientRect(), i = document.querySelector('[data-row=\"3\"] img').getBoundingClientRect(); return [(r.x - i.x) / i.width, (r.y - i.y) / i.height, r.width / i.width, r.height / i.height]"
    assert browser.execute_script(drawn) == pytest.approx([0.389, 0.362, 0.221, 0.294], abs=0.01)
    browser.execute_script("document.querySelector('[data-row=\"3\"] .picture').click()")
    assert browser.execute_script("return document.querySelectorAll('dialog[open] rect[data-of]').length") == 3
    press(browser, "\ue00c")
    assert browser.execute_script("return document.querySelector('dialog[open]')") is None


def test_an_image_of_several_questions_is_stored_once(page):
    facts = facts_of(page)
    assert facts["rows"][0]["media"] == facts["rows"][1]["media"]
    assert len(facts["pictures"]) == 6  # one image twice, one video, one with a box, two of one question, one lost
    text = page.read_text(encoding="utf-8")
    assert sum(len(block.split("\n")) for block in re.findall(r'class="pictures">(.*?)</script>', text, re.DOTALL)) == 6


def test_long_and_empty_answers(page, open_page):
    browser = open_page(page)
    assert browser.execute_script("return document.querySelector('[data-row=\"5\"] .empty').textContent") == "(empty)"
    height = "return document.querySelectorAll('[data-row=\"7\"] .text')[2].clientHeight"
    closed = browser.execute_script(height)
    browser.execute_script("document.querySelector('[data-row=\"7\"] .more').click()")
    assert closed < 150 < browser.execute_script(height)


def test_the_address_keeps_what_is_shown(page, open_page):
    browser = open_page(page)
    click(browser, "worse")
    write(browser, "n o")
    address = browser.current_url
    assert shown(browser) == [5, 8]
    fragment = address.partition("#")[2]
    assert "show=worse" in fragment
    assert shown(open_page(page, f"#{fragment}")) == [5, 8]
    assert browser.execute_script("return document.getElementById('search').value") == "n o"
    assert shown(open_page(page, "#show=nonsense&sort=nonsense&metric=nonsense&row=99999")) == list(range(10))


def test_sorted_by_change(page, open_page):
    assert shown(open_page(page, "#sort=gain"))[:3] == [0, 2, 6]
    assert shown(open_page(page, "#sort=drop"))[:2] == [5, 8]
    assert shown(open_page(page, "#sort=longest"))[0] == 7
    assert shown(open_page(page, "#sort=shortest"))[0] == 5


def test_keys(page, open_page):
    browser = open_page(page, "#show=better")
    active = "return document.activeElement.dataset.row ?? document.activeElement.id"
    for key, wanted in (
        ("j", "0"),
        ("j", "2"),
        ("\ue015", "6"),
        ("j", "6"),
        ("k", "2"),
        ("\ue013", "0"),
        ("/", "search"),
    ):
        press(browser, key)
        assert browser.execute_script(active) == wanted, key
    press(browser, "j")
    assert browser.execute_script("return document.getElementById('search').value") == "j", "a letter is a letter there"


def test_the_loss_curve_and_the_settings(page, open_page):
    curve = facts_of(page)["run"]["curve"]
    assert curve["training"] == [[step, round(3 / step, 5)] for step in range(1, 21)]
    assert curve["heldOut"] == [[20, 0.25]]
    browser = open_page(page)
    assert len(browser.execute_script("return [...document.querySelectorAll('#curve path')]")) == 2
    text = browser.execute_script("return document.getElementById('made').textContent")
    assert "learning_rate1e-05" in text or "learning_rate0.00001" in text
    assert "secret-host" not in page.read_text(encoding="utf-8"), "which machine it was is nobody's business"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 640), (820, 1180), (1280, 900)])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_every_screen(page, open_page, tmp_path, width, height, dark):
    """Nothing to scroll sideways; text stands out from what is behind it (WCAG 2.1: 4.5 to 1)."""
    browser = open_page(page, width=width, height=height, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    script = """const luminance = text => { const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
    return [...document.querySelectorAll('main *')].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && !(e instanceof SVGElement) && e.getClientRects().length).map(e => { const [a, b] = [luminance(getComputedStyle(e).color), luminance(behind(e))]; return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.className, e.textContent.slice(0, 30)]; }).filter(([ratio]) => ratio < 4.5)"""
    assert browser.execute_script(script) == []
    unnamed = "return [...document.querySelectorAll('button, input, select')].filter(e => e.getClientRects().length && !e.textContent.trim() && !e.ariaLabel && !e.labels?.length).map(e => e.outerHTML)"
    assert browser.execute_script(unnamed) == []
    file = tmp_path / f"{width}x{height}.png"
    browser.save_screenshot(str(file))
    with Image.open(file) as picture:
        assert picture.size == (width, height)
        assert len(picture.convert("RGB").resize((width // 4, height // 4)).getcolors(10**6)) > 50, f"{file} is empty"


def test_three_columns(tmp_path, open_page):
    samples = [("a", "One?", [], "1", "0", "1", "1"), ("a", "Two?", [], "2", "2", "0", "2"), ("a", "3?", [], "3", "0", "0", "3")]  # fmt: skip
    files = write_columns(tmp_path, samples, ("before", "prompted", "after"))
    report(files, tmp_path / "report.html", ["exact_match"], None)
    browser = open_page(tmp_path / "report.html")
    assert counts(browser) == {"all": 3, "better": 2, "worse": 0, "same": 1, "wrong": 0, "right": 3}
    browser.execute_script(
        "const a = document.getElementById('against'); a.value = 'prompted'; a.dispatchEvent(new Event('change'))"
    )
    click(browser, "better")
    assert shown(browser) == [1, 2]
    assert "against=prompted" in browser.current_url
    assert not browser.execute_script("return document.getElementById('curve').offsetParent"), "no run is known"
    assert browser.execute_script("return [...document.querySelectorAll('#scores thead th')].map(h => h.textContent)") == [
        "score", "before", "prompted", "after", "change from before", "change from prompted", "0 to 100 %"]  # fmt: skip


def test_one_column(tmp_path, open_page):
    report(write_columns(tmp_path, TEN)[1:], tmp_path / "report.html", ["exact_match"], None)
    assert counts(open_page(tmp_path / "report.html")) == {"all": 10, "wrong": 5, "right": 5}


# ---- many questions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory, picture) -> Path:
    """10,000 questions about 250 images; every seventh answer became better, every eleventh of the others worse."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(250):
        Image.fromarray(picture(120, 160, seed=number)).save(folder / f"{number}.png")
    samples = []
    for i in range(10_000):
        asked = f"Question {i}: what does the chart of region {i % 97} say about the year {1900 + i % 120}?"
        right, better, worse = f"{i * 7919 % 1000}.{i % 10}", i % 7 == 0, i % 7 != 0 and i % 11 == 0
        samples.append((f"kind {i % 5}", asked, [{"type": "image", "image": str(folder / f"{i % 250}.png")}], right,
                        "nothing" if better else right, "nothing" if worse else right))  # fmt: skip
    report(write_columns(folder, samples), folder / "report.html", ["exact_match"], None)
    return folder / "report.html"


def test_ten_thousand_questions(large, open_page):
    """It loads, filters at once, and holds but a few questions in the page wherever one scrolls."""
    browser = open_page(large)
    better = len([i for i in range(10_000) if i % 7 == 0])
    worse = len([i for i in range(10_000) if i % 7 and i % 11 == 0])
    told = counts(browser)
    assert (told["all"], told["better"], told["worse"], told["same"]) == (
        10_000,
        better,
        worse,
        10_000 - better - worse,
    )
    nodes = "return document.querySelectorAll('*').length"
    for place in (0, 0.3, 0.7, 1):
        browser.execute_script("scrollTo(0, document.documentElement.scrollHeight * arguments[0])", place)
        time.sleep(0.3)
        assert browser.execute_script(nodes) < 5000
        assert shown(browser)
    assert shown(browser)[-1] == 9999, "the end of the list is its last question"
    timed = """const times = []; for (let i = 0; i < 5; i++) for (const does of arguments[0]) {
        const begin = performance.now(); eval(does); document.body.offsetHeight; times.push(performance.now() - begin); }
        return arguments[0].map((_, i) => Math.min(...times.filter((_, n) => n % arguments[0].length === i)))"""
    fast = browser.execute_script(timed, [
        "document.getElementById('show-worse').click()", "document.getElementById('show-all').click()",
        "document.getElementById('search').value = 'region 13 1950'; document.getElementById('search').dispatchEvent(new Event('input'))",
        "document.getElementById('search').value = ''; document.getElementById('search').dispatchEvent(new Event('input'))",
    ])  # fmt: skip
    assert max(fast) < 300, f"milliseconds: {fast}"
    write(browser, "question 7777:")
    assert shown(browser) == [7777]
    assert large.stat().st_size < reports.MOST_BYTES


def test_more_pictures_are_smaller_ones(tmp_path, monkeypatch, open_page):
    """Noise cannot be compressed: 30 pictures of it are stored small, the page stays below its bound and says so."""
    monkeypatch.setattr(reports, "MOST_BYTES", 300_000)
    noise = np.random.default_rng(0)
    samples = []
    for number in range(30):
        Image.fromarray(noise.integers(0, 256, (480, 640, 3), np.uint8)).save(tmp_path / f"{number}.png")
        samples.append(("noise", "What?", [{"type": "image", "image": str(tmp_path / f"{number}.png")}], "a", "a", "a"))
    report(write_columns(tmp_path, samples), tmp_path / "report.html", ["exact_match"], None)
    assert (tmp_path / "report.html").stat().st_size < 300_000 + len(reports.TEMPLATE.read_bytes())
    facts = facts_of(tmp_path / "report.html")
    assert {(p["width"], p["height"]) for p in facts["pictures"]} <= {(160, 120), (128, 96), (96, 72)}
    note = open_page(tmp_path / "report.html").execute_script("return document.getElementById('note').textContent")
    assert "30 of 30 pictures are stored smaller than 640 pixels" in note


# ---- pictures and files ---------------------------------------------------------------------------------------------


def opened(picture: dict) -> Image.Image:
    return Image.open(io.BytesIO(picture["pixels"])).convert("RGB")


def test_frames_are_those_that_the_model_saw(decode_all):
    """Of a budget of 4 frames qwen-vl-utils takes the first, the last, and two between."""
    frames = decode_all(VIDEO["video"])
    drawn = reports.draw_picture(VIDEO, Budget(video_max_frames=4), 10**6)
    assert drawn["caption"].startswith("all 4 frames that the model saw, 0.0 to ")
    seen = np.linspace(0, len(frames) - 1, 4).round().astype(int)
    sheet = opened(drawn)
    width, height = frames.shape[2], frames.shape[1]
    scale = min(1, 320 / max(width, height))
    width, height = round(width * scale), round(height * scale)
    across = (sheet.width + 2) // (width + 2)
    for number, index in enumerate(seen):
        x, y = number % across * (width + 2), number // across * (height + 2)
        cell = np.asarray(sheet.crop((x, y, x + width, y + height)), dtype=float)
        wanted = np.asarray(Image.fromarray(frames[index]).resize((width, height), Image.BICUBIC), dtype=float)
        assert np.abs(cell - wanted).mean() < 6, f"frame {number} is not frame {index} of the file"


def test_pictures_are_upright_and_on_white():
    with Image.open(MEDIA / "0016_rotated_0.jpg") as stored:
        assert stored.getexif()[0x0112] in (6, 8)
        assert opened(reports.draw_picture(image("0016_rotated_0.jpg"), Budget(), 10**6)).size == stored.size[::-1]
    drawn = opened(reports.draw_picture(image("0017_transparent_0.png"), Budget(), 10**6))
    with Image.open(MEDIA / "0017_transparent_0.png") as stored:
        x, y = np.argwhere(np.asarray(stored.convert("RGBA"))[..., 3].T == 0)[0]
    assert min(drawn.getpixel((int(x), int(y)))) > 240


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image", "image": str(ROOT / "README.md")},
        {"type": "video", "video": str(MEDIA / "0000_gone.mp4")},
        {"type": "video", "video": []},
        {"type": "image", "image": "data:image/png;base64,AAAA"},
        {"type": "video", "video": VIDEO["video"], "video_start": 999},
    ],
)
def test_what_cannot_be_read_is_said_in_its_place(item):
    drawn = reports.draw_picture(item, Budget(), 10**6)
    assert drawn["type"] == item["type"]
    assert len(drawn["problem"]) > 5


def test_an_image_in_a_data_uri(tmp_path):
    import base64

    uri = "data:image/png;base64," + base64.b64encode((MEDIA / "0000_colour_0.png").read_bytes()).decode()
    samples = [("a", "What?", [{"type": "image", "image": uri}], "1", "1", "1")]
    report(write_columns(tmp_path, samples), tmp_path / "report.html", ["exact_match"], None)
    facts = facts_of(tmp_path / "report.html")
    assert "problem" not in facts["pictures"][0]
    assert len(facts["rows"][0]["names"][0]) < 200


def test_answers_with_every_line_end_are_read_back(tmp_path):
    samples = [("a", "What?\u2028\x85\r\n\x0c", [], "1\x1c", "2\u2029", "3\x0b")]
    for column, file in enumerate(write_columns(tmp_path, samples)):
        assert read_file(file) == (MADE_FROM, answers_of(samples, column))


def test_wrong_files_are_one_message(tmp_path):
    before, after = write_columns(tmp_path, TEN)
    (tmp_path / "other.jsonl").write_text("{}\n")
    write_answers(tmp_path / "fewer.jsonl", MADE_FROM, answers_of(TEN, 0)[:9])
    write_answers(tmp_path / "another.jsonl", MADE_FROM, answers_of(TEN[1:] + TEN[:1], 0))
    old = json.loads(before.read_text().splitlines()[1])
    del old["earlier"]
    (tmp_path / "old.jsonl").write_text(before.read_text().splitlines()[0] + "\n" + json.dumps(old) + "\n")
    for name, words in (("gone", "no such file of answers"), ("other", "no answers that this version wrote"),
                        ("fewer", "before has 10 answers, fewer 9"), ("another", "answer 1 of before is to data.json, sample 1 .'yellow'., that of another to data.json, sample 1 .'right"),
                        ("old", "answer again"), ("before", "two files are named before")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            report([before, tmp_path / f"{name}.jsonl"], tmp_path / "report.html", ["exact_match"], None)
    with pytest.raises(UserError, match="it has no training_config"):
        report([before, after], tmp_path / "report.html", None, str(tmp_path))
    assert not (tmp_path / "report.html").exists()


def test_the_command(tmp_path, run):
    files = [str(file) for file in write_columns(tmp_path, TEN)]
    words = [sys.executable, "-m", "util", "report", *files, "--run", str(run), "--out", str(tmp_path / "my.html")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"report: {tmp_path / 'my.html'} (")
