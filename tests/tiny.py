"""Tiny random models and a tiny tokenizer, made in memory: float32, seeded, different in every weight."""

from functools import cache
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from baton.models.loading import LanguageModel
from baton.train.tokenizers import train_bpe

VOCAB = 300  # 3 special tokens, 256 bytes, 41 merges
PAD, EOS = 0, 1
WIDTH, HEADS = 32, 4

TEXTS = [
    "The cat sat on the mat.",
    "The dog and the cat ran to the house.",
    "A small model writes what a large model has read.",
    "Die Katze schläft im Haus, der Hund schläft davor.",
    "Wir lesen und schreiben, sie lesen und schreiben auch.",
]
PROMPTS = [
    "The cat.",
    "A dog and a cat sat in the house and read.",
    "Die Katze",
    "Ünïcödé: 日本",
    "the large model has read what the small one writes, and then it sat down",
]


@cache
def tokenizer(*, append_eos: bool = True) -> PreTrainedTokenizerFast:
    """`append_eos` for encoder-decoder models; off for decoder-only ones, whose prompt goes on."""
    made = train_bpe(TEXTS, VOCAB, append_eos=append_eos)
    assert len(made) == VOCAB
    return made


def t5(seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    config = T5Config(
        **{
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 48,
            "num_heads": HEADS,
            "num_layers": 3,
            "num_decoder_layers": 2,  # not more than num_layers: transformers' cache would be too short
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
            "feed_forward_proj": "gated-gelu",
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "decoder_start_token_id": PAD,
        }
        | changes
    )
    return randomized(T5ForConditionalGeneration(config), seed)


def bart(seed: int = 0, **changes: Any) -> BartForConditionalGeneration:
    return randomized(BartForConditionalGeneration(BartConfig(**_bart_like() | changes)), seed)


def marian(seed: int = 0, **changes: Any) -> MarianMTModel:
    extra = {"scale_embedding": True, "share_encoder_decoder_embeddings": True, "activation_function": "swish"}
    extra |= {"decoder_vocab_size": VOCAB}
    return randomized(MarianMTModel(MarianConfig(**_bart_like() | extra | changes)), seed)


def gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    config = GPT2Config(
        **{
            "vocab_size": VOCAB,
            "n_positions": 128,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": HEADS,
            "bos_token_id": EOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        | changes
    )
    return randomized(GPT2LMHeadModel(config), seed)


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": EOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        | changes
    )
    return randomized(LlamaForCausalLM(config), seed)


FAMILIES = {"t5": t5, "bart": bart, "marian": marian, "gpt2": gpt2, "llama": llama}


def language_model(family: str, seed: int = 0, **changes: Any) -> LanguageModel:
    """A tiny model of one of `FAMILIES` with the tokenizer that suits it."""
    model = FAMILIES[family](seed, **changes)
    return LanguageModel(model, tokenizer(append_eos=model.config.is_encoder_decoder), f"tiny {family}")


def randomized(model: Any, seed: int) -> Any:
    """Fill every weight, in place: outputs that depend on all of them, and no near-ties. Returns it in `eval` mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:  # sinusoidal positions
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:  # norms stay near one, biases near zero
                weight.add_(0.1 * noise)
            elif "relative_attention_bias" in name:
                weight.copy_(noise)
            elif _is_embedding(model, weight):  # small: with a tied head, large ones repeat the last token for ever
                weight.copy_(0.1 * noise)
            else:
                # Attention says much the same at every step: were it loud, every token would be the same too.
                gain = 0.7 if "attn.out_proj" in name or "EncDecAttention.o" in name else 2.5
                weight.copy_(gain * noise * weight.shape[-1] ** -0.5)
    return model.eval()


def _is_embedding(model: PreTrainedModel, weight: torch.Tensor) -> bool:
    return any(isinstance(module, torch.nn.Embedding) and module.weight is weight for module in model.modules())


def _bart_like() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": 2,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": None,
    }
