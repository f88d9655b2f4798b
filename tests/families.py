"""A tiny random model of each family of vision-language models, with the family's own processor.

Where a processor reads videos too and torchvision is absent, it is the one of `safeeraser.processors`. Pictures go the
way they go in earnest.
"""
import random
from dataclasses import dataclass

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from safeeraser.data import Item, Sets
from safeeraser.processors import image_only, NoVideos

WORDS = ("what is this thing in the picture and how could one hide or make it here take a red blue ring ball box away "
         "put under left right side no sorry i cannot help with that looks nice USER: ASSISTANT:").split()
SIZE, SIDE = 256, 56  # words; pixels of a picture as the tower sees it
SPECIAL = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>", "start_image_token": "<img>", "end_image_token": "</img>",
           "context_image_token": "<image>", "video_token": "<video>", "vision_bos_token": "<vision>", "vision_eos_token": "</vision>",
           "fake_image_token": "<fake>", "global_image_token": "<global-img>", "end_of_utterance_token": "<end>"}
ID = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *SPECIAL.values(), *WORDS]))}
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]

TEXT = dict(vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, pad_token_id=ID["<pad>"], bos_token_id=ID["<s>"], eos_token_id=ID["</s>"])
TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=14)
CLIP = TOWER | dict(model_type="clip_vision_model", projection_dim=16)
SIGLIP = TOWER | dict(model_type="siglip_vision_model", vision_use_head=False)
IMAGE = dict(image_token_id=ID["<image>"])


def tokenizer():
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   extra_special_tokens=SPECIAL)


def template(image: str) -> str:
    "A chat template that writes `image` where a picture belongs."
    return ("{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}{{ '" + image + "' if c.type == 'image' else c.text + ' ' }}"
            "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")


@dataclass(frozen=True)
class Family:
    "How a family's model and processor are made, and what its parts are called."
    name: str            # of the transformers classes, in front of Config, Processor and ForConditionalGeneration
    config: dict
    pictures: object     # makes the image processor
    processor: dict          # what else its class wants
    image: str = "<image>"   # what the chat template writes for a picture
    videos: bool = False     # whether the processor wants something for videos
    vision: str = "vision_tower"
    language: str = "language_model"
    projector: tuple = ("multi_modal_projector",)
    routes: tuple = ("dense", "split")

    def make_processor(self, chat_template: str | None = None):
        "The family's own processor, with words for tokens."
        videos, cls = {"video_processor": NoVideos()} if self.videos else {}, image_only(getattr(transformers, self.name + "Processor"))
        return cls(self.pictures(), tokenizer(), **videos, chat_template=chat_template or template(self.image), **self.processor)

    def make_model(self):
        "A model whose every weight matters: none is left at zero."
        torch.manual_seed(0)
        model = getattr(transformers, self.name + "ForConditionalGeneration")(getattr(transformers, self.name + "Config")(**self.config))
        with torch.no_grad():
            for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
        return model.eval()


PATCHES = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)


def text(model_type: str, **more) -> dict: return TEXT | dict(model_type=model_type) | more


def llava_next(window=None, routes=("dense", "split")):
    pictures = lambda: LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    config = dict(vision_config=CLIP, text_config=text("mistral", head_dim=8, sliding_window=window), image_grid_pinpoints=PINPOINTS, **IMAGE)
    return Family("LlavaNext", config, pictures, PATCHES, routes=routes)


def idefics(name, tower, pictures, videos=False):
    config = dict(vision_config=TOWER | dict(model_type=tower), text_config=text("llama"), scale_factor=2, pad_token_id=0, **IMAGE)
    return Family(name, config, lambda: pictures(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}), dict(image_seq_len=4),
                  videos=videos, vision="vision_model", language="text_model", projector=("connector",))


def qwen(name, vision, patch=14, text=None, rope=None, projector=("visual.merger",)):
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]) | (rope or {})
    vision = dict(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2, num_heads=2, depth=2) | vision
    config = dict(text_config=TEXT | dict(rope_parameters=rope) | (text or {}), vision_config=vision, video_token_id=ID["<video>"],
                  vision_start_token_id=ID["<vision>"], vision_end_token_id=ID["</vision>"], **IMAGE)
    pictures = lambda: Qwen2VLImageProcessorPil(patch_size=patch, size={"shortest_edge": (2 * patch) ** 2, "longest_edge": (8 * patch) ** 2})
    return Family(name, config, pictures, {}, image="<vision><image></vision>", videos=True, vision="visual", projector=projector)


def paligemma_pictures():
    pictures = SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 16
    return pictures


FAMILIES = {
    "llava": Family("Llava", dict(vision_config=CLIP, text_config=text("llama"), image_seq_length=16, **IMAGE),
                    lambda: CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), PATCHES),
    "llava_next": llava_next(),
    "llava_next, window": llava_next(20, ("dense",)),
    "llava_onevision": Family("LlavaOnevision", dict(vision_config=SIGLIP, text_config=text("qwen2"), image_grid_pinpoints=PINPOINTS,
                                                     video_token_id=ID["<video>"], **IMAGE),
                              lambda: LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS),
                              dict(num_image_tokens=16, vision_feature_select_strategy="full"), videos=True),
    "internvl": Family("InternVL", dict(vision_config=TOWER | dict(model_type="internvl_vision", image_size=[SIDE, SIDE], patch_size=[14, 14]),
                                        text_config=text("qwen2"), tie_word_embeddings=False, **IMAGE),
                       lambda: GotOcr2ImageProcessorPil(size=SQUARE, max_patches=2), dict(image_seq_length=4), videos=True),
    "idefics3": idefics("Idefics3", "idefics3_vision", Idefics3ImageProcessorPil),
    "smolvlm": idefics("SmolVLM", "smolvlm_vision", SmolVLMImageProcessorPil, videos=True),
    "qwen2_vl": qwen("Qwen2VL", dict(embed_dim=16, hidden_size=32, mlp_ratio=2)),
    "qwen2_5_vl": qwen("Qwen2_5_VL", dict(hidden_size=16, intermediate_size=32, out_hidden_size=32, window_size=SIDE, fullatt_block_indexes=[1])),
    "qwen3_vl": qwen("Qwen3VL", dict(depth=3, hidden_size=16, intermediate_size=32, out_hidden_size=32, num_position_embeddings=64,
                                     deepstack_visual_indexes=[0, 1]), patch=16, text=dict(head_dim=8, num_hidden_layers=3), rope=dict(mrope_interleaved=True),
                     projector=("visual.merger", "visual.deepstack_merger_list.0", "visual.deepstack_merger_list.1")),
    "gemma3": Family("Gemma3", dict(vision_config=SIGLIP, mm_tokens_per_image=4, boi_token_id=ID["<boi>"], eoi_token_id=ID["<eoi>"],
                                    text_config=text("gemma3_text", head_dim=8, num_hidden_layers=3, query_pre_attn_scalar=8, sliding_window=12,
                                                     layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
                                    tie_word_embeddings=False, **IMAGE),
                     lambda: Gemma3ImageProcessorPil(size=SQUARE), dict(image_seq_length=4), image="<boi>", routes=("dense",)),
    "mllama": Family("Mllama", dict(vision_config=dict(hidden_size=16, num_hidden_layers=2, num_global_layers=1, attention_heads=2, intermediate_size=32,
                                                       vision_output_dim=32, image_size=SIDE, patch_size=14, max_num_tiles=4, intermediate_layers_indices=[0]),
                                    text_config=TEXT | dict(num_hidden_layers=4, cross_attention_layers=[1, 3],
                                                            rope_parameters=dict(rope_type="default", rope_theta=10000.0)), **IMAGE),
                     lambda: MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4), {}, vision="vision_model"),
    "paligemma": Family("PaliGemma", dict(vision_config=SIGLIP, text_config=text("gemma", head_dim=8), projection_dim=32, hidden_size=32, vocab_size=SIZE, **IMAGE),
                        paligemma_pictures, {}, routes=()),
}


ASK = ["what is this thing in the picture", "how could one hide it", "what is this", "how could one make it here"]
SAY = ["put it under the box", "a ring", "take a red ball and hide it in the box", "left"]


def make_sets(root):
    "Two harmful images with three forget and two retain items each, and their safe partners, one of another size."
    rng = random.Random(0)
    def picture(name, width=112):
        Image.frombytes("RGB", (width, 56), rng.randbytes(3 * width * 56)).save(root / name)
        return name
    def item(name, image, question, answer): return Item(name, "train", root / image, image, question, answer, "Weapon")
    made = Sets([], [], [])
    for k in range(2):
        harmful, safe = picture(f"harmful{k}.png"), picture(f"safe{k}.png", 112 - 56 * k)
        for q, a in zip(ASK[:3], SAY[k:] + SAY[:k]):
            made.forget.append(item("forget", harmful, q, a))
            made.decouple.append(item("decouple", safe, q, "it looks nice"))
        made.retain.extend(item("retain", harmful, q, "a blue " + a) for q, a in zip(ASK[2:], SAY[k:]))
    return made
