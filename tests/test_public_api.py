"""The names and signatures that `import fathom` promises."""

from pathlib import Path

import torch

import fathom


def test_the_whole_api_in_one_breath(tmp_path: Path) -> None:
    run = fathom.presets.nano()
    config = fathom.ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    model = fathom.Model(config)
    tokens_BS = torch.randint(9, 300, (2, 7))
    out = model(tokens_BS, mtp=True)
    assert out.logits_BSO.shape == (2, 7, 300)
    assert [t.shape for t in out.mtp_logits] == [(2, 6, 300)]
    assert out.router.tokens_per_expert_LE.shape == (2, 4)
    assert out.router.balance_loss > 0
    assert model(tokens_BS).mtp_logits is None
    torch.testing.assert_close(model.logits(model.hidden(tokens_BS)), out.logits_BSO)

    tokenizer = fathom.data.tokenizer.train_tokenizer(["def f(x):\n    return x\n"] * 9, 300)
    fathom.save_model(model, tmp_path / "m", tokenizer=tokenizer, max_shard_size=10_000)
    loaded = fathom.load_model(tmp_path / "m", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(loaded(tokens_BS).logits_BSO, out.logits_BSO)
    again = fathom.load_tokenizer(str(tmp_path / "m"))
    assert again.config == fathom.load_tokenizer(tmp_path / "m").config
    texts = {fathom.generate(loaded, again, "def", 5, temperature=0.0, speculative=s) for s in (True, False)}
    assert len(texts) == 1
    assert isinstance(run.model, fathom.ModelConfig)


def test_presets_have_the_advertised_sizes() -> None:
    sizes = {name: make().model.parameter_counts() for name, make in fathom.presets.ALL.items()}
    assert sizes["deepseek-v3-671b"].total == 671026419200
    assert 15e9 < sizes["16b-a3b"].total < 17e9
    assert 2.4e9 < sizes["16b-a3b"].active < 3.2e9
    assert sizes["nano"].active < 10e6
