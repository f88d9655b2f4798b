"""Every family goes the whole way in both precisions; the table in tutorials/your_model says what was found here."""
import json
from pathlib import Path

import pytest
from journeys import journey, PRECISIONS, ROUNDING
from real import REAL, write_data
from transformers.utils import is_torchvision_available

COMMITTED = json.loads((Path(__file__).parent.parent / "benchmarks/results/families.json").read_text())["families"]
ALWAYS = {("llava", "bfloat16"), ("qwen2_5_vl", "float32")}  # the others with the slow tests
TRIPS = [pytest.param(name, p, marks=[] if (name, p) in ALWAYS else [pytest.mark.slow]) for name in REAL for p in PRECISIONS]


@pytest.mark.parametrize("name, precision", TRIPS)
def test_a_family_goes_the_whole_way(name, precision, tmp_path):
    pytest.importorskip("bitsandbytes")
    found, told = journey(name, precision, tmp_path / "family", write_data(tmp_path)), COMMITTED[name]
    off, was = found.pop("difference"), told[precision]
    assert (off is None) == (was is None) and (off is None or off <= ROUNDING[precision])
    if is_torchvision_available(): found["processor"] = told["processor"]
    assert found == {k: told[k] for k in found}
