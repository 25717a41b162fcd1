"""From a folder or a Hub id to something that writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from baton.errors import BatonError, ModelMismatch, UnsupportedModel
from baton.models.adapter import runtime_of
from baton.models.prompts import prompt_limit
from baton.models.writer import PromptInputs, Writer
from baton.types import RuntimeName, Timings

HANDOFF_TYPE = "baton-handoff"  # model_type in the config.json of a hand-off


@dataclass(frozen=True)
class LanguageModel:
    """A `Writer` that is one transformers model, decoder-only or encoder-decoder."""

    model: PreTrainedModel
    tokenizer: Any
    name: str = "model"  # how errors call it

    @property
    def lm(self) -> PreTrainedModel:
        return self.model

    @property
    def prompt_tokenizer(self) -> Any:
        return self.tokenizer

    @property
    def response_tokenizer(self) -> Any:
        return self.tokenizer

    @property
    def prompt_limits(self) -> dict[str, int]:
        limit = prompt_limit(self.model.config, self.tokenizer)
        return {} if limit is None else {self.name: limit}

    def encode(self, ids: Tensor, mask: Tensor, timings: Timings) -> PromptInputs:
        """Nothing to do: the prompt pass happens in prefill."""
        return PromptInputs(ids=ids, mask=mask)


def resolve_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """`"bfloat16"` to `torch.bfloat16`; `"auto"`, the dtype of the stored weights, stays as it is.

    Raises:
        BatonError: not the name of a floating-point dtype.
    """
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BatonError(f"dtype={dtype!r} is not known: use auto, float32, bfloat16 or float16")
    return found


def resolve_device(device: str | torch.device | None) -> torch.device:
    """None is the first GPU, or the CPU where there is none."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def at_revision(source: str | Path) -> tuple[str, str | None]:
    """A folder or Hub id, and the branch, tag or commit that stands behind it: `owner/name@revision`."""
    name, at, revision = str(source).rpartition("@")
    return (name, revision) if at and not Path(source).exists() else (str(source), None)


def read_config(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a folder or Hub id, as it stands.

    Raises:
        ModelMismatch: there is none.
    """
    name, named = at_revision(source)
    source, revision = (source if named is None else name), revision or named
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelMismatch(f"{source} has no config.json: name a folder that save_pretrained wrote")
    # A Hub id has one slash at most: do not ask the network about a path that was mistyped.
    if not folder.is_dir() and (
        isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1
    ):
        raise ModelMismatch(f"no model at {str(source)!r}: there is no such folder")
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision)
    except (OSError, ValueError) as error:  # the Hub's own errors are both
        raise ModelMismatch(f"no model at {str(source)!r}, as a folder or on the Hub: {first_line(error)}") from error
    if not config:
        raise ModelMismatch(f"no model at {str(source)!r}, as a folder or on the Hub")
    return dict(config)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bar and report of unused weights: parts of a model are left out on purpose."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    runtime: RuntimeName = "auto",
) -> Writer:
    """A model that writes, with its tokenizer, ready for `generate`.

    Args:
        source: folder or Hub id, of a hand-off or of any language model that transformers knows; a Hub id may name a
            branch, tag or commit: `owner/name@revision`.
        dtype: "auto" is the dtype of the stored weights.
        device: None is the first GPU, or the CPU where there is none.
        runtime: how it is made fast, see `baton.runtime.prepare`; `eager` to train it, move it or save it afterwards.
    Raises:
        ModelMismatch: there is no model at `source`.
        BatonError: it cannot be read.
        UnsupportedModel: it does not write text.
    """
    raw = read_config(source)
    if raw.get("model_type") == HANDOFF_TYPE:
        from baton.handoff.model import HandoffModel  # a hand-off stands above the models that it joins

        return HandoffModel.from_pretrained(source, dtype=dtype, device=device, runtime=runtime)
    model_type = raw.get("model_type")
    try:
        name, revision = at_revision(source)
        config = AutoConfig.from_pretrained(name, revision=revision)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if type(config) not in auto._model_mapping or kind_of(config) == "encoder-only":
            raise UnsupportedModel(f"{source} is of type {model_type!r}, which does not write text")
        with quiet_loading():
            model = auto.from_pretrained(name, revision=revision, config=config, dtype=resolve_dtype(dtype))
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise BatonError(f"cannot load {source} (type {model_type!r}): {first_line(error)}") from error
    model = model.to(resolve_device(device)).eval()
    from baton.runtime import prepare  # runtimes know the models that they run

    prepare(model, runtime)
    return LanguageModel(model, tokenizer, str(source))


def beside(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `load` for a model that works with this one: its dtype and device, eager or compiled if it is."""
    name = runtime_of(model).name
    runtime: RuntimeName = name if name in ("eager", "compiled") else "auto"
    return {"dtype": model.dtype, "device": model.device, "runtime": runtime}


def kind_of(config: PreTrainedConfig) -> str:
    """encoder-decoder, decoder-only or encoder-only."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    architectures = " ".join(config.architectures or [])
    generates = "CausalLM" in architectures or "LMHead" in architectures
    causal = type(config) in AutoModelForCausalLM._model_mapping
    masked = type(config) in AutoModelForMaskedLM._model_mapping
    # Some families (BERT, RoBERTa) are in both lists: they are encoders unless built as a language model.
    return "decoder-only" if causal and (generates or not masked) else "encoder-only"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
