"""Train a hand-off: the SLM and the projector learn to write from what the frozen LLM has read."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from baton.data.storage import atomic_write
from baton.errors import BatonError, DataError
from baton.handoff.card import handoff_card
from baton.handoff.config import HandoffOptions
from baton.handoff.features import FeatureCache, build
from baton.handoff.model import HandoffModel
from baton.handoff.read import fingerprint
from baton.models.prompts import pad_right
from baton.models.writer import Writer
from baton.quality import text_quality
from baton.train.dataset import PairDataset
from baton.train.options import TrainOptions
from baton.train.trainer import TextTrainer, make_trainer, run
from baton.types import Pair

log = logging.getLogger(__name__)
METRICS = ("eval_loss", "eval_bleu", "eval_chrf", "eval_rouge_l")
RUN = "run"  # folder of checkpoints, logs and cached states inside the output folder


def train_handoff(
    *,
    llm: str | Path,
    slm: str | Path,
    pairs: Sequence[Pair],
    validation: Sequence[Pair],
    out: str | Path,
    options: HandoffOptions,
    train: TrainOptions,
    revision: str | None = None,
    cache_gb: float = 4.0,
    held_out: str | None = None,
    truncate: bool = False,
    command: str = "",
    on_cache: Callable[[int, int], None] | None = None,
) -> bool:
    """Train and save a hand-off into `out`; run again after an interruption to continue.

    Args:
        llm, slm: folders or Hub ids.
        pairs, validation: examples; validation loss decides which checkpoint is kept.
        out: the hand-off's folder; checkpoints and logs go to `out/run`.
        cache_gb: room for the LLM's states on disk, GiB. With too little they are recomputed at each step.
        held_out: recorded in the config: path, relative to `out`, of the pairs it is evaluated on.
        truncate: cut prompts longer than either model allows, instead of refusing them.
        command: what made this model, for its card.
        on_cache: called with (prompts done, prompts) while states are cached.
    Returns: False when interrupted; the state is saved.
    """
    out = Path(out)
    torch.manual_seed(train.seed)  # the new weights are drawn here
    model = HandoffModel.build(llm=llm, slm=slm, options=options, revision=revision, dtype="float32")
    model.config.held_out = held_out
    datasets = [_dataset(model, examples, truncate) for examples in (pairs, validation)]
    if not all(len(d) for d in datasets):
        raise DataError("no examples left to train or validate on: give more data")
    _check_same_run(out, model, train, datasets)
    if model.needs_states:
        prompts = [ids for d in datasets for ids in d.prompts]
        cache = cache_states(model, prompts, out / RUN / "states", cache_gb, on_cache)
        if cache is not None:
            first = len(datasets[0])
            datasets[0].states = _View(cache, 0)
            datasets[1].states = _View(cache, first)
    if options.fit_steps and model.needs_states:
        error = fit_projector(model, datasets[0], options.fit_steps, train.seed)
        log.info("the projector gives the SLM's embeddings back up to %.0f %% of their variance", 100 * error)
    trainer = make_trainer(
        model,
        *datasets,
        out=out / RUN,
        options=train,
        prompt_pad_id=model.prompt_tokenizer.pad_token_id or 0,
        quality=quality_of(model, validation[: train.max_quality_examples]) if train.max_quality_examples else None,
    )
    finished = run(trainer)
    if finished and trainer.is_world_process_zero():
        card = handoff_card(
            model.config,
            title=out.resolve().name,
            data=f"{len(pairs):,} training and {len(validation):,} validation pairs",
            command=command or "baton.handoff.training.train_handoff(...)",
            validation=_last_metrics(trainer),
        )
        model.save_pretrained(out, card=card)
    return finished


def fit_projector(model: HandoffModel, data: PairDataset, steps: int, seed: int = 0, batch_size: int = 128) -> float:
    """Teach the projector alone to give back the SLM's side of the fusion: its embeddings of the prompt's tokens.

    With two tokenizers that is the LLM's own embeddings through the map to the SLM's width, which starts random.

    Where training starts from Z = 0, or from noise, what a trained SLM learns first is that Z does not help, and the
    projector's units die; from here on Z already means something to the SLM, and the SLM still writes as before.

    Returns: mean squared error of the last steps, as a fraction of the embeddings' variance.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    errors: list[float] = []
    for _ in range(steps):
        chosen = torch.randint(len(data), (batch_size,), generator=generator).tolist()
        ids, mask = pad_right([data.prompts[index] for index in chosen], device=model.device)
        with torch.no_grad():
            if data.states is None:
                states = model.read(ids, mask)
            else:
                rows = [data.states[index] for index in chosen]
                states = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
            wanted = model.prompt_embeddings(ids).float()[mask.bool()]
        error = (model.project(states).float()[mask.bool()] - wanted).pow(2).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        errors.append(float(error.detach() / wanted.var()))
    optimizer.zero_grad()
    return sum(errors[-20:]) / len(errors[-20:])


def cache_states(
    model: HandoffModel,
    prompts: list[list[int]],
    folder: Path,
    cache_gb: float,
    on_progress: Callable[[int, int], None] | None = None,
) -> FeatureCache | None:
    """The LLM's states of every prompt, from disk where they were computed before; None when there is no room."""
    llm = model.config.llm
    return build(
        folder,
        prompts,
        lambda ids, mask: model.read(ids.to(model.device), mask.to(model.device)),
        width=llm["width"] * llm["layers_read"],
        key=f"{llm['sha256']}:{llm['layer']}",
        cache_gb=cache_gb,
        on_progress=on_progress,
    )


def quality_of(writer: Writer, pairs: Sequence[Pair], max_new_tokens: int = 128) -> Callable[[nn.Module], dict]:
    """BLEU, chrF and ROUGE-L of greedy answers, for validation during training."""
    from baton.engine import generate

    def measure(module: nn.Module) -> dict[str, float]:
        training = module.training
        module.eval()
        try:
            outputs = generate(writer, [p.prompt for p in pairs], max_new_tokens=max_new_tokens, truncate=True)
        finally:
            module.train(training)
        return text_quality([o.text for o in outputs], pairs, rouge=True)

    return measure


def _last_metrics(trainer: TextTrainer) -> dict[str, float]:
    """Loss and quality of the last validation, and the steps taken."""
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        found |= {k.removeprefix("eval_"): v for k, v in entry.items() if k in METRICS}
    return found | {"steps": trainer.state.global_step}


class _View:
    """States of a stretch of the cached prompts."""

    def __init__(self, cache: FeatureCache, start: int) -> None:
        self.cache, self.start = cache, start

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.cache[self.start + index]


def _dataset(model: HandoffModel, pairs: Sequence[Pair], truncate: bool) -> PairDataset:
    return PairDataset(
        pairs,
        model.prompt_tokenizer,
        model.response_tokenizer,
        limits=model.prompt_limits,
        truncate=truncate,
        room=model.response_room,
    )


def _check_same_run(out: Path, model: HandoffModel, train: TrainOptions, datasets: Sequence[PairDataset]) -> None:
    """A run is continued only with the models, options and data it was started with."""
    path = out / RUN / "settings.json"
    settings = {
        "llm": {k: v for k, v in model.config.llm.items() if k != "id"},  # the same model may have another name
        "slm": {"sha256": fingerprint(model.slm)},
        "handoff": model.config.options,
        "train": asdict(train),
        "data": {name: _digest(d) for name, d in zip(("pairs", "validation"), datasets, strict=True)},
    }
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{part}.{k}" for part in settings for k, v in settings[part].items() if before.get(part, {}).get(k) != v
        ]
        if changed:
            raise BatonError(
                f"{out} holds a run started with other settings ({', '.join(changed)}): use the same ones to "
                "continue it, or another --out (or --overwrite) to start anew"
            )
        return
    with atomic_write(path) as file:  # other processes may be about to read it
        json.dump(settings, file, indent=1)


def _digest(dataset: PairDataset) -> str:
    digest = hashlib.sha256()
    for ids in zip(dataset.prompts, dataset.responses, strict=True):
        digest.update(repr(ids).encode())
    return digest.hexdigest()
