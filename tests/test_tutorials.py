"""Tutorials run from top to bottom under a real kernel, as JupyterLab runs them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "nbs" / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", TUTORIALS, ids=lambda p: p.name)
def test_tutorial_under_a_kernel(notebook, tmp_path):
    done = subprocess.run([sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", tmp_path,
                           "--ExecutePreprocessor.timeout=600", notebook], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / notebook.name).is_file()


def test_there_are_tutorials(): assert TUTORIALS
