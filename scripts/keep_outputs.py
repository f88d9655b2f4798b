"""Execute notebooks and keep what a reader without a kernel should see: values, tables, figures, what a cell prints.

    python scripts/keep_outputs.py                      all of them (some ten minutes)
    python scripts/keep_outputs.py nbs/30_loss.ipynb    these

Kept is what a cell prints and its value, a figure as PNG. What would differ from run to run goes: progress bars, widgets,
execution counts, and whatever names a folder of this machine, an address in memory or a time. Needs `pip install kaleido`
and a Chromium. What is harmful has to be folded by the notebook itself.
"""
import argparse, base64, io, os, re
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
KINDS = "image/png", "text/html", "text/plain"   # the first that an output has is kept
FOLDER = re.compile(r"/tmp/tmp\w+/?")            # a notebook's own: what stands below it is the same everywhere
LOCAL = re.compile(r"/tmp|/home|/root| at 0x|\d seconds?\b|\d s\b|['\"]seconds['\"]|s/it|<progress|it/s")  # differs from run to run
LONG = 6_000                                     # characters of a text beyond which nobody reads


def small(png: str) -> str:
    "A base64 PNG with 64 colours: a figure looks the same at a tenth of the size."
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    picture.quantize(64, method=Image.Quantize.FASTOCTREE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def printed(output) -> list:
    "What a cell printed, where it is the same on every machine."
    text = FOLDER.sub("", output.get("text", ""))
    if output.name != "stdout" or LOCAL.search(text) or len(text) > LONG: return []
    return [nbformat.v4.new_output("stream", name="stdout", text=text)]


def shown(output) -> list:
    "A value reduced to its best kind; nothing where it is a widget, a progress table, or differs from run to run."
    data = output.get("data", {})
    kind = next((k for k in KINDS if k in data), None)
    if kind is None or WIDGET in data or (kind, output.output_type) == ("text/html", "display_data"): return []
    if kind == "image/png": return [nbformat.v4.new_output("display_data", {kind: small(data[kind])})]
    text = FOLDER.sub("", data[kind])
    if LOCAL.search(text) or kind == "text/plain" and len(text) > LONG: return []
    return [nbformat.v4.new_output("display_data", {kind: text})]


def kept(cell) -> list:
    "The outputs of a cell that are worth keeping."
    if re.match(r"#\|\s*(hide|export|default_exp)", cell.source): return []
    return [o for output in cell.outputs for o in (printed if output.output_type == "stream" else shown)(output)]


def keep_outputs(path: Path, timeout: int = 900):
    "Execute the notebook at `path` and write it back with the outputs worth keeping."
    nb = nbformat.read(path, 4)
    metadata = dict(nb.metadata)
    ExecutePreprocessor(timeout=timeout, store_widget_state=False).preprocess(nb, {"metadata": {"path": path.parent}})
    nb.metadata = metadata
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code": cell.execution_count, cell.outputs = None, kept(cell)
    nbformat.write(nb, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    os.environ["PLOTLY_RENDERER"] = "png"        # read by plotly in the kernel
    everything = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.name != "index.ipynb")
    for notebook in parser.parse_args().notebooks or everything:
        keep_outputs(notebook)
        print(notebook.name, flush=True)
