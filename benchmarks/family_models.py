"""Tiny networks of many families with random weights: transformers, timm, torchvision.

A library that is not installed leaves its families out. Widths are multiples of 16, so that blocks of 8 fit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, TOKENS, PIXELS = 96, 12, 32


@dataclass(frozen=True)
class Family:
    """One architecture: ``inputs(n)`` are the keywords of a forward pass over ``n`` samples.

    ``in_float64``: its twin trains in float64, where rounding hides no fault. Experts do not: torch's grouped
    product of them has no float64.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    in_float64: bool = True


def families() -> list[Family]:
    """Every family whose library is installed, in a fixed order."""
    makers = {"transformers": _of_transformers, "timm": _of_timm, "torchvision": _of_torchvision}
    return [
        family
        for library, make in makers.items()
        if importlib.util.find_spec(library) is not None
        for family in make()
    ]


def _tokens(n: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (n, TOKENS))}


def _both_sides(n: int) -> dict[str, Tensor]:
    return {**_tokens(n), "decoder_input_ids": torch.randint(3, VOCABULARY, (n, TOKENS // 2))}


def _pixel_values(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, PIXELS, PIXELS)}


def _image(name: str) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {name: torch.randn(n, 3, PIXELS, PIXELS)}


def _waves(n: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(n, 1600)}


def _spectrogram(n: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(n, 16, 32),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (n, TOKENS // 2)),
    }


_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 4,
}
_VISION = {
    "image_size": PIXELS,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 4,
}
_HEADS = {"head_dim": 8}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _of_transformers() -> list[Family]:
    import transformers

    def family(
        name: str,
        model: str,
        config: str,
        inputs: Callable[[int], dict[str, Tensor]],
        common: Mapping[str, Any],
        **own: Any,
    ) -> Family:
        def build() -> nn.Module:
            settings = getattr(transformers, config)(**{**common, **own})
            return getattr(transformers, model)(settings)

        return Family(
            name, "transformers", build, inputs, in_float64="Mixtral" not in model and "Moe" not in model
        )

    def decoder(name: str, prefix: str, **own: Any) -> Family:
        return family(name, f"{prefix}ForCausalLM", f"{prefix}Config", _tokens, _DECODER, **own)

    def encoder(name: str, prefix: str, **own: Any) -> Family:
        return family(name, f"{prefix}ForSequenceClassification", f"{prefix}Config", _tokens, _ENCODER, **own)

    def vision(name: str, prefix: str, **own: Any) -> Family:
        model, config = f"{prefix}ForImageClassification", f"{prefix}Config"
        return family(name, model, config, _pixel_values, _VISION, **own)

    def stages(name: str, prefix: str, **own: Any) -> Family:
        model, config = f"{prefix}ForImageClassification", f"{prefix}Config"
        return family(name, model, config, _pixel_values, {"num_labels": 4}, **own)

    return [
        decoder("Llama", "Llama"),
        decoder("Qwen2", "Qwen2"),
        decoder("Qwen3", "Qwen3", **_HEADS),
        decoder("Mistral", "Mistral"),
        decoder("Mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2),
        decoder("Qwen3-MoE", "Qwen3Moe", **_HEADS, **_MOE, num_experts=4),
        decoder("Gemma", "Gemma", **_HEADS),
        decoder("Gemma 2", "Gemma2", **_HEADS),
        decoder("Phi-3", "Phi3"),
        decoder("GPT-NeoX", "GPTNeoX", hidden_dropout=0.0),
        decoder("OPT", "OPT", ffn_dim=64, dropout=0.0, word_embed_proj_dim=32),
        family(
            "BLOOM",
            "BloomForCausalLM",
            "BloomConfig",
            _tokens,
            {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0},
        ),
        family(
            "GPT-2",
            "GPT2LMHeadModel",
            "GPT2Config",
            _tokens,
            {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
            bos_token_id=1,
            eos_token_id=2,
        ),
        encoder("BERT", "Bert"),
        encoder("RoBERTa", "Roberta", pad_token_id=0, bos_token_id=1, eos_token_id=2),
        encoder("ELECTRA", "Electra", embedding_size=32),
        encoder("ALBERT", "Albert", embedding_size=32),
        encoder("DeBERTa-v2", "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
        encoder("ModernBERT", "ModernBert", pad_token_id=0, cls_token_id=1, sep_token_id=2),
        family(
            "DistilBERT",
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            _tokens,
            {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            num_labels=4,
        ),
        family(
            "T5",
            "T5ForConditionalGeneration",
            "T5Config",
            _both_sides,
            {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        family(
            "BART",
            "BartForConditionalGeneration",
            "BartConfig",
            _both_sides,
            {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
            dropout=0.0,
        ),
        family(
            "Whisper",
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            _spectrogram,
            {"vocab_size": VOCABULARY, "num_mel_bins": 16, "d_model": 32, "dropout": 0.0},
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=16,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        family(
            "Wav2Vec 2.0",
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            _waves,
            {**_ENCODER, "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8)},
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            num_feat_extract_layers=2,
            classifier_proj_size=32,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
        ),
        vision("ViT", "ViT"),
        vision("DeiT", "DeiT"),
        vision("BEiT", "Beit"),
        vision("DINOv2", "Dinov2"),
        stages(
            "Swin", "Swin", image_size=PIXELS, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4
        ),
        stages(
            "Swin V2",
            "Swinv2",
            image_size=PIXELS,
            embed_dim=32,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
        ),
        stages("ConvNeXt", "ConvNext", hidden_sizes=[32, 64], depths=[1, 1], num_stages=2),
        stages("ConvNeXt V2", "ConvNextV2", hidden_sizes=[32, 64], depths=[1, 1], num_stages=2),
        stages(
            "ResNet (transformers)",
            "ResNet",
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            layer_type="basic",
        ),
        stages(
            "PVT",
            "PvtV2",
            image_size=PIXELS,
            num_encoder_blocks=2,
            depths=[1, 1],
            hidden_sizes=[32, 64],
            num_attention_heads=[2, 4],
            sr_ratios=[2, 1],
            mlp_ratios=[2, 2],
            patch_sizes=[7, 3],
            strides=[4, 2],
        ),
    ]


def _of_timm() -> list[Family]:
    import timm

    def family(name: str, model: str, **own: Any) -> Family:
        def build() -> nn.Module:
            return timm.create_model(model, num_classes=4, **own)

        return Family(f"{name} (timm)", "timm", build, _image("x"))

    patches = {"img_size": PIXELS, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    windows = {"img_size": PIXELS, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
    return [
        family("ViT", "vit_tiny_patch16_224", **patches),
        family("DeiT 3", "deit3_small_patch16_224", **patches),
        family("BEiT", "beit_base_patch16_224", **patches),
        family("EVA-02", "eva02_tiny_patch14_224", **patches),
        Family(
            "MLP-Mixer (timm)",
            "timm",
            lambda: timm.models.MlpMixer(4, img_size=PIXELS, patch_size=8, num_blocks=2, embed_dim=32),
            _image("x"),
        ),
        family("Swin", "swin_tiny_patch4_window7_224", **windows),
        family("Swin V2", "swinv2_tiny_window8_256", **windows),
        family("ConvNeXt", "convnext_atto", depths=(1, 1, 1, 1), dims=(32, 32, 64, 64)),
        family("EfficientNet", "efficientnet_b0", drop_rate=0.0),
        family("MobileNet V3", "mobilenetv3_small_100", drop_rate=0.0),
        family("RegNetY", "regnety_002"),
        family("ResNet-D", "resnet18d"),
        family("SE-ResNet", "legacy_seresnet18"),
        family("DenseNet", "densenet121", growth_rate=16, block_config=(2, 2), drop_rate=0.0),
    ]


def _of_torchvision() -> list[Family]:
    from torchvision import models

    def family(name: str, build: Callable[[], nn.Module]) -> Family:
        return Family(f"{name} (torchvision)", "torchvision", build, _image("x"))

    return [
        family("ResNet-18", lambda: models.resnet18(num_classes=4)),
        family(
            "ResNeXt",
            lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 4, groups=4, width_per_group=16),
        ),
        family("MobileNet V2", lambda: models.MobileNetV2(4, dropout=0.0)),
        family("ShuffleNet V2", lambda: models.ShuffleNetV2([1, 1, 1], [24, 48, 96, 192, 256], 4)),
        family(
            "Swin",
            lambda: models.SwinTransformer(
                [4, 4], 32, [1, 1], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=4
            ),
        ),
        family("ViT", lambda: models.VisionTransformer(PIXELS, 8, 2, 4, 32, 64, num_classes=4)),
    ]
