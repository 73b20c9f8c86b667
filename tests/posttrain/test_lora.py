"""Adapters: nothing changes before training, nothing but them is trained, and merged weights compute the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from fathom import presets
from fathom.config import ConfigError
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.posttrain.config import LoraConfig, PosttrainRun
from fathom.posttrain.lora import (
    adaptable_weights,
    adapter_state,
    adapters,
    add_adapters,
    load_adapters,
    merged_model,
    merged_state,
)
from fathom.posttrain.lora_memory import lora_memory, lora_memory_refusal
from fathom.train.optim import build_optimizers
from fathom.train.run import OptimizerConfig
from tests.model.configs import lively_model, model_configs, random_tokens, relative_error, tiny
from tests.posttrain.models import adapted

both = pytest.mark.parametrize("experts", [False, True], ids=["layers", "experts too"])


def _changed(**changes: Any) -> Model:
    return lively_model(tiny(num_nextn_predict_layers=1, **changes))


@both
def test_nothing_changes_before_training(experts: bool) -> None:
    model = _changed()
    tokens_BS = random_tokens(model.config, 2, 11)
    before = model(tokens_BS, mtp=True)
    add_adapters(model, LoraConfig(3, experts=experts), seed=0)
    after = model(tokens_BS, mtp=True)
    assert torch.equal(before.logits_BSO, after.logits_BSO)
    assert torch.equal(before.mtp_logits[0], after.mtp_logits[0])


@both
def test_only_adapters_get_gradients_and_moments(experts: bool) -> None:
    model = adapted(_changed(), experts)
    output = model(random_tokens(model.config, 2, 11), mtp=True)
    (output.logits_BSO.square().sum() + output.mtp_logits[0].square().sum()).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    kinds = {name.rsplit(".", 1)[1] for name in with_gradient}
    assert kinds == {"A", "B"} and len(with_gradient) == 2 * len(adapters(model))
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)
    [optimizer] = build_optimizers(model, OptimizerConfig())
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters() if p.grad is not None}


def test_which_weights_take_an_adapter() -> None:
    names = {name for name, *_ in adaptable_weights(_changed(), experts=True)}
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert {f"layers.0.self_attn.{name}.weight" for name in attention} <= names
    assert {"layers.0.mlp.up_proj.weight", "layers.1.mlp.shared_experts.down_proj.weight"} <= names
    assert {"layers.2.mlp.experts.gate_up_proj", "mtp.0.mlp.experts.down_proj"} <= names
    assert not any("norm" in name or "gate.weight" in name or "eh_proj" in name or "lm_head" in name for name in names)
    assert not any("experts.gate_up" in name for name, *_ in adaptable_weights(_changed(), experts=False))


@settings(max_examples=25, deadline=None)
@given(model_configs())
def test_merged_weights_compute_the_same(config: ModelConfig) -> None:
    """Any shape, tied heads included; the definition in float64, W + (alpha / rank)·B·A."""
    model = lively_model(config)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted(model, experts=True, rank=1)
    state = merged_state(model)
    assert state.keys() == plain.keys()
    found = adapters(model)
    for name, tensor in state.items():
        if name not in found:
            assert torch.equal(tensor, plain[name])
            continue
        a, b = found[name].A.double(), found[name].B.double()
        assert relative_error(tensor.double().detach(), plain[name].double() + 5 * (b @ a).detach()) < 1e-6
    tokens_BS = random_tokens(config, 2, 9)
    merged = merged_model(model)
    assert torch.equal(merged(tokens_BS).logits_BSO, model(tokens_BS).logits_BSO)
    assert merged.config.tie_word_embeddings == (merged.lm_head.weight is merged.embed_tokens.weight)


def test_a_merged_model_shares_what_is_not_adapted() -> None:
    model = adapted(_changed(tie_word_embeddings=True))
    merged, names = merged_model(model), adapters(model).keys()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for name, tensor in merged.state_dict().items():
        assert (tensor.untyped_storage().data_ptr() in own) == (name not in names), name
    plain = _changed()
    assert merged_model(plain) is plain


def test_checkpointed_layers_and_float64_give_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(_changed().double(), experts=True)
        hidden = model.forward_hidden(
            random_tokens(model.config, 2, 11), mtp=True, activation_checkpointing=checkpointing
        )
        hidden.h_BSD.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert found[0] and all(relative_error(b, a) < 1e-12 for a, b in zip(*found, strict=True))


def test_an_adapters_gradient_is_that_of_its_weight() -> None:
    """dA = scale·Bᵀ·dW and dB = scale·dW·Aᵀ, with dW from a model that trains all its weights."""
    model = adapted(_changed().double(), experts=True)
    tokens_BS = random_tokens(model.config, 2, 11)
    model(tokens_BS).logits_BSO.square().sum().backward()
    whole = Model(model.config).double()
    whole.load_state_dict(merged_state(model))
    whole(tokens_BS).logits_BSO.square().sum().backward()
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    for name, adapter in adapters(model).items():
        if name.startswith("mtp."):
            continue
        dw, a, b = gradients[name], adapter.A.double(), adapter.B.double()
        assert relative_error(adapter.A.grad.double(), (5 / 3 * b.mT @ dw).detach()) < 1e-6
        assert relative_error(adapter.B.grad.double(), (5 / 3 * dw @ a.mT).detach()) < 1e-6


@both
def test_an_engine_takes_the_merged_state(experts: bool) -> None:
    model = adapted(_changed(vocab_size=11), experts)
    merged = merged_model(model)
    engine = Engine(merged, max_batch=2)
    adapted_again = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    for name in adapted_again:
        if name.endswith(".B"):
            adapted_again[name] *= 3
    load_adapters(model, adapted_again)
    engine.update_weights(merged_state(model))
    [updated] = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2))
    [fresh] = Engine(merged_model(model)).generate(
        [[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2)
    )
    assert updated.token_ids == fresh.token_ids
    logits_BSO = model(torch.tensor([[1, 2, 3, *updated.token_ids]])).logits_BSO
    assert logits_BSO[0, 2:-1].argmax(-1).tolist() == updated.token_ids


def test_initial_adapters_are_a_function_of_seed_and_name() -> None:
    states = []
    for seed in (0, 0, 1):
        model = _changed()
        add_adapters(model, LoraConfig(2, experts=True), seed)
        states.append(adapter_state(model))
    a = [name for name in states[0] if name.endswith(".A")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in a)
    assert not any(torch.equal(states[0][name], states[2][name]) for name in a)
    assert not torch.equal(
        states[0]["layers.1.mlp.shared_experts.up_proj.weight.A"],
        states[0]["layers.2.mlp.shared_experts.up_proj.weight.A"],
    )
    experts_ERI = states[0]["layers.1.mlp.experts.gate_up_proj.A"]
    assert not torch.equal(experts_ERI[0], experts_ERI[1])


def test_the_state_of_other_adapters_is_refused() -> None:
    model = adapted(_changed())
    state = adapter_state(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_a_proj\.weight\.A is in the model alone"):
        load_adapters(model, {k: v for k, v in state.items() if k != "layers.0.self_attn.q_a_proj.weight.A"})
    with pytest.raises(ValueError, match="has shape"):
        load_adapters(model, {name: tensor[..., :1] for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": -1}, "lora.rank.*-1"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha.*0.0"),
        ({"experts": True}, "lora.experts"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**wrong)


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.rank is 11; it must be from 1 to 10, as layers.0.self_attn.q_a_proj"):
        add_adapters(_changed(), LoraConfig(11), seed=0)
    with pytest.raises(ValueError, match="adapters already"):
        add_adapters(adapted(_changed()), LoraConfig(2), seed=0)


def test_a_16b_model_fits_into_one_gpu_of_80_gb() -> None:
    config = presets.moe_16b_a3b().model
    for experts in (False, True):
        needs = lora_memory(config, LoraConfig(16, experts=experts), tokens=4 * 4096)
        assert 32e9 < needs.weights < needs.total < 80e9
        assert lora_memory_refusal(needs, 80 * 10**9, True) is None
        message = lora_memory_refusal(needs, 24 * 2**30, True)
        assert message is not None and "24.0 GiB are free" in message and "micro-batch-tokens" in message
    unchecked = lora_memory(config, LoraConfig(16), 4 * 4096, activation_checkpointing=False)
    assert "activation_checkpointing" in str(lora_memory_refusal(unchecked, 24 * 2**30, False))


@both
def test_the_estimate_counts_what_is_there(experts: bool) -> None:
    """Weights and adapters exactly; the sums by what autograd saves without checkpointing."""
    config = tiny(num_nextn_predict_layers=1, hidden_size=64, moe_intermediate_size=32)
    lora = LoraConfig(2, experts=experts)
    model = lively_model(config)
    frozen = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    largest = {}
    for name, module, parameter in adaptable_weights(model, experts):
        layer = ".".join(name.split(".")[:2])
        largest[layer] = largest.get(layer, 0) + getattr(module, parameter).nbytes
    add_adapters(model, lora, seed=0)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    needs = lora_memory(config, lora, tokens=22, itemsize=4, activation_checkpointing=False)
    assert needs.weights == frozen
    assert needs.adapters == 4 * trained
    saved: dict[int, int] = {}
    shapes = {tuple(getattr(module, name).shape) for _, module, name in adaptable_weights(model, experts)}
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        flat = tuple(tensor.shape) in shapes or tuple(tensor.shape[::-1]) in shapes
        if flat and storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(random_tokens(config, 2, 11), mtp=True)
    assert output.logits_BSO.requires_grad
    # The first layer's input has no gradient, so those that multiply it are not kept.
    attention = model.layers[0].self_attn
    unneeded = attention.q_a_proj.weight.nbytes + attention.kv_a_proj_with_mqa.weight.nbytes
    assert needs.sums == sum(saved.values()) + unneeded + max(largest.values())


def test_muon_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapters are not whole matrices"):
        PosttrainRun("m", optimizer=OptimizerConfig(name="muon"), lora=replace(LoraConfig(), rank=4))
