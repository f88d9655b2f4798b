"""Bad inputs by the hundred: every field of every file that the tool reads, and every option of every verb, made wrong in many ways.

    python tests/bad_input.py [VERB]   tries them all (some minutes), prints how many end in one sentence and which do not
"""
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

LIMIT = 20  # seconds a command may take
MISSING = object()
VALUES = {"missing": MISSING, "null": None, "a number": 5, "a text": "x", "a list": [], "an object": {}, "nothing": "", "huge": 10**30, "not a number": float("nan"), "below zero": -1,
          "true": True, "nested": [[{"a": [{}]}]], "NUL": "a\0b", "half a pair": "\ud800"}
DEEP = "[" * 100_000


@dataclass(frozen=True)
class Case:
    "A command and what is done to the folder that it runs in."
    verb: str
    what: str
    argv: tuple
    file: str = ""
    content: bytes | None = None  # of the file

    def __str__(self): return f"{self.verb} | {self.what}"


@dataclass(frozen=True)
class Outcome:
    "How a command ended."
    code: int          # negative: the signal it died of
    said: str          # on stderr
    left: tuple        # files that were not there before

    @property
    def told(self) -> bool:
        "One sentence, exit code 2, nothing left."
        lines = [x for x in self.said.replace("\r", "\n").split("\n") if x.strip() and "it/s]" not in x]  # bars aside
        if lines and lines[0].startswith("Usage:"): return self.code == 2 and not self.left  # typer's own, of three lines
        return self.code == 2 and len(lines) == 1 and lines[0].startswith("safeeraser:") and not self.left


# ---- What is made wrong --------------------------------------------------------------------------------------------
def whole_files(text: bytes) -> Iterator[tuple[str, bytes]]:
    "A file's content, wrong as a whole."
    for n in (1, 3, len(text) // 2, len(text) - 3): yield f"cut off after {n} bytes", text[:n]
    yield from {"empty": b"", "zeros": b"\0" * 64, "Latin-1": '{"é": "ü"}'.encode("latin-1"), "UTF-16": text.decode("utf-8", "replace").encode("utf-16"), "not JSON": b"nonsense",
                "a list": b"[]", "an object": b"{}", "a number": b"5", "null": b"null", "a text": b'"x"', "nested deep": DEEP.encode(), "5000 digits": b"1" * 5000, "a list of numbers": b"[1, 2]"}.items()


def paths(value, depth: int = 3, at: tuple = ()) -> Iterator[tuple]:
    "Ways to the values inside a JSON value; of a list only the first."
    inside = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*at, key)
        if depth > 1: yield from paths(inner, depth - 1, (*at, key))


def changed(value, path: tuple, new):
    "The JSON value with one inner value replaced."
    value = inner = deepcopy(value)
    for key in path[:-1]: inner = inner[key]
    if new is MISSING: del inner[path[-1]]
    else: inner[path[-1]] = new
    return value


def same_kind(old, new) -> bool:
    "Whether a value may well be right in another's place."
    plain = isinstance(new, str) and "\0" not in new and "\ud800" not in new and new
    return new is not MISSING and (type(old) is type(new) and (not isinstance(new, str) or bool(plain)) and new != 10**30 and new == new)


def field_cases(value, fields: list[str] | None, every: int = 1) -> Iterator[tuple[str, object]]:
    "One wrong field after another; of many every n-th combination, so that all fields and all kinds of wrong are seen."
    found = [p for p in paths(value) if fields is None or ".".join(map(str, p)) in fields]
    for n, path in enumerate(found):
        old = value
        for key in path: old = old[key]
        for k, (kind, new) in enumerate(VALUES.items()):
            if (n + k) % every == 0 and not same_kind(old, new) and (new is not MISSING or path[-1] != "max_new_tokens"): yield f"{'.'.join(map(str, path))}: {kind}", changed(value, path, new)


# ---- Where it is tried ---------------------------------------------------------------------------------------------
def run(argv, root: Path) -> tuple[int, str]:
    "A command in a fork of this process, which has everything imported; killed after `LIMIT` seconds."
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for target, source in ((0, nowhere), (1, nowhere), (2, said.fileno())): os.dup2(source, target)
            signal.alarm(LIMIT)
            os._exit(_command(argv, root))
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode("utf-8", "replace")


def _command(argv, root: Path) -> int:
    from safeeraser.cli import main
    os.chdir(root)
    out, err = sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # by name too, or replacing them closes them
    code = 0
    with mock.patch.object(sys, "argv", ["safeeraser", *argv]):
        try: main()
        except SystemExit as e: code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
    with contextlib.suppress(ValueError): sys.stdout.flush(), sys.stderr.flush()
    return code


def _link_large(source, target): (os.link if os.path.getsize(source) > 200_000 else shutil.copy2)(source, target)


def attempt(case: Case, base: Path, scratch: Path) -> Outcome:
    "The command on a copy of the good folder with one thing wrong."
    root = scratch / "case"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root, copy_function=_link_large)
    if case.content is not None:
        (root / case.file).unlink(missing_ok=True)
        (root / case.file).write_bytes(case.content)
    before = set(root.rglob("*"))
    code, said = run(case.argv, root)
    return Outcome(code, said, tuple(sorted(str(p.relative_to(root)) for p in set(root.rglob("*")) - before if not p.name.endswith(".lock"))) if code else ())


def good_folder(root: Path, tiny) -> Path:
    "Everything that a person has after one run, made by the commands."
    shutil.copytree(tiny.data.parent, root / "world")
    shutil.copytree(tiny.model, root / "model")
    (root / "world/dataset/settings.json").write_text(json.dumps({"unlearn": {"default": {"learning_rate": 1e-3}, "po": {"lora_r": 2}}, "generate": {"max_new_tokens": 2, "batch_size": 8}}))
    for argv in (UNLEARN, GENERATE_ADAPTER, ["judge", "run/responses.jsonl", "--judge", "rule", "--out", "run/judged.jsonl"],
                 ["judge", "run/judged.jsonl", "--judge", "exact", "--out", "run/judged.jsonl"]):
        code, said = run(argv, root)
        assert code == 0, (code, argv, said)
    (root / "run/specificity.json").write_text(json.dumps({"schema_version": 1, "model": "m", "by": "lmms-eval", "tasks": {"gqa": {"score": .5, "n": 10, "of": 12}}}))
    code, said = run(["report", "run", "--judge", "exact", "--out", "results.json"], root)
    assert code == 0, (code, argv, said)
    shutil.rmtree(root / "run/checkpoints", ignore_errors=True)
    (root / "run/report.html").unlink()
    row = json.loads((root / "run/judged.jsonl").read_text().splitlines()[0])
    key = [row[k] for k in ("method", "seed", "split", "set", "image_id", "question", "sample")]
    (root / "labels.jsonl").write_text(json.dumps({"key": key, "asked": "refusal", "label": True}) + "\n")
    torch.save({k.replace("base_model.model.", ""): v for k, v in load_file(root / "run/adapter_model.safetensors").items()}, root / "checkpoint.pt")
    (root / "config.yaml").write_text(json.dumps({"model": "model", "data": "world/dataset", "method": "po", "out": "new", "seed": 1, "settings": {"max_steps": 1, "lora_r": 2}}))
    return root


SMALL = ["--set", "max_steps=1", "--set", "lora_r=2", "--set", "per_device_train_batch_size=2", "--set", "gradient_accumulation_steps=1", "--set", "save_strategy=\"no\""]
UNLEARN = ["unlearn", "--model", "model", "--data", "world/dataset", "--method", "po", "--out", "run", *SMALL]
NEW_RUN = ["new" if x == "run" else x for x in UNLEARN]
GENERATE = ["generate", "--model", "model", "--data", "world/dataset", "--splits", "val", "--max-new-tokens", "1", "--out", "new.jsonl"]
GENERATE_ADAPTER = ["generate", "--model", "model", "--data", "world/dataset", "--adapter", "run", "--max-new-tokens", "2", "--out", "run/responses.jsonl"]
ADAPTED = [*GENERATE, "--adapter", "run"]
JUDGE = ["judge", "run/responses.jsonl", "--out", "new.jsonl"]
REPORT = ["report", "run", "--judge", "exact", "--out", "new.json"]
MERGE = ["merge", "run", "--out", "new"]
IMPORT = ["import-checkpoint", "checkpoint.pt", "--model", "model", "--out", "new"]

# file, verb, command, fields (None: all), every n-th combination
JSON_FILES = [
    ("world/dataset/all_train.json", "data check", ["data", "check", "world/dataset"], None, 2),
    ("world/dataset/all_train.json", "unlearn", NEW_RUN, ["0.image_path", "0.SDImage_path", "0.unsafe_pairs", "0.UnharmPair_text1"], 3),
    ("world/dataset/all_val.json", "generate", GENERATE, ["0", "0.image_path", "0.unsafe_pairs", "0.UnharmPair_text1"], 3),
    ("world/dataset/prompt.json", "unlearn", NEW_RUN, None, 2),
    ("world/dataset/settings.json", "unlearn", NEW_RUN, ["unlearn", "unlearn.po", "unlearn.po.lora_r", "unlearn.default"], 1),
    ("world/dataset/settings.json", "generate", [x for x in GENERATE if x not in ("--max-new-tokens", "1")], ["generate", "generate.max_new_tokens", "generate.batch_size"], 1),
    ("config.yaml", "unlearn --config", ["unlearn", "--config", "config.yaml"], None, 2),
    ("run/run.json", "report", REPORT, ["method", "seed", "model", "data", "settings", "history", "finished", "steps", "seconds", "packing", "environment"], 3),
    ("run/run.json", "generate --adapter", ADAPTED, ["method", "seed", "model", "model_fingerprint"], 3),
    ("run/run.json", "merge", MERGE, ["method", "seed", "model", "model_fingerprint"], 3),
    ("run/run.json", "unlearn again", UNLEARN, ["method", "settings", "finished", "data_digest", "objective"], 3),
    ("run/specificity.json", "report", REPORT, None, 2),
    ("results.json", "report results.json", ["report", "results.json", "--out", "new.json"], None, 7),
    ("run/adapter_config.json", "generate --adapter", ADAPTED, ["peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "lora_dropout"], 3),
    ("model/config.json", "generate", GENERATE, ["model_type", "text_config", "vision_config", "image_token_index", "text_config.hidden_size", "text_config.vocab_size", "text_config.num_attention_heads",
                                                 "vision_config.image_size", "vision_config.patch_size"], 4),
    ("model/generation_config.json", "generate", GENERATE, None, 4),
    ("model/processor_config.json", "generate", GENERATE, ["image_token", "patch_size", "image_processor", "vision_feature_select_strategy", "num_additional_image_tokens"], 4),
    ("model/tokenizer_config.json", "generate", GENERATE, ["eos_token", "pad_token", "extra_special_tokens", "tokenizer_class"], 4),
    ("model/tokenizer.json", "generate", GENERATE, ["model", "model.vocab", "pre_tokenizer", "added_tokens"], 4),
]
LINE_FILES = [
    ("run/responses.jsonl", "judge", [*JUDGE, "--judge", "rule"], None, 2),
    ("run/responses.jsonl", "judge exact", [*JUDGE, "--judge", "exact"], ["question", "reference", "response", "set", "image_id"], 2),
    ("run/judged.jsonl", "report", REPORT, ["method", "seed", "image_id", "split", "set", "category", "question", "sample", "response", "verdicts", "verdicts.exact", "verdicts.exact.refusal",
                                            "verdicts.exact.correct"], 2),
    ("labels.jsonl", "judge --calibrate", ["judge", "run/judged.jsonl", "--calibrate", "labels.jsonl"], None, 1),
]
BINARY_FILES = [("model/model.safetensors", "generate", GENERATE), ("run/adapter_model.safetensors", "generate --adapter", ADAPTED), ("run/adapter_model.safetensors", "merge", MERGE),
                ("checkpoint.pt", "import-checkpoint", IMPORT), ("world/dataset/all_train.json", "data check", ["data", "check", "world/dataset"])]
NUMBERS, TEXTS = ["x", "", "nan", "inf", "-1", "1e400", "1.5", "9" * 40], ["", "no/such/thing", "\ud800", "x" * 5000]
OPTIONS = {  # a command that works, and its options: each is given each wrong value in turn
    "generate": (GENERATE, {"--samples": NUMBERS, "--temperature": NUMBERS, "--top-p": [*NUMBERS, "0", "2"], "--max-new-tokens": NUMBERS, "--batch-size": NUMBERS, "--batch-tokens": NUMBERS,
                            "--seed": NUMBERS, "--splits": ["", "none", "val,val", ","], "--adapter": TEXTS, "--model": TEXTS, "--data": TEXTS, "--server": ["nonsense", "http://127.0.0.1:1/v1", "http://\n"],
                            "--engine": ["", "nonsense", "vllm"], "--python": TEXTS, "--gpus": NUMBERS, "--engine-args": ["--seed 1"]}),
    "unlearn": (NEW_RUN, {"--seed": NUMBERS, "--method": ["", "nonsense", "npo(beta=0)", "npo(beta=nan)", "npo(beta=-1)", "po+po", "1e400 po", "-1 po"], "--preset": TEXTS, "--config": TEXTS, "--model": TEXTS, "--data": TEXTS}),
    "judge": ([*JUDGE, "--judge", "rule"], {"--judge": ["", "nonsense", "server", "guard", "chat"], "--at-once": NUMBERS, "--view": ["", "nonsense"], "--calibrate": TEXTS, "--out": ["world", "/dev/null/x"]}),
    "report": (REPORT, {"--judge": ["", "nobody", "rule2"], "--out": ["world", "/dev/null/x"], "--page": ["world"], "--csv": ["world"], "--markdown": ["world"]}),
    "merge": (MERGE, {"--model": TEXTS, "--out": ["model", "labels.jsonl", "/dev/null/x"]}),
    "import-checkpoint": (IMPORT, {"--alpha": NUMBERS, "--model": TEXTS, "--out": ["model", "/dev/null/x"]}),
    "import-results": (["import-results", "world/dataset/all_val.json", "--method", "m", "--out", "new.jsonl"], {"--split": ["", "../x", "nonsense/y"], "--method": ["", "\ud800"], "--data": TEXTS}),
    "world": (["world", "--out", "new", "--records", "2"], {"--seed": ["x", "", "nan", "1.5", "9" * 40, "-1"], "--records": ["x", "0", "-1", "1.5"]}),
    "sweep": (["sweep", "--model", "model", "--data", "world/dataset", "--method", "po", "--out", "new", "--grid", "lora_r=2", *SMALL],
              {"--grid": ["", "lora_r", "lora_r=", "lora_r=4,x", "learning_rate=1e-3,NaN", "seed=1,2", "nonsense=1"], "--judge": ["", "nonsense"], "--seed": NUMBERS[:5]}),
    "grid": (["grid", "--model", "model", "--data", "world/dataset", "--methods", "po", "--out", "new", *SMALL],
             {"--methods": ["", "nonsense", "po,po", ","], "--seeds": ["", "x", "-1", "1,1", "9" * 10, "9" * 40], "--grid": ["", "lora_r", "lora_r=4,x", "seed=1,2"], "--judge": ["", "nonsense", "guard"],
              "--judge-set": ["", "x", "model=m"], "--submit": ["", "pbs", "slurm"], "--slurm": ["", "x", "partition=gpu"], "--splits": ["", "none"], "--engine": ["nonsense", "vllm"], "--python": TEXTS}),
    "specificity": (["specificity", "model", "--run", "run", "--python", "python3"], {"--python": TEXTS, "--limit": NUMBERS[:5], "--run": TEXTS}),
    "data convert": (["data", "convert", "labels.jsonl", "--out", "new"], {"--split": ["", "a/b", "../x"], "--column": ["", "x", "image=", "nonsense=a"], "--harmless": TEXTS}),
}
SETTINGS = {name: ["NaN", "-1", "\"x\"", "Infinity", "[]", "null", "{}", "true", "1e30"] for name in (
    "learning_rate", "lora_r", "lora_alpha", "lora_dropout", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "threads", "max_length", "stop_forget_ce",
    "pack_row_tokens", "vision_cache_gib", "reference_cache_gib", "warmup_steps", "weight_decay", "max_grad_norm", "save_steps", "logging_steps", "dataloader_num_workers", "packing", "tuning", "projector",
    "group_images", "lr_scheduler_type", "optim", "report_to", "deepspeed", "fsdp", "save_strategy", "seed", "disable_tqdm", "output_dir", "eval_strategy", "data_seed", "label_smoothing_factor")}


def cases(base: Path) -> Iterator[Case]:
    "All of them, in a fixed order."
    dump = lambda value: json.dumps(value).encode()
    for file, verb, argv, fields, every in JSON_FILES:
        text = (base / file).read_bytes()
        for what, content in whole_files(text): yield Case(verb, f"{file}: {what}", tuple(argv), file, content)
        for what, value in field_cases(json.loads(text), fields, every): yield Case(verb, f"{file}, {what}", tuple(argv), file, dump(value))
    for file, verb, argv, fields, every in LINE_FILES:
        first, *others = (base / file).read_bytes().splitlines(keepends=True)
        for what, content in whole_files(first): yield Case(verb, f"{file}, line 1: {what}", tuple(argv), file, content + b"\n" + b"".join(others))
        for what, value in field_cases(json.loads(first), fields, every): yield Case(verb, f"{file}, line 1, {what}", tuple(argv), file, dump(value) + b"\n" + b"".join(others))
    for file, verb, argv in BINARY_FILES:
        text = (base / file).read_bytes()
        broken = {"empty": b"", "zeros": b"\0" * 100, "half": text[:len(text) // 2], "its first 7 bytes": text[:7], "its last byte lost": text[:-1], "text": b"nonsense"}
        for what, content in broken.items(): yield Case(verb, f"{file}: {what}", tuple(argv), file, content)
    for verb, (argv, options) in OPTIONS.items():
        for option, values in options.items():
            kept = [x for k, x in enumerate(argv) if x != option and (k == 0 or argv[k - 1] != option)]
            for value in values: yield Case(verb, f"{option} {value!r:.40}", (*kept, option, value))
    for name, values in SETTINGS.items():
        for value in values: yield Case("unlearn --set", f"{name}={value}", (*NEW_RUN, "--set", f"{name}={value}"))


# Accepted rightly: what a command does not read, may be left out, or is overruled by an option.
FINE = [r"UnharmPair_\w+: (missing|nothing|null)", r"all_\w+.json, 0(\.unsafe_pairs\.0)?: missing", r"settings.json, [\w.]+: missing", r"settings.json, unlearn.po.lora_r", r"settings.json, unlearn.default",
        r"run.json, (seconds|history|packing|environment|steps|model|data|settings)", r"results.json, rows.0.\w+: (missing|null)", r"specificity.json, (model|by)", r"responses.jsonl, line 1, (category|image_digest|reference)",
        r"generation_config.json, (_from_model_config|transformers_version|output_\w+|use_cache)", r"line 1: (empty|cut off after)", r"tokenizer_config.json, tokenizer_class", r"config.yaml, (seed: (missing|null)|settings\.\w+: missing)",
        r"responses.jsonl, line 1, (decoding|run)", r"responses.jsonl, line 1, response: null", r"generation_config.json: an object", r"--temperature '1.5'",
        r"(max_length|stop_forget_ce|group_images|deepspeed|fsdp|seed|disable_tqdm|data_seed)=null"]


# ---- What was found ------------------------------------------------------------------------------------------------
def verdict(case: Case, found: Outcome) -> str:
    "told, fine, accepted (for no reason that we know), or what is wrong."
    if found.told: return "told"
    if found.code == 0: return "fine" if any(re.search(f, case.what) for f in FINE) else "accepted"
    if found.code < 0: return "killed by us: too slow" if found.code == -signal.SIGALRM else "died"
    if found.code == 2 and found.left: return f"left {', '.join(found.left[:3])}"
    if "Traceback" in found.said: return "traceback: " + found.said.strip().splitlines()[-1][:160]
    return f"exit {found.code}, {len(found.said.splitlines())} lines: {found.said.strip()[:120]!r}"


def tried(base: Path, scratch: Path, only: str = "", every: int = 1) -> list[tuple[Case, str]]:
    "Every n-th case with its verdict."
    for late in ("calibrate", "check", "convert", "engine", "export", "judges", "page", "published", "specificity", "sweep", "tiny_llava", "trainer"): __import__(f"safeeraser.{late}")
    __import__("peft")
    chosen = [c for c in cases(base) if only in c.verb][::every]
    return [(c, verdict(c, attempt(c, base, scratch))) for c in chosen]  # no bar: a command's own would be drawn below it


def told_text(found: list[tuple[Case, str]]) -> str:
    "The shares by verb, and every case that did not end as it should."
    lines, well = [], ("told", "fine")
    for verb in dict.fromkeys(c.verb for c, _ in found):
        count = Counter(v if v in (*well, "accepted") else "wrong" for c, v in found if c.verb == verb)
        lines.append(f"{verb:22} {count.total():4} tried {count['told']:4} in one sentence {count['fine']:4} fine {count['accepted']:4} accepted {count['wrong']:4} otherwise")
    lines.append(f"all: {len(found)} tried, {sum(v == 'told' for _, v in found)} in one sentence, {100 * share(found):.1f}% as they should be")
    return "\n".join([*lines, *(f"  {c}: {v}" for c, v in found if v not in well)])


def share(found: list[tuple[Case, str]]) -> float:
    "Of those that ended in one sentence, or rightly did not."
    return sum(v in ("told", "fine") for _, v in found) / len(found)


def main(only: str = ""):
    from conftest import make_tiny
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "good"
        base.mkdir()
        print(told_text(tried(good_folder(base, make_tiny(Path(folder) / "tiny")), Path(folder), only)))


if __name__ == "__main__": main(*sys.argv[1:])
