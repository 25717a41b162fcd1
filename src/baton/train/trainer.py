"""The training loop: transformers' Trainer with a response-only loss, length buckets and whole checkpoints."""

import errno
import functools
import math
import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    Adafactor,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from baton.data.storage import storage_errors
from baton.errors import DataError, StorageError, UnknownOption, nearest
from baton.models.text import IGNORE
from baton.train.dataset import Collator, PairDataset
from baton.train.optim import adamw, grouped, muon
from baton.train.options import Optimizer, TrainOptions
from baton.train.sampler import LengthBucketSampler

COMPLETE = "complete"  # written last into a checkpoint: a folder without it was cut off while saving
TRAINED = "trained"  # in the folder of a run that came to its end: the options it was run with
Quality = Callable[[nn.Module], dict[str, float]]


def response_loss(logits: Tensor, labels: Tensor, smoothing: float, tokens: Tensor | int | None) -> Tensor:
    """Cross-entropy over response tokens in one pass, float32.

    Args:
        logits: [b, n, V], position i predicts label i; labels: int64 [b, n], `IGNORE` where there is none.
        smoothing: label smoothing in [0, 1).
        tokens: labels in the whole optimizer step over all processes; None averages over this batch.
    """
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum"
    )
    return total / ((labels != IGNORE).sum() if tokens is None else tokens)


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer named in the options, over trainable parameters, with float32 master weights."""
    scale = options.projector_lr_scale
    common = {"lr": options.learning_rate, "fresh_scale": scale, "weight_decay": options.weight_decay}
    if options.optimizer == "muon":
        embedding_lr = options.embedding_lr or options.learning_rate
        return muon(model, embedding_lr=embedding_lr, **common)
    if options.optimizer == "adamw":
        return adamw(model, **common)
    if options.optimizer == "adafactor":
        make = functools.partial(_adafactor, weight_decay=options.weight_decay)
        params = [p for p in model.parameters() if p.requires_grad]
        return grouped(model, [(params, options.learning_rate, make)], scale)
    raise UnknownOption(
        f"optimizer {options.optimizer!r} is not known: {nearest(options.optimizer, get_args(Optimizer))}"
    )


def _adafactor(masters: list[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return Adafactor(masters, lr=lr, relative_step=False, scale_parameter=False, weight_decay=weight_decay)


class TextTrainer(Trainer):
    """Trains anything called as `model(input_ids, attention_mask, labels, ...)` that returns aligned `logits`.

    Where it also returns `exits`, pairs of a weight and logits, the loss is their weighted sum instead.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, options: TrainOptions, quality: Quality | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options, self.quality = options, quality
        # The loss below divides by the tokens of the whole step; this makes the Trainer count them over processes.
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(model or self.model, self.options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    @functools.cached_property
    def sampler(self) -> LengthBucketSampler:
        return LengthBucketSampler(self.train_dataset.lengths, self.options.batch_size, seed=self.options.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        terms = outputs.get("exits") or [(1.0, outputs.logits)]
        loss = sum(
            weight * response_loss(logits, inputs["labels"], self.options.label_smoothing, num_items_in_batch)
            for weight, logits in terms
        )
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, not summed
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple:
        """Negative log-likelihood [b] and tokens [b] of each response: `validation_loss` is made of these sums."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad():
            logits = model(**inputs).logits.float()
        nll = nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORE, reduction="none").sum(1)
        return None, nll, (labels != IGNORE).sum(1)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.quality is not None and self.is_world_process_zero():
            extra = {f"eval_{k}": v for k, v in self.quality(self.model).items()}
            self.log(extra)
            metrics.update(extra)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state_dict or self.model.state_dict(), folder / "pytorch_model.bin")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with storage_errors(folder, f"kept: {last_checkpoint(self.args.output_dir)}"):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    _check_whole(folder)
                    (folder / COMPLETE).touch()
        except StorageError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def restore(self, checkpoint: Path) -> None:
        """The state and the weights that a finished run ended with: the best ones, where those are kept."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            best = checkpoint.parent / Path(self.state.best_model_checkpoint).name
            checkpoint = best if best.is_dir() else checkpoint
        self.model.load_state_dict(torch.load(checkpoint / "pytorch_model.bin", map_location="cpu", weights_only=True))


def _check_whole(folder: Path) -> None:
    """Raise for a file whose end is missing: on a full disk torch.save may say nothing about the last few kB."""
    for path in folder.iterdir():
        if path.suffix in (".bin", ".pt", ".pth") and not zipfile.is_zipfile(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def validation_loss(sums: EvalPrediction) -> dict[str, float]:
    """Plain negative log-likelihood per response token, whatever the batches and processes it was computed in."""
    return {"loss": float(sums.predictions.sum(dtype="float64") / sums.label_ids.sum())}


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's folder."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


class EpochOrder(TrainerCallback):
    """Tell the sampler its epoch, also after a resume in the middle of one."""

    def __init__(self, trainer: TextTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps_per_epoch = max(1, len(self.trainer.sampler) // self.trainer.options.batch_size)
        self.trainer.sampler.set_epoch(state.global_step // steps_per_epoch)


class SaveOnInterrupt(TrainerCallback):
    """First Ctrl-C (or SIGTERM): finish the step, save, stop, all processes together. Second: stop at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever owns it handles signals
                return

    def _note(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # a signal reaches them at different times, and a step needs all of them
            votes = torch.tensor(int(self.interrupted), device=args.device)
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(votes)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def end(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def bf16_is_fast(device: str) -> bool:
    """Whether bf16 matrix products run in hardware: a recent GPU, or a CPU with AVX512-BF16 or AMX."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def resolve_dtype(precision: str, device: str) -> torch.dtype:
    """The dtype weights are kept in for training."""
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def make_trainer(
    model: nn.Module,
    train: PairDataset,
    validation: PairDataset,
    *,
    out: str | Path,
    options: TrainOptions,
    prompt_pad_id: int,
    quality: Quality | None = None,
    cpu: bool | None = None,
) -> TextTrainer:
    """A trainer ready to run; `run` starts it or continues it. The model is converted to the training dtype.

    Raises: UnknownOption for options that do not fit each other; DataError for too few examples.
    """
    cpu = not torch.cuda.is_available() if cpu is None else cpu
    model.to(resolve_dtype(options.precision, "cpu" if cpu else "cuda"))
    processes = TrainingArguments(output_dir=str(out), use_cpu=cpu, report_to=[]).world_size
    if options.batch_size % processes:
        raise UnknownOption(f"batch_size={options.batch_size} cannot be split over {processes} processes")
    share = options.batch_size // processes
    micro = min(options.micro_batch_size or share, share)
    if share % micro:
        raise UnknownOption(f"micro_batch_size={micro} does not divide the {share} examples of one process and step")
    if options.patience and options.save_every % options.eval_every:
        raise UnknownOption(
            f"save_every={options.save_every} is not a multiple of eval_every={options.eval_every}: the best step "
            "would not be there to keep; change one, or turn early stopping off (patience=0)"
        )
    if len(train) < options.batch_size:
        raise DataError(f"{len(train)} training examples do not fill a batch of {options.batch_size}: lower batch_size")
    arguments = TrainingArguments(
        output_dir=str(Path(out).resolve()),  # recorded as the place of the best checkpoint
        use_cpu=cpu,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        per_device_eval_batch_size=micro,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,
        max_grad_norm=options.max_grad_norm,
        eval_strategy="steps",
        eval_steps=options.eval_every,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        load_best_model_at_end=bool(options.patience),
        restore_callback_states_from_checkpoint=True,  # how long validation has not improved
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=math.gcd(10, options.save_every),  # a mean over steps must not span a checkpoint
        report_to=_reporters(),
        seed=options.seed,
        ddp_find_unused_parameters=False,
        ddp_timeout=24 * 3600,  # the first process may write out validation prompts while the others wait
        label_names=["labels"],
        disable_tqdm=False,
    )
    trainer = TextTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=Collator(prompt_pad_id),
        compute_metrics=validation_loss,
        options=options,
        quality=quality,
    )
    trainer.add_callback(EpochOrder(trainer))
    if arguments.load_best_model_at_end:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=options.patience))
    return trainer


def run(trainer: TextTrainer) -> bool:
    """Train to the end, or continue where an earlier run stopped. Returns False when interrupted (state is saved).

    A run that had come to its end with the same options is not trained further: its weights are loaded.
    """
    folder = Path(trainer.args.output_dir)
    checkpoint, trained = last_checkpoint(folder), folder / TRAINED
    if checkpoint and trained.exists() and trained.read_text(encoding="utf-8") == repr(trainer.options):
        trainer.restore(checkpoint)
        return True
    if trainer.is_world_process_zero():
        for path in folder.glob("checkpoint-*"):
            if not (path / COMPLETE).exists():  # cut off by a kill
                shutil.rmtree(path, ignore_errors=True)
    interrupt = SaveOnInterrupt()
    trainer.add_callback(interrupt)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        interrupt.end()
    if interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        return False
    if trainer.is_world_process_zero():
        trained.write_text(repr(trainer.options), encoding="utf-8")
    return True


def _reporters() -> list[str]:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return []
    return ["tensorboard"]
