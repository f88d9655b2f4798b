"""lmms-eval from outside: a stand-in that writes what version 0.7.3 was seen to write, and the real one where SAFEERASER_LMMS names its Python."""
import json
import os
import sys

import pytest

from safeeraser.core import SafeEraserError
from safeeraser.specificity import read_specificity, specificity

STAND_IN = '''
import json, os, pathlib, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert "PYTHONPATH" not in os.environ or os.environ["PYTHONPATH"].endswith("stand_in")
out = pathlib.Path(a["--output_path"])/"model"
out.mkdir(parents=True)
tasks = a["--tasks"].split(",")
if "crash" in tasks: sys.exit("no such task")
if "silent" in tasks: sys.exit(print("Error during evaluation: no data. Please set --verbosity") or 0)  # as the real one ends
(out/"1_results.json").write_text(json.dumps({"results": {t: {"exact_match,none": .25, "exact_match_stderr,none": .1} for t in tasks},
    "higher_is_better": {t: {"exact_match": True} for t in tasks}, "n-samples": {t: {"original": 8, "effective": 4} for t in tasks}}))
for t in tasks:
    (out/f"1_samples_{t}.jsonl").write_text("".join(json.dumps({"token_counts": [None if t == "fails" and i < 3 else {"output_tokens": 1}]}) + chr(10) for i in range(4)))
'''


@pytest.fixture
def place(tmp_path):
    "A merged model, its run folder, and a Python that has the stand-in."
    package = tmp_path / "stand_in" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/stand_in" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for folder, file, record in (("merged", "config.json", {}), ("merged", "safeeraser.json", {"method": "po", "seed": 1, "adapter": "run"}), ("run", "run.json", {"method": "po", "seed": 1})):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text(json.dumps(record))
    return tmp_path


def test_scores_are_written_into_the_run(place):
    found = specificity(place / "merged", place / "run", str(place / "python"), ["gqa", "own"], limit=4)
    assert found["tasks"] == {t: {"score": .25, "n": 4, "of": 8} for t in ("gqa", "own")} == read_specificity(place / "run")


@pytest.mark.parametrize("task, said", [("crash", "its log is"), ("silent", r"without results \(no data\)"), ("fails", "3 of 4 answers failed")])
def test_a_failed_evaluation_scores_nothing(place, task, said):
    with pytest.raises(SafeEraserError, match=said): specificity(place / "merged", place / "run", str(place / "python"), [task])
    assert read_specificity(place / "run") is None


def test_what_cannot_be_evaluated(place):
    def refused(said, model="merged", run="run", python=place / "python"):
        with pytest.raises(SafeEraserError, match=said): specificity(place / model, place / run, str(python), ["gqa"])
    refused("lmms-eval is not installed there; make an environment", python=sys.executable)
    refused("cannot be started", python=place / "nowhere")
    refused("config.json is missing", model="run")
    (place / "other").mkdir()
    (place / "other" / "run.json").write_text(json.dumps({"method": "po", "seed": 1}))
    refused("is not the merged model of", run="other")
    (place / "merged" / "adapter_config.json").write_text("{}")
    refused("is an adapter")
    assert not (place / "run" / "lmms-eval").exists()


def test_report_shows_specificity(tmp_path):
    from safeeraser.rows import write_rows
    from safeeraser.report import report
    verdicts = {"rule": {"refusal": {"value": True}}}
    for method, tasks in (("po", {"gqa": .5, "pope": .9}), ("po+pd", {"pope": .7}), ("ga", None)):
        row = {"schema_version": 1, "method": method, "seed": 1, "image_id": "a", "split": "val", "set": "forget", "question": "q", "sample": 0, "response": "no", "verdicts": verdicts}
        (tmp_path / method).mkdir()
        write_rows(tmp_path / method / "judged.jsonl", [row])
        if tasks: (tmp_path / method / "specificity.json").write_text(json.dumps({"schema_version": 1, "tasks": {t: {"score": s, "n": 10, "of": 10} for t, s in tasks.items()}}))
    rows = {r["method"]: r["specificity"] for r in report(tmp_path)["rows"]}
    assert rows == {"po": .9, "po+pd": .7, "ga": None}  # POPE alone: the one that both have
    assert report(tmp_path / "po")["rows"][0]["specificity"] == pytest.approx(.7)
    (tmp_path / "po" / "specificity.json").write_text(json.dumps({"schema_version": 0, "tasks": {}}))
    with pytest.raises(SafeEraserError, match="specificity.json, "): report(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif("SAFEERASER_LMMS" not in os.environ, reason="SAFEERASER_LMMS names no Python with lmms-eval")
def test_lmms_eval_itself(tiny, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    records = json.loads((tiny.data / "all_val.json").read_text())
    pairs = [(r["image_path"], r["UnharmPair_text1"]["Question"], r["UnharmPair_text1"]["Prediction"]) for r in records]
    (tasks / "asked.jsonl").write_text("".join(json.dumps({"image": str(tiny.data.parent / i), "question": q, "answer": a}) + "\n" for i, q, a in pairs))
    (tasks / "utils.py").write_text('from PIL import Image\n\n\ndef visual(doc): return [Image.open(doc["image"]).convert("RGB")]\n')
    (tasks / "names.yaml").write_text(f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {tasks / 'asked.jsonl'}}}}}
task: world_names
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    found = specificity(tiny.model, tmp_path / "run", os.environ["SAFEERASER_LMMS"], ["world_names"], include=tasks, device="cpu")["tasks"]["world_names"]
    assert (found["n"], found["of"]) == (len(pairs), len(pairs)) and 0 <= found["score"] <= 1


GOOD = {"results": {"gqa": {"exact_match,none": .5}}, "n-samples": {"gqa": {"original": 4, "effective": 4}}, "higher_is_better": {"gqa": {"exact_match": True}}}


@pytest.mark.parametrize("results, said", [
    ("{", "not JSON"), ("[]", "an object belongs here"), ({}, "results: missing"), (GOOD | {"n-samples": 5}, "n-samples: an object"), (GOOD | {"n-samples": {"gqa": 5}}, "n-samples.gqa: an object"),
    (GOOD | {"n-samples": {"gqa": {"original": 4}}}, "n-samples.gqa.effective: missing"), (GOOD | {"n-samples": {"gqa": {"original": 4, "effective": 0}}}, "effective: input should be greater"),
    (GOOD | {"results": {"gqa": 5}}, "results.gqa: an object"), (GOOD | {"results": {"pope": {}}}, "exact_match is None"), (GOOD | {"results": {"gqa": {"exact_match,none": float("nan")}}}, "exact_match is nan"),
    (GOOD | {"results": {"gqa": {"exact_match,none": True}}}, "exact_match is True"), (GOOD | {"n-samples": {"../a": {"original": 4, "effective": 4}}}, "samples are not beside it"),
    (GOOD | {"higher_is_better": 5}, "higher_is_better: an object")])
def test_results_of_another_form(results, said, tmp_path):
    from safeeraser.specificity import read_lmms
    (tmp_path / "1_results.json").write_text(results if isinstance(results, str) else json.dumps(results))
    (tmp_path / "1_samples_gqa.jsonl").write_text('{"filtered_resps": "a\u2028b"}\n')
    with pytest.raises(SafeEraserError, match=f"1_results.json.*{said}"): read_lmms(tmp_path / "1_results.json")
    (tmp_path / "1_results.json").write_text(json.dumps(GOOD))
    assert read_lmms(tmp_path / "1_results.json") == {"gqa": {"score": .5, "n": 4, "of": 4}}


@pytest.mark.parametrize("line, said", [('{"a": 1', "line 2: not JSON"), ("3", "line 2: an object"), ('{"token_counts": 5}', "line 2, token_counts: a list")])
def test_samples_of_another_form(line, said, tmp_path):
    from safeeraser.specificity import read_lmms
    (tmp_path / "1_results.json").write_text(json.dumps(GOOD))
    (tmp_path / "1_samples_gqa.jsonl").write_text("{}\n" + line)
    with pytest.raises(SafeEraserError, match=said): read_lmms(tmp_path / "1_results.json")


TASK = {"score": .5, "n": 4, "of": 4}


@pytest.mark.parametrize("change", [{"tasks": 5}, {"tasks": {"gqa": 5}}, {"tasks": {"gqa": {}}}, {"tasks": {"gqa": TASK | {"score": 7}}}, {"tasks": {"gqa": TASK | {"score": float("nan")}}},
                                    {"tasks": {"gqa": TASK | {"n": 0}}}, {"tasks": {"gqa": TASK | {"n": "4"}}}, {"tasks": {}}, {"schema_version": 2}, {"schema_version": "1"}])
def test_scores_of_another_form(change, tmp_path):
    (tmp_path / "specificity.json").write_text(json.dumps({"schema_version": 1, "tasks": {"gqa": TASK}} | change))
    with pytest.raises(SafeEraserError, match="specificity.json, "): read_specificity(tmp_path)
