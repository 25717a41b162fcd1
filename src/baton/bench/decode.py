"""Ways to decode side by side: plain, drafting methods, hand-offs, and other engines, on the same prompts in one run.

Tokens are counted as ids, the same way for all. Texts are compared with plain decoding before any speed is reported: a
lossless method that wrote something else is marked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from baton.bench.contenders import PLAIN, Contender, Ours
from baton.bench.metrics import Measurement
from baton.bench.peers import Absent, make_peers
from baton.bench.record import Quality, Record, Run, to_json
from baton.bench.runner import Progress, measure
from baton.bench.suites import Suite
from baton.data.storage import append_jsonl
from baton.errors import UnknownOption
from baton.machine import bandwidth_gb_s, machine, revision, versions
from baton.models.adapter import runtime_of, target_for
from baton.models.loading import beside, load
from baton.models.writer import Writer
from baton.quality import edit_similarity, exact_match, perplexity, text_quality
from baton.types import Pair, Sampling


def bench_decode(
    writer: Writer,
    suites: Sequence[Suite],
    *,
    methods: Sequence[str] = (),
    handoffs: Sequence[str] = (),
    peers: Sequence[str] = (),
    assistant: str | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    max_new_tokens: int = 256,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 1,
    fill: bool = True,
    out: Path | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Measurement:
    """Measure ways to decode against plain decoding.

    Args:
        methods: as in `baton.generate(drafter=...)`; plain decoding is always measured.
        handoffs: folders or Hub ids of hand-offs from this model, each possibly with a method that drafts for it:
            `DIR` or `DIR+METHOD`. They write other texts than the model: look at their quality too.
        peers: other engines, see `baton.bench.peers`; greedy only. One that cannot take part is reported as absent.
        assistant: folder or Hub id of the small model that peers draft with.
        repeats: passes over all prompts, after a first group that warms up.
        fill: leave out the last prompts where they do not fill a batch: their speed is another one.
        out: keeps the raw records (JSONL), and what a run that was cut off had measured.
        progress: called with (what, done, total).
    """
    absent: list[str] = []
    methods = [m for m in dict.fromkeys(methods) if m != PLAIN]
    writers = {spec: load(_handoff(spec)[0], **beside(writer.lm)) for spec in handoffs}
    others: list[Contender] = []
    for name in peers:
        if not sampling.greedy:
            raise UnknownOption(f"peer {name} is compared greedy only: their random numbers are not ours")
        try:
            others += make_peers(name, writer, max_new_tokens=max_new_tokens, assistant=assistant)
        except Absent as error:
            absent.append(str(error))

    def make(size: int) -> list[Contender]:
        options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": max_new_tokens, "max_rows": size}
        ours = [Ours(writer, method, **options) for method in (PLAIN, *methods)]
        for spec, other in writers.items():
            ours.append(Ours(other, _handoff(spec)[1], name=spec, family="hand-off", **options))
        return [*ours, *others]

    families = {PLAIN: "plain"} | dict.fromkeys(methods, "speculative") | dict.fromkeys(handoffs, "hand-off")
    run = Run(
        model=str(getattr(writer.lm, "name_or_path", "")),
        dtype=str(writer.lm.dtype).removeprefix("torch."),
        runtime=runtime_of(writer.lm).name,
        step_bytes=_step_bytes(writer),
        contenders=families | {peer.name: peer.family for peer in others},
        suites={suite.name: suite.about for suite in suites},
        sampling={k: list(v) if isinstance(v, tuple) else v for k, v in asdict(sampling).items()},
        max_new_tokens=max_new_tokens,
        batch_sizes=list(batch_sizes),
        repeats=repeats,
        machine=machine() | {"bandwidth_gb_s": bandwidth_gb_s(writer.lm.device)},
        versions=versions("torch", "transformers", "baton-decoding"),
        git=revision(),
        absent=absent,
        command=command,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    run, records = measure(writer, make, suites, run, fill=fill, out=out, overwrite=overwrite, progress=progress)
    quality = judge(records, suites, writer, run.contenders)
    if out is not None:
        with append_jsonl(out) as log:
            log.write(*(to_json(Quality(contender=name, scores=scores)) for name, scores in quality.items()))
    return Measurement(run=run, records=records, quality=quality)


def judge(
    records: Sequence[Record], suites: Sequence[Suite], writer: Writer, families: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Quality of what each contender wrote: against references where the suites have them; under the target for those
    that may write something else than plain decoding.

    Each contender is judged by its texts of the first repeat at the smallest batch size.
    """
    tasks = {(suite.name, index): task for suite in suites for index, task in enumerate(suite.tasks)}
    judged = any(task.references for task in tasks.values())
    lossy = "hand-off" in families.values()
    smallest = min((record.batch_size for record in records), default=1)
    found: dict[str, dict[str, float]] = {}
    for name, family in families.items():
        own = [r for r in records if r.contender == name and (r.batch_size, r.repeat) == (smallest, 0) and not r.failed]
        scores: dict[str, float] = {}
        if judged and own:
            pairs = [
                (record, Pair(prompt=task.prompt, response=task.references[0], references=task.references))
                for record in own
                if (task := tasks[record.suite, record.prompt]).references
            ]
            texts = [record.text for record, _ in pairs]
            accepted = [pair.accepted for _, pair in pairs]
            scores |= text_quality(texts, [pair for _, pair in pairs], rouge=True)
            scores["exact_match"] = 100 * sum(map(exact_match, texts, accepted)) / len(texts)
            scores["edit_similarity"] = 100 * sum(map(edit_similarity, texts, accepted)) / len(texts)
        if lossy and own and family in ("plain", "hand-off"):
            prompts = [tasks[record.suite, record.prompt].prompt for record in own]
            tokenizer = writer.response_tokenizer
            ids = [tokenizer(text_target=record.text)["input_ids"] for record in own]
            scores["perplexity"] = perplexity(writer, prompts, ids)
        if scores:
            found[name] = scores
    return found


def _handoff(spec: str) -> tuple[str, str]:
    """Folder or Hub id, and the method that drafts for it."""
    folder, _, method = spec.partition("+")
    return folder, method or PLAIN


def _step_bytes(writer: Writer) -> int:
    """Bytes of the weights in the decoder's layers and the head."""
    target = target_for(writer.lm)
    weights = [*target.layers.parameters(), *target.lm_head.parameters()]
    return sum(weight.nbytes for weight in weights)
