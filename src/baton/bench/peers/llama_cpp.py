"""llama.cpp on the same weights, written to GGUF: greedy, prompt lookup, and a draft model; one prompt at a time."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from torch import Tensor
from transformers import PreTrainedModel

from baton.bench.peers.table import Absent
from baton.machine import seconds_of
from baton.models.loading import LanguageModel, load
from baton.models.prompts import tokenize_prompts
from baton.models.writer import Writer
from baton.types import FinishReason, Output

FAMILIES = ("llama", "mistral")  # of ours, those that are written to GGUF here
NUM_DRAFT_TOKENS = 10  # of both drafting modes, as transformers' prompt lookup is given


def contenders(writer: Writer, max_new_tokens: int, assistant: str | None) -> list["LlamaCppPeer"]:
    family = writer.lm.config.model_type
    if not isinstance(writer, LanguageModel) or family not in FAMILIES:
        raise Absent(f"llama.cpp is left out: here it runs {', '.join(FAMILIES)}, and this is {family}")
    context = min(writer.lm.config.max_position_embeddings, 4096)
    drafts: dict[str, LlamaDraftModel | None] = {
        "greedy": None,
        "prompt lookup": LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=NUM_DRAFT_TOKENS),
    }
    if assistant is not None:
        drafts["draft model"] = _Small(open_llama(load(assistant, dtype=writer.lm.dtype).lm, context))
    return [
        LlamaCppPeer(writer, kind, open_llama(writer.lm, context, draft), context, max_new_tokens)
        for kind, draft in drafts.items()
    ]


class LlamaCppPeer:
    """`Llama.generate` of llama-cpp-python, on as many threads as PyTorch has."""

    family, batches = "peer", False

    def __init__(self, writer: LanguageModel, kind: str, llama: Llama, context: int, max_new_tokens: int) -> None:
        self.writer, self.llama, self.context, self.max_new_tokens = writer, llama, context, max_new_tokens
        self.name = f"llama.cpp {kind}"
        ends = writer.lm.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def write(self, prompts: Sequence[str], first_index: int) -> list[Output]:
        tokenizer = self.writer.tokenizer
        outputs = []
        for prompt, row in zip(
            prompts, tokenize_prompts(tokenizer, prompts, self.writer.prompt_limits, truncate=True), strict=True
        ):
            ids: list[int] = []
            room = min(self.max_new_tokens, self.context - len(row))
            reason: FinishReason = "length"
            self.llama.reset()  # or it would reuse what it knows of an equal beginning
            for token in self.llama.generate(row, temp=0.0, repeat_penalty=1.0):
                ids.append(token)
                if token in self.ends:
                    reason = "eos"
                if reason == "eos" or len(ids) == room:
                    break
            text = tokenizer.decode(ids, skip_special_tokens=True)
            outputs.append(Output(prompt=prompt, text=text, token_ids=ids, finish_reason=reason))
        return outputs


class _Small(LlamaDraftModel):
    """A chain of tokens that a small model finds most probable."""

    def __init__(self, llama: Llama) -> None:
        self.llama = llama

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
        found: list[int] = []
        # What both texts begin with stays in the small model's cache.
        for token in self.llama.generate(input_ids.tolist(), temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == NUM_DRAFT_TOKENS:
                break
        return np.array(found, dtype=np.intc)


def open_llama(model: PreTrainedModel, context: int, draft: LlamaDraftModel | None = None, *, bits: int = 0) -> Llama:
    """llama.cpp with a copy of these weights, in their dtype, or in its own eight or four `bits`."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path, bits=bits)
        return Llama(
            str(path),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            draft_model=draft,
            logits_all=draft is not None,  # it verifies drafts by them
            use_mmap=False,
            verbose=False,
        )


def write_gguf(model: PreTrainedModel, path: Path, tokenizer: Any = None, *, bits: int = 0) -> None:
    """Weights of a Llama-shaped model, in their own dtype.

    Args:
        tokenizer: byte-pair encoding that is written too; None: no vocabulary, ids go in and come out.
        bits: 8: matrices in Q8_0; 4: in Q4_0, and the embeddings and the head in Q8_0, as ours has them.
    """
    config: Any = model.config
    if config.rope_parameters.get("rope_type", "default") != "default" or getattr(config, "sliding_window", None):
        raise Absent("left out: positions that are scaled, and sliding windows, are not written to GGUF here")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise Absent("left out: biases are not written to GGUF here")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    out = gguf.GGUFWriter(path, "llama")
    if tokenizer is None:
        out.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(out, tokenizer)
    out.add_vocab_size(config.vocab_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(width)
    out.add_value_length(width)
    out.add_rope_dimension_count(width)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)

    def add(name: str, weight: Tensor) -> None:
        weight = weight.detach().cpu().contiguous()
        if bits and weight.dim() == 2:
            kind = gguf.GGMLQuantizationType[f"Q{bits if name.startswith('blk.') else 8}_0"]
            out.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)
        elif weight.dim() == 1 or weight.dtype == torch.float32:
            out.add_tensor(name, weight.float().numpy())
        elif weight.dtype == torch.bfloat16:
            raw = weight.view(torch.uint8).numpy()
            out.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            out.add_tensor(name, weight.numpy())

    def paired(weight: Tensor, count: int) -> Tensor:
        """Rows of each head in the order that llama.cpp turns them: neighbours together, not halves."""
        return weight.reshape(count, 2, width // 2, -1).transpose(1, 2).reshape(weight.shape)

    body: Any = model.base_model
    add("token_embd.weight", body.embed_tokens.weight)
    for number, layer in enumerate(body.layers):
        place = f"blk.{number}."
        attention, mlp = layer.self_attn, layer.mlp
        add(f"{place}attn_norm.weight", layer.input_layernorm.weight)
        add(f"{place}attn_q.weight", paired(attention.q_proj.weight, heads))
        add(f"{place}attn_k.weight", paired(attention.k_proj.weight, kv_heads))
        add(f"{place}attn_v.weight", attention.v_proj.weight)
        add(f"{place}attn_output.weight", attention.o_proj.weight)
        add(f"{place}ffn_norm.weight", layer.post_attention_layernorm.weight)
        add(f"{place}ffn_gate.weight", mlp.gate_proj.weight)
        add(f"{place}ffn_up.weight", mlp.up_proj.weight)
        add(f"{place}ffn_down.weight", mlp.down_proj.weight)
    add("output_norm.weight", body.norm.weight)
    add("output.weight", model.get_output_embeddings().weight)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _add_vocabulary(out: gguf.GGUFWriter, tokenizer: Any) -> None:
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    out.add_token_types([control if token in tokenizer.all_special_tokens else normal for token in tokens])
    out.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for add in (out.add_bos_token_id, out.add_eos_token_id, out.add_unk_token_id, out.add_pad_token_id):
        add(tokenizer.eos_token_id)
    out.add_chat_template("{{ messages[0].content }}")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    out.add_quantization_version(2)


class Passes:
    """Single passes, for `baton bench forward`."""

    lacks = ""

    def __init__(self, model: PreTrainedModel, context: int, *, bits: int = 0) -> None:
        if model.config.model_type not in FAMILIES:
            raise Absent(f"llama.cpp is left out: here it runs {', '.join(FAMILIES)}")
        self.name = f"llama.cpp Q{bits}_0" if bits else "llama.cpp"
        self.llama = open_llama(model, context, bits=bits)

    def begin(self, ids: list[int]) -> float:
        self.llama.reset()
        return seconds_of(lambda: self.llama.eval(ids))

    def look(self, ids: list[int]) -> float:
        llama, length = self.llama, self.llama.n_tokens
        llama._batch.set_batch(batch=ids, n_past=length, logits_all=True)
        taken = seconds_of(lambda: llama._ctx.decode(llama._batch))
        llama._ctx.kv_cache_seq_rm(-1, length, -1)
        return taken
