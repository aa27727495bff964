"""Small networks that describe and segment pictures, in the folders that the Hub's models have."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "photo",
    "of",
    "dog",
    "on",
    "sofa",
    "red",
    "the",
    "snow",
]
SAID = ["a", "photo", "of", "a", "dog", "on", "the", "sofa"]


def bert_tokenizer(folder: Path):
    from transformers import BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return BertTokenizer(str(folder / "vocab.txt"))


def save_vit_gpt2(folder: Path) -> Path:
    """A vision encoder and GPT-2 that says SAID of every picture: its weights were chosen so.

    Attention and MLPs give nothing, and what is left of a token is its position p, as a one-hot vector; the word of
    that position has the same vector in the output.
    """
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = bert_tokenizer(folder)
    encoder = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=32, patch_size=8
    )  # fmt: skip
    decoder = GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=16, is_decoder=True,
        add_cross_attention=True, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    network = VisionEncoderDecoderModel(config)
    for name, value in (("decoder_start_token_id", 2), ("pad_token_id", 0), ("eos_token_id", 3)):
        setattr(network.generation_config, name, value)
    gpt = network.decoder.transformer
    with torch.no_grad():
        for name, parameter in gpt.h.named_parameters():
            if "c_proj" in name:
                parameter.zero_()
        gpt.wpe.weight.copy_(100 * torch.eye(16))
        gpt.wte.weight.zero_()
        for position, word in enumerate([*SAID, "[SEP]"]):
            gpt.wte.weight[WORDS.index(word), position] += 1
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """A BLIP that says dog without end; like the real ones it begins with a token that its tokenizer does not have."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    text = {"hidden_size": 16, "encoder_hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 64, "vocab_size": len(WORDS) + 1}
    text |= {"bos_token_id": len(WORDS), "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3}
    vision = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 8}, projection_dim=8
    )
    network = BlipForConditionalGeneration(config)
    network.text_decoder.cls.predictions.bias.data[WORDS.index("dog")] = 100.0
    network.save_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), bert_tokenizer(folder))
    processor.save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """A random LLaVA, which is asked in a conversation."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "ASK", "ANSWER", *WORDS[5:]]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(words)}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 20}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    vision |= {"image_size": 32, "patch_size": 8}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=16)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    parts = (
        "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}"
    )
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=f"{{% for m in messages %}}ASK {parts}{{% endfor %}}ANSWER ",
    ).save_pretrained(folder)
    return folder


def save_clipseg(folder: Path) -> Path:
    """A random CLIPSeg."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from coeffdiff.pocket.model import tokenizer_pair

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {
        "vocab_size": 514,
        "max_position_embeddings": 77,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    vision = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config=text,
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
        extract_layers=[0, 1],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    CLIPSegProcessor(
        ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer_pair()[0]
    ).save_pretrained(folder)
    return folder


def save_segformer(folder: Path, labels: dict[int, str], favourite: int | None = None) -> Path:
    """A random SegFormer. favourite: the label that it sees everywhere."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[1, 1], decoder_hidden_size=8, id2label=labels,
    )  # fmt: skip
    network = SegformerForSemanticSegmentation(config)
    if favourite is not None:
        network.decode_head.classifier.bias.data[favourite] = 100.0
    network.save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_mask2former(folder: Path, labels: dict[int, str], favourite: int) -> Path:
    """A random Mask2Former, a panoptic model, that takes every segment for one label."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5, id2label=labels,
    )  # fmt: skip
    network = Mask2FormerForUniversalSegmentation(config)
    network.class_predictor.bias.data[favourite] = 100.0
    network.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
