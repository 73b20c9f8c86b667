"""The names and signatures that `import fathom` promises."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fathom
from fathom.data.tokenizer import train_tokenizer


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

    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 9, 300)
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


def test_names_are_imported_at_first_use_from_where_type_checkers_find_them() -> None:
    tree = ast.parse(Path(fathom.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    assert {alias.name for node in imports for alias in node.names} == set(fathom.__all__) <= set(dir(fathom))
    for node in imports:
        for alias in node.names:
            assert fathom._MODULES.get(alias.name, "fathom") == node.module
            assert getattr(fathom, alias.name) is not None
    with pytest.raises(AttributeError, match="'fathom' has no attribute 'Modle'"):
        _ = fathom.Modle


@pytest.mark.parametrize(
    "line", ["import fathom", "from fathom.cli import main; main(['--help']); main(['--version'])"]
)
def test_nothing_slow_is_imported_before_it_is_used(line: str) -> None:
    """torch alone takes seconds."""
    slow = {"torch", "numpy", "transformers", "tyro", "starlette", "huggingface_hub"}
    code = f"import sys; {line}; print(sorted({slow} & set(sys.modules)))"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1] == "[]"
