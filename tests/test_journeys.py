"""Every family goes the whole way; the table in the README says what was found here."""
import json
from pathlib import Path

import pytest
from families import FAMILIES
from journeys import journey
from test_families import sets  # noqa: F401  (a fixture)
from transformers.utils import is_torchvision_available

COMMITTED = json.loads((Path(__file__).parent.parent / "benchmarks/results/families.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_the_whole_way(name, sets, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    found = journey(name, sets, tmp_path)
    if is_torchvision_available(): found["processor"] = COMMITTED["families"][name]["processor"]
    assert found == COMMITTED["families"][name]
