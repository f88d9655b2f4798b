"""What goes out and what comes in: nothing that is not whole, finite and plain."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from safeeraser.core import SafeEraserError
from safeeraser.export import import_checkpoint, merge, read_tensors
from safeeraser.model import add_adapter, load_model


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    "A PEFT folder of the tiny model."
    folder = tmp_path_factory.mktemp("adapter") / "run"
    add_adapter(load_model(tiny.model, "cpu")[0], r=4, alpha=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tensors(adapter): return load_file(adapter / "adapter_model.safetensors")


def refused(said, call, folder):
    "The call ends in one sentence and leaves nothing but what was there."
    before = sorted(folder.rglob("*"))
    with pytest.raises(SafeEraserError, match=said) as e: call()
    assert "\n" not in str(e.value) and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_merged(value, adapter, tensors, tiny, tmp_path):
    shutil.copytree(adapter, tmp_path / "run")
    broken = dict(tensors)
    name = next(n for n in broken if "lora_B" in n)
    broken[name] = torch.full_like(broken[name], value)
    save_file(broken, tmp_path / "run" / "adapter_model.safetensors")
    refused("NaN", lambda: merge(tmp_path / "run", tmp_path / "merged", tiny.model, "cpu"), tmp_path)


def test_finite_parts_that_overflow_together_are_not_merged(adapter, tensors, tiny, tmp_path):
    shutil.copytree(adapter, tmp_path / "run")
    save_file({n: torch.full_like(t, 1e30) if "lora" in n else t for n, t in tensors.items()}, tmp_path / "run" / "adapter_model.safetensors")
    refused("infinite or NaN", lambda: merge(tmp_path / "run", tmp_path / "merged", tiny.model, "cpu"), tmp_path)


@pytest.mark.parametrize("record", ["[]", "{", '{"model": 5}', '{"method": []}', "\udcff"])
def test_a_run_record_of_another_form(record, adapter, tiny, tmp_path):
    shutil.copytree(adapter, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(record.encode(errors="surrogateescape"))
    refused("run.json", lambda: merge(tmp_path / "run", tmp_path / "merged", tiny.model, "cpu"), tmp_path)


@pytest.mark.parametrize("alpha", [0, -5, 10**30])
def test_a_scale_that_is_none(alpha, tensors, tiny, tmp_path):
    torch.save(tensors, tmp_path / "c.pt")
    refused("--alpha", lambda: import_checkpoint(tmp_path / "c.pt", tiny.model, tmp_path / "out", alpha), tmp_path)


def one(tensors, change):
    "The tensors with one of LoRA's changed."
    name = next(n for n in tensors if "lora_A" in n)
    return {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize("change, said", [
    (lambda t: one(t, lambda x: x.to(torch.complex64)), "complex64"), (lambda t: one(t, lambda x: x.to_sparse()), "sparse"), (lambda t: one(t, lambda x: x.int()), "int32"),
    (lambda t: one(t, lambda x: x[0, 0]), "several ranks"), (lambda t: one(t, lambda x: x[:0]), "several ranks"), (lambda t: one(t, lambda x: x * torch.nan), "not finite"),
    (lambda t: one(t, lambda x: x.double() + 1e300), "not finite"), (lambda t: {n: x[:0] if "lora_A" in n else x for n, x in t.items()}, "of none"),
    (lambda t: {**t, 5: torch.zeros(1)}, "by name"), (lambda t: {**t, **{"module." + n: x for n, x in t.items()}}, "the name of another"),
    (lambda t: {n: x for n, x in t.items() if "lora" not in n}, "no LoRA tensors"), (lambda t: list(t.values()), "dictionary"), (lambda t: {}, "dictionary"), (lambda t: None, "dictionary"),
])
def test_checkpoints_that_are_none(change, said, tensors, tiny, tmp_path):
    torch.save(change(tensors), tmp_path / "c.pt")
    refused(said, lambda: import_checkpoint(tmp_path / "c.pt", tiny.model, tmp_path / "out"), tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04N.", b"\x80\x02c__builtin__\nprint\nq\x00.", b"hello"])
@pytest.mark.filterwarnings("error")
def test_files_that_hold_no_checkpoint(content, tmp_path):
    (tmp_path / "c.pt").write_bytes(content)
    refused("c.pt: ", lambda: read_tensors(tmp_path / "c.pt"), tmp_path)


def test_an_output_that_is_written_already(adapter, tiny, tmp_path):
    from safeeraser.core import only_here
    with only_here(tmp_path / "merged"):
        with pytest.raises(SafeEraserError, match="another process"): merge(adapter, tmp_path / "merged", tiny.model, "cpu")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused("link to nothing", lambda: merge(adapter, tmp_path / "link", tiny.model, "cpu"), tmp_path)
    assert merge(adapter, tmp_path / "merged", tiny.model, "cpu") < 1e-4
    assert json.loads((tmp_path / "merged" / "safeeraser.json").read_text())["adapter"] == "run"
