"""LayerSkip: train a decoder-only model so that its first layers can write too.

Source: arXiv 2404.16710. Later layers are dropped more often than early ones, example by example, and the loss also
looks at what the shared norm and head make of earlier layers. `drafters.layerskip` and `drafters.dynamic_exit` then
draft with those layers.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import ModelOutput

from baton.errors import UnknownOption, UnsupportedModel, nearest
from baton.models.adapter import runtime_of, target_for
from baton.models.text import TextToText

Curriculum = Literal["rotational", "gradual"]


@dataclass(frozen=True, kw_only=True)
class LayerSkipOptions:
    p_max: float = 0.1  # dropout of the last layer; the first is never dropped
    e_scale: float = 0.2  # how much early exits weigh beside the last layer
    curriculum: Curriculum = "rotational"  # which exits count in a step: every so many layers in turn, or from the last
    # layer down, one more layer every steps / (2 layers)
    rotation: int = 8  # of the rotational curriculum: a layer's exit counts once in so many steps
    from_scratch: bool = False  # dropout rises from 0 over the run; for models that are not trained yet

    def __post_init__(self) -> None:
        if not 0 <= self.p_max < 1 or self.e_scale < 0 or self.rotation < 1:
            raise UnknownOption(
                f"p_max={self.p_max}, e_scale={self.e_scale}, rotation={self.rotation}: a probability below 1, a "
                "number of 0 or more, and steps of 1 or more are needed"
            )
        if self.curriculum not in (known := get_args(Curriculum)):
            raise UnknownOption(f"no curriculum {self.curriculum!r}: {nearest(self.curriculum, known)}")


def dropout_rates(options: LayerSkipOptions, layers: int, step: int, steps: int) -> list[float]:
    """How probably each layer is dropped in optimizer step `step` of `steps`: exponentially rising with depth."""
    scale = math.exp(step * math.log(2) / max(steps - 1, 1)) - 1 if options.from_scratch else 1.0
    return [scale * (math.exp(layer * math.log(2) / max(layers - 1, 1)) - 1) * options.p_max for layer in range(layers)]


def exit_weights(options: LayerSkipOptions, layers: int, step: int, steps: int) -> list[float]:
    """What the loss after each layer counts in a step; they sum to 1. The last layer always counts."""
    last = layers - 1
    if options.curriculum == "rotational":
        active = [layer % options.rotation == step % options.rotation for layer in range(layers)]
    else:
        lowest = last - step * 2 * layers // max(steps, 1)
        active = [layer >= lowest for layer in range(layers)]
    weights = [options.e_scale * layer * (layer + 1) / 2 * active[layer] for layer in range(last)]
    weights.append(last + options.e_scale * last * (last - 1) / 2 if last else 1.0)
    return [weight / sum(weights) for weight in weights]


class EarlyExits(TextToText):
    """A language model that is trained with layer dropout and with losses after earlier layers.

    In training its output also has `exits`, pairs of a weight and logits [b, n, V], of which the trainer makes the
    loss. In evaluation it is the plain model.

    Args:
        model: decoder-only, of a family that the engine runs.
        steps: of the whole run, which the curriculum and `from_scratch` follow.
    Raises: UnsupportedModel for any other, and for one that was made faster.
    """

    def __init__(self, model: PreTrainedModel, options: LayerSkipOptions, steps: int) -> None:
        super().__init__(model)
        if model.config.is_encoder_decoder:
            raise UnsupportedModel("LayerSkip trains decoder-only models, and this one has an encoder")
        if runtime_of(model).target is not None:
            raise UnsupportedModel("LayerSkip trains stock layers: load the model with runtime='eager'")
        self.options, self.steps, self.step = options, steps, 0
        self.target = target_for(model)
        for index, layer in enumerate(self.target.layers):
            layer.register_forward_hook(lambda module, args, output, index=index: self._drop(index, args[0], output))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> ModelOutput:
        """As of `TextToText`."""
        if not self.training:
            return super().forward(input_ids, attention_mask, labels)
        *early, last = exit_weights(self.options, len(self.target.layers), self.step, self.steps)
        active = {layer + 1: weight for layer, weight in enumerate(early) if weight}
        with self.target.capture(active) as hidden:
            output = super().forward(input_ids, attention_mask, labels)
        at = attention_mask.sum(1, keepdim=True) - 1 + torch.arange(labels.shape[1], device=labels.device)
        exits = [(last, output.logits)]
        for layer, weight in active.items():
            exits.append((weight, self.target.unembed(self.target.finish(_gathered(hidden[layer], at)))))
        output["exits"] = exits
        return output

    def _drop(self, layer: int, before: Tensor, output: Any) -> Any:
        """Some examples go around the layer."""
        if not self.training:
            return output
        rate = dropout_rates(self.options, len(self.target.layers), self.step, self.steps)[layer]
        if not rate:
            return output
        kept = torch.rand(len(before), device=before.device)[:, None, None] >= rate
        if isinstance(output, tuple):
            return torch.where(kept, output[0], before), *output[1:]
        return torch.where(kept, output, before)


class StepCounter(TrainerCallback):
    """Tells the model the optimizer step, also of a run that goes on."""

    def __init__(self, model: EarlyExits) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.step = state.global_step


def _gathered(hidden: Tensor, at: Tensor) -> Tensor:
    """[b, width, d] at positions [b, n]; padding may lie behind the last."""
    return hidden.gather(1, at.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
