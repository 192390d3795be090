"""Wav2Vec 2.0 for the speech tasks: sizes, where the weights come from, and the call.

The regularisers that draw at random in training are off, except the dropout that the arm asks for: no
SpecAugment masks, no layer drop. Both arms then do the same work in every step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["HUB_MODEL", "OPTIONS", "SIZES", "build", "check_options", "feature_frames", "logits"]

HUB_MODEL = "facebook/wav2vec2-base"
OPTIONS: dict[str, Any] = {"init": "scratch", "size": "", "max_seconds": 0.0, "train_samples": 0}
DEFAULT_SIZE = "small"

# Pre-norm layers and a layer norm after every convolution train from scratch, and with them padding changes
# nothing; "base" is facebook/wav2vec2-base as published (group norm, post-norm). A frame is 320 samples.
_FROM_SCRATCH = {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 16,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_FROM_SCRATCH,
        "conv_dim": (32, 32, 32),
        "conv_kernel": (40, 4, 5),
        "conv_stride": (16, 4, 5),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "classifier_proj_size": 32,
    },
    "small": {
        **_FROM_SCRATCH,
        "conv_dim": (64, 128, 128),
        "conv_kernel": (40, 8, 5),
        "conv_stride": (16, 4, 5),
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "classifier_proj_size": 128,
    },
    "base": {},
}


def check_options(options: Mapping[str, Any]) -> None:
    """ValueError for a size or a source of weights that does not exist, or the two together."""
    size, init = options["size"], options["init"]
    if size and size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if init == "scratch":
        return
    if init != "pretrained" and not Path(init).expanduser().is_dir():
        raise ValueError(
            f"init must be 'scratch', 'pretrained' ({HUB_MODEL} from the hub) or a folder with config.json "
            f"and model.safetensors, got {init!r}, which is no folder"
        )
    if size:
        raise ValueError(f"size belongs to --init scratch: with --init {init} the weights have their own")


def build(kind: str, options: Mapping[str, Any], outputs: int, dropout: float) -> nn.Module:
    """A fresh ``transformers`` model: ``kind`` "sequence" (``Wav2Vec2ForSequenceClassification``, ``outputs``
    classes) or "ctc" (``Wav2Vec2ForCTC``, ``outputs`` symbols, 0 the blank).

    The initial weights depend on torch's global seed only. Pretrained weights come as safetensors; the head
    is new in any case.

    ConnectionError where the hub cannot be reached, with what to do; ValueError for a folder without fitting
    weights; ImportError without transformers."""
    check_options(options)
    try:
        from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2ForSequenceClassification
    except ImportError as error:
        raise ImportError(
            "Wav2Vec 2.0 needs the package `transformers` (pip install dynaprune[speech])"
        ) from error
    kinds: dict[str, Any] = {"sequence": Wav2Vec2ForSequenceClassification, "ctc": Wav2Vec2ForCTC}
    head = dict(vocab_size=outputs, pad_token_id=0) if kind == "ctc" else dict(num_labels=outputs)
    settings: dict[str, Any] = {
        **head,
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
        "activation_dropout": dropout,
        "feat_proj_dropout": dropout,
        "final_dropout": dropout,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }
    if options["init"] != "scratch":
        return _pretrained(kinds[kind], options["init"], settings)
    model = kinds[kind](Wav2Vec2Config(**SIZES[options["size"] or DEFAULT_SIZE], **settings))
    return _without_input_gradient(model)


def _pretrained(kind: Any, init: str, settings: dict[str, Any]) -> nn.Module:
    source = HUB_MODEL if init == "pretrained" else str(Path(init).expanduser())
    # A mask embedding that is in the weights and not in the model, or a head of another task, is no mistake.
    load: Callable[..., Any] = functools.partial(
        kind.from_pretrained,
        source,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=init != "pretrained",
    )
    try:
        model, said = load(**settings)
    except OSError as error:
        if init == "pretrained":
            raise ConnectionError(
                f"could not load {HUB_MODEL} from the hub ({type(error).__name__}: {error}). On a machine "
                "without network: copy its folder (config.json, model.safetensors) there and pass "
                "--init FOLDER, or train from random weights with --init scratch"
            ) from error
        raise ValueError(
            f"expected config.json and model.safetensors of a Wav2Vec 2.0 model in {init}: {error}"
        ) from error
    missing = sorted(name for name in said["missing_keys"] if name.startswith("wav2vec2."))
    mismatched = sorted(str(key[0]) for key in said["mismatched_keys"] if key[0].startswith("wav2vec2."))
    if missing or mismatched:
        raise ValueError(
            f"expected the weights of a whole Wav2Vec 2.0 model in {source}, got none that fit for "
            f"{', '.join([*missing, *mismatched][:5])} ({len(missing) + len(mismatched)} tensors in all)"
        )
    return _without_input_gradient(model)


def _without_input_gradient(model: Any) -> nn.Module:
    """transformers computes the gradient of the sound itself, which gradient checkpointing needs and nothing
    here reads; the weights of the feature encoder are trained as before."""
    model.wav2vec2.feature_extractor._requires_grad = False
    assert isinstance(model, nn.Module)
    return model


def logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits ``[n, outputs]`` or ``[n, frames, outputs]``.

    With group norm the model gets no mask: such models are trained on clips filled up with zeros
    (transformers' documentation of ``Wav2Vec2Model``)."""
    mask = inputs["attention_mask"] if model.config.feat_extract_norm == "layer" else None
    found: torch.Tensor = model(inputs["input_values"], attention_mask=mask).logits
    return found


def feature_frames(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How many frames of the feature encoder each clip fills, int64 ``[n]``: the model's own formula."""
    frames: torch.Tensor = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
    return frames.long()
