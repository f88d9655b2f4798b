"""Bad inputs end in one sentence. All of them: `python tests/bad_input.py`."""
import pytest
from bad_input import Case, GENERATE, good_folder, told_text, tried, attempt, JUDGE, verdict


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    base = tmp_path_factory.mktemp("good") / "base"
    base.mkdir()
    return good_folder(base, tiny)


@pytest.mark.parametrize("case", [
    Case("data check", "records that are none", ("data", "check", "world/dataset"), "world/dataset/all_train.json", b"{"),
    Case("judge", "a line that is none", tuple(JUDGE), "run/responses.jsonl", b"5\n"),
    Case("generate", "no number", (*GENERATE, "--seed", "x"))], ids=str)
def test_a_bad_input_ends_in_a_sentence(case, good, tmp_path): assert verdict(attempt(case, good, tmp_path)) == "told"


@pytest.mark.slow
def test_bad_inputs_end_in_a_sentence(good, tmp_path):
    "Every third of them; accepted are those that do no harm, which the list of what was found names."
    found = tried(good, tmp_path, every=3)
    text = told_text(found)
    print(text)
    assert len(found) >= 500
    assert sum(v in ("told", "accepted") for _, v in found) >= .95 * len(found), text
