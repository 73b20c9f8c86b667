"""Our GGUF files in llama.cpp: the same logits, greedy continuations, tokens, chats and drafts."""

import copy
import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.data.tokenizer import ASSISTANT, EOS, USER, Tokenizer, train_tokenizer
from fathom.model.config import ModelConfig
from fathom.model.rope_scaling import YarnScaling
from fathom.model.router import Router, RouterOutput
from fathom.model.transformer import Model
from tests.model.configs import lively_model, model_configs, random_tokens, relative_error, tiny

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

from fathom.checkpoint.gguf.writer import DType, save_gguf  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

LENGTH = 40
FLOAT32 = 0
"""ggml's number of the type; llama.cpp's KV cache is float16 by default."""

seeds = st.integers(0, 2**32 - 1)
many = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


_default_params = llama_cpp.llama_cpp.llama_model_default_params


def _weights_as_they_are() -> Any:
    """llama.cpp's defaults, but no repacked weights: 0.3.36 aborts where it puts MLA's Q8_0 into buffers for AMX."""
    params = _default_params()
    params.use_extra_bufts = False
    return params


@contextmanager
def llama(path: Path, **options: Any) -> Iterator[Any]:
    """llama-cpp-python over one file, its cache in float32. One thread: several would busy-wait for one another."""
    given = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False} | options
    with patch.object(llama_cpp.llama_cpp, "llama_model_default_params", _weights_as_they_are):
        program = llama_cpp.Llama(str(path), type_k=FLOAT32, type_v=FLOAT32, **given)
    try:
        yield program
    finally:
        program.close()


def logits_of(path: Path, tokens_BS: Tensor) -> Tensor:
    """llama.cpp's logits of one row (1, S, O)."""
    with llama(path) as program:
        program.eval(tokens_BS[0].tolist())
        return torch.tensor(np.array(program.scores[: tokens_BS.shape[1]]))[None]


def saved(model: Model, folder: Path, dtype: DType = "f32", tokenizer: Tokenizer | None = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MTP modules that llama.cpp cannot use
        save_gguf(model, tokenizer, folder / "model.gguf", dtype)
    return folder / "model.gguf"


# --------------------------------------------------------------------------------------------------- logits


@st.composite
def representable(draw: st.DrawFn) -> ModelConfig:
    """Any shape, and any YaRN with llama.cpp's ramp."""
    config = draw(model_configs())
    if (yarn := config.rope_scaling) is not None:
        length = max(yarn.original_max_position_embeddings, 7)
        yarn = replace(yarn, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=length)
    return replace(config, rope_scaling=yarn, rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])))


RELEASED_YARN = YarnScaling(40.0, 16, mscale=1.0, mscale_all_dim=1.0)


@many
@given(representable(), seeds)
@example(tiny(rope_scaling=RELEASED_YARN), 0)
@example(tiny(rope_scaling=YarnScaling(4.0, 16, mscale=0.7, mscale_all_dim=0.8), q_lora_rank=None), 1)
@example(tiny(topk_group=4), 2)
@example(tiny(first_k_dense_replace=3, tie_word_embeddings=True), 3)
@example(tiny(first_k_dense_replace=3, n_routed_experts=0), 4)
def test_float32_logits_are_equal(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, seed: int) -> None:
    note(f"{config}")
    model = lively_model(config, seed)
    tokens_BS = random_tokens(config, 1, LENGTH, seed)
    with smallest_margin(model) as margin, torch.no_grad():
        expected_BSO = model(tokens_BS).logits_BSO
    assume(margin[0] > 1e-5)
    found_BSO = logits_of(saved(model, tmp_path_factory.mktemp("float32")), tokens_BS)
    assert relative_error(found_BSO, expected_BSO) <= 1e-5


@contextmanager
def smallest_margin(model: Model) -> Iterator[list[float]]:
    """The smallest change of a score that could alter any router's choice; closer calls may go either way."""
    margin = [float("inf")]

    def gap(scores: Tensor, count: int) -> float:
        ordered = scores.sort(dim=-1, descending=True).values
        return float((ordered[:, count - 1] - ordered[:, count]).min()) if count < scores.shape[1] else float("inf")

    def note_choice(router: Router, inputs: Any, _: RouterOutput) -> None:
        config = router.config
        scores_NE = (inputs[0].flatten(0, 1) @ router.weight.T).sigmoid()
        biased_NE = scores_NE.double() + router.e_score_correction_bias
        grouped_NGe = biased_NE.unflatten(1, (config.n_group, -1))
        group_NG = grouped_NGe.topk(2).values.sum(-1)
        worst_N1 = group_NG.topk(config.topk_group).values[:, -1:]
        open_NE = biased_NE.masked_fill((group_NG < worst_N1).repeat_interleave(grouped_NGe.shape[2], 1), -torch.inf)
        margin[0] = min(margin[0], gap(group_NG, config.topk_group), gap(open_NE, config.num_experts_per_tok))

    hooks = [router.register_forward_hook(note_choice) for router in model.routers()]
    try:
        yield margin
    finally:
        for hook in hooks:
            hook.remove()


# Widths that q8_0 can store, one matrix (the dense down_proj) that it cannot; every expert is taken, so that no rounded
# score decides between two.
WIDE = tiny(
    hidden_size=64, intermediate_size=40, moe_intermediate_size=32, kv_lora_rank=32, q_lora_rank=32,
    qk_nope_head_dim=32, v_head_dim=32, num_attention_heads=2, n_group=1, topk_group=1, num_experts_per_tok=8,
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bf16_and_q8_0_files_differ_by_the_rounding_of_weights_only(tmp_path: Path, dtype: DType, seed: int) -> None:
    """llama.cpp rounds the activations of every matmul as it does weights, with an error of about the same size."""
    model = lively_model(WIDE, seed)
    tokens_BS = random_tokens(WIDE, 1, LENGTH, seed)
    found_BSO = logits_of(saved(model, tmp_path, dtype), tokens_BS)
    with torch.no_grad():
        exact_BSO = model(tokens_BS).logits_BSO
        alike_BSO = rounded(model, dtype)(tokens_BS).logits_BSO
    from_weights = distance(alike_BSO, exact_BSO)
    assert distance(found_BSO, alike_BSO) <= 1.5 * from_weights
    assert distance(found_BSO, alike_BSO) < distance(found_BSO, exact_BSO)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def rounded(model: Model, dtype: DType) -> Model:
    """The model with the weights that a file of this type holds."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or name.endswith("mlp.gate.weight"):
            continue
        if name.endswith("kv_b_proj.weight"):
            config = model.config
            up_HYC = weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
            key_HPC, value_HVC = up_HYC.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
            key_HPC.copy_(round_rows(key_HPC.transpose(1, 2), dtype).transpose(1, 2))
            value_HVC.copy_(round_rows(value_HVC, dtype))
        else:
            weight.copy_(round_rows(weight, dtype))
    return model


def round_rows(weight: Tensor, dtype: DType) -> Tensor:
    if dtype == "bf16" or weight.shape[-1] % 32:
        return weight.bfloat16().float()
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(weight.contiguous().numpy(), kind), kind))


@pytest.mark.parametrize("q_lora_rank", [10, None])
def test_greedy_continuations_are_equal(tmp_path: Path, q_lora_rank: int | None) -> None:
    config = tiny(q_lora_rank=q_lora_rank, num_nextn_predict_layers=1, rope_scaling=RELEASED_YARN)
    model = lively_model(config, seed=5, std=0.25)
    with llama(saved(model, tmp_path)) as program:
        for length in (1, 7):
            prompt = random_tokens(config, 1, length, seed=length)[0].tolist()
            expected = greedy(model, prompt, 30)
            written = program.generate(prompt, temp=0.0, repeat_penalty=1.0)
            assert [next(written) for _ in range(30)] == expected
            assert len(set(expected)) > 3, "a continuation that repeats itself proves little"


@torch.no_grad()
def greedy(model: Model, prompt: list[int], count: int, stop: int | None = None) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (stop is None or ids[-1] != stop):
        ids.append(int(model(torch.tensor([ids])).logits_BSO[0, -1].argmax()))
    return ids[len(prompt) :]


# -------------------------------------------------------------------------------------------------- drafting


def test_main_logits_are_the_same_with_modules(tmp_path: Path) -> None:
    for modules in (1, 2):
        config = tiny(num_nextn_predict_layers=modules)
        model = lively_model(config)
        tokens_BS = random_tokens(config, 1, LENGTH)
        with torch.no_grad():
            expected_BSO = model(tokens_BS).logits_BSO
        assert relative_error(logits_of(saved(model, tmp_path), tokens_BS), expected_BSO) <= 1e-5


@pytest.mark.parametrize("yarn", [None, RELEASED_YARN])
@pytest.mark.parametrize("tied", [False, True])
def test_drafts_are_equal(tmp_path: Path, yarn: YarnScaling | None, tied: bool) -> None:
    """llama.cpp's `draft-mtp`: the module's logits from the main model's hidden states and the next tokens.

    llama-cpp-python's `Llama` has no such mode; its bindings of the C functions have.
    """
    config = tiny(num_nextn_predict_layers=1, rope_scaling=yarn, tie_word_embeddings=tied, rms_norm_eps=1e-5)
    model = lively_model(config, seed=3)
    tokens_BS = random_tokens(config, 1, 12)
    with torch.no_grad():
        states = model.forward_hidden(tokens_BS, mtp=True)
        expected_BSO = model.logits(states.mtp_h_BSD[0])
    tokens = tokens_BS[0].tolist()
    with drafting_contexts(saved(model, tmp_path)) as (main, draft):
        _, h_SD = process(main, config, tokens, 0)
        found_SO, found_h_SD = process(draft, config, tokens[1:], 1, h_SD[:-1])
    assert relative_error(h_SD[None], states.h_BSD) <= 1e-5
    assert relative_error(found_SO[None], expected_BSO) <= 1e-5
    assert relative_error(found_h_SD[None], states.mtp_h_BSD[0]) <= 1e-5  # what a second draft is made from


@contextmanager
def drafting_contexts(path: Path) -> Iterator[tuple[Any, Any]]:
    """A context of the main model and one of its MTP module, both with hidden states as output."""
    extension = pytest.importorskip("llama_cpp.llama_cpp_ext", reason="the drafting functions are not bound")
    llama_cpp.llama_backend_init()
    model_options = llama_cpp.llama_model_default_params()
    model_options.load_mtp = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_options)
    assert llama_cpp.llama_model_n_layer_nextn(model) == 1
    contexts = []
    for kind in (llama_cpp.LLAMA_CONTEXT_TYPE_DEFAULT, llama_cpp.LLAMA_CONTEXT_TYPE_MTP):
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 64
        options.type_k = options.type_v = FLOAT32
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.n_threads = options.n_threads_batch = 1
        options.ctx_type = kind
        contexts.append(llama_cpp.llama_init_from_model(model, options))
        extension.llama_set_embeddings_nextn(contexts[-1], True, kind == llama_cpp.LLAMA_CONTEXT_TYPE_MTP)
    try:
        yield contexts[0], contexts[1]
    finally:
        for context in contexts:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def process(
    context: Any, config: ModelConfig, tokens: list[int], position: int, h_SD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (S, O) and hidden states (S, D) of tokens; `h_SD` are the hidden states that an MTP module takes in."""
    from llama_cpp import llama_cpp_ext

    batch = llama_cpp.llama_batch_ext_init(context)
    rows = []
    for number, token in enumerate(tokens):
        index = llama_cpp.llama_batch_ext_add_token(batch, 0, token)
        assert llama_cpp.llama_batch_ext_set_pos(batch, index, (ctypes.c_int32 * 1)(position + number))
        if h_SD is not None:
            rows.append((ctypes.c_float * config.hidden_size)(*h_SD[number].tolist()))
            state = llama_cpp.llama_embd(ctypes.cast(rows[-1], ctypes.POINTER(ctypes.c_float)), 1, config.hidden_size)
            assert llama_cpp.llama_batch_ext_set_embd_token(batch, index, state)
        assert llama_cpp.llama_batch_ext_set_output_logits(batch, index, True)
    assert llama_cpp.llama_process(context, llama_cpp.LLAMA_PROCESS_TYPE_DECODE, batch) == 0
    llama_cpp.llama_batch_ext_free(batch)
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), config.vocab_size))
    states = np.ctypeslib.as_array(llama_cpp_ext.llama_get_embeddings_nextn(context), (len(tokens), config.hidden_size))
    return torch.tensor(logits), torch.tensor(states)


# ------------------------------------------------------------------------------------------------- tokenizer

SAMPLE = 'def main(x: int) -> None:\n    """Reads 1024 lines."""\n    return x.value + [1, 22, 333]\n' * 3 + (
    "naïve Ünïcödé “quotes” — 你好世界，こんにちは。カタカナ 漢字 🙂👍🏽 we'll 3.14159 $a_b^{2}$\r\n\t\tend  of   it"
)
TEXTS = [
    SAMPLE,
    "",
    "\n",
    "a  b   c\t\td\n\n\n e \r\n\r\n f",
    "1 12 123 1234 12345678 ٣٤٥ ²³½ ⅷ",
    "é café e\u0301 İstanbul ẞ ǅ ก็ हिन्दी العربية עברית 한국어",
    "a\u00a0b\u3000c\u0085d\u2028e\ufefff\x00g",
    "👨‍👩‍👧 \U0010fffd",
    f"text that spells {EOS} and {USER} is text <think>",
    "if(x){return\\frac{1}{2};}  // …",
]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Model, Tokenizer]]:
    """A model with a tokenizer, in llama.cpp and here; its vocabulary is larger than the tokenizer's."""
    tokenizer = train_tokenizer([SAMPLE, *TEXTS], 500)
    config = tiny(vocab_size=tokenizer.vocab_size + 11)
    model = lively_model(config, seed=1, std=0.25)
    with llama(saved(model, tmp_path_factory.mktemp("chat"), tokenizer=tokenizer)) as program:
        yield program, model, tokenizer


def assert_same_tokens(program: Any, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert program.tokenize(text.encode(), add_bos=True, special=False) == ids
    # Without BOS: llama-cpp-python removes a leading space after it.
    assert program.detokenize(ids[1:]) == text.encode() == tokenizer.decode(ids).encode()


def test_texts_are_tokenized_and_detokenized_alike(chat_model: tuple[Any, Model, Tokenizer]) -> None:
    program, _, tokenizer = chat_model
    for text in TEXTS:
        assert_same_tokens(program, tokenizer, text)
    special = [tokenizer.bos_id, tokenizer.token_id(USER), *tokenizer.encode("hi", bos=False), tokenizer.eos_id]
    assert program.detokenize(special).decode() == tokenizer.decode(special) == "hi"
    assert program.tokenize(f"{USER}hi{EOS}".encode(), add_bos=True, special=True) == special
    assert program.token_eos() == tokenizer.eos_id and program.token_bos() == tokenizer.bos_id


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*" \n\r\t.,'a1Z$你か٣é🙂", "  ", "def", " x", "'ll", "()"]), max_size=20).map("".join))
def test_random_texts_are_tokenized_alike(chat_model: tuple[Any, Model, Tokenizer], text: str) -> None:
    program, _, tokenizer = chat_model
    assert_same_tokens(program, tokenizer, text)


def test_chats_are_answered_alike(chat_model: tuple[Any, Model, Tokenizer]) -> None:
    """The chat template in the file gives the same prompt tokens, and the greedy answer is the same."""
    program, model, tokenizer = chat_model
    user, assistant = tokenizer.token_id(USER), tokenizer.token_id(ASSISTANT)
    assert user is not None and assistant is not None
    prompt = [tokenizer.bos_id, user, *tokenizer.encode("Who are you?", bos=False), assistant]
    answer = greedy(model, prompt, 12, stop=tokenizer.eos_id)
    program.reset()
    program.create_chat_completion(
        [{"role": "user", "content": "Who are you?"}], temperature=0.0, repeat_penalty=1.0, max_tokens=len(answer)
    )
    seen = program.input_ids[: program.n_tokens].tolist()
    assert seen[: len(prompt)] == prompt
    written = seen[len(prompt) :]  # the last token is returned but not fed back
    assert written == answer[: len(written)] and len(written) >= len(answer) - 1 > 3
