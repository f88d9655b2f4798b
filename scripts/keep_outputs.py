"""Execute notebooks and keep what a reader without a kernel should see: figures and values, not logs.

    python scripts/keep_outputs.py nbs/tutorials/over_forgetting.ipynb

Kept is what a cell *shows* (its value, or a figure as PNG). Everything that would differ from run to run goes:
printed lines and progress bars (they tell times), widgets, execution counts. Needs `pip install kaleido` and a Chromium.
What is harmful has to be folded or blurred by the notebook itself.
"""
import argparse, base64, io, os
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor
from PIL import Image

WIDGET = "application/vnd.jupyter.widget-view+json"
KINDS = "image/png", "text/html", "text/plain"   # the first that an output has is kept


def small(png: str) -> str:
    "A base64 PNG with 64 colours: a figure looks the same at a tenth of the size."
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA").quantize(64, method=Image.Quantize.FASTOCTREE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def kept(output) -> list:
    "The output reduced to its best kind; nothing where it is a stream, a widget, or no value (a progress table, say)."
    data = output.get("data", {})
    kind = next((k for k in KINDS if k in data), None)
    if kind is None or WIDGET in data or (kind, output.output_type) == ("text/html", "display_data"): return []
    return [nbformat.v4.new_output("display_data", {kind: small(data[kind]) if kind == "image/png" else data[kind]})]


def keep_outputs(path: Path, timeout: int = 600):
    "Execute the notebook at `path` and write it back with the outputs worth keeping."
    nb = nbformat.read(path, 4)
    metadata = dict(nb.metadata)
    ExecutePreprocessor(timeout=timeout, store_widget_state=False).preprocess(nb, {"metadata": {"path": path.parent}})
    nb.metadata = metadata
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code": continue
        cell.execution_count = None
        cell.outputs = kept(cell.outputs[-1]) if cell.outputs else []   # a cell ends on the value worth seeing
    nbformat.write(nb, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    os.environ["PLOTLY_RENDERER"] = "png"        # read by plotly in the kernel
    for notebook in parser.parse_args().notebooks: keep_outputs(notebook)
