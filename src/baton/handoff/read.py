"""Read: a frozen model reads the prompt once and gives its hidden states.

Encoder-decoder models give the last encoder layer after its final norm, encoder-only models their last layer,
decoder-only models any layer or all of them for a learned mix (arXiv 2402.16844; layer choice: arXiv 2502.02013).
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)

from baton.errors import ModelMismatch, UnknownOption, UnsupportedModel
from baton.models.loading import at_revision, first_line, kind_of, quiet_loading, read_config
from baton.runtime.families import make_reader
from baton.runtime.t5 import T5Reader
from baton.types import RuntimeName


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and bf16-rounded values: the same for a model loaded in float32 or in bf16."""
    return _digest(model.state_dict())


def encoder_fingerprints(lm: PreTrainedModel) -> set[str]:
    """The fingerprints that a `PromptEncoder` of a whole encoder-decoder model may have, by how its kind is stored."""
    state = {name.removeprefix("model."): tensor for name, tensor in lm.state_dict().items()}
    stored = {name: tensor for name, tensor in state.items() if name.startswith(("shared.", "encoder."))}
    return {_digest(stored), fingerprint(lm.get_encoder())}


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def resolve_layer(layer: str, num_layers: int) -> int | None:
    """How many layers are run: 1..num_layers; None for a mix of all.

    `layer` is last, mix, an index counted from 1 (or from the end when negative), or a fraction such as 0.5.
    """
    if layer in ("last", "mix"):
        return num_layers if layer == "last" else None
    try:
        number = round(float(layer) * num_layers) if "." in layer else int(layer)
    except ValueError:
        raise UnknownOption(f"layer {layer!r}: give last, mix, an index or a fraction such as 0.5") from None
    index = number + num_layers + 1 if number < 0 else number
    if not 1 <= index <= num_layers:
        raise UnknownOption(f"layer {layer!r} is outside of 1..{num_layers}")
    return index


class PromptEncoder:
    """A frozen reader of prompts. Not a submodule of anything: no optimizer or checkpoint ever sees it.

    Args:
        model: the part of the LLM that reads; put into evaluation mode, its parameters frozen.
        kind: see `kind_of`.
        layer: see `resolve_layer`; the model holds exactly the layers needed.
        depth: layers the whole LLM has on its reading side.
        cut: whether layers above the ones held were left out, so that the final norm is not meant for what is read.
    """

    def __init__(self, model: PreTrainedModel, *, kind: str, layer: str, depth: int, cut: bool) -> None:
        self.model, self.kind, self.layer, self.cut = model.eval().requires_grad_(False), kind, layer, cut
        self.mixes = resolve_layer(layer, depth) is None
        self.layers_read = depth if self.mixes else 1
        self.width: int = getattr(model.config, "hidden_size", model.get_input_embeddings().weight.shape[1])
        if not cut and not self.mixes:  # one size of OPT maps its last layer back to the width of its embeddings
            self.width = getattr(model.config, "word_embed_proj_dim", self.width)
        self._native: T5Reader | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        layer: str = "last",
        cut: bool = False,
        revision: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
    ) -> "PromptEncoder":
        """Load only what reads: no decoder, no output head, no layers above the one asked for.

        Args:
            source: folder or Hub id of any encoder-decoder, decoder-only or encoder-only model.
            layer: last, mix, index or fraction; anything but last needs a decoder-only model.
            cut: the stored model itself ends at the layer that is read.
        Raises: ModelMismatch when there is no such model; UnknownOption for an impossible layer.
        """
        where, named = at_revision(source)
        revision = revision or named
        read_config(where, revision)  # says clearly when there is no model
        config = AutoConfig.from_pretrained(where, revision=revision)
        kind = kind_of(config)
        if kind != "decoder-only" and layer != "last":
            raise UnknownOption(f"layer={layer!r}: a {kind} LLM is read at its last layer; drop the option")
        arguments: dict[str, Any] = {"revision": revision, "dtype": dtype}
        depth = config.num_hidden_layers if kind != "encoder-decoder" else 1
        keep = resolve_layer(layer, depth) or depth
        try:
            with quiet_loading():
                if kind == "decoder-only":
                    _shorten(config, keep)
                    model = _load(AutoModel, where, config=config, **arguments)
                else:
                    model = _load_encoder(where, config, arguments)
        except (OSError, ValueError) as error:
            raise ModelMismatch(f"cannot load the LLM {where!r}: {first_line(error)}") from error
        return cls(model.to(device or "cpu"), kind=kind, layer=layer, depth=depth, cut=cut or keep < depth)

    def prepare(self, runtime: RuntimeName) -> None:
        """Read faster, where the runtime asked for can: `baton.runtime`."""
        self._native = make_reader(self.model) if runtime in ("auto", "native", "int8", "int4") else None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def embed(self, ids: Tensor) -> Tensor:
        """The LLM's own input embeddings [b, m, d_l] of int64 ids [b, m]."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States H of right-padded int64 ids [b, m]: [b, m, d_l], or [b, m, layers * d_l] for a mix.

        The last layer is after the model's final norm. States from other layers have had no norm and may hold very
        large entries, so they are divided by their root mean square over the width.
        """
        if self.cut:
            captured: list[Tensor] = []
            layers = _layer_list(self.model)
            hook = layers[-1].register_forward_hook(
                lambda module, args, output: captured.append(output[0] if isinstance(output, tuple) else output)
            )
            try:
                self.model(input_ids=ids, attention_mask=mask)
            finally:
                hook.remove()
            return _unit_rms(captured[0])
        if self._native is not None and not self._native.stack.parts.valid:  # moved or converted
            self._native = make_reader(self.model)
        if self._native is not None:
            return self._native(self.embed(ids), mask)
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=self.mixes)
        if self.mixes:
            return torch.cat([_unit_rms(h) for h in output.hidden_states[1:]], dim=-1)
        return output.last_hidden_state

    def fingerprint(self) -> str:
        return fingerprint(self.model)


class LayerMix(nn.Module):
    """A learned convex mix of layers times a learned gain (arXiv 1802.05365, section 3.2)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, states: Tensor) -> Tensor:
        """[b, m, layers * d] to [b, m, d]."""
        layers = states.unflatten(-1, (len(self.weights), -1))
        return self.gain * torch.einsum("bmld,l->bmd", layers, self.weights.softmax(0))


def _unit_rms(states: Tensor) -> Tensor:
    wide = states.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(states.dtype)


def _load(kind: Any, where: str, **arguments: Any) -> PreTrainedModel:
    """`from_pretrained` that raises where transformers would make up the weights that are not stored."""
    model, info = kind.from_pretrained(where, output_loading_info=True, **arguments)
    if getattr(model, "pooler", None) is not None:  # a head on the first token: not read, and often not stored
        model.pooler = None
    computed = {f"{name}.weight" for name, part in model.named_modules() if "Sinusoidal" in type(part).__name__}
    lost = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()} - computed)
    if lost:
        raise ModelMismatch(f"{where} lacks weights of {type(model).__name__}: {', '.join(lost[:3])}")
    return model


def _load_encoder(where: str, config: PreTrainedConfig, arguments: dict[str, Any]) -> PreTrainedModel:
    if type(config) in AutoModelForTextEncoding._model_mapping:
        # The flag: T5Gemma's encoder wants to be told that it is one.
        return _load(AutoModelForTextEncoding, where, is_encoder_decoder=False, **arguments)
    if not config.is_encoder_decoder:
        return _load(AutoModel, where, **arguments)
    with torch.device("meta"):
        kind = type(AutoModel.from_config(config).get_encoder())
    if kind.__name__ in (config.architectures or []):  # an encoder stored on its own, with the hand-off
        return _load(kind, where, **arguments)
    encoder = _load(AutoModel, where, **arguments).get_encoder()
    if not isinstance(encoder, PreTrainedModel):
        raise UnsupportedModel(f"{where}: cannot separate the encoder of a {config.model_type} model")
    return encoder


def _shorten(config: PreTrainedConfig, keep: int) -> None:
    """Make a configuration describe only its first `keep` layers."""
    if keep == config.num_hidden_layers:
        return
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:keep]
    config.num_hidden_layers = keep


def _layer_list(model: PreTrainedModel) -> nn.ModuleList:
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UnsupportedModel(f"cannot find the {depth} layers of a {model.config.model_type} model: read layer=last")


def check_same(expected: dict[str, Any], encoder: PromptEncoder, source: str) -> None:
    """Raise ModelMismatch unless the encoder's weights are those the hand-off was trained with."""
    check_weights(expected, {encoder.fingerprint()}, source)


def check_weights(expected: dict[str, Any], found: set[str], source: str) -> None:
    """The same for fingerprints, of which one must fit."""
    if expected["sha256"] not in found:
        revision = f" at revision {expected['revision']}" if expected.get("revision") else ""
        raise ModelMismatch(
            f"this hand-off was trained with the LLM {expected['id']!r}{revision} (sha256 of the weights used "
            f"{expected['sha256'][:12]}..., layer {expected['layer']}), but {source!r} has {min(found)[:12]}...: "
            "pass the LLM it was trained with (llm=..., or --llm)"
        )
