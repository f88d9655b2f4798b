"""The exported package stands on its own, and the repository's files say the same thing."""
import configparser
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"IPython", "ipywidgets", "jupyterlab", "nbdev", "execnb", "anywidget", "ipykernel", "notebook"}:
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
import importlib, pkgutil, safeeraser
for m in pkgutil.iter_modules(safeeraser.__path__):
    if not m.name.startswith("_"): importlib.import_module("safeeraser." + m.name)
from safeeraser.cli import app
print(safeeraser.__version__)
"""


def test_imports_without_any_notebook_package():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    assert done.stdout.strip() == ini["DEFAULT"]["version"]


def test_the_root_shadows_no_module():
    import safeeraser
    assert not {"generate", "judge", "unlearn", "world"} & {n for n in vars(safeeraser) if callable(vars(safeeraser)[n])}
    from safeeraser.generate import generate
    from safeeraser.judge import judge
    assert callable(generate) and callable(judge)


def test_wheel_holds_the_package_and_the_command(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    built = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        assert {f"safeeraser/{p.name}" for p in (ROOT / "safeeraser").glob("*.py")} | {"safeeraser/py.typed"} <= set(names)
        assert b"safeeraser = safeeraser.cli:main" in wheel.read(next(n for n in names if n.endswith("entry_points.txt")))
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line]
    assert any("transformers>=" in r for r in required) and not any("jupyterlab" in r or "ipywidgets" in r for r in required)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_small_and_hold_no_error(notebook):
    assert notebook.stat().st_size < 300_000
    cells = json.loads(notebook.read_text())["cells"]
    assert not [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]


def test_every_module_comes_from_a_notebook():
    made = {line.split("default_exp")[1].strip() for p in NOTEBOOKS for c in json.loads(p.read_text())["cells"]
            for line in c["source"] if "default_exp" in line and line.startswith("#|")}
    own = {p.stem for p in (ROOT / "safeeraser").glob("*.py") if p.name not in ("__init__.py", "_modidx.py")}  # those two are nbdev's
    assert made == own


def test_readme_shows_the_committed_results():
    "Its five columns, figure by figure; and nothing that reads like a replication of the paper."
    from safeeraser.report import report
    from safeeraser.tables import method_name
    results, readme = report(ROOT / "benchmarks" / "results" / "world.json"), (ROOT / "README.md").read_text()
    shown = [line.split("  ") for line in readme.splitlines() if line.startswith("    ")]
    shown = {cells[2]: [c.split()[0] for c in cells[3:] if c.strip()] for cells in shown}
    measures = "asr_generality", "utility_accuracy", "sarr", "safe_answer_accuracy"
    for method in {r["method"] for r in results["rows"]}:
        rows = [r for r in results["rows"] if r["method"] == method]
        means = [100 * sum(r[m] for r in rows) / 3 for m in measures]
        assert [f"{m:.1f}" for m in means] == shown[method_name(method)]
    assert {r["seed"] for r in results["rows"]} == {1, 2, 3} and len(results["rows"]) == 30
    assert "a toy's" in readme and "79.5" not in readme and len(readme.split()) < 1500


def test_the_package_says_that_it_is_typed(): assert (ROOT / "safeeraser" / "py.typed").is_file()


def test_contributing_fits_on_a_screen_and_names_files_that_there_are():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:nbs|tests|scripts|\.github)/[\w/.]+)`", text)
    assert len(named) > 5 and all((ROOT / name).is_file() for name in named) and len(text.splitlines()) <= 40


def test_a_chapter_uses_only_what_stands_before_it():
    "No module imports one of a later notebook, at its top or inside a function."
    exported = [(nb, json.loads(nb.read_text())["cells"]) for nb in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
    module = lambda cells: "".join(cells[0]["source"]).split()[-1]
    order = [module(cells) for _, cells in exported]
    for n, name in enumerate(order):
        imported = re.findall(r"^\s*from (?:safeeraser)?\.(\w+) import", (ROOT / "safeeraser" / f"{name}.py").read_text(), re.M)
        assert {m for m in imported if m in order} <= set(order[:n]), name
