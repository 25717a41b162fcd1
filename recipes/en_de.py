"""Train the English-German reference models: LLM, SLM, hand-off, and a hand-off to a decoder-only SLM.

    python recipes/en_de.py --data deu-eng.zip                 every stage, in order; run again to continue
    python recipes/en_de.py --data deu-eng.zip --processes 2   two training processes (torchrun)
    python recipes/en_de.py --data deu-eng.zip handoff         one stage
    python recipes/en_de.py --data deu-eng.zip curve           smaller SLMs, alone and with the hand-off

A finished stage is skipped; an interrupted training continues from its last checkpoint.
Data: Tatoeba English-German (CC BY 2.0), the zip from manythings.org/anki.
"""

import json
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from stages import main
from torch import nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from baton.bench.report import conditions, results_table
from baton.data.formats import read_pairs
from baton.data.tatoeba import read_tatoeba, split_tatoeba
from baton.handoff.card import handoff_card
from baton.handoff.config import HandoffConfig, HandoffOptions
from baton.handoff.evaluate import MODES, evaluate
from baton.handoff.label import label
from baton.handoff.model import HandoffModel
from baton.handoff.training import train_handoff
from baton.machine import machine, revision
from baton.models.loading import load
from baton.models.text import TextToText
from baton.train.dataset import PairDataset
from baton.train.options import TrainOptions
from baton.train.tokenizers import train_bpe
from baton.train.trainer import make_trainer, run
from baton.types import Pair

# stage: whether torchrun may run it
STAGES = {
    "tokenizers": False,
    "llm": True,
    "labels": False,
    "slm-start": False,  # one decoder layer and the embeddings of the LLM, from which both of the next start
    "slm": True,  # ... trained alone, on the LLM's translations
    "handoff": True,  # ... trained with what the LLM has read, on the same
    "publish": False,  # into models/, with cards; measured results into benchmarks/results/
    "gpt-start": True,  # a decoder-only SLM that has its own tokenizer, trained alone on human translations
    "gpt-handoff": True,  # ... trained on, with what the LLM has read
    "publish-gpt": False,
    "curve": False,
    "cards": False,
}
ON_REQUEST = ("curve", "cards")  # no part of what is trained and shipped
ROOT = Path(__file__).resolve().parents[1]
VOCAB, GPT_VOCAB = 3072, 1536
LLM = TrainOptions(
    max_steps=1300,
    batch_size=512,
    micro_batch_size=128,  # activations that fit into a processor's cache: 9 % faster, same result
    learning_rate=6e-3,
    embedding_lr=3e-2,
    warmup=0.04,
    eval_every=200,
    save_every=100,
    patience=0,
    max_quality_examples=0,
)
# Both halves of a comparison use the same options: same start, same labels, same steps, same schedule.
SLM = replace(LLM, max_steps=2400, learning_rate=8e-3, embedding_lr=1e-2, eval_every=400, save_every=200)
SLM_FF = 1344  # as wide as an eighth of the LLM's weights allows
CURVE = {width: replace(SLM, max_steps=400, eval_every=400) for width in (32, 192, 1344)}
START = replace(LLM, max_steps=600)
# The SLM's one layer has read the LLM's states before: it starts with them, as they are.
REPLACE = HandoffOptions(fusion="replace", inner_width=2048, identity_init=True)
# GPT-2 initialises embeddings at a scale of 0.02, T5 at 1: a smaller rate changes them as much.
GPT_START = replace(START, max_steps=400, embedding_lr=3e-3)
GPT_CONTINUE = replace(START, max_steps=450, learning_rate=3e-3, embedding_lr=3e-3)


def t5(*, d_ff: int, encoder: int, decoder: int) -> PreTrainedModel:
    """A new T5-shaped model, initialised from seed 0."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=256,
            d_kv=32,
            num_heads=8,
            d_ff=d_ff,
            num_layers=encoder,
            num_decoder_layers=decoder,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            decoder_start_token_id=0,
            n_positions=512,
        )
    )


def gpt() -> PreTrainedModel:
    """A new GPT-2-shaped model, initialised from seed 0."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=GPT_VOCAB,
            n_positions=512,
            n_embd=160,
            n_layer=2,
            n_head=5,
            n_inner=640,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


class Recipe:
    """One method per stage; each fills one folder under `out`."""

    def __init__(self, data: Path, out: Path) -> None:
        self.out = out
        self.train, self.validation, self.test = split_tatoeba(read_tatoeba(data))

    def tokenizers(self) -> None:
        """One for LLM and SLM, a smaller one for the decoder-only SLM."""
        texts = [s for p in self.train for s in (p.prompt, p.response)]
        train_bpe(texts, VOCAB, append_eos=True).save_pretrained(self.out / "tokenizers" / "t5")
        train_bpe(texts, GPT_VOCAB, append_eos=False).save_pretrained(self.out / "tokenizers" / "gpt")
        for name, pairs in (("validation", self.validation), ("test", self.test)):
            rows = ({"prompt": p.prompt, "response": p.response, "references": list(p.accepted)} for p in pairs)
            lines = [json.dumps(row if len(row["references"]) > 1 else _short(row), ensure_ascii=False) for row in rows]
            (self.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def llm(self) -> bool:
        model = t5(d_ff=768, encoder=8, decoder=5)
        return self._alone(model, "t5", self.train, LLM, "llm")

    def labels(self) -> None:
        """The LLM's own greedy translation of every sentence: sequence-level distillation, arXiv 1606.07947."""
        prompts = list(dict.fromkeys(p.prompt for p in self.train))
        with Progress() as bar:
            task = bar.add_task("labels", total=len(prompts))
            label(
                load(self.out / "llm"),
                prompts,
                self.out / "labels" / "labels.jsonl",
                max_new_tokens=96,
                batch_size=256,
                on_progress=lambda done, total: bar.update(task, completed=done),
            )

    def slm_start(self) -> None:
        self._slm_start("slm-start", SLM_FF)

    def _slm_start(self, stage: str, width: int) -> None:
        """The LLM without its encoder and all but the last of its decoder's layers (as in arXiv 2010.13002).

        Its feed-forward part is widened by units of the layer before, which are not heard until they have learned, or
        loses its last units.
        """
        llm = T5ForConditionalGeneration.from_pretrained(self.out / "llm", dtype=torch.float32)
        slm = t5(d_ff=width, encoder=0, decoder=1)
        weights = llm.state_dict()
        depth = llm.config.num_decoder_layers
        first, before, last = (f"decoder.block.{n}." for n in (0, depth - 2, depth - 1))
        # Positions are the first layer's, in T5.
        kept = {n: weights[n if "relative" in n else n.replace(first, last)] for n in slm.state_dict()}
        more = max(0, width - llm.config.d_ff)
        feed, norm = f"{first}layer.2.DenseReluDense", f"{first}layer.2.layer_norm.weight"
        scale = weights[norm.replace(first, before)] / weights[norm.replace(first, last)]  # each layer has its own norm
        units = weights[f"{feed}.wi.weight".replace(first, before)] * scale
        kept[f"{feed}.wi.weight"] = torch.cat([kept[f"{feed}.wi.weight"], units[:more]])[:width]
        kept[f"{feed}.wo.weight"] = nn.functional.pad(kept[f"{feed}.wo.weight"], (0, more))[:, :width].contiguous()
        # The LLM's states have been normalised: the SLM's own norm, which they pass once more, leaves them as they are.
        norm = "encoder.final_layer_norm.weight"
        kept[norm] = weights[norm].pow(2).mean().sqrt().expand_as(weights[norm]).clone()
        slm.load_state_dict(kept)
        slm.save_pretrained(self.out / stage)
        AutoTokenizer.from_pretrained(self.out / "tokenizers" / "t5").save_pretrained(self.out / stage)

    def slm(self) -> bool:
        return self._slm("slm-start", SLM, "slm")

    def _slm(self, start: str, options: TrainOptions, stage: str) -> bool:
        model = T5ForConditionalGeneration.from_pretrained(self.out / start, dtype=torch.float32)
        return self._alone(model, "t5", self._labelled(), options, stage)

    def handoff(self) -> bool:
        return self._handoff("slm-start", REPLACE, SLM, "handoff")

    def curve(self) -> bool:
        """How large an SLM must be, alone and with the hand-off: the same few steps for each size."""
        points = []
        for width, options in CURVE.items():
            start, alone, handoff = (f"curve/{width}/{name}" for name in ("start", "alone", "handoff"))
            if not (self.out / start).exists():
                self._slm_start(start, width)
            states = self.out / handoff / "run" / "states"
            if not states.exists() and (self.out / "handoff" / "run" / "states").exists():  # the LLM is the same
                states.parent.mkdir(parents=True)
                states.symlink_to((self.out / "handoff" / "run" / "states").resolve())
            if not self._slm(start, options, alone) or not self._handoff(start, REPLACE, options, handoff):
                return False
            pairs = read_pairs(self.out / "test.jsonl")[0]
            report = evaluate(
                self.out / handoff, pairs, slm=self.out / alone, limit=500, modes=("llm", "slm", "handoff")
            ).to_dict()
            kept = ("parameters", "bleu", "chrf", "ms_per_token")
            points.append({"width": width, "steps": options.max_steps, **{name: report[name] for name in kept}})
        about = {"prompts": 500, "command": f"{COMMAND} curve", "git": revision(), "machine": machine()}
        text = json.dumps({"sizes": points, **about}, indent=1)
        (ROOT / "benchmarks" / "results" / "en-de-curve.json").write_text(text + "\n", encoding="utf-8")
        return True

    def gpt_start(self) -> bool:
        return self._alone(gpt(), "gpt", self.train, GPT_START, "gpt-start")

    def gpt_handoff(self) -> bool:
        options = HandoffOptions(inner_width=256, fit_steps=1000)
        return self._handoff("gpt-start", options, GPT_CONTINUE, "gpt-handoff")

    def publish(self) -> None:
        """LLM, SLM and hand-off to their place; measured there, the numbers go into cards and README."""
        for name in ("llm", "slm"):
            writer = load(self.out / name, dtype=torch.bfloat16)
            writer.lm.save_pretrained(folder(name))
            writer.response_tokenizer.save_pretrained(folder(name))
        report = self._publish("handoff", "handoff", alone=str(folder("slm")), held_out="test.jsonl")
        write_cards(report)

    def cards(self) -> None:
        """All cards anew, from the committed measurements."""
        for name in ("handoff", "handoff-gpt"):
            path = ROOT / "benchmarks" / "results" / f"en-de-{name}.json"
            report = json.loads(path.read_text(encoding="utf-8"))
            write_handoff_card(report, name)
            if name == "handoff":
                write_cards(report)

    def publish_gpt(self) -> None:
        self._publish("gpt-handoff", "handoff-gpt", alone=None, held_out="../en-de-handoff/test.jsonl")

    def _publish(self, source: str, name: str, *, alone: str | None, held_out: str) -> dict[str, Any]:
        """A hand-off with its measurement and card; returns the measurement."""
        model = HandoffModel.from_pretrained(self.out / source, llm=folder("llm"), dtype=torch.bfloat16)
        model.config.slm_alone, model.config.held_out = alone, held_out
        model.save_pretrained(folder(name))
        shutil.copy(self.out / "test.jsonl", folder("handoff"))
        report = self._measure(folder(name))
        write_handoff_card(report, name)
        return report

    def _measure(self, place: Path) -> dict[str, Any]:
        with Progress() as bar:
            tasks: dict[str, Any] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done)

            report = evaluate(place, progress=show).to_dict()
        path = ROOT / "benchmarks" / "results" / f"{place.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return report

    def _labelled(self) -> list[Pair]:
        return read_pairs(self.out / "labels" / "labels.jsonl")[0]

    def _alone(
        self, model: PreTrainedModel, tokenizer_name: str, train: list[Pair], options: TrainOptions, stage: str
    ) -> bool:
        tokenizer = AutoTokenizer.from_pretrained(self.out / "tokenizers" / tokenizer_name)
        datasets = [PairDataset(pairs, tokenizer, tokenizer) for pairs in (train, self.validation)]
        trainer = make_trainer(
            TextToText(model), *datasets, out=self.out / stage / "run", options=options, prompt_pad_id=0
        )
        finished = run(trainer)
        if finished and trainer.is_world_process_zero():
            model.to(torch.bfloat16).save_pretrained(self.out / stage)
            tokenizer.save_pretrained(self.out / stage)
        return finished

    def _handoff(self, slm: str, options: HandoffOptions, train: TrainOptions, stage: str) -> bool:
        return train_handoff(
            llm=self.out / "llm",
            slm=self.out / slm,
            pairs=self._labelled(),
            validation=self.validation,
            out=self.out / stage,
            options=options,
            train=train,
        )


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "response": row["response"]}


DATA = "Tatoeba English-German pairs (tatoeba.org, through manythings.org/anki, CC BY 2.0), split by English sentence"
COMMAND = "python recipes/en_de.py --data deu-eng.zip"
START_MARK, END_MARK = "<!-- results -->", "<!-- end of results -->"


def folder(name: str) -> Path:
    return ROOT / "models" / f"en-de-{name}"


def results(report: dict[str, Any], name: str, modes: Collection[str] = MODES) -> str:
    return (
        f"{results_table(report, modes)}\n\n{conditions(report)}\n\nMeasured by `baton eval handoff "
        f"models/en-de-{name} --json out.json`; the committed result is `benchmarks/results/en-de-{name}.json`."
    )


def write_handoff_card(report: dict[str, Any], name: str) -> None:
    card = handoff_card(
        HandoffConfig.from_pretrained(folder(name)),
        title=f"en-de-{name}",
        data=f"{DATA}; responses are the LLM's own greedy translations of the training sentences",
        command=COMMAND,
        results=results(report, name),
        licence="cc-by-2.0",
    )
    (folder(name) / "README.md").write_text(card, encoding="utf-8")


def write_cards(report: dict[str, Any]) -> None:
    """README.md of LLM and SLM, and the results between the markers of the project's README."""
    shapes = {
        "llm": "The large model: T5 shape, 8 encoder and 5 decoder layers, width 256, trained on human translations.",
        "slm": "The small model alone: T5 shape, no encoder layer and one decoder layer, width 256. It starts from the "
        "large model's embeddings and last decoder layer, and is trained on the large model's greedy translations, "
        "for the same steps as `en-de-handoff`, whose baseline it is.",
    }
    for name, text in shapes.items():
        (folder(name) / "README.md").write_text(
            f'---\nlicense: "cc-by-2.0"\nlanguage: ["en", "de"]\npipeline_tag: "translation"\n---\n\n'
            f"# en-de-{name}\n\n{text}\n\n- Parameters: {report['parameters'][name]:,}\n- Data: {DATA}\n"
            f"- Made by: `{COMMAND}`\n\n## Results\n\n{results(report, 'handoff', (name,))}\n",
            encoding="utf-8",
        )
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START_MARK)
    after = rest.split(END_MARK)[1]
    shown = results(report, "handoff").split("\n\nMeasured")[0]
    readme.write_text(f"{before}{START_MARK}\n{shown}\n{END_MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(
        __file__,
        str(__doc__),
        STAGES,
        lambda args: Recipe(args.data, args.out),
        lambda parser: parser.add_argument("--data", type=Path, required=True, help="deu-eng.zip"),
        on_request=ON_REQUEST,
    )
