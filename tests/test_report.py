"""The page stands alone, hides what is harmful, and nothing a model said can act in it."""
import json
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from safeeraser.judge import rule_judge
from safeeraser.world import exact_judge
from safeeraser.report import count, load_sources
from safeeraser.page import report_page
from safeeraser.tables import table_html
from safeeraser.world import INSTRUCTIONS, RECIPES

HIDDEN = '<div title="click to show or hide" style="filter:blur(8px)'
NASTY = ["<script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">", "</div></details></bdi><h1>free</h1>",
         "\u202egnp.elif\u2066", "x" * 20_000, "&lt;b&gt;", "\ufffd where half a character was", "' onclick='alert(1)"]


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    q, reference = INSTRUCTIONS["make"][4], RECIPES["make"].format("clay", "drum", "twice")
    safe, harmful = (next((tiny.data / d).rglob("*.png")).relative_to(tiny.data.parent) for d in ("pdset", "img"))
    for method in ("base", "po", "po+pd"):
        rows = []
        for i, said in enumerate(NASTY):
            for name, image in (("forget", harmful), ("decouple", safe)):
                row = {"schema_version": 1, "method": method, "seed": 1, "image_id": str(image), "split": "val", "set": name, "question": q if i else INSTRUCTIONS["hide"][4],
                       "sample": 0, "response": said, "reference": reference, "verdicts": {}}
                rows.append(row | {"verdicts": {"exact": exact_judge(row), "rule": rule_judge(row)}})
        (folder / method).mkdir()
        (folder / method / "judged.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))  # escapes, so the surrogate survives
        (folder / method / "run.json").write_text(json.dumps({"method": method, "data": str(tiny.data), "finished": False}))
    return folder


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.handlers, self.links = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [v for k, v in attrs if k.startswith("on")]
        self.links += [v for k, v in attrs if k in ("src", "href")]


def page_of(folder):
    sources = load_sources(folder)
    merged = [sources[0].__class__(sources[0].file, [r for s in sources for r in s.rows], None, sources[0].runs)]
    return report_page(count(sources, "exact"), merged)


def test_nothing_a_model_said_acts(run_folder):
    page = page_of(run_folder)
    body = Tags(page[page.index("</head>"):])
    figures = page.count('class="plotly-graph-div"')
    assert body.tags.count("h1") == 1 and body.tags.count("script") <= 2 * figures  # ours, a few for each figure
    assert set(body.handlers) == {"this.style.filter=this.style.filter?'':'blur(8px)'"}
    assert all(link.startswith("data:") for link in body.links)
    assert "default-src 'none'" in page and "&lt;script&gt;document" in page


def test_harm_is_collapsed_and_blurred(run_folder):
    page = page_of(run_folder)
    examples = page[page.index("<h2>Examples"):page.index("<h2>Settings")]
    assert examples.count("<details>") == examples.count("</details>") > 0
    for question in examples.split("</summary>")[1:]:
        assert question.startswith(HIDDEN)
    for half in examples.split("<b>harmful image</b>")[1:]:
        assert half.startswith(HIDDEN)
    for half in examples.split("<b>safe image</b>")[1:]:
        assert not half.startswith(HIDDEN)
    assert "open>" not in examples


def test_report_writes_the_page(run_folder):
    import sys
    done = subprocess.run([str(Path(sys.executable).parent / "safeeraser"), "report", str(run_folder), "--judge", "exact"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert "<title>safeeraser report</title>" in page and "PO+PD" in table_html(count(load_sources(run_folder), "exact"))


def test_figures_explain_themselves(run_folder):
    page = page_of(run_folder)
    figures = page[page.index("<h2>Figures"):page.index("<h2>Examples")]
    for words in ("trained to refuse harmful questions", "the model before unlearning", "prompt decoupling, also trained", "Error bars: 95% interval",
                  "Harmful questions still answered (ASR, new images)"):
        assert words in figures, words


def test_a_methods_name_is_text(run_folder):
    rows = count(load_sources(run_folder), "exact")["rows"]
    nasty = [r | {"method": r["method"].replace("po", NASTY[1])} for r in rows]
    page = report_page({"schema_version": 1, "environment": {}, "settings": {}, "rows": nasty})
    assert NASTY[1].upper() not in page and "&lt;IMG SRC=X" in page
