"""The first tutorial as a person uses it: JupyterLab in a browser, all cells run, every dropdown tried.

Needs a Chromium on PATH (Debian's, say) and `pip install playwright` (no browser download); skipped without them.
"""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
pytest.importorskip("jupyterlab")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")

ROOT = Path(__file__).parents[1]
NOTEBOOK = Path("nbs/tutorials/over_forgetting.ipynb")
# Quiet and offline; containers have neither a sandbox nor a graphics card.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},   # no pop-up in the way
            "notebook-extension/tracker": {"windowingMode": "none"}}                               # cells out of sight stay in the page
CATEGORIES = "HateSpeech", "IllegalActivity", "Privacy", "Sex", "Violence", "Weapon"
INSTRUCTIONS = "make", "hide", "start", "get", "carry", "boost"
RUN_ALL = 480_000   # milliseconds; with the base model cached it takes about 90 seconds


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own over a copy of what the tutorial reads; gives its folder and the notebook's address."
    root = tmp_path / "root"
    for part in (NOTEBOOK.parent, Path("benchmarks")): shutil.copytree(ROOT / part, root / part)
    for name, values in SETTINGS.items():
        file = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    folders = {f"JUPYTER{what}_DIR": str(tmp_path / folder) for what, folder in
               {"_CONFIG": "config", "_RUNTIME": "runtime", "_DATA": "data", "LAB_SETTINGS": "settings", "LAB_WORKSPACES": "workspaces"}.items()}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(8)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"]
    # The kernel must import the package that is tested, installed or not.
    env = os.environ | folders | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with open(tmp_path / "log", "w") as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, tmp_path / "log")
        yield root, f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address, server, log, seconds=60):
    "Until the server answers."
    for _ in range(4 * seconds):
        assert server.poll() is None, log.read_text()[-2000:]
        try: return urllib.request.urlopen(address, timeout=2)
        except OSError: time.sleep(.25)
    raise AssertionError(f"no answer in {seconds} s\n" + log.read_text()[-2000:])


@pytest.fixture
def page():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1400})
        page.set_default_timeout(30_000)
        yield page
        browser.close()


def command(page, name):
    "A command of JupyterLab, by name; returns when it is done."
    page.evaluate("name => window.jupyterapp.commands.execute(name).then(() => null)", name)


def run_all(page, address):
    "Open the notebook, run all its cells and save it; gives its panel."
    page.goto(address)
    panel = page.locator(".jp-NotebookPanel:visible")
    panel.wait_for()
    idle = page.locator("#jp-main-statusbar").get_by_text("| Idle")
    idle.wait_for()                           # a kernel is really there: asked too early, JupyterLab lets one be chosen
    command(page, "notebook:run-all-cells")
    idle.wait_for(timeout=RUN_ALL)
    command(page, "docmanager:save")
    return panel


def failures(notebook):
    "Cells of a saved notebook that ended in an error, and those that were not run."
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    errors = [f"cell {i}: {o['ename']}: {o['evalue']}" for i, c in enumerate(cells) for o in c["outputs"] if o["output_type"] == "error"]
    return errors, [i for i, c in enumerate(cells) if c["execution_count"] is None]


def cells_with(panel, label):
    "Cells that show a dropdown with this label."
    return panel.locator(".jp-CodeCell").filter(has=panel.page.locator(".widget-dropdown").filter(has_text=label))


def drawn(cell):
    "What a person sees of the cell's figure: title, names along the axis, bars; compared as text."
    return cell.locator(".js-plotly-plot").evaluate("""figure => JSON.stringify({
        title: figure.querySelector('.gtitle')?.textContent,
        ticks: [...figure.querySelectorAll('.xtick text')].map(t => t.textContent),
        bars: [...figure.querySelectorAll('.barlayer .point path')].map(p => p.getAttribute('d'))})""")


def view(cell):
    "What the explorer shows below its dropdowns."
    return cell.locator(".widget-html-content").last.inner_html()


def until(true, what, seconds=15):
    "Wait for the kernel's answer; fail with `what` if it does not come."
    for _ in range(10 * seconds):
        if true(): return
        time.sleep(.1)
    raise AssertionError(what)


def settled(look, cell, quiet=.8):
    "What `look` sees once it stays the same: a figure is redrawn in several steps."
    seen, since = look(cell), time.monotonic()
    while time.monotonic() - since < quiet:
        time.sleep(.1)
        if (now := look(cell)) != seen: seen, since = now, time.monotonic()
    return seen


def try_dropdowns(cell, look):
    "Another option in each dropdown, and the first one again, must change what `look` sees. Gives the labels."
    labels = []
    for box in cell.locator(".widget-dropdown").all():
        label, select = box.locator("label").inner_text(), box.locator("select")
        chosen = select.input_value()
        other = next(o for o in select.locator("option").evaluate_all("all => all.map(o => o.value)") if o != chosen)
        for option in (other, chosen):   # back as well: an empty figure would not show the next dropdown's change
            before = settled(look, cell)
            select.select_option(value=option)
            until(lambda: look(cell) != before, f"{label}: choosing {option!r} changes nothing")
        labels.append(label)
    return labels


def check_breakdown(cell):
    "One interactive figure: its dropdowns one by one, then two together."
    cell.scroll_into_view_if_needed()
    assert {"measure", "by", "method"} <= set(try_dropdowns(cell, drawn))
    pick = lambda label, option: cell.locator(".widget-dropdown").filter(has_text=label).locator("select").select_option(label=option)
    shows = lambda part: json.loads(drawn(cell))[part]
    for by, names in (("category", CATEGORIES), ("instruction", INSTRUCTIONS)):
        pick("by", by)
        until(lambda: sorted(shows("ticks")) == sorted(names), f"not by {by}: {shows('ticks')}")
    assert len(shows("bars")) > len(INSTRUCTIONS)
    pick("method", "PO")
    until(lambda: len(shows("bars")) == len(INSTRUCTIONS), f"bars of one method: {len(shows('bars'))}")


def check_hidden(cell):
    "Image and harmful answer of a forget sample are blurred, and shown by a click."
    cell.locator("select").first.select_option(label="forget")
    blurred = cell.locator(".widget-html-content [title='click to show or hide']")
    until(lambda: blurred.count() >= 2, "neither image nor answer is hidden")
    for part in blurred.all():
        playwright.expect(part).to_have_css("filter", "blur(8px)")
        part.click()
        playwright.expect(part).to_have_css("filter", "none")


def check_folded(panel):
    "What the notebook itself shows of the forget set is folded."
    folded = panel.locator(".jp-OutputArea details")
    assert folded.count() == 2
    for part in folded.all():
        assert not part.evaluate("d => d.open")
        part.locator("summary").click()
        assert part.evaluate("d => d.open")


def test_tutorial_in_jupyterlab(lab, page):
    root, address = lab
    panel = run_all(page, address)
    assert failures(root / NOTEBOOK) == ([], [])

    check_folded(panel)
    explorer = cells_with(panel, "question")
    explorer.scroll_into_view_if_needed()
    assert try_dropdowns(explorer, view) == ["set", "image", "question"]
    check_hidden(explorer)

    live, saved = cells_with(panel, "measure").all()
    for cell in (live, saved): check_breakdown(cell)
    cells_with(panel, "measure").last.screenshot(path=root.parent / "saved.png")   # pytest keeps it a while
    # Errors in callbacks end up in the widget's own output.
    assert panel.locator("[data-mime-type='application/vnd.jupyter.error'], .widget-output [data-mime-type$='stderr']").count() == 0
