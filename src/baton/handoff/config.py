"""What a hand-off is made of, and the options a user gives to make one."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

Fusion = Literal["add", "replace", "concatenate"]
Signal = Literal["llm", "zero", "constant", "shuffled", "prompt"]
SlmTraining = Literal["full", "lora", "frozen"]


@dataclass(frozen=True, kw_only=True)
class HandoffOptions:
    """The three operators (read, project, inject) and how much of the SLM is trained. arXiv 2402.16844."""

    layer: str = "last"  # LLM layer that is read: last, an index (1 is the first), a fraction of the depth, or mix
    inner_width: int = 0  # width between the projector's two linear maps; 0 means the SLM's width
    bias: bool = True  # whether the projector's linear maps have biases
    zero_init: bool = True  # start the projector's last map at zero, so that step 0 is the plain SLM
    identity_init: bool = False  # start with Z = H, for an SLM made of the LLM's own layers; needs equal widths
    fit_steps: int = 0  # before training, steps in which the projector alone learns to give the SLM's embeddings back
    fusion: Fusion = "add"  # Z and the SLM's prompt embeddings: add, replace, concatenate
    signal: Signal = "llm"  # llm; for a baseline zero, constant (learned) or shuffled Z, or prompt (learned, no Z)
    prompt_length: int = 20  # learned vectors in front of the prompt when signal is prompt (prompt tuning)
    slm_training: SlmTraining = "full"  # full, lora (an adapter), or frozen (projector only)
    lora_rank: int = 16  # rank of the adapter when slm_training is lora
    include_llm: bool = False  # store the LLM's encoder with the hand-off instead of a pointer to it


class HandoffConfig(PreTrainedConfig):
    """Stored as config.json.

    Args:
        llm: pointer to the prompt encoder: `id`, `revision`, `sha256` of the weights used, `kind`, `layer`,
            `width` (of one layer's states) and `layers_read` (more than 1 for a learned mix).
        slm: the SLM's own configuration as a dict.
        slm_base: pointer (`id`, `revision`, `sha256`) to the SLM an adapter or a frozen SLM was taken from; empty
            when the SLM's weights are stored here.
        options: the fields of `HandoffOptions`.
        same_tokenizer: whether LLM and SLM share theirs; otherwise prompts are embedded by the LLM's own table.
        slm_alone: the SLM without the hand-off that evaluations compare with, a folder seen from this one or a Hub id.
        held_out: path, relative to the folder, of the test pairs this model is evaluated on.
    """

    model_type = "baton-handoff"

    def __init__(
        self,
        llm: dict[str, Any] | None = None,
        slm: dict[str, Any] | None = None,
        slm_base: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        same_tokenizer: bool = True,
        slm_alone: str | None = None,
        held_out: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.llm, self.slm, self.slm_base = llm or {}, slm or {}, slm_base or {}
        self.options = options or {}
        self.same_tokenizer, self.slm_alone, self.held_out = same_tokenizer, slm_alone, held_out
        kwargs.pop("is_encoder_decoder", None)
        super().__init__(is_encoder_decoder=bool(self.slm.get("is_encoder_decoder")), **kwargs)

    @property
    def handoff(self) -> HandoffOptions:
        return HandoffOptions(**self.options)

    @property
    def slm_config(self) -> PreTrainedConfig:
        """The SLM's configuration object."""
        return AutoConfig.for_model(**self.slm)
