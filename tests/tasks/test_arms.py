"""put_arm: what trains, at which rate, and that nothing else does."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from coeffdiff.errors import ConfigError, InjectionError
from coeffdiff.tasks.arms import PARTS, put_arm, trained_numbers

RATES = {"head": 1e-2, "lora": 2e-3, "coeff": 3e-2, "full": 1e-5}
WORDS = torch.tensor([[5, 6, 7, 8]])
# 2 layers of 4 heads, 16 wide
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def bert():
    torch.manual_seed(0)
    return tf.BertModel(tf.BertConfig(vocab_size=40, **SIZE), add_pooling_layer=False)


def bart():
    torch.manual_seed(0)
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        )
    )  # fmt: skip


@pytest.mark.parametrize("arm", PARTS)
def test_an_arm_trains_its_parts_and_nothing_else(arm):
    """A step of AdamW moves every group; what is in none has no gradient and stays bit for bit."""
    model, head = bert(), nn.Linear(16, 3)
    before = copy.deepcopy(model.state_dict())
    armed, groups = put_arm(model, arm, rates=RATES, heads=[head], rank=2)
    counts = {"head": 16 * 3 + 3, "coeff": 2 * 4 * 4, "lora": 2 * 2 * 2 * (16 + 16)}
    counts["full"] = sum(value.numel() for value in before.values())
    assert trained_numbers(groups) == {part: counts[part] for part in PARTS[arm]}
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [
        (RATES[part], 0.0 if part == "coeff" else 0.01) for part in PARTS[arm]
    ]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):  # LoRA's A moves only when B is no longer zero
        optimizer.zero_grad()
        head(armed(input_ids=WORDS).last_hidden_state.mean(1)).logsumexp(-1).sum().backward()
        optimizer.step()
    trained = {id(p) for group in groups for p in group["params"]}
    assert all(
        p.grad is not None and p.grad.any() for g in groups if g["name"] != "full" for p in g["params"]
    )
    frozen = [p for p in [*armed.parameters(), *head.parameters()] if id(p) not in trained]
    assert not any(p.requires_grad for p in frozen)
    if arm != "full":
        after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_head_inside_the_model_trains_beside_alpha_and_lora():
    """BART's own cross-attention included: 4 heads in the encoder, 2 twice in the decoder."""
    model = bart()
    _, groups = put_arm(model, "coeff+lora", rates=RATES, heads=[model.lm_head, model.lm_head], rank=2)
    assert trained_numbers(groups) == {"head": 40 * 16, "lora": 3 * 2 * 2 * 32, "coeff": 16 + 4 + 4}
    assert model.lm_head.weight.requires_grad


def test_lora_begins_as_its_seed_says():
    """Whatever torch's own generator was at, and leaving it where it was."""
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))
        state = torch.get_rng_state()
        _, groups = put_arm(bert(), "lora", rates=RATES, seed=seed)
        weights.append(groups[-1]["params"][0].detach())
        torch.manual_seed(len(weights) - 1)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("arm", "options", "says"),
    [
        ("dora", {}, "no arm 'dora'; there are linear, lora"),
        ("coeff", {"rates": {"head": 1e-2}}, "needs a learning rate of its coeff"),
        ("linear", {"heads": []}, "no head was given"),
        ("lora", {"lora_targets": ["to_q"]}, "no linear layer 'to_q' for LoRA; it has dense, key, query, value"),
    ],
)  # fmt: skip
def test_a_mistake_meets_one_sentence(arm, options, says):
    """And the model has no adapter then."""
    model = bert()
    with pytest.raises(ConfigError, match=says):
        put_arm(model, arm, **{"rates": RATES, "heads": [nn.Linear(16, 3)]} | options)
    assert not hasattr(model, "peft_config")


def test_a_model_without_attention_is_refused():
    """By the sentence of coeffdiff.attach, for LoRA as for alpha."""
    resnet = tf.ResNetModel(
        tf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    )
    for arm in ("lora", "coeff"):
        with pytest.raises(InjectionError, match="has no attention layer"):
            put_arm(resnet, arm, rates=RATES)
