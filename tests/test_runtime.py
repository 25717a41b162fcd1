"""Faster runtimes give what stock layers give; native rows do not depend on what is computed beside them."""

import copy
import logging
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import baton
import baton.runtime
from baton.cache import Memory
from baton.errors import BatonError, UnknownOption
from baton.models.adapter import Target, runtime_of, target_for
from baton.models.loading import LanguageModel
from baton.models.writer import PromptInputs
from baton.quality import cost_of_bits
from baton.runtime import families, native, prepare
from baton.runtime.native import Parts, apply
from baton.runtime.packed import PackedLinear
from baton.runtime.quantized import Int4, Int8, copy_of
from baton.runtime.t5 import T5Reader
from baton.types import Sampling

CAUSAL = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": tiny.EOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": tiny.PAD,
}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CAUSAL.items() if name not in names}


def turning(part: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part}


NEOX = without("num_key_value_heads", "head_dim") | {"rope_parameters": turning(0.25)}
T5 = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96}
BART = tiny._bart_like() | {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny.llama(**CAUSAL),
    "llama, biases": lambda: tiny.llama(**CAUSAL, attention_bias=True, mlp_bias=True),
    "llama, all heads": lambda: tiny.llama(**CAUSAL | {"num_key_value_heads": 4, "hidden_act": "gelu_new"}),
    "mistral, window": lambda: tiny.randomized(MistralForCausalLM(MistralConfig(**CAUSAL, sliding_window=6)), 0),
    "qwen2": lambda: tiny.randomized(
        Qwen2ForCausalLM(Qwen2Config(**CAUSAL, use_sliding_window=True, sliding_window=5, max_window_layers=1)), 0
    ),
    "qwen3": lambda: tiny.randomized(Qwen3ForCausalLM(Qwen3Config(**CAUSAL)), 0),
    "gpt2": lambda: tiny.gpt2(n_embd=64, n_head=4, n_inner=96, n_layer=3),
    "opt": lambda: tiny.randomized(OPTForCausalLM(OPTConfig(**CAUSAL, ffn_dim=96, word_embed_proj_dim=64)), 0),
    "neox": lambda: tiny.randomized(GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)), 0),
    "neox, one after the other": lambda: tiny.randomized(
        GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX, use_parallel_residual=False, attention_bias=False)), 0
    ),
    "phi3": lambda: tiny.randomized(
        Phi3ForCausalLM(Phi3Config(**without("head_dim"), rope_parameters=turning(0.5))), 0
    ),
    "gemma": lambda: tiny.randomized(GemmaForCausalLM(GemmaConfig(**CAUSAL)), 0),
    "gemma2": lambda: tiny.randomized(
        Gemma2ForCausalLM(
            Gemma2Config(
                **CAUSAL,
                sliding_window=6,
                query_pre_attn_scalar=16,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=20.0,
                attn_implementation="eager",
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            )
        ),
        0,
    ),
    "gemma3": lambda: tiny.randomized(
        Gemma3ForCausalLM(
            Gemma3TextConfig(
                **CAUSAL,
                sliding_window=6,
                query_pre_attn_scalar=16,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            )
        ),
        0,
    ),
    "t5": lambda: tiny.t5(**T5, feed_forward_proj="relu"),
    "t5, gated": lambda: tiny.t5(**T5, feed_forward_proj="gated-gelu"),
    "t5, silu": lambda: tiny.t5(**T5, feed_forward_proj="gated-silu"),
    "bart": lambda: tiny.bart(**BART),
    "marian": lambda: tiny.marian(**BART),
    "mbart": lambda: tiny.randomized(
        MBartForConditionalGeneration(MBartConfig(**BART, scale_embedding=True, activation_function="relu")), 0
    ),
    "pegasus": lambda: tiny.randomized(
        PegasusForConditionalGeneration(PegasusConfig(**BART, scale_embedding=True, activation_function="relu")), 0
    ),
    "mt5": lambda: tiny.randomized(
        MT5ForConditionalGeneration(MT5Config(vocab_size=tiny.VOCAB, num_layers=2, decoder_start_token_id=0, **T5)), 0
    ),
}
DTYPES = [torch.float32, torch.bfloat16]
TREE = torch.tensor(
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], dtype=torch.bool
)
DEPTHS = torch.tensor([0, 1, 1, 2, 2])


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    try:
        native.kernels()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"the C kernels cannot be compiled here: {error}")


def both(name: str, dtype: torch.dtype) -> tuple[Target, Target]:
    """The same model, stock and native."""
    model = MODELS[name]().to(dtype)
    stock = target_for(model)
    assert prepare(model, "native") == "native"
    return stock, target_for(model)


def prompts(*lengths: int, seed: int = 3) -> PromptInputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return PromptInputs(ids=ids * mask, mask=mask)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.float() - right).pow(2).mean().sqrt() / right.pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_native_layers_give_the_logits_of_stock_ones(name: str, dtype: torch.dtype) -> None:
    """Ragged prompts, a chain of several tokens, a tree, one token."""
    stock, fast = both(name, dtype)
    results = {}
    # Stock layers in float32, on the same weights, say what is right.
    right = copy.deepcopy(stock.model).float()
    del right.baton_runtime
    exact = target_for(right)
    assert type(exact) is not type(fast)
    for kind, target in (("stock", stock), ("native", fast), ("exact", exact)):
        logits, memory = target.prefill(prompts(9, 4, 1))
        found = [logits, *target.forward(torch.tensor([[5, 6, 7]] * 3), memory).unbind(1)]
        memory.keep([[0, 1, 2], [0], [0, 1]])
        positions = torch.tensor(memory.lengths)[:, None] + DEPTHS
        ids = torch.tensor([[8, 9, 10, 11, 12]] * 3)
        found += target.forward(ids, memory, positions=positions, tree=TREE.expand(3, -1, -1)).unbind(1)
        memory.keep([[0, 2, 4], [0], [0, 1, 3]])
        found += target.forward(torch.tensor([[13]] * 3), memory).unbind(1)
        results[kind] = torch.stack(found).float()
        assert memory.lengths == [9 + 3 + 3 + 1, 4 + 1 + 1 + 1, 1 + 2 + 3 + 1] or not target.reads_prompt
    if dtype == torch.float32:
        torch.testing.assert_close(results["native"], results["exact"], atol=2e-4, rtol=2e-4)
    else:  # about as far off as stock layers are
        assert error(results["native"], results["exact"]) < 2 * error(results["stock"], results["exact"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it(name: str, dtype: torch.dtype) -> None:
    """Alone or in a ragged batch, token by token or as a path of a tree: equal, not close, in bfloat16 too."""
    _, target = both(name, dtype)
    # A path with gaps, from one vector of slots to the next.
    parents = [-1, 0, 0, 0, 1, 0, 4, 2, 6, 8, 3, 9, 1, 11, 5, 13]
    nodes, tree = len(parents), torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents[1:], 1):
        tree[node] |= tree[parent]
    depths, ids = tree.sum(1) - 1, torch.arange(8, 8 + nodes)[None]
    path = tree[-1].nonzero().flatten().tolist()
    assert path == [0, 1, 4, 6, 8, 9, 11, 13, 15]
    for length in (4, 12, 16, 27):
        beside = prompts(9, length, 12)
        together, memory = target.prefill(beside)
        one, own = target.prefill(PromptInputs(ids=beside.ids[1:2, :length], mask=beside.mask[1:2, :length]))
        assert torch.equal(one[0], together[1])
        positions = torch.tensor(memory.lengths)[:, None] + depths
        found = target.forward(ids.expand(3, -1), memory, positions=positions, tree=tree.expand(3, -1, -1))
        for node in path:
            assert torch.equal(target.forward(ids[:, node : node + 1], own)[0, 0], found[1, node])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rows_with_fewer_tokens_are_computed_without_their_padding(name: str, dtype: torch.dtype) -> None:
    """Bit for bit what a rectangular pass gives; chains and trees, rows without any token among them."""
    _, target = both(name, dtype)
    ids = torch.arange(8, 8 + 5 * 4).view(4, 5)
    for counts, tree in (([2, 5, 0, 1], None), ([5, 1, 3, 4], TREE.expand(4, -1, -1))):
        (_, memory), (_, other) = (target.prefill(prompts(9, 4, 12, 1)) for _ in range(2))
        positions = None if tree is None else torch.tensor(memory.lengths)[:, None] + DEPTHS
        full = target.forward(ids, memory, positions=positions, tree=tree)
        found = target.forward(ids, other, positions=positions, tree=tree, counts=counts)
        for row, count in enumerate(counts):
            assert torch.equal(found[row, :count], full[row, :count]) and not found[row, count:].any()
        after = []
        for held in (memory, other):
            held.keep([list(range(min(count, 2))) for count in counts])
            after.append(target.forward(ids[:, :1], held))
        assert torch.equal(*after)
    with pytest.raises(ValueError, match="counted"):
        target.forward(ids, memory, counts=[6, 1, 1, 1])


@pytest.mark.parametrize("name", ["llama", "qwen2", "t5, gated", "bart", "mbart"])
def test_layers_are_captured_and_run_apart(name: str) -> None:
    stock, fast = both(name, torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    seen = []
    for target in (stock, fast):
        with target.capture([0, 1, 2]) as found:
            _, memory = target.prefill(prompts(6))
            prompt = dict(found)
            logits = target.forward(ids, memory)
        before = [length - 3 for length in memory.lengths]
        memory.truncate(before)
        low = target.forward_layers(0, 1, ids, memory)
        memory.truncate(before)
        high = target.forward_layers(1, len(target.layers), ids, memory, hidden=low)
        torch.testing.assert_close(low, found[1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(target.head(high).float(), logits.float(), atol=1e-4, rtol=1e-4)
        seen.append((prompt, dict(found)))
    for expected, got in zip(*seen, strict=True):
        for layer in (0, 1, 2):
            torch.testing.assert_close(got[layer], expected[layer], atol=1e-4, rtol=1e-4)
    with pytest.raises(BatonError, match="layer 9"), fast.capture([9]):
        pass


@pytest.mark.parametrize("layers", [0, 3])
def test_the_native_encoder_reads_what_the_stock_one_reads(layers: int) -> None:
    model = tiny.t5(**T5, num_layers=layers, num_decoder_layers=2)
    reader, inputs = T5Reader(model.get_encoder()), prompts(70, 3, 11)
    expected = model.get_encoder()(input_ids=inputs.ids, attention_mask=inputs.mask).last_hidden_state
    found = reader(model.get_input_embeddings()(inputs.ids).detach(), inputs.mask)
    real = inputs.mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=5e-4, rtol=5e-4)
    short = reader(model.get_input_embeddings()(inputs.ids[1:2, :3]).detach(), inputs.mask[1:2, :3])
    assert torch.equal(short[0], found[1, :3])


@pytest.mark.parametrize("name", ["bart", "marian", "mbart", "pegasus"])
def test_native_encoders_of_other_families_read_alike(name: str) -> None:
    stock, fast = both(name, torch.float32)
    inputs = prompts(70, 3, 11)
    expected, found = (target.encode(inputs)[0] for target in (stock, fast))
    real = inputs.mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=5e-4, rtol=5e-4)
    embeds = fast.encoder.get_input_embeddings()(inputs.ids).detach()
    given = PromptInputs(embeds=embeds, mask=inputs.mask)
    torch.testing.assert_close(fast.encode(given)[0][real], stock.encode(given)[0][real], atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("method", ["prompt-lookup", "token-recycling"])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=4)], ids=["greedy", "seeded"]
)
@pytest.mark.parametrize(
    "name",
    ["llama", "mistral, window", "gpt2", "opt", "neox", "phi3", "gemma2", "gemma3", "t5, gated", "bart", "pegasus"],
)
def test_drafts_change_no_token_in_bfloat16_either(name: str, sampling: Sampling, method: str) -> None:
    model = MODELS[name]().to(torch.bfloat16)
    prepare(model, "native")
    writer = LanguageModel(model, tiny.tokenizer(append_eos=model.config.is_encoder_decoder))
    plain = [baton.generate(writer, [p], sampling=sampling, max_new_tokens=40)[0].token_ids for p in tiny.PROMPTS[:1]]
    for size in (1, 5):
        found = baton.generate(
            writer, tiny.PROMPTS, drafter=method, sampling=sampling, max_new_tokens=40, batch_size=size
        )
        assert found[0].token_ids == plain[0]


def test_auto_takes_native_where_it_can_and_changes_nothing_in_the_model(tmp_path: Path) -> None:
    for name, expected in (("llama", "native"), ("gpt2", "native"), ("neox", "native"), ("narrow heads", "eager")):
        model = MODELS[name]() if name in MODELS else tiny.gpt2()
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer(append_eos=False).save_pretrained(tmp_path / name)
        loaded = baton.load(tmp_path / name)
        assert runtime_of(loaded.lm).name == expected
        assert runtime_of(baton.load(tmp_path / name, runtime="eager").lm).name == "eager"
        loaded.lm.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        for saved in (loaded.lm.state_dict(), again.state_dict()):
            weights = model.state_dict()
            assert weights.keys() == saved.keys() and all(torch.equal(weights[key], saved[key]) for key in weights)
        ids = torch.tensor([[5, 6, 7, 8]])
        torch.testing.assert_close(loaded.lm(ids).logits, model(ids).logits)  # stock layers go on as before


def test_a_model_that_was_converted_runs_eager_and_its_old_engine_says_so() -> None:
    model = MODELS["llama"]()
    prepare(model, "native")
    engine = baton.Engine(LanguageModel(model, tiny.tokenizer(append_eos=False)))
    model.to(torch.bfloat16)
    assert runtime_of(model).name == "eager"
    with pytest.raises(BatonError, match="moved or converted"):
        baton.generate(engine, ["The cat."], max_new_tokens=3)
    assert baton.generate(LanguageModel(model, tiny.tokenizer(append_eos=False)), ["The cat."], max_new_tokens=3)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: tiny.llama(**CAUSAL | {"head_dim": 8}), "heads 8 wide"),
        (lambda: tiny.llama(**CAUSAL | {"hidden_act": "tanh"}), "activation Tanh"),
        (lambda: tiny.llama(**CAUSAL).to(torch.float16), "float16"),
        (lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_head=2)), "no native layers for bloom"),
        (lambda: MODELS["t5"]().to(torch.bfloat16).requires_grad_(False), ""),
    ],
)
def test_what_native_layers_cannot_run_is_left_alone_with_a_reason(
    make: Callable[[], PreTrainedModel], why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baton.runtime, "_said", set())
    model = make()
    with caplog.at_level(logging.WARNING):
        assert prepare(model, "native") == ("eager" if why else "native")
        assert prepare(model, "native") == ("eager" if why else "native")
    said = [record.getMessage() for record in caplog.records]
    assert (len(said) == 1 and why in said[0]) if why else not said


def test_without_a_compiler_models_run_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.kernels.cache_clear()
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    model = MODELS["llama"]()
    assert "cannot be compiled" in families.make_native(model)
    assert prepare(model, "auto") == "eager"
    native.kernels.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama, biases", "qwen3", "gpt2", "neox", "phi3", "t5, gated", "bart"])
@pytest.mark.parametrize("runtime", ["int8", "int4"])
def test_fewer_bits_are_the_model_whose_weights_were_rounded(runtime: Any, name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]().to(dtype)
    rounded = copy.deepcopy(model)
    assert prepare(model, runtime) == runtime
    four = 0
    for small, module in zip(model.modules(), rounded.modules(), strict=True):
        if (smaller := copy_of(small)) is not None:
            four += isinstance(smaller, Int4)
            dense = smaller.dense()
            module.weight = nn.Parameter(dense.T if type(module) is Conv1D else dense)
    layers = target_for(model).layers
    inside = [m for m in layers.modules() if type(m) in (nn.Linear, Conv1D)]
    assert four == (len(inside) if runtime == "int4" else 0)
    assert isinstance(copy_of(model.get_output_embeddings()), Int8)  # the head, in both
    found = []
    for target in (target_for(model), target_for(rounded.float())):
        logits, memory = target.prefill(prompts(9, 4, 1))
        found.append(torch.cat([logits[:, None], target.forward(torch.tensor([[5, 6, 7]] * 3), memory)], 1).float())
    errors = sorted(error(*row) for row in zip(*found, strict=True))
    if dtype == torch.float32:
        assert errors[-1] < 1e-4
    else:  # the longest prompt of a random T5 is sensitive to any rounding of its states
        assert errors[1] < 0.1
    assert prepare(model, "native") == "native"
    logits, _ = target_for(model).prefill(prompts(9, 4, 1))
    assert error(logits, found[0][:, 0]) > 1e-3  # the copies are gone


def test_eight_bits_are_a_scale_per_row() -> None:
    smaller = Int8.of(torch.tensor([[1.0, -0.5, 0.0, 0.004], [0.0, 0.0, 0.0, 0.0]]))
    assert smaller.weight.tolist() == [[127, -64, 0, 1], [0, 0, 0, 0]]
    torch.testing.assert_close(
        smaller.dense(), torch.tensor([[1.0, -0.504, 0.0, 0.0079], [0.0] * 4]), atol=1e-4, rtol=0
    )


def test_four_bits_are_packed_as_their_docstring_says() -> None:
    """Two rows of 64 inputs: the weights are multiples of a scale already, so nothing is lost."""
    levels = torch.arange(64).view(1, 64).remainder(16) - 8
    weight = torch.cat([levels * 0.5, levels.flip(1) * -2.0])
    weight[1, 32:] = 0
    smaller = Int4.of(weight)
    assert torch.equal(smaller.dense(), weight) and smaller.packed.shape == (1, 1, 144)
    numbers = smaller.packed[0, 0, :32].int() & 0xFFFF  # of the first row
    assert [int(n) for n in numbers & 15] == [int(level) + 8 for level in levels[0, :32]]
    assert [int(n) for n in numbers >> 4 & 15] == [int(level) + 8 for level in levels[0, 32:]]
    scales = smaller.packed[0, 0, 128:].contiguous().view(torch.bfloat16).float()
    assert scales.tolist() == [0.5, 0.5, 0.0, 0.0, -2.0, *[0.0] * 11]
    assert smaller.nbytes == 4 * 128 * 4.5 / 8  # four and a half bits of each of four rows of 128 inputs


def test_four_bits_lose_less_than_rounding_at_the_largest_weight_does() -> None:
    weight = torch.randn((64, 256), generator=torch.Generator().manual_seed(0))
    groups = weight.view(64, -1, 32)
    scales = groups.abs().amax(2, keepdim=True) / 7
    plain = error((groups / scales).round() * scales, groups)
    found = error(Int4.of(weight).dense(), weight)
    assert 0.05 < found < 0.9 * plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(16, 64), (37, 96), (6, 192), (32, 768)])
def test_products_in_four_bits_are_exact_and_the_same_for_any_number_of_rows(
    rows: int, width: int, dtype: torch.dtype
) -> None:
    """Whole blocks and parts of them, outputs that are no multiple of four, a bias, a group of zeros."""
    torch.manual_seed(0)
    layer = nn.Linear(width, rows).to(dtype).requires_grad_(False)
    layer.weight[2, :32] = 0
    smaller = Int4.of(layer.weight)
    layer.baton_copy = smaller  # type: ignore[assignment]
    made = Parts(dtype, torch.device("cpu")).linear(layer)
    x = torch.randn(9, width).to(dtype)
    together = apply(made, x, dtype)
    exact = x.double() @ smaller.dense().double().T + layer.bias.double()
    assert float((together - exact).abs().max() / exact.abs().max()) < 1e-6
    for n in (1, 2, 3, 5):
        assert torch.equal(apply(made, x[:n], dtype), together[:n])


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "-march=x86-64-v4"])
def test_other_processors_compute_the_same_products(
    flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernels compiled for less than this processor can: a compiler that does not hear of it."""
    if platform.machine() != "x86_64" or shutil.which("gcc") is None:
        pytest.skip("needs gcc on x86-64")
    if "v4" in flags and "avx512" not in native._cpu_flags():
        pytest.skip("this processor has no AVX-512")
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/bash\nexec gcc "${{@/-march=native/-O3}}" {flags}\n')
    compiler.chmod(0o755)
    torch.manual_seed(0)
    layer, x, results = nn.Linear(192, 30, bias=False).requires_grad_(False), torch.randn(5, 192), []
    layer.baton_copy = Int4.of(layer.weight)  # type: ignore[assignment]
    for other in (False, True):
        if other:
            native.kernels.cache_clear()
            monkeypatch.setenv("BATON_CACHE", str(tmp_path))
            monkeypatch.setenv("CC", str(compiler))
        results.append([apply(Parts(d, x.device).linear(layer.to(d)), x, d) for d in DTYPES])
    native.kernels.cache_clear()
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5, gated"])
def test_a_row_in_four_bits_is_the_same_bit_for_bit_whatever_is_beside_it(name: str) -> None:
    model = MODELS[name]().to(torch.bfloat16)
    assert prepare(model, "int4") == "int4"
    target = target_for(model)
    together, _ = target.prefill(prompts(9, 4, 12))
    many = prompts(9, 4, 12)
    alone, _ = target.prefill(PromptInputs(ids=many.ids[1:2, :4], mask=many.mask[1:2, :4]))
    assert torch.equal(alone[0], together[1])


def test_what_fewer_bits_cost_is_measured_on_given_texts() -> None:
    writer = tiny.language_model("llama", **CAUSAL)
    texts = [("The cat sat", " on the mat"), ("A dog runs in the garden.", "")]
    with pytest.raises(BatonError, match="int8 or int4"):
        cost_of_bits(writer, texts)
    found = {}
    for runtime in ("int8", "int4"):
        prepare(writer.lm, runtime)  # type: ignore[arg-type]
        found[runtime] = cost_of_bits(writer, texts)
    assert found["int8"]["native"] == found["int4"]["native"] > 1
    eight, four = (abs(found[name][name] / found[name]["native"] - 1) for name in ("int8", "int4"))
    assert 0 < eight < four < 0.5
    t5 = LanguageModel(MODELS["t5"](), tiny.tokenizer(append_eos=True))
    prepare(t5.lm, "int4")
    with pytest.raises(BatonError, match="prompt and response"):
        cost_of_bits(t5, texts)


def test_where_nothing_native_runs_four_bits_fall_back_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    baton.runtime._said.clear()
    with caplog.at_level(logging.WARNING):
        assert prepare(BloomForCausalLM(BloomConfig(hidden_size=16, n_head=2)), "int4") == "eager"
        assert prepare(BloomForCausalLM(BloomConfig(hidden_size=16, n_head=2)), "int4") == "eager"
    assert [record.getMessage() for record in caplog.records] == [
        f"runtime int4 is not used: there are no native layers for bloom (for {', '.join(families.TARGETS)})"
    ]


def test_an_unknown_runtime_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownOption, match="native"):
        prepare(tiny.bart(), "nativ")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "bart", "llama"])
def test_packed_weights_give_the_same_logits_and_replace_the_old_ones(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("baton.runtime.packed.WORTH_PACKING", 0)
    model = tiny.FAMILIES[family]().to(dtype)
    results = []
    for runtime in ("eager", "packed"):
        if prepare(model, runtime) != runtime:  # type: ignore[arg-type]
            pytest.skip("this machine has no packed weights in bfloat16")
        target = target_for(model)
        logits, memory = target.prefill(prompts(9, 4, 1))
        results.append(torch.cat([logits[:, None], target.forward(torch.tensor([[5, 6, 7]] * 3), memory)], 1))
    assert error(results[1], results[0].float()) < (1e-5 if dtype == torch.float32 else 0.05)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert packed and not any(type(module) is nn.Linear for module in model.modules())
    with pytest.raises(BatonError, match="runtime='eager'"):
        model.save_pretrained(tmp_path)
    with pytest.raises(BatonError, match="runtime='eager'"):
        model.to(torch.float64)


def test_logits_that_are_no_numbers_stay_so() -> None:
    """Rounding to bfloat16 must not turn them into numbers."""
    model = MODELS["llama"]().to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    prepare(model, "native")
    target: Any = target_for(model)
    logits, memory = target.prefill(prompts(3, 5))
    assert isinstance(memory, Memory) and logits.isfinite().all()
    after = target.forward(torch.tensor([[7], [8]]), memory)
    assert after[0].isnan().all() and after[1].isfinite().all()


# --- models that are not what they were ------------------------------------------------------------------------------


def test_an_adapter_is_never_left_out() -> None:
    """With a LoRA of rank 16 every matrix looks right from outside; added before or after, the text must have it."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    before, after = MODELS["llama"](), MODELS["llama"]()
    peft.inject_adapter_in_model(options, before)
    assert prepare(before, "native") == "eager"
    assert prepare(after, "native") == "native"
    peft.inject_adapter_in_model(options, after)
    stock = MODELS["llama"]()
    inputs = prompts(5)
    for model in (before, after):
        expected = model(input_ids=inputs.ids).logits[:, -1]
        logits, _ = target_for(model).prefill(inputs)
        torch.testing.assert_close(logits.float(), expected, atol=1e-4, rtol=1e-4)
        assert (logits - stock(input_ids=inputs.ids).logits[:, -1]).abs().max() > 0.1


def test_weights_that_are_computed_or_elsewhere_are_refused() -> None:
    computed, elsewhere = MODELS["llama"](), MODELS["llama"]()
    nn.utils.parametrizations.weight_norm(computed.model.layers[0].mlp.up_proj)
    elsewhere.model.layers[1].mlp.up_proj.to("meta")
    for model in (computed, elsewhere):
        assert prepare(model, "native") == "eager"
    packed = tiny.llama(**CAUSAL).to(torch.bfloat16)
    if prepare(packed, "packed") == "packed":
        assert prepare(packed, "native") == "eager"


def test_an_engine_sees_that_weights_were_exchanged_and_reads_no_freed_memory() -> None:
    model = MODELS["llama"]()
    prepare(model, "native")
    target = target_for(model)
    logits, _ = target.prefill(prompts(5))
    other = {name: weight.clone() for name, weight in MODELS["llama"]().state_dict().items()}
    model.load_state_dict(other, assign=True)
    with pytest.raises(BatonError, match="make a new engine"):
        target.prefill(prompts(5))
    assert torch.equal(target_for(model).prefill(prompts(5))[0], logits)


def test_a_long_prompt_is_captured_whole() -> None:
    """It is read in pieces; what drafters are given is all of it."""
    stock, fast = both("llama", torch.float32)
    inputs = prompts(*[100] * 7, 30)
    states = []
    for target in (stock, fast):
        with target.capture([0, 2]) as found:
            target.prefill(inputs)
        states.append(found)
    for layer in (0, 2):
        assert states[1][layer].shape == (8, 100, 64)
        torch.testing.assert_close(states[1][layer][:7], states[0][layer][:7], atol=2e-3, rtol=2e-3)


def test_what_the_native_encoder_read_can_be_learned_from() -> None:
    model = tiny.t5(**T5)
    states = T5Reader(model)(model.get_input_embeddings()(torch.tensor([[5, 6, 7]])), torch.ones((1, 3)).long())
    layer = nn.Linear(64, 4)
    layer(states).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_states_and_embeddings_of_another_dtype_or_order_are_converted() -> None:
    model = MODELS["t5"]().to(torch.bfloat16)
    prepare(model, "native")
    target: Any = target_for(model)
    inputs = prompts(6, 3)
    states, _ = target.encode(inputs)
    expected, _ = target.prefill(PromptInputs(states=states, mask=inputs.mask))
    found, _ = target.prefill(PromptInputs(states=states.float(), mask=inputs.mask))
    assert torch.equal(found, expected)
    wide = model.get_input_embeddings()(inputs.ids).detach()
    turned = wide.transpose(0, 1).contiguous().transpose(0, 1).float()
    assert torch.equal(target.reader(turned, inputs.mask), target.reader(wide, inputs.mask))


def test_positions_and_rows_that_do_not_exist_are_no_accident() -> None:
    _, fast = both("llama, all heads", torch.float32)
    fast.context = None
    _, memory = fast.prefill(prompts(4))
    assert fast.forward(torch.tensor([[5]]), memory, positions=torch.tensor([[50000]])).isfinite().all()
    with pytest.raises(ValueError, match=r"2 rows of 1 tokens, counted \[1, 1\], for 1 rows"):
        fast.forward(torch.tensor([[5], [6]]), memory)
    _, t5 = both("t5", torch.float32)
    _, memory = t5.prefill(prompts(4))
    assert t5.forward(torch.tensor([[5, 6]]), memory, positions=torch.tensor([[3000, 9000]])).isfinite().all()


def test_relu_hides_no_broken_number() -> None:
    model = MODELS["t5"]()
    with torch.no_grad():
        model.decoder.block[0].layer[2].DenseReluDense.wi.weight[3] = float("nan")
    prepare(model, "native")
    assert target_for(model).prefill(prompts(4))[0].isnan().any()
