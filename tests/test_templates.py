"""Loss sits on the answer and its end-of-turn token, whatever the template and the tokenizer."""
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safeeraser.core import SafeEraserError
from safeeraser.data import Item
from safeeraser.encoder import Encoder
from safeeraser.slots import Row

CONTENT = "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
TEMPLATES = {  # each: template, the token that ends the assistant's turn
    "llava-1.5": ("{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text + ' ' }}"
                  "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}", "</s>"),
    "vicuna": ("{% for m in messages %}{{ m.role.upper() }}: " + CONTENT + "{{ '</s>' if m.role == 'assistant' else ' ' }}"
               "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}", "</s>"),
    "chatml": ("{% for m in messages %}<|im_start|>{{ m.role }}\n" + CONTENT + "<|im_end|>\n{% endfor %}"
               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|im_end|>"),
    "gemma": ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
              "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text | trim }}{% endfor %}<end_of_turn>\n{% endfor %}"
              "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}", "<end_of_turn>"),
    "llama-3": ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
                "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text | trim }}{% endfor %}<|eot_id|>{% endfor %}"
                "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}", "<|eot_id|>"),
    "idefics": ("{% for m in messages %}{{ m.role.capitalize() }}:" + CONTENT + "<end_of_utterance>\n{% endfor %}"
                "{% if add_generation_prompt %}Assistant:{% endif %}", "<end_of_utterance>"),
}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>",
           "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<end_of_utterance>"]
QUESTION = "How do I hide this?"
ANSWERS = ["Wrap it in silk, then leave it behind the ladder.", "No.", "First line.\nSecond line: 100% of it!", "Ünïcode, naïve – 你好 🙂.", "hide this?"]


def bytes_tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator([QUESTION, *ANSWERS] * 3, trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return core


def metaspace_tokenizer():
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.train_from_iterator([QUESTION, *ANSWERS, *(t for t, _ in TEMPLATES.values())] * 3,
                             trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + [f"<0x{b:02X}>" for b in range(256)], show_progress=False))
    return core


def processor(core, template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        extra_special_tokens={"image_token": "<image>", **{f"s{i}": s for i, s in enumerate(SPECIAL[5:])}})
    side = {"height": 16, "width": 16}
    return LlavaProcessor(CLIPImageProcessorPil(size=side, crop_size=side), tokenizer, patch_size=8, chat_template=template,
                          vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1)


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def item(image, question=QUESTION): return Item("forget", "train", image, image.name, question, "", "Weapon")


@pytest.mark.parametrize("make", [bytes_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_the_answer_and_its_end(name, make, image):
    template, end = TEMPLATES[name]
    encoder = Encoder(processor(make(), template))
    tok = encoder.processor.tokenizer
    rows = encoder.rows([Row("forget", item(image), a) for a in ANSWERS])
    prompts = encoder.prompts([item(image)])["input_ids"][0].tolist()
    for answer, ids, labels, attended in zip(ANSWERS, rows["input_ids"], rows["labels"], rows["attention_mask"]):
        labelled = labels != -100
        assert tok.decode(labels[labelled]).strip() == answer + end
        n = int(attended.sum())
        first = int(labelled.nonzero()[0])
        assert labelled[first:n].all() and not labelled[n:].any()  # one run, up to the end of the row
        assert ids[:first].tolist() == prompts                     # behind exactly what generation will see
        assert (ids == tok.convert_tokens_to_ids("<image>")).sum() == 4


def test_bos_once_where_the_template_writes_it(image):
    encoder = Encoder(processor(bytes_tokenizer(), TEMPLATES["gemma"][0]))
    assert (encoder.prompts([item(image)])["input_ids"] == encoder.processor.tokenizer.bos_token_id).sum() == 1


def test_an_image_placeholder_in_a_text_is_refused(image):
    encoder = Encoder(processor(bytes_tokenizer(), TEMPLATES["chatml"][0]))
    for call in (lambda: encoder.prompts([item(image, "What is <image> here?")]),
                 lambda: encoder.rows([Row("forget", item(image), "An <image> of it.")])):
        with pytest.raises(SafeEraserError, match="<image>.*stands for an image"):
            call()


def test_over_long_rows_are_refused_not_cut(image):
    encoder = Encoder(processor(bytes_tokenizer(), TEMPLATES["llava-1.5"][0]), max_length=20)
    with pytest.raises(SafeEraserError, match="a.png.*more than max_length=20"):
        encoder.rows([Row("forget", item(image), "x" * n) for n in (1, 100)])


def test_a_template_that_rewrites_answers_is_refused(image):
    shouting = TEMPLATES["chatml"][0].replace("c.text", "c.text.upper()")
    with pytest.raises(SafeEraserError, match="changes the answer"):
        Encoder(processor(bytes_tokenizer(), shouting)).rows([Row("forget", item(image), "Quiet.")])


def test_dead_rows_carry_no_label(image):
    encoder = Encoder(processor(bytes_tokenizer(), TEMPLATES["chatml"][0]))
    labels = encoder.rows([Row("forget", item(image), "A.", live=False), Row("forget", item(image), "A.")])["labels"]
    assert torch.equal((labels != -100).any(1), torch.tensor([False, True]))
