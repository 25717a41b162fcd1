"""Faster runtimes give what stock layers give; native rows do not depend on what is computed beside them."""

import copy
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import baton
import baton.runtime
from baton.cache import Memory
from baton.errors import BatonError, UnknownOption
from baton.models.adapter import Target, runtime_of, target_for
from baton.models.loading import LanguageModel
from baton.models.writer import PromptInputs
from baton.runtime import native, prepare
from baton.runtime.native import Quantized, T5Reader
from baton.runtime.packed import PackedLinear
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
T5 = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny.llama(**CAUSAL),
    "llama, biases": lambda: tiny.llama(**CAUSAL, attention_bias=True, mlp_bias=True),
    "llama, all heads": lambda: tiny.llama(**CAUSAL | {"num_key_value_heads": 4, "hidden_act": "gelu_new"}),
    "mistral, window": lambda: tiny.randomized(MistralForCausalLM(MistralConfig(**CAUSAL, sliding_window=6)), 0),
    "qwen2": lambda: tiny.randomized(
        Qwen2ForCausalLM(Qwen2Config(**CAUSAL, use_sliding_window=True, sliding_window=5, max_window_layers=1)), 0
    ),
    "qwen3": lambda: tiny.randomized(Qwen3ForCausalLM(Qwen3Config(**CAUSAL)), 0),
    "t5": lambda: tiny.t5(**T5, feed_forward_proj="relu"),
    "t5, gated": lambda: tiny.t5(**T5, feed_forward_proj="gated-gelu"),
    "t5, silu": lambda: tiny.t5(**T5, feed_forward_proj="gated-silu"),
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
    together, memory = target.prefill(prompts(9, 4, 12))
    alone = prompts(9, 4, 12)
    mine = PromptInputs(ids=alone.ids[1:2, :4], mask=alone.mask[1:2, :4])
    one, own = target.prefill(mine)
    assert torch.equal(one[0], together[1])
    positions = torch.tensor(memory.lengths)[:, None] + DEPTHS
    ids = torch.tensor([[8, 9, 10, 11, 12]] * 3)
    tree = target.forward(ids, memory, positions=positions, tree=TREE.expand(3, -1, -1))
    for node in (0, 2, 4):  # a path with gaps between its slots
        assert torch.equal(target.forward(ids[:1, node : node + 1], own)[0, 0], tree[1, node])


@pytest.mark.parametrize("name", ["llama", "qwen2", "t5, gated"])
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


@pytest.mark.parametrize("method", ["prompt-lookup", "token-recycling"])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=4)], ids=["greedy", "seeded"]
)
@pytest.mark.parametrize("name", ["llama", "mistral, window", "t5, gated"])
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
    for name, expected in (("llama", "native"), ("gpt2", "eager")):
        model = MODELS[name]() if name in MODELS else tiny.gpt2()
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer(append_eos=False).save_pretrained(tmp_path / name)
        loaded = baton.load(tmp_path / name)
        assert runtime_of(loaded.lm).name == expected
        assert runtime_of(baton.load(tmp_path / name, runtime="eager").lm).name == "eager"
        loaded.lm.save_pretrained(tmp_path / "again")
        weights, saved = model.state_dict(), loaded.lm.state_dict()
        assert weights.keys() == saved.keys() and all(torch.equal(weights[key], saved[key]) for key in weights)


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
        (tiny.gpt2, "no native layers for gpt2"),
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
    assert "cannot be compiled" in native.make_native(model)
    assert prepare(model, "auto") == "eager"
    native.kernels.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama, biases", "qwen3", "t5, gated"])
def test_int8_is_the_model_whose_weights_were_rounded(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]().to(dtype)
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if type(module) is nn.Linear:
            stored = Quantized.of(module.weight)
            assert stored.weight.abs().max() == 127
            module.weight = nn.Parameter(stored.weight.to(torch.float32) * stored.scales[:, None])
    tie = rounded.float()
    assert prepare(model, "int8") == "int8"
    found = []
    for target in (target_for(model), target_for(tie)):
        logits, memory = target.prefill(prompts(9, 4, 1))
        found.append(torch.cat([logits[:, None], target.forward(torch.tensor([[5, 6, 7]] * 3), memory)], 1).float())
    assert error(found[0], found[1]) < (1e-4 if dtype == torch.float32 else 0.1)
    assert prepare(model, "native") == "native"
    logits, _ = target_for(model).prefill(prompts(9, 4, 1))
    assert error(logits, found[0][:, 0]) > 1e-3  # the int8 copies are gone


def test_an_unknown_runtime_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownOption, match="native"):
        prepare(tiny.gpt2(), "nativ")  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match="2 rows of tokens for 1"):
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
