"""Public shapes, whose speed is measured with random weights: model type and settings as transformers has them."""

from typing import Any

_LLAMA = {"vocab_size": 32000, "max_position_embeddings": 16384, "tie_word_embeddings": False}
_T5 = {"d_kv": 64, "vocab_size": 32128, "decoder_start_token_id": 0}

_SIX = {"encoder_layers": 6, "decoder_layers": 6}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-110m": (
        "llama",
        _LLAMA | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "llama-1b": (  # TinyLlama, arXiv 2401.02385
        "llama",
        _LLAMA
        | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
        | {"num_attention_heads": 32, "num_key_value_heads": 4},
    ),
    "qwen2-0.5b": (
        "qwen2",
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "gpt2": ("gpt2", {}),  # 124 M parameters; transformers' defaults are its shape
    "t5-small": ("t5", _T5 | {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}),
    "t5-base": ("t5", _T5 | {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "t5-large": ("t5", _T5 | {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}),
    "bart-base": (  # arXiv 1910.13461
        "bart",
        _SIX
        | {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "vocab_size": 50265}
        | {"encoder_attention_heads": 12, "decoder_attention_heads": 12},
    ),
    "opus-mt": (  # of the translators of Helsinki-NLP
        "marian",
        _SIX
        | {"d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "vocab_size": 58101}
        | {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "max_position_embeddings": 512}
        | {"activation_function": "swish", "scale_embedding": True, "pad_token_id": 58100, "eos_token_id": 0}
        | {"decoder_start_token_id": 58100, "bos_token_id": 0, "forced_eos_token_id": 0},
    ),
}
