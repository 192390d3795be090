"""Per-sample losses against the loss that the model itself gives for each sample alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynaprune.nn.calibration_mode import calibration_mode

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = transformers.BertConfig(**SIZES, intermediate_size=24)
TOKENS = torch.randint(2, 40, (6, 9), generator=torch.Generator().manual_seed(0))
SOME = torch.where(TOKENS % 3 == 0, -100, TOKENS)


def bert(kind: str, **changes: Any) -> Any:
    config = transformers.BertConfig(**{**BERT.to_dict(), **changes})
    return getattr(transformers, f"BertFor{kind}")(config)


def llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24)
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


CASES = {
    "classes": (lambda: bert("SequenceClassification", num_labels=3), torch.arange(6) % 3, True),
    "regression": (lambda: bert("SequenceClassification", num_labels=1), torch.arange(6) / 3, False),
    "several figures": (
        lambda: bert("SequenceClassification", num_labels=2, problem_type="regression"),
        torch.arange(12).view(6, 2) / 3,
        False,
    ),
    "several labels": (
        lambda: bert("SequenceClassification", num_labels=4, problem_type="multi_label_classification"),
        (torch.arange(24).view(6, 4) % 3 == 0).float(),
        False,
    ),
    "tokens": (
        lambda: bert("TokenClassification", num_labels=5),
        torch.where(SOME < 0, SOME, SOME % 5),
        False,
    ),
    "masked": (lambda: bert("MaskedLM"), SOME, False),
    "next": (llama, SOME, False),
    "encoder and decoder": (t5, SOME, False),
}


@pytest.mark.parametrize("case", CASES)
def test_each_sample_has_the_models_own_loss(case: str) -> None:
    from dynaprune.integrations.losses import per_sample_losses

    build, labels, classified = CASES[case]
    model = build()
    inputs: dict[str, Tensor] = {"input_ids": TOKENS, "labels": labels}
    with calibration_mode(model):
        losses, classes = per_sample_losses(model, inputs)
        alone = [model(**{key: value[i : i + 1] for key, value in inputs.items()}).loss for i in range(6)]
    torch.testing.assert_close(losses, torch.stack(alone).float(), rtol=1e-5, atol=1e-6)
    assert (classes is not None and torch.equal(classes, labels)) if classified else classes is None


def test_other_models_and_batches_are_refused() -> None:
    from dynaprune.integrations.losses import per_sample_losses

    with pytest.raises(ValueError, match="got Linear with None and labels: give loss=f"):
        per_sample_losses(nn.Linear(2, 2), {"labels": torch.zeros(2)})
    with pytest.raises(ValueError, match="ForSequenceClassification without labels"):
        per_sample_losses(bert("SequenceClassification"), {"input_ids": TOKENS})
    with pytest.raises(ValueError, match="ForQuestionAnswering"):
        per_sample_losses(bert("QuestionAnswering"), {"input_ids": TOKENS, "labels": torch.zeros(6)})
