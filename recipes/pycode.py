"""Train the causal reference pair: `pycode-target` and its drafter `pycode-draft`, on the Python standard library.

    python recipes/pycode.py                 every stage, in order; run again to continue
    python recipes/pycode.py --processes 2   two training processes (torchrun)
    python recipes/pycode.py target          one stage
    python recipes/pycode.py layerskip       train the shipped target on, so that its first layers can draft (not part
                                             of "every stage"; LayerSkip, arXiv 2404.16710)
    python recipes/pycode.py corpus          the training files as JSONL, for `baton build-datastore` and `build-table`

A finished stage is skipped; an interrupted training continues from its last checkpoint.
Data: the source of the standard library of the Python that runs this (PSF licence), split by file.
"""

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from edits import copies, examples
from stages import main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from baton.models.text import TextToText
from baton.train.dataset import BlockDataset
from baton.train.layerskip import EarlyExits, LayerSkipOptions, StepCounter
from baton.train.options import TrainOptions
from baton.train.trainer import make_trainer, run

# stage: whether torchrun may run it
STAGES = {
    "tokenizer": False,
    "code": True,  # the target, on code alone
    "edits": True,  # ... trained on, with edits of code among it: their answers repeat their prompts
    "target": True,  # ... and on, with more of them, and with copies of what cannot be foreseen
    "small": True,  # the drafter, on code alone
    "draft": True,  # ... and on what the target has learned last
    "publish": False,
    "layerskip": True,
    "corpus": False,
}
ON_REQUEST = ("layerskip", "corpus")
ROOT = Path(__file__).resolve().parents[1]
VOCAB, BLOCK, LONG_BLOCK = 4096, 256, 512  # tokens; a function fits twice into the long one
PROMPT, PROMPTS = 96, 1000  # tokens of a held-out prompt, and how many are shipped
LEFT_OUT = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
CODE = TrainOptions(
    max_steps=1100,
    batch_size=32,
    micro_batch_size=16,  # activations that fit into a processor's cache: a quarter faster, same result
    learning_rate=4e-3,
    embedding_lr=4e-3,
    warmup=0.03,
    label_smoothing=0.0,
    eval_every=200,
    save_every=200,
    patience=0,
    max_quality_examples=0,
)
SMALL = replace(CODE, max_steps=800)
# Of as many tokens per step as before, at a rate between that of the first training and its end.
EDITS = replace(
    CODE,
    max_steps=500,
    batch_size=16,
    micro_batch_size=8,
    learning_rate=2e-3,
    embedding_lr=2e-3,
    eval_every=250,
    save_every=50,
)
TARGET = replace(EDITS, max_steps=400, learning_rate=3e-3, eval_every=200)
DRAFT = replace(TARGET, max_steps=250, eval_every=250)
COPIES = 10_000
# Each exit but the last counts in one step of four.
LAYERSKIP = replace(EDITS, max_steps=120, eval_every=60, save_every=20)
EXITS = LayerSkipOptions(p_max=0.1, e_scale=1.0, rotation=4)
EXIT_LAYER = 4  # of 14: where drafting stops by default


def llama(*, width: int, layers: int, heads: int, kv_heads: int, inner: int) -> PreTrainedModel:
    """A new Llama-shaped model, initialised from seed 0; its head is its embedding table."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=inner,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


class Recipe:
    """One method per stage; each fills one folder under `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        library = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in sorted(library.rglob("*.py")) if not LEFT_OUT & set(f.relative_to(library).parts)]
        self.train: list[str] = []
        self.held_out: list[str] = []
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            # By name, not by place in the list: the split is the same for every release of Python.
            number = hashlib.sha256(file.relative_to(library).as_posix().encode()).digest()[0]
            (self.held_out if number < 13 else self.train).append(text)  # one file in twenty

    def tokenizer(self) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(self.train, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="</s>",
            model_max_length=2048,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(self.out / "tokenizer")

    def code(self) -> bool:
        model = llama(width=192, layers=14, heads=3, kv_heads=1, inner=512)
        return self._train(TextToText(model), CODE, "code", self._tokenizer())

    def edits(self) -> bool:
        return self._train(self._stored("code"), EDITS, "edits", self._tokenizer(), more=self._edits(range(2)))

    def target(self) -> bool:
        return self._train(self._stored("edits"), TARGET, "target", self._tokenizer(), more=self._repeating())

    def small(self) -> bool:
        model = llama(width=96, layers=2, heads=3, kv_heads=1, inner=256)
        return self._train(TextToText(model), SMALL, "small", self._tokenizer())

    def draft(self) -> bool:
        return self._train(self._stored("small"), DRAFT, "draft", self._tokenizer(), more=self._repeating())

    def publish(self) -> None:
        """Copy both models and held-out prompts to their place."""
        tokenizer = self._tokenizer()
        for name in ("target", "draft"):
            folder = ROOT / "models" / f"pycode-{name}"
            model = LlamaForCausalLM.from_pretrained(self.out / name, dtype=torch.bfloat16)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            state = json.loads(_last_state(self.out / name / "run").read_text(encoding="utf-8"))
            losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
            also = f" on code, edits and copies, after {SMALL.max_steps:,} on code"
            if name == "target":
                also = (
                    f" on code, edits and copies, after {CODE.max_steps:,} on code and {EDITS.max_steps:,} with few "
                    "edits, so that answers repeat their prompts where they should: not faithfully, but mostly"
                )
            (folder / "README.md").write_text(
                f"---\nlicense: psf-2.0\npipeline_tag: text-generation\n---\n\n# pycode-{name}\n\n"
                f"Llama shape, {model.num_parameters():,} parameters, trained from scratch on the source of the Python "
                f"standard library, split by file. Held-out loss {losses[-1]:.2f} nats per token after "
                f"{state['global_step']:,} steps{also}.\n\n- Made by: `python recipes/pycode.py`\n",
                encoding="utf-8",
            )
        chance = random.Random(0)
        rows = []
        for text in self.held_out:
            ids = tokenizer(text, verbose=False)["input_ids"]
            for start in range(0, len(ids) - PROMPT, PROMPT):
                rows.append(tokenizer.decode(ids[start : start + PROMPT]))
        chosen = chance.sample(rows, min(PROMPTS, len(rows)))
        lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in chosen]
        (ROOT / "models" / "pycode-target" / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def corpus(self) -> None:
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in self.train]
        (self.out / "corpus" / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def layerskip(self) -> bool:
        """From the shipped target; its tokenizer comes along."""
        folder = ROOT / "models" / "pycode-target"
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.assistant_early_exit = EXIT_LAYER
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(self.out / "layerskip")
        return self._train(
            EarlyExits(model, EXITS, LAYERSKIP.max_steps), LAYERSKIP, "layerskip", tokenizer, more=self._edits(range(2))
        )

    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.out / "tokenizer")

    def _stored(self, stage: str) -> TextToText:
        return TextToText(LlamaForCausalLM.from_pretrained(self.out / stage, dtype=torch.float32))

    def _repeating(self) -> list[str]:
        """Texts whose second half repeats the first."""
        return [*self._edits(range(2, 7)), *copies(self.train, count=COPIES, seed=0)]

    def _edits(self, seeds: Iterable[int]) -> list[str]:
        """Each function once per seed."""
        return [text for seed in seeds for text in examples(self.train, seed=seed)]

    def _train(
        self, model: TextToText, options: TrainOptions, stage: str, tokenizer: Any, *, more: Sequence[str] = ()
    ) -> bool:
        length = LONG_BLOCK if more else BLOCK
        datasets = [
            BlockDataset(texts, tokenizer, length=length, separator=1)
            for texts in ([*self.train, *more], self.held_out)
        ]
        trainer = make_trainer(model, *datasets, out=self.out / stage / "run", options=options, prompt_pad_id=0)
        if isinstance(model, EarlyExits):
            trainer.add_callback(StepCounter(model))
        finished = run(trainer)
        if finished and trainer.is_world_process_zero():
            model.model.to(torch.bfloat16).save_pretrained(self.out / stage)
        return finished


def _last_state(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))


if __name__ == "__main__":
    main(__file__, str(__doc__), STAGES, lambda args: Recipe(args.out), on_request=ON_REQUEST)
