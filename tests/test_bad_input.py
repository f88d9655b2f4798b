"""Bad inputs end in one sentence. All of them: `python tests/bad_input.py`."""
import pytest
from bad_input import attempt, Case, GENERATE, good_folder, JUDGE, share, told_text, tried, verdict


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    base = tmp_path_factory.mktemp("good") / "base"
    base.mkdir()
    return good_folder(base, tiny)


@pytest.mark.parametrize("case", [
    Case("data check", "records that are none", ("data", "check", "world/dataset"), "world/dataset/all_train.json", b"{"),
    Case("judge", "a line that is none", tuple(JUDGE), "run/responses.jsonl", b"5\n"),
    Case("generate", "no number", (*GENERATE, "--seed", "x"))], ids=str)
def test_a_bad_input_ends_in_a_sentence(case, good, tmp_path): assert verdict(case, attempt(case, good, tmp_path)) == "told"


@pytest.mark.slow
def test_bad_inputs_end_in_a_sentence(good, tmp_path):
    "Every third of them."
    found = tried(good, tmp_path, every=3)
    text = told_text(found)
    print(text)
    assert len(found) >= 500
    assert share(found) >= .95, text
