"""Tutorials run under a real kernel too, and what is committed of their outputs is what it should be."""
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))


def test_a_tutorial_under_a_kernel(tmp_path):
    "The quickest one, as JupyterLab runs it; nbdev_test has run them all, and test_browser.py clicks through another."
    notebook = ROOT / "nbs" / "tutorials" / "your_model.ipynb"
    done = subprocess.run([sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", tmp_path,
                           "--ExecutePreprocessor.timeout=600", notebook], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / notebook.name).is_file()


def test_there_are_tutorials(): assert TUTORIALS


NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.name != "index.ipynb")
KEPT = {"image/png", "text/html", "text/plain"}


def committed(notebook):
    "The outputs a notebook carries, and all their text."
    outputs = [o for c in json.loads(notebook.read_text())["cells"] for o in c.get("outputs", [])]
    texts = [o["text"] for o in outputs if "text" in o] + [o["data"].get(k, "") for o in outputs if "data" in o for k in ("text/html", "text/plain")]
    return outputs, "".join(map(json.dumps, texts))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_committed_outputs_say_the_same_on_every_machine(notebook):
    outputs, text = committed(notebook)
    assert {o["output_type"] for o in outputs} <= {"display_data", "stream"} and {k for o in outputs for k in o.get("data", {})} <= KEPT
    assert not (found := re.search(r"/tmp|/home|/root| at 0x|\d seconds?\b|<progress", text)), found


def exported(cell) -> bool: return cell["cell_type"] == "code" and "".join(cell["source"]).startswith("#| export")


def test_notebooks_are_made_of_small_pieces_that_show_something():
    "What CONTRIBUTING.md asks for."
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        for code in ("".join(c["source"]) for c in cells if exported(c)):
            assert len(code) <= 2000, (notebook.name, code[:80])
            assert max(map(len, code.splitlines())) <= 140, (notebook.name, max(code.splitlines(), key=len))
        shown = [bool(c["outputs"]) for c in cells if c["cell_type"] == "code" and not "".join(c["source"]).startswith(("#| hide", "#| export", "#| default_exp"))]
        if notebook.parent.name == "nbs": assert sum(shown) >= len(shown) / 4, notebook.name
    assert sum(p.stat().st_size for p in NOTEBOOKS) < 6e6


def test_hazards_are_folded_in_committed_outputs():
    "The words of a recipe about a hazard appear only behind a click; blur would not do, untrusted notebooks drop it."
    from safeeraser.pictures import HAZARDS
    from safeeraser.world import INSTRUCTIONS, World
    outputs, text = committed(ROOT / "nbs" / "tutorials" / "over_forgetting.ipynb")
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 4
    folded, shown = re.findall("<details>.*?</details>", text), re.sub("<details>.*?</details>", "", text)
    told = [World(0).recipe(family, instruction) for family in HAZARDS.values() for instruction in INSTRUCTIONS]
    assert any(a in part for part in folded for a in told)
    assert not [a for a in told if a in shown]


def test_saved_responses_count_up_to_the_saved_results():
    from safeeraser.metrics import result_row, split_runs
    saved = ROOT / "benchmarks" / "results"
    with gzip.open(saved / "responses.jsonl.gz", "rt", encoding="utf-8") as lines: runs = split_runs([json.loads(line) for line in lines])
    results = {(r["method"], r["seed"]): r for r in json.loads((saved / "world.json").read_text())["rows"] if r["seed"] == 1}
    assert runs.keys() == results.keys()
    for run, rows in runs.items():
        counted = result_row(rows, "exact")
        for name in ("asr_generality", "rr_generality", "sarr", "sarr_held_out", "safe_answer_accuracy_held_out"):
            assert counted[name] == results[run][name], (run, name)
