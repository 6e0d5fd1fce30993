"""The report: what the page holds, that nothing in a record is markup, and its views in a browser."""

import json
from html.parser import HTMLParser

import pytest

from labkit import record, report

EVIL = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'><!--<script>"


def make(root, notebook="02_lora", losses=(4.0, 2.0), verdict="holds", text="the mill", **given):
    run = record.start(notebook, {"rank": 8, "seed": 0} | given, root=root)
    for step, loss in enumerate(losses):
        run.log({"loss": loss}, step)
    run.metric(accuracy=losses[-1] / 4)
    run.claim(10, f"r = 8 {text}", "sweep", 0.95, verdict)
    run.table("samples", [{"prompt": "Where?", "after": text}])
    run.finish()
    return run


class Page(HTMLParser):
    """The tags of a page, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.lasttag == "script":
            self.scripts[-1] += data


def read_page(page):
    return json.loads(Page(page.read_text("utf-8")).scripts[0])["runs"]


def test_the_page_holds_the_records_with_thin_curves_and_where_files_are(tmp_path):
    run = make(tmp_path, losses=[2 / (step + 1) for step in range(1000)])
    (run.folder / "notebook.ipynb").write_text("{}")
    make(tmp_path, "08_rlhf", losses=[float("nan"), 1.0])
    page = report.write(tmp_path, tmp_path / "pages" / "all.html")
    (shown,) = [r for r in read_page(page) if r["notebook"] == "02_lora"]
    (steps,), (number, values) = shown["steps"], shown["curves"]["loss"]
    assert number == 0 and len(steps) == len(values) == report.POINTS and steps[-1] == 999
    assert values[0] == pytest.approx(sum(2 / n for n in range(1, 6)) / 5, rel=1e-4)
    assert (page.parent / shown["place"]).resolve() == run.folder
    assert shown["files"] == ["notebook.ipynb", "record.json"] and "history" not in shown
    kept = json.loads((run.folder / "record.json").read_text("utf-8"))
    for part in ("parameters", "metrics", "claims", "tables", "hardware", "versions", "status"):
        assert shown[part] == kept[part]


def test_what_a_record_says_is_never_markup(tmp_path):
    make(tmp_path, text=EVIL, data=EVIL)
    text = report.write(tmp_path).read_text("utf-8")
    page = Page(text)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert json.loads(page.scripts[0])["runs"][0]["parameters"]["data"] == EVIL
    code = [file for file in report.SCRIPTS if not file.startswith("uPlot")]
    sources = "".join((report.HERE / file).read_text("utf-8") for file in code)
    ways = ("innerHTML", "outerHTML", "insertAdjacent", "eval(")
    assert not [way for way in ways if way in sources]
    assert "http://" not in text and 'src="' not in text  # needs nothing from elsewhere


def test_a_place_without_runs_is_refused_and_stays_as_it_was(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="runs"):
            report.write(place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [0, 1, 3, 200, 201, 1000])
def test_thin_keeps_the_mean_and_the_last_step(count):
    steps, values = report.thin([(step, float(step)) for step in range(count)])
    assert len(steps) == len(values) == min(count, 200)
    assert not count or steps[-1] == count - 1 and steps == sorted(steps)
    assert count != 1000 or sum(values) / len(values) == pytest.approx(499.5, rel=1e-3)


@pytest.fixture
def show(browser, tmp_path):
    """Opens the report of `tmp_path`; a script's error fails the test."""
    errors, contexts = [], []

    def open_page(hash="", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(error))
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.goto(f"{report.write(tmp_path).as_uri()}{hash}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def rows(page):
    return page.locator("tbody tr").all_inner_texts()


def test_runs_are_filtered_sorted_grouped_and_kept_in_the_address(tmp_path, show):
    for seed, accuracy in enumerate([1.0, 3.0]):
        make(tmp_path, losses=(4.0, accuracy), seed=seed)
    make(tmp_path, losses=(4.0, 1.0), rank=16)
    make(tmp_path, "09_dpo", verdict="does not hold here")
    page = show()
    assert len(rows(page)) == 4
    page.fill("#search", "lora rank<=8")
    assert len(rows(page)) == 2 and "q=lora" in page.url
    page.fill("#search", "lora")
    page.get_by_role("button", name="accuracy").click()
    assert ["0.25", "0.25", "0.75"] == [row.split("\t")[-1] for row in rows(page)]
    page.get_by_role("button", name="accuracy").click()
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("accuracy")
    page.get_by_label("Group over seeds").check()
    assert len(rows(page)) == 2 and "0.5 ± 0.35" in rows(page)[0]
    again = show(page.url[page.url.index("#") :])
    assert rows(again) == rows(page)
    page.get_by_text("Columns").click()
    page.get_by_label("commit").check()
    assert page.get_by_role("button", name="commit").count() == 1


def test_what_differs_between_runs_comes_first_and_claims_have_sign_and_colour(tmp_path, show):
    first = make(tmp_path, text="the inn")
    second = make(tmp_path, rank=16, losses=(4.0, 1.0), verdict="does not hold here")
    page = show(f"#runs?runs={first.folder.name}")
    page.get_by_label(f"compare 02_lora {second.folder.name}").check()
    page.get_by_text("Compare 2 runs").click()
    text = page.locator("main").inner_text()
    assert "rank\t8\t16" in text and "1 equal parameter" in text and "-0.25 (-50 %)" in text
    assert "the inn\tthe mill" in text  # the texts stand side by side
    page.locator(".plot canvas").first.wait_for()
    assert page.locator(".plot").first.get_attribute("aria-label").count("step 0") == 2
    page.get_by_role("link", name="Claims").click()
    assert "✘ does not hold here" in page.locator(".claims").inner_text()
    page.get_by_label("Show").select_option("1")
    signs = page.locator(".matrix td:nth-child(n + 3) .verdict")
    colours = signs.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert len(set(colours)) == 2
    page.locator(".matrix a").first.click()
    assert second.folder.name in page.locator("main").inner_text()
    page.get_by_role("link", name="record.json").click()
    assert page.url == (second.folder / "record.json").as_uri()


def test_a_text_that_is_a_script_does_nothing_in_any_view(tmp_path, show):
    run = make(tmp_path, text=EVIL, data=EVIL)
    name = run.folder.name
    page = show()
    for view in ("runs", f"compare?runs={name}", "claims", "claims?all=1", f"run?id={name}"):
        page.goto(f"{page.url.split('#')[0]}#{view}")
        page.wait_for_timeout(50)
        assert "<img src=x" in page.locator("main").inner_text() or view.startswith("runs")
    assert page.evaluate("window.hit") is None and page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_only_tables_and_the_page_is_light_or_dark(tmp_path, show, scheme):
    run = make(tmp_path, learning_rate=0.001, a_parameter_of_a_rather_long_name="x" * 100)
    for view in ("runs", f"compare?runs={run.folder.name}", "claims", f"run?id={run.folder.name}"):
        page = show(f"#{view}", viewport={"width": 390, "height": 800}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_five_hundred_runs_answer_at_once(tmp_path, show):
    template = json.loads((make(tmp_path).folder / "record.json").read_text("utf-8"))
    for number in range(500):
        folder = tmp_path / "runs" / "02_lora" / f"20260101-000001-{number:06x}"
        folder.mkdir()
        given = {"rank": number, "seed": number % 3}
        text = json.dumps(template | {"id": folder.name, "parameters": given})
        (folder / "record.json").write_text(text)
    page = show()
    assert len(rows(page)) == 100  # the others come as one scrolls
    code = "(() => { const t = performance.now(); render(); return performance.now() - t })()"
    assert min(page.evaluate(code) for _ in range(3)) < 1000
    page.fill("#search", "rank=499")
    assert len(rows(page)) == 1


def test_keys_reach_search_sorting_and_links(tmp_path, show):
    make(tmp_path)
    page = show("#claims")
    page.keyboard.press("/")
    page.wait_for_function("document.activeElement.id === 'search'")
    page.keyboard.type("lora")
    button = page.get_by_role("button", name="status")
    button.focus()
    page.keyboard.press("Enter")
    assert "sort=status" in page.url
    focused = page.evaluate("document.activeElement.dataset.column")
    assert focused == "status"  # the new table's button
