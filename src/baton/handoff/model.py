"""LLM-to-SLM: a frozen LLM reads the prompt once, the SLM, conditioned on what was read, writes (arXiv 2402.16844).

A hand-off is three operators: *read* (frozen states, one layer or a learned mix), *project* (to the SLM's width) and
*inject* (into the SLM's prompt embeddings). After the prompt pass nothing but the SLM runs.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.pytorch_utils import Conv1D

from baton.data.storage import atomic_folder, settle
from baton.errors import BatonError, ModelMismatch, NotAHandoff
from baton.handoff.config import HandoffConfig, HandoffOptions, Signal
from baton.handoff.inject import INJECT, prefix
from baton.handoff.project import Projector
from baton.handoff.read import LayerMix, PromptEncoder, check_same, fingerprint
from baton.models.loading import (
    HANDOFF_TYPE,
    at_revision,
    first_line,
    quiet_loading,
    read_config,
    resolve_device,
    resolve_dtype,
)
from baton.models.prompts import prompt_limit, same_tokenizer
from baton.models.text import IGNORE, embed_tokens, pack, response_logits
from baton.models.writer import PromptInputs
from baton.runtime import prepare
from baton.runtime.families import Projection, make_projection
from baton.types import RuntimeName, Timings

WEIGHTS = "handoff.safetensors"  # everything trained but a fully trained SLM, which has its own folder
READING = ("llm", "shuffled")  # signals for which the LLM is run
LLM = "llm"  # folder of the LLM's reading side, where it is stored with the hand-off


class HandoffModel(PreTrainedModel):
    """An SLM that writes what a frozen LLM has read. A `Writer` for `baton.generate`.

    The LLM is not a submodule: `parameters()`, `state_dict()` and optimizers never see it, `to()` moves it along.

    Args:
        config: see `HandoffConfig`.
        slm: encoder-decoder or decoder-only language model.
        encoder: the LLM's reading side; None when only cached states are used, or after `release_encoder`.
        prompt_tokenizer, response_tokenizer: equal when the models share theirs.
    """

    config_class = HandoffConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    config: HandoffConfig

    def __init__(
        self,
        config: HandoffConfig,
        slm: PreTrainedModel,
        encoder: PromptEncoder | None = None,
        prompt_tokenizer: Any = None,
        response_tokenizer: Any = None,
    ) -> None:
        super().__init__(config)
        options = config.handoff
        width = slm.get_input_embeddings().weight.shape[1]
        self.slm = slm
        self.projector = Projector(
            config.llm["width"],
            width,
            inner_width=options.inner_width,
            bias=options.bias,
            zero_init=options.zero_init and options.fusion != "replace",
            identity_init=options.identity_init,
        )
        self.mix = LayerMix(config.llm["layers_read"]) if config.llm["layers_read"] > 1 else None
        # Different tokenizers: the prompt's tokens are the LLM's, so are their embeddings (card section 5.4).
        embedding_width = config.llm.get("embedding_width", config.llm["width"])
        self.prompt_map = None if config.same_tokenizer else nn.Linear(embedding_width, width, bias=False)
        self.constant = nn.Parameter(torch.zeros(width), requires_grad=options.signal == "constant")
        self.signal: Signal = options.signal
        self.soft_prompt: nn.Embedding | None = None
        if options.signal == "prompt":  # starts as embeddings of random tokens, where the SLM is at home
            table = slm.get_input_embeddings().weight
            drawn = torch.randint(len(table), (options.prompt_length,), device=table.device)
            # A table of its own, so that optimizers treat it as one.
            self.soft_prompt = nn.Embedding.from_pretrained(embed_tokens(slm, drawn).detach().clone(), freeze=False)
        self.prompt_tokenizer, self.response_tokenizer = prompt_tokenizer, response_tokenizer
        self._encoder = encoder
        self._projection: Projection | None = None
        _set_trainable(self, options)
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: the SLM comes initialised or trained, and the new modules initialise themselves."""

    # --- parts -------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> PromptEncoder:
        if self._encoder is None:
            raise BatonError("this hand-off has no LLM in memory: it was released, or loaded with encoder=False")
        return self._encoder

    def release_encoder(self) -> None:
        """Free the LLM. Prompts already read can still be answered; new ones cannot be read."""
        self._encoder = None

    def fresh_modules(self) -> list[nn.Module]:
        """What starts untrained, beside an SLM that starts trained: it may learn at a higher rate."""
        return [m for m in (self.projector, self.mix, self.prompt_map, self.soft_prompt) if m is not None]

    @property
    def lm(self) -> PreTrainedModel:
        return self.slm

    @property
    def prompt_limits(self) -> dict[str, int]:
        """Most prompt tokens the LLM and the SLM can read. What is injected may take some of the SLM's."""
        limits = {"the LLM": self.config.llm.get("limit"), "the SLM": prompt_limit(self.slm.config)}
        if self.soft_prompt is not None:
            limits["the LLM"] = None  # reads nothing
            if limits["the SLM"]:
                limits["the SLM"] -= self.soft_prompt.num_embeddings
        elif limits["the SLM"] and self.config.handoff.fusion == "concatenate":
            limits["the SLM"] //= 2
        return {name: limit for name, limit in limits.items() if limit}

    def response_room(self, prompt_tokens: int) -> int:
        """Most response tokens that the SLM has positions for in training, after a prompt of so many tokens."""
        positions = prompt_limit(self.slm.config) or sys.maxsize
        if self.slm.config.is_encoder_decoder:
            return positions
        if self.soft_prompt is not None:
            return positions - prompt_tokens - self.soft_prompt.num_embeddings
        return positions - prompt_tokens * (2 if self.config.handoff.fusion == "concatenate" else 1)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "HandoffModel":
        if self._encoder is not None:
            self._encoder.model._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    # --- read, project, inject ----------------------------------------------------------------------------------

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States H of the frozen LLM for right-padded int64 prompts [b, m]: [b, m, width * layers_read]."""
        return self.encoder(ids, mask)

    def project(self, states: Tensor) -> Tensor:
        """H to Z [b, m, d_s]."""
        states = states.to(self.projector.first.weight.dtype)
        states = self.mix(states) if self.mix is not None else states
        if self._projection is not None and self._projection.parts.valid and not torch.is_grad_enabled():
            return self._projection(states)
        return self.projector(states)

    def prompt_embeddings(self, ids: Tensor) -> Tensor:
        """The SLM's side of the fusion, E [b, m, d_s]: its own embeddings, or mapped ones of the LLM's tokens."""
        if self.prompt_map is None:
            return embed_tokens(self.slm, ids)
        return self.prompt_map(self.encoder.embed(ids).to(self.prompt_map.weight.dtype))

    def inject(self, ids: Tensor, mask: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """F [b, m', d_s] and its mask, what the SLM reads in place of its prompt embeddings.

        Args:
            ids, mask: int64 [b, m], right-padded.
            states: H; not needed for the baselines `zero`, `constant` and `prompt`.
        """
        if self.signal == "prompt":
            assert self.soft_prompt is not None
            return prefix(self.prompt_embeddings(ids), self.soft_prompt.weight, mask)
        if self.signal == "zero":
            z = self.constant.new_zeros(*ids.shape, len(self.constant))
        elif self.signal == "constant":
            z = self.constant.expand(*ids.shape, -1)
        else:
            assert states is not None
            z = self.project(states) * mask[..., None]
            if self.signal == "shuffled":  # a prompt alone in its batch has no other: it gets none
                z = z.roll(1, 0) if len(z) > 1 else torch.zeros_like(z)
        return self.fuse(ids, mask, z)

    def fuse(self, ids: Tensor, mask: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """F and its mask from Z [b, m, d_s] and the SLM's side of the fusion; padding carries no Z."""
        fusion = self.config.handoff.fusion
        # Where E is not used, the LLM's table is not needed for it.
        embeds = torch.zeros_like(z) if fusion == "replace" else self.prompt_embeddings(ids)
        return INJECT[fusion](embeds, z * mask[..., None].to(z.dtype), mask)

    @property
    def needs_states(self) -> bool:
        return self.signal in READING

    @contextlib.contextmanager
    def with_signal(self, signal: Signal, constant: Tensor | None = None) -> Iterator[None]:
        """For a while, write with another Z: what the hand-off is worth is seen against zero, constant and shuffled."""
        before, kept = self.signal, self.constant.detach().clone()
        self.signal = signal
        if constant is not None:
            self.constant.data.copy_(constant)
        try:
            yield
        finally:
            self.signal = before
            self.constant.data.copy_(kept)

    # --- training and generation ---------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        prompt_states: Tensor | None = None,
        return_loss: bool = False,
    ) -> ModelOutput:
        """Teacher-forced logits [b, n, V] of the response, aligned with `labels`.

        Args:
            input_ids, attention_mask: int64 [b, m], prompts in the prompt tokenizer's ids, right-padded.
            labels: int64 [b, n] in the response tokenizer's ids, -100 on padding. Never seen by the LLM.
            prompt_states: H computed before, [b, m, width * layers_read]; None runs the LLM.
            return_loss: also the mean cross-entropy as `loss`.
        """
        if prompt_states is None and self.needs_states:
            prompt_states = self.read(input_ids, attention_mask)
        embeds, mask = self.inject(input_ids, attention_mask, prompt_states)
        logits = response_logits(self.slm, embeds, mask, labels)
        if not return_loss:
            return ModelOutput(logits=logits)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        return ModelOutput(loss=loss, logits=logits)

    def encode(self, ids: Tensor, mask: Tensor, timings: Timings) -> PromptInputs:
        """LLM, projector and fusion for right-padded int64 prompts [b, m]; seconds are added to `timings`."""
        start = time.perf_counter()
        states = self.read(ids, mask) if self.needs_states else None
        _synchronize(ids.device)
        read = time.perf_counter()
        embeds, mask = self.inject(ids, mask, states)
        _synchronize(ids.device)
        timings.encode_s += read - start
        timings.project_s += time.perf_counter() - read
        return PromptInputs(embeds=embeds, mask=mask)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' own `generate` of the SLM, on the fused prompt: beams, streamers, logits processors.

        Args:
            input_ids: int64 [b, m] in the prompt tokenizer's ids; attention_mask: [b, m], padding on either side.
            kwargs: as for `generate` of the SLM.
        Returns: response ids in the response tokenizer's vocabulary (after the start token for an encoder-decoder).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, mask = pack(input_ids, mask, to_left=True)
        inputs = self.encode(ids, mask, Timings())
        assert inputs.embeds is not None
        embeds, mask = inputs.embeds, inputs.mask
        if not self.slm.config.is_encoder_decoder:  # its `generate` appends at the right end
            embeds, mask = pack(embeds, mask, to_left=False)
        return self.slm.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    # --- making, saving, loading ---------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        *,
        llm: str | Path,
        slm: str | Path,
        options: HandoffOptions,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
    ) -> "HandoffModel":
        """A new, untrained hand-off from two models, each a folder or a Hub id (`owner/name@revision`).

        Raises: ModelMismatch when a model cannot be loaded; UnknownOption for options that do not fit.
        """
        torch_dtype, where = resolve_dtype(dtype), resolve_device(device)
        llm, named = at_revision(llm)
        revision = revision or named
        # Fingerprints are taken in bfloat16: of weights that were rounded to float16 before they would be others.
        loaded: Any = "auto" if torch_dtype == torch.float16 else torch_dtype
        encoder = PromptEncoder.from_pretrained(llm, layer=options.layer, revision=revision, dtype=loaded, device=where)
        prompt_tokenizer = _load_tokenizer(llm, revision)
        response_tokenizer = _load_tokenizer(slm)
        same = same_tokenizer(prompt_tokenizer, response_tokenizer)
        model = _load_slm(slm, loaded).to(where)
        base: dict[str, Any] = {}
        if options.slm_training != "full":
            base = {"id": str(slm), "sha256": fingerprint(model)}
        if options.slm_training == "lora":
            model = with_adapter(model, options)
        config = HandoffConfig(
            llm={
                "id": str(llm),
                "revision": revision,
                "sha256": encoder.fingerprint(),
                "kind": encoder.kind,
                "layer": options.layer,
                "width": encoder.width,
                "embedding_width": encoder.model.get_input_embeddings().weight.shape[1],
                "layers_read": encoder.layers_read,
                "cut": encoder.cut,
                "limit": prompt_limit(encoder.model.config, prompt_tokenizer),
            },
            slm={k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"},  # where it was in training
            slm_base=base,
            options=asdict(options),
            same_tokenizer=same,
            slm_alone=str(slm),
        )
        made = cls(config, model, encoder, prompt_tokenizer, response_tokenizer).to(where)
        return made if torch_dtype == "auto" else made.to(torch_dtype)

    def save_pretrained(self, save_directory: str | Path, *, card: str | None = None, **_: Any) -> None:
        """Write the hand-off: complete or not at all.

        Stores config.json, the trained weights, both tokenizers, the SLM (unless frozen or adapted: then a pointer),
        and the LLM's reading side when the option `include_llm` is set.

        Args:
            card: text of README.md; None leaves an existing one alone.
        """
        folder = Path(save_directory)
        config = HandoffConfig.from_dict(self.config.to_dict())
        for pointer in (config.llm, config.slm_base):
            if pointer and Path(pointer["id"]).is_dir():
                pointer["id"] = _relative(Path(pointer["id"]), folder)
        if config.slm_alone and Path(config.slm_alone).is_dir():
            config.slm_alone = _relative(Path(config.slm_alone), folder)
        if config.held_out and Path(config.held_out).is_absolute():
            config.held_out = _relative(Path(config.held_out), folder)
        with atomic_folder(folder) as new:
            if config.handoff.include_llm:
                self.encoder.model.save_pretrained(new / LLM)
            config.save_pretrained(new)
            own = {k: v.contiguous() for k, v in self.state_dict().items() if not self._stored_elsewhere(k)}
            save_file(own, new / WEIGHTS, metadata={"format": "pt"})
            if config.handoff.slm_training == "full":
                self.slm.save_pretrained(new / "slm")
            if self.response_tokenizer is not None:
                self.response_tokenizer.save_pretrained(new / "slm")
            if self.prompt_tokenizer is not None and not config.same_tokenizer:
                self.prompt_tokenizer.save_pretrained(new / "prompt_tokenizer")
            if card is not None:
                (new / "README.md").write_text(card, encoding="utf-8")

    def _stored_elsewhere(self, name: str) -> bool:
        return name.startswith("slm.") and "lora_" not in name

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        llm: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        encoder: bool = True,
        runtime: RuntimeName = "auto",
    ) -> "HandoffModel":
        """Load a hand-off from a folder or Hub id.

        Args:
            llm: where its LLM is, when not where the pointer says; must be the very same weights.
            dtype: "auto" keeps the stored one; device: None is the first GPU or the CPU.
            encoder: False leaves the LLM out, for work with cached states.
            runtime: how LLM and SLM are made fast, see `baton.runtime.prepare`.
        Raises: NotAHandoff, or ModelMismatch when the LLM is missing or another one.
        """
        if Path(source).is_dir():
            settle(source)
        try:
            found = read_config(source).get("model_type")
        except ModelMismatch as error:
            raise NotAHandoff(f"no hand-off at {source}: {error}") from error
        if found != HANDOFF_TYPE:
            raise NotAHandoff(f"{source} holds a model, but no hand-off: make one with `baton train handoff`")
        folder = local_folder(source)
        config = HandoffConfig.from_pretrained(folder)
        # In memory pointers are places that can be opened from here; saving makes them relative to the new folder.
        for pointer in (config.llm, config.slm_base):
            if pointer:
                pointer["id"] = _resolve(pointer["id"], folder)
        if config.slm_alone:
            config.slm_alone = _resolve(config.slm_alone, folder)
        if config.held_out and (folder / config.held_out).is_file():
            config.held_out = str((folder / config.held_out).resolve())
        options, torch_dtype, where = config.handoff, resolve_dtype(dtype), resolve_device(device)
        if options.slm_training == "full":
            slm = _load_slm(folder / "slm", torch_dtype)
        else:
            base = config.slm_base["id"]
            slm = _load_slm(base, "auto")  # converted below: the fingerprint is that of the stored weights
            if fingerprint(slm) != config.slm_base["sha256"]:
                raise ModelMismatch(f"{base} is not the SLM this adapter was trained on: its weights have changed")
            if options.slm_training == "lora":
                slm = with_adapter(slm, options)
        reader = None
        if encoder:
            reader = _find_encoder(llm, config, folder)
            if llm is not None:
                config.llm["id"] = str(llm)
        response_tokenizer = _load_tokenizer(folder / "slm")
        prompt_tokenizer = response_tokenizer
        if not config.same_tokenizer:
            prompt_tokenizer = _load_tokenizer(folder / "prompt_tokenizer")
        model = cls(config, slm, reader, prompt_tokenizer, response_tokenizer)
        weights = load_file(folder / WEIGHTS)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        lost = [name for name in missing if not model._stored_elsewhere(name)]
        if lost or unexpected:
            raise NotAHandoff(f"{folder / WEIGHTS} does not fit its config.json: {(lost + unexpected)[:3]}")
        stored = next(iter(weights.values())).dtype
        model = model.to(where, stored if torch_dtype == "auto" else torch_dtype).eval()
        if prepare(model.slm, runtime) in ("native", "int8", "int4"):
            model._projection = make_projection(model.projector.first, model.projector.last)
        if reader is not None:
            reader.prepare(runtime)
        return model


def _set_trainable(model: HandoffModel, options: HandoffOptions) -> None:
    if options.slm_training == "frozen":
        model.slm.requires_grad_(False)
    if model.prompt_map is not None and options.fusion == "replace":
        model.prompt_map.requires_grad_(False)
    if options.signal not in READING:  # the projector is not used: nothing to train in it
        for module in (model.projector, model.mix):
            if module is not None:
                module.requires_grad_(False)


def with_adapter(slm: PreTrainedModel, options: HandoffOptions) -> PreTrainedModel:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BatonError("LoRA needs peft: pip install 'baton-decoding[train]'") from error
    slm.requires_grad_(False)
    adapter = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in slm.modules()),  # GPT-2 stores its weights transposed
    )
    return inject_adapter_in_model(adapter, slm)


def _load_slm(source: str | Path, dtype: Any) -> PreTrainedModel:
    config = read_config(source)
    auto = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    try:
        with quiet_loading():
            name, revision = at_revision(source)
            return auto.from_pretrained(name, revision=revision, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelMismatch(f"cannot load the SLM {source}: {first_line(error)}") from error


def _load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    # Without any file transformers 5 makes an empty tokenizer for some families, and every word is unknown to it.
    if Path(source).is_dir() and not any(any(Path(source).glob(p)) for p in ("*token*", "*vocab*", "*.model", "*spm*")):
        raise ModelMismatch(f"{source} holds no tokenizer: save the model's own there")
    try:
        name, named = at_revision(source)
        return AutoTokenizer.from_pretrained(name, revision=revision or named)
    except (OSError, ValueError) as error:
        raise ModelMismatch(f"cannot load the tokenizer of {source}: {first_line(error)}") from error


def _find_encoder(llm: str | Path | None, config: HandoffConfig, folder: Path) -> PromptEncoder:
    """The LLM given, or else the one stored with the hand-off, or else the one its pointer names."""
    expected = config.llm
    stored = llm is None and config.handoff.include_llm
    location = str(folder / LLM if stored else llm or expected["id"])
    try:
        encoder = PromptEncoder.from_pretrained(
            location,
            layer="last" if stored and expected["cut"] else expected["layer"],
            cut=stored and expected["cut"],
            revision=None if stored else expected["revision"],
        )
    except BatonError as error:
        raise ModelMismatch(
            f"the LLM of this hand-off is not at {location!r}; expected {expected['id']!r} (sha256 of the weights "
            f"used {expected['sha256'][:12]}...): pass llm=... (--llm) ({error})"
        ) from error
    check_same(expected, encoder, location)
    return encoder


def local_folder(source: str | Path) -> Path:
    """The folder of a model: itself, or the Hub's files downloaded."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    name, revision = at_revision(source)
    return Path(snapshot_download(name, revision=revision))


def _relative(target: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(target.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(target.resolve())


def _resolve(identifier: str, folder: Path) -> str:
    beside = folder / identifier
    return str(beside) if beside.is_dir() else identifier


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
