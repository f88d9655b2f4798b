"""Run the code cells of nbs/index.ipynb that show results, and keep what they show; cells marked `eval: false` are left alone."""
from pathlib import Path

import nbformat
from nbclient import NotebookClient

INDEX = Path(__file__).resolve().parents[1] / "nbs/index.ipynb"


def main():
    "Only cells that hide their source hold results; the others are examples for the reader."
    nb = nbformat.read(INDEX, as_version=4)
    shown = [c for c in nb.cells if c.cell_type == "code" and "echo: false" in c.source]
    part = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.source) for c in shown], metadata=nb.metadata)
    NotebookClient(part, timeout=300, resources={"metadata": {"path": str(INDEX.parent)}}).execute()
    for cell, done in zip(shown, part.cells):
        cell.outputs, cell.execution_count = done.outputs, None
        for output in cell.outputs: output.pop("execution_count", None) if output.output_type != "execute_result" else output.update(execution_count=None)
    nbformat.write(nb, INDEX)


if __name__ == "__main__": main()
