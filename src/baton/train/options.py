"""What a training run can be told. The command line reads names, defaults and help from here."""

from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["muon", "adamw", "adafactor"]
Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of one training run."""

    epochs: float = 3.0  # passes over the data; ignored when max_steps is given
    max_steps: int = -1  # optimizer steps; -1 means by epochs
    batch_size: int = 128  # examples per optimizer step, over all processes
    micro_batch_size: int = 0  # examples per forward of one process; 0 means the whole share at once
    learning_rate: float = 1e-3  # peak rate
    embedding_lr: float = 0.0  # peak rate of embedding tables under muon; 0 means learning_rate
    projector_lr_scale: float = 1.0  # times the rate, for parts that start untrained: projector, mix, prompt map
    optimizer: Optimizer = "muon"  # muon (matrices; AdamW elsewhere), adamw, adafactor
    weight_decay: float = 0.0  # decoupled, matrices only under muon
    warmup: float = 0.03  # share of the steps in which the rate rises; then it falls along a cosine
    label_smoothing: float = 0.1  # share of the target probability spread over the vocabulary
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    precision: Precision = "auto"  # bf16: weights in bf16 with float32 copies in the optimizer; auto: bf16 where fast
    eval_every: int = 200  # steps between validations
    save_every: int = 200  # steps between checkpoints
    patience: int = 5  # validations without a lower loss before stopping; 0 never stops early
    seed: int = 0  # order of examples and initialisation of new weights
    max_quality_examples: int = 200  # validation prompts written out for BLEU at each validation; 0 for none
