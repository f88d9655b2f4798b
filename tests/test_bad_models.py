"""A model folder or an adapter that is not what it says ends in one sentence, and no number is drawn at random for it."""
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeeraser.core import SafeEraserError
from safeeraser.export import merge
from safeeraser.model import load_adapter, load_model, model_fingerprint, same_weights
from safeeraser.trainer import unlearn

SMALL = dict(seed=1, progress=False, lora_r=2, use_cpu=True, save_strategy="no", max_steps=1)


@pytest.fixture
def model(tiny, tmp_path): return shutil.copytree(tiny.model, tmp_path / "model")


def edited(file, **changes):
    "A JSON file with values replaced; `a__b` is b inside a."
    whole = json.loads(file.read_text())
    for path, value in changes.items():
        inside, *names = whole, *path.split("__")
        for name in names[:-1]: inside = inside[name]
        inside[names[-1]] = value
    file.write_text(json.dumps(whole))


def one_sentence(said, call):
    with pytest.raises(SafeEraserError, match=said) as found: call()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("change, said", [
    ({"text_config__hidden_size": 10**12}, "overflowed"), ({"text_config__vocab_size": 10**15}, "describes a model of 6.4e[+]16"), ({"text_config__intermediate_size": 10**9}, "describes a model"),
    ({"text_config__num_hidden_layers": 10**9}, "text_config.num_hidden_layers: at most 1000"), ({"vision_config__num_hidden_layers": 10**9}, "at most 1000"),
    ({"text_config__num_hidden_layers": 3}, r"they lack model.language_model.layers.2"), ({"text_config__num_hidden_layers": 1}, "which config.json does not, model.language_model.layers.1"),
    ({"text_config__hidden_size": 48}, "lm_head.weight is .* in the file and"), ({"text_config__hidden_size": "x"}, "expected int, got str"), ({"text_config__num_attention_heads": 0}, "num_attention_heads: at least 1"),
    ({"text_config": None}, "describes a model of"), ({"image_token_index": 10**9}, "image token is 1000000000, the processor's 4"), ({"model_type": "x"}, "cannot be loaded")], ids=str)
def test_a_configuration_that_is_not_the_weights(change, said, model):
    edited(model / "config.json", **change)
    begin = time.time()
    one_sentence(said, lambda: load_model(model, "cpu"))
    assert time.time() - begin < 20


@pytest.mark.parametrize("change, said", [
    ({"vision_config__image_size": float("inf")}, "vision_config.image_size: a finite number"), ({"vision_config__layer_norm_eps": float("nan")}, "layer_norm_eps: a finite number"),
    ({"vision_config__patch_size": 0}, "vision_config.patch_size: at least 1"), ({"vision_config__num_channels": -3}, "num_channels: at least 1"), ({"vision_config__image_size": 10**9}, "describes a model"),
    ({"text_config__max_position_embeddings": 10**30}, "max_position_embeddings: at most 100000000"), ({"vision_feature_layer": 10**9}, "a layer from -3 to 2 belongs here"),
    ({"quantization_config": {"quant_method": "gguf"}}, "quantization_config.quant_method: 'gguf' is not read here"), ({"quantization_config": {"quant_method": "x"}}, "'x' is not read here"),
    ({"quantization_config": 5}, "quantization_config: an object belongs here"), ({"quantization_config": {}}, "None is not read here")], ids=str)
def test_single_numbers_of_a_configuration(change, said, model):
    edited(model / "config.json", **change)
    one_sentence(said, lambda: load_model(model, "cpu"))


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [10**30, 10**6, 1.5, True, -2, float("inf"), "x", {}], ids=str)
def test_tokens_that_there_are_not(name, value, model):
    edited(model / "generation_config.json", **{name: value})
    one_sentence(f"{name}|cannot be loaded", lambda: load_model(model, "cpu"))


@pytest.mark.parametrize("template, said", [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template: cannot write .* unsafe"), ("{% for i in range(10**12) %}x{% endfor %}", "Range too big"), ("{% if x %}", "chat template"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "its chat template takes longer than 5 s"), ("{{ raise_exception('no') }}", "chat template: cannot write .*no")])
def test_templates_that_break(template, said, model, tmp_path):
    from safeeraser.check import encoder_for
    (model / "chat_template.jinja").write_text(template)
    begin = time.time()
    for call in (lambda: load_model(model, "cpu"), lambda: encoder_for(model)): one_sentence(said, call)
    assert time.time() - begin < 30


@pytest.mark.parametrize("content", [b"", b"x" * 5000, "first 50", "first half"], ids=str)
def test_weights_that_are_cut_off(content, model):
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes({"first 50": whole[:50], "first half": whole[:len(whole) // 2]}.get(content, content))
    one_sentence("cannot be loaded|but the files beside it hold", lambda: load_model(model, "cpu"))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[]", "{", "5", ""])
def test_settings_that_are_no_objects(file, content, model):
    (model / file).write_text(content)
    one_sentence("model", lambda: load_model(model, "cpu"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, model, tiny, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights[next(n for n in weights if n.endswith("layers.1.mlp.up_proj.weight"))][3, 5] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    one_sentence(r"up_proj.weight hold NaN or infinity", lambda: load_model(model, "cpu"))
    one_sentence(r"up_proj.weight hold NaN or infinity", lambda: unlearn(model, tiny.data, tmp_path / "run", "ga", **SMALL))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    unlearn(tiny.model, tiny.data, out, "ga", **SMALL)
    return out


@pytest.fixture
def run(trained, tmp_path): return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("change, said", [
    ({"target_modules": "(a+)+$"}, "target_modules: a list of module names, or a simple pattern"), ({"target_modules": ".*.*.*.*x"}, "a simple pattern"),
    ({"target_modules": r"(?:.*a){1,30}"}, "a simple pattern"), ({"exclude_modules": "(x*)*y"}, "exclude_modules"), ({"rank_pattern": {"(a|a)+$": 2}}, "rank_pattern"),
    ({"layers_pattern": "(a+)+"}, "layers_pattern"), ({"r": 10**9}, "r: the weights' rank is 2, found 1000000000"), ({"r": 0}, "r: "), ({"r": "x"}, "r: a whole number"),
    ({"rank_pattern": {"q_proj": 10**9}}, "found 1000000000"), ({"lora_alpha": float("nan")}, "lora_alpha: a finite number"), ({"lora_dropout": 7}, "lora_dropout"),
    ({"peft_type": "NONSENSE"}, "does not fit"), ({"target_modules": 5}, "target_modules"), ({"modules_to_save": "x"}, "modules_to_save: a list")], ids=str)
def test_settings_of_an_adapter(change, said, run, tiny):
    edited(run / "adapter_config.json", **change)
    begin = time.time()
    one_sentence(said, lambda: load_adapter(load_model(tiny.model, "cpu")[0], run))
    assert time.time() - begin < 20


@pytest.mark.parametrize("pattern", [r"model\.language_model\.(.*\.)?layers\.\d+\..*\.(down_proj|up_proj)", ["q_proj", "v_proj"], "all-linear", r".*language_model.*\.(up_proj|k_proj)", r"^model.*q_proj$"], ids=str)
def test_patterns_that_are_in_use(pattern):
    from safeeraser.model import _simple
    assert all(map(_simple, [pattern] if isinstance(pattern, str) else pattern))


@pytest.mark.parametrize("content, said", [("[]", "an object belongs here"), ("{", "not JSON"), ('{"model_fingerprint": 5}', "model_fingerprint"), (b"\xe9{}", "UTF-8")], ids=str)
def test_records_of_an_adapter(content, said, run, tiny):
    (run / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    one_sentence(said, lambda: load_adapter(load_model(tiny.model, "cpu")[0], run))


def test_an_adapter_that_is_not_finite_or_of_another_shape(run, tiny, tmp_path):
    weights = load_file(run / "adapter_model.safetensors")
    name = min(weights)
    for wrong, said in ((torch.full_like(weights[name], torch.nan), f"{name} hold NaN"), (torch.zeros(3, 3), f"another shape of {name}")):
        save_file(weights | {name: wrong}, run / "adapter_model.safetensors")
        for call in (lambda: load_adapter(load_model(tiny.model, "cpu")[0], run), lambda: merge(run, tmp_path / "merged", tiny.model)): one_sentence(said, call)
    save_file({k: torch.full_like(v, 1e30) if "lora_" in k else v for k, v in weights.items()}, run / "adapter_model.safetensors")  # each is finite, products are not
    one_sentence("it cannot be merged", lambda: merge(run, tmp_path / "merged", tiny.model))
    assert not (tmp_path / "merged").exists()


def test_every_weight_counts_in_a_fingerprint(tiny):
    net = load_model(tiny.model, "cpu")[0]
    before, found = model_fingerprint(net), set()
    for name, weight in net.state_dict().items():
        last = (-1,) * weight.ndim
        old, weight[last] = weight[last].clone(), torch.nextafter(weight[last], torch.tensor(9.))
        found.add(changed := model_fingerprint(net))
        assert not same_weights(before, changed), name
        weight[last] = old
    assert model_fingerprint(net) == before and len(found) == len(net.state_dict())
    assert same_weights(before, model_fingerprint(net.bfloat16()))
