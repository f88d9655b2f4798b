"""The command line says everything once: options are the functions' parameters, their help the docments."""
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, Union

import pytest
import typer.main
from command import command as call
from fastcore.docments import docments
from safeeraser.cli import app
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
ROOT_COMMAND = typer.main.get_command(app)
VERBS = {(*group, c.callback.__name__): c for group, of in (((), app), (("data",), next(g.typer_instance for g in app.registered_groups)))
         for c in of.registered_commands}
TAKING = [pytest.param(group, function, id=f"{group[-1]} {function}") for group, c in VERBS.items() for function in getattr(c.callback, "taken", ())]
PARTLY = {"trainer.unlearn", "plan.plan", "check.check_dataset", "published.read_authors", "specificity.specificity", "specificity.lmms_command", "bulk.bulk_generate"}  # by `only`
DIFFERENT = {("unlearn", n) for n in ("model", "data", "method", "out")} | {("plan", n) for n in ("model", "data", "method")} | {("sweep", "judge"), ("make_answers", "max_new_tokens"), *((verb, n) for verb in ("generate", "grid_command") for n in ("engine", "python"))}  # defaults


def words(text): return re.sub(r"[\s-]+", " ", text).strip().lower()


def path_of(key):
    "The words that call a verb."
    return [*key[:-1], VERBS[key].name or key[-1].replace("_", "-")]


def found(path):
    "The command at a path, as typer made it."
    command = ROOT_COMMAND
    for name in path: command = command.get_command(None, name)
    return command


def real(function):
    module, name = function.split(".")
    return getattr(importlib.import_module(f"safeeraser.{module}"), name)


def sayable(annotation):
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return any(m in (str, Path, int, float, bool, list[str]) for m in members)


@pytest.mark.parametrize("key, function", TAKING)
def test_an_option_is_its_function_s_parameter_and_its_help_the_docment(key, function):
    options = {p.name: p for p in found(path_of(key)).params}
    told, parameters = docments(real(function)), inspect.signature(real(function)).parameters
    taken = VERBS[key].callback.taken[function]
    for name in taken:
        option, default = options[name], parameters[name].default
        assert words(option.help) and words(told[name] or "") in words(option.help)
        if (key[-1], name) not in DIFFERENT:
            assert option.required == (default is inspect.Parameter.empty) and (option.required or option.default == default)
    if function in PARTLY or key[-1] in ("make_answers", "grid_command") and function == "generate.generate": return
    left = {n for n, p in parameters.items() if n not in taken and p.kind is not p.VAR_KEYWORD and sayable(p.annotation)}
    assert left <= {"progress"}, "the verb lacks what its function has"


def test_generate_and_merge_have_what_their_functions_have():
    assert {"device", "share_images"} <= {p.name for p in found(["generate"]).params} and "device" in {p.name for p in found(["merge"]).params}


def parsed(line):
    "Parse a command without running it; typer exits where an option is unknown or missing."
    path, args = [], shlex.split(line, comments=True)[1:]
    while not path or path == ["data"]: path.append(args.pop(0))
    return found(path).make_context(path[-1], args)


def test_help_is_in_the_order_of_work_and_every_verb_has_an_example():
    helped = CliRunner().invoke(app, ["--help"]).output
    shown = [line.split()[0] for line in helped.split("Commands:")[1].split("The loop:")[0].splitlines() if re.match(r"  \w", line)]
    work = [v for v in shown if v in ("world", "unlearn", "generate", "judge", "report", "merge")]
    assert work == ["world", "unlearn", "generate", "judge", "report", "merge"]
    for key in VERBS:
        text = CliRunner().invoke(app, [*path_of(key), "--help"]).output
        example, = re.findall(r"Example:\n +(safeeraser .*)", text)
        assert example.split()[1:1 + len(path_of(key))] == path_of(key) and parsed(example)


def commands_in(text): return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line.startswith("safeeraser ")]


def test_what_the_readme_types_can_be_typed():
    lines = commands_in((ROOT / "README.md").read_text())
    assert len(lines) >= 5
    for line in lines: parsed(line)


def test_version():
    done = call("--version")
    assert done.returncode == 0 and re.fullmatch(r"safeeraser \d+\.\d+\.\d+\n", done.stdout)


def test_help_loads_neither_torch_nor_transformers():
    code = "import sys\nfrom safeeraser.cli import app\ntry: app(['generate', '--help'])\nexcept SystemExit: print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


def test_every_verb_says_what_to_do_next(tiny, tmp_path):
    "The loop by its own advice: each step is the command that the step before it told."
    run = tmp_path / "my run"
    done = call("unlearn", "--model", tiny.model, "--data", tiny.data, "--method", "gd", "--out", run, "--seed", 2,
                "--set", "max_steps=1", "--set", "use_cpu=true", "--set", "lora_r=4")
    for verb in ("generate", "judge", "report"):
        told, = re.findall(r"^next: safeeraser (.*)$", done.stdout, re.M)
        done = call(*shlex.split(told))
        assert told.startswith(verb) and done.returncode == 0, done.stderr
    assert (run / "report.html").is_file() and "report.html in a browser" in done.stdout
    merged = call("merge", run, "--out", tmp_path / "merged")
    assert f"next: vllm serve {tmp_path / 'merged'}" in merged.stdout and merged.stderr == ""
    checked = call("data", "check", tiny.data)
    assert re.search(r"^next: safeeraser unlearn .*--data", checked.stdout, re.M)
    assert "next:" not in call("data", "check", tiny.data, "--json").stdout
