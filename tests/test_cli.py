"""The command as a user meets it: verbs that chain, and one sentence with exit code 2 for what is wrong."""
import json
import subprocess
import sys

import pytest
from command import command as call


def test_the_verbs_chain(tiny, tmp_path):
    run = tmp_path / "run"
    steps = [("unlearn", "--model", tiny.model, "--data", tiny.data, "--method", "gd+pd", "--out", run, "--seed", 2,
              "--set", "max_steps=2", "--set", "use_cpu=true", "--set", "lora_r=4"),
             ("generate", "--model", tiny.model, "--adapter", run, "--data", tiny.data, "--out", run / "responses.jsonl"),
             ("judge", run / "responses.jsonl", "--judge", "rule", "--out", run / "judged.jsonl"),
             ("judge", run / "judged.jsonl", "--judge", "exact", "--out", run / "judged.jsonl"),
             ("report", run, "--out", tmp_path / "results.json")]
    for step in steps:
        done = call(*step)
        assert done.returncode == 0, done.stderr
    assert "GD+PD" in done.stdout and "SARR" in done.stdout
    row, = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["method"], row["seed"]) == ("gd+pd", 2) and row["sarr_n"] == 12 and row["seconds"] > 0


@pytest.mark.parametrize("args, problem", [
    (("unlearn", "--method", "pq", "--out", "o"), "method 'pq': unknown term 'pq'"),
    (("unlearn", "--method", "po+pdd", "--out", "o"), "did you mean"),
    (("unlearn", "--method", "po", "--out", "o", "--set", "learning-rate"), "name=value belongs here"),
    (("unlearn", "--method", "po", "--out", "o", "--set", "lr=1"), "unknown setting 'lr'"),
    (("generate", "--out", "o.jsonl", "--samples", "3"), "set temperature"),
    (("generate", "--out", "o.jsonl", "--splits", "tset"), "no 'tset' in"),
    (("generate", "--out", "o.jsonl", "--adapter", "nowhere"), "nowhere: no adapter there"),
])
def test_one_sentence_and_exit_code_2(args, problem, tiny, tmp_path):
    done = call(*args, "--model", tiny.model, "--data", tiny.data, cwd=tmp_path)
    assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.jsonl").exists()


def test_wrong_folders(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    for args, problem in [((tmp_path / "empty", tiny.data), "no config.json there"), ((tiny.model, tmp_path / "empty"), "all_train.json: no such file")]:
        done = call("unlearn", "--model", args[0], "--data", args[1], "--method", "po", "--out", tmp_path / "o")
        assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr


def test_a_text_model_is_no_vision_language_model(tmp_path, tiny):
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path / "m")
    done = call("generate", "--model", tmp_path / "m", "--data", tiny.data, "--out", tmp_path / "r.jsonl")
    assert done.returncode == 2 and "cannot be loaded as a vision-language model" in done.stderr


def test_bad_responses_and_results(tmp_path):
    (tmp_path / "r.jsonl").write_text("{}\n")
    for args, problem in [(("judge", "r.jsonl", "--judge", "rule", "--out", "j"), "line 1: lacks"), (("judge", "none", "--judge", "rule", "--out", "j"), "cannot be read"),
                          (("report", "none"), "no such file or folder"), (("report", "."), "holds neither")]:
        done = call(*args, cwd=tmp_path)
        assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr


def test_help_is_quick_and_complete():
    helped = call("--help")
    assert helped.returncode == 0 and all(v in helped.stdout for v in ("world", "unlearn", "generate", "judge", "report", "demo"))
    imported = subprocess.run([sys.executable, "-c", "import sys, safeeraser.cli; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert imported.stdout.strip() == "False"


def test_unwritable_out_leaves_nothing(tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    done = call("generate", "--model", tiny.model, "--data", tiny.data, "--out", tmp_path / "file" / "r.jsonl")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("args, option", [(["unlearn", "--model", "m", "--data", "d", "--method", "po", "--preset", ""], "--preset"), (["merge", "run", "--out", "new", "--model="], "--model"),
                                          (["merge", "", "--out", "new"], "''"), (["generate", "--model", "m", "--data", "d", "--out", "o", "--server", " "], "--server"),
                                          (["report", "run", "--csv", ""], "--csv")])
def test_nothing_given_is_told(args, option, tmp_path):
    "A variable of the shell that was never set must not stand for a default."
    done = call(*args, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"safeeraser: {option}") and "nothing is given" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_view_that_there_is_not(tmp_path):
    (tmp_path / "r.jsonl").write_text("{}\n")
    done = call("judge", "r.jsonl", "--judge", "rule", "--view", "nonsense", "--out", "j.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "--view 'nonsense': one of " in done.stderr
