"""Writes one self-contained page about runs: losses, curves, gates, expert load, costs.

The page loads nothing from a network, and its only script sorts tables. Figures are matplotlib's,
as SVG inside the page with the text's own colour, so that light, dark and print all read well.
"""

import functools
import html
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rorqual import runtime
from rorqual.analyze import figures
from rorqual.analyze.measures import Gates, Load, MemoryScores, expert_load, gates, suppression
from rorqual.checkpoint import load_model, run_of
from rorqual.config import to_dict
from rorqual.costs import Costs, costs
from rorqual.data import chats
from rorqual.data.corpus import Trained, open_corpus, trained
from rorqual.data.tokenizer import Tokenizer
from rorqual.io import write_text
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig

SENTENCE = "The Eiffel Tower is a famous tower in Paris, the capital of France."
SAMPLE = 200  # documents of validation text for expert load
READ_TWICE = 50  # documents of those that are scored with the memory and without it
CONTEXT = 4096  # most tokens read at once, where the sequence length of the training is unknown
_PAGE = Path(__file__).with_name("report.html")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Everything that a page shows of one run."""

    name: str
    config: ModelConfig
    costs: Costs
    records: list[dict[str, Any]]
    gates: Gates | None = None
    load: Load | None = None
    memory_kept: MemoryScores | None = (
        None  # nats per token of the sample with its memory and without
    )
    # layer, expert, the tokens that it processes above chance
    favourites: list[tuple[int, int, str]] = field(default_factory=list)
    # tokens per second by placement of the rows, from `rorqual table bench`
    placements: dict[str, float] = field(default_factory=dict)

    def last(self, key: str) -> float | None:
        """Returns the newest value of a metric, None if it was never logged."""
        return next((record[key] for record in reversed(self.records) if key in record), None)


def sample(run: Trained | None, count: int = SAMPLE) -> tuple[str, ...]:
    """Returns the first documents of the validation part of a training's corpus.

    They are WordNet's for an unknown training, or where its text is gone.
    """
    if run is not None:
        try:
            return _held_out(run.source, run.column, run.limit, count)
        except ValueError as error:
            runtime.log(f"{error}; the load of experts is read over wordnet instead")
    return _held_out("wordnet", "text", None, count)


def _held_out(source: str, column: str, limit: int | None, count: int) -> tuple[str, ...]:
    """Returns the first documents of a corpus's validation part; chats become plain text."""
    corpus = open_corpus(source, column=column, limit=limit)
    texts = (text for side, text in corpus.sided() if side == "validation")
    return tuple(islice(map(chats.plain, texts) if corpus.chats else texts, count))


def read_run(
    folder: str | Path,
    *,
    sentence: str = SENTENCE,
    texts: Sequence[str] = (),
    draw: Callable[[Trained | None], Sequence[str]] = sample,
) -> Reading:
    """Reads everything that the page shows of one run folder.

    Costs are those at its sequence length in training, 4,096 where unknown. The load of experts and
    the loss without memory are over `texts`, or over what `draw` returns for the run's training, of
    each as many tokens as fit that length. A run without a tokenizer (of needles) reads no text.
    FileNotFoundError, naming the folder, for what is no run.
    """
    weights = Path(folder)
    folder = run_of(weights)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"report: got {folder}, expected a run folder with config.json; "
            "train one with `rorqual train`"
        )
    model = load_model(weights)
    before = trained(folder)
    context = CONTEXT if before is None else before.seq_len
    reading = Reading(
        name=folder.resolve().name,
        config=model.config,
        costs=costs(model.config, context),
        records=_records(folder),
        placements=_placements(folder),
    )
    has_moe = model.config.moe is not None
    has_memory = model.config.engram is not None
    if not (folder / "tokenizer.json").is_file() or not (has_moe or has_memory):
        return reading
    tokenizer = Tokenizer.load(folder)
    texts = texts or draw(before)
    load = _load(model, tokenizer, texts, context) if has_moe else None
    return replace(
        reading,
        gates=gates(model, tokenizer, sentence) if has_memory else None,
        load=load,
        memory_kept=_memory_scores(model, tokenizer, texts[:READ_TWICE], context)
        if has_memory
        else None,
        favourites=_favourites(load, tokenizer) if load is not None else [],
    )


def _records(folder: Path) -> list[dict[str, Any]]:
    """Reads the complete lines of metrics.jsonl; none if a run has logged nothing."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]


def _placements(folder: Path) -> dict[str, float]:
    """Reads the tokens a second by placement that `rorqual table bench` saved; {} without them."""
    path = folder / "placements.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _load(model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], context: int) -> Load:
    """Counts the tokens of each expert over the first `context` tokens of every text."""
    device = model.embed.weight.device
    encoded = [[tokenizer.begin_id, *ids][:context] for ids in tokenizer.encode_batch(list(texts))]
    return expert_load(model, (torch.tensor([ids], device=device) for ids in encoded))


def _memory_scores(
    model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], context: int
) -> MemoryScores:
    """Scores each document by itself, with the memory and without.

    The end of a document is scored too where it is reached; every token counts alike.
    """
    device = model.embed.weight.device
    sums = [0.0, 0.0]
    tokens = 0
    for ids in tokenizer.encode_batch(list(texts)):
        before, following = (
            torch.tensor([of[:context]], device=device)
            for of in ([tokenizer.begin_id, *ids], [*ids, tokenizer.end_id])
        )
        tokens += following.numel()
        sums = [
            total + nats * following.numel()
            for total, nats in zip(sums, suppression(model, before, following), strict=True)
        ]
    return MemoryScores(*(total / max(tokens, 1) for total in sums))


def _favourites(load: Load, tokenizer: Tokenizer, experts: int = 6) -> list[tuple[int, int, str]]:
    """Returns the busiest experts of every layer and the tokens that they process."""
    rows = []
    for n, layer in enumerate(load.layers):
        for expert in load.counts[n].topk(min(experts, load.counts.shape[1])).indices.tolist():
            words = [tokenizer.token(i).strip() or "␣" for i, _ in load.favourites(n, expert)]
            rows.append((layer, expert, " · ".join(words)))
    return rows


def page_for(runs: Sequence[str | Path], folder: str | Path) -> Path:
    """Returns the first of report.html, report-2.html, ... that is free or of these runs."""
    names_in_turn = ("report.html" if n == 1 else f"report-{n}.html" for n in itertools.count(1))
    return next(
        page
        for name in names_in_turn
        if not (page := Path(folder) / name).exists() or _is_of(page, runs)
    )


def _is_of(page: Path, runs: Sequence[str | Path]) -> bool:
    """Returns whether a page was made from these runs, even if it and they were moved together."""
    return f'<meta name="rorqual-runs" content="{_mark(page, runs)}">' in page.read_text(
        encoding="utf-8", errors="replace"
    )


def _mark(page: Path, runs: Sequence[str | Path]) -> str:
    """Formats the runs that a page was made from: their paths, relative to the page's folder."""
    here = page.parent.resolve()
    return html.escape(
        json.dumps(sorted({os.path.relpath(Path(run).resolve(), here) for run in runs}))
    )


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "rorqual: what was trained, and what it learned",
    sentence: str = SENTENCE,
    texts: Sequence[str] = (),
    note: str = "",
    asked: Sequence[str | Path] | None = None,
) -> Path:
    """Reads the run folders, writes the page and returns its path.

    `note` is a paragraph of text above the tables. `asked` are the folders that the runs were found
    in, by which `page_for` recognises the page later; None: the runs. A page of other runs at `out`
    is replaced, and the log says so; ValueError for any other file.

    A folder that is named twice is read once; runs of one name are prefixed with as much of their
    path as tells them apart.
    """
    folders = list(dict.fromkeys(Path(run).resolve() for run in runs))
    if not folders:
        raise ValueError("report: got no runs, expected at least one run folder")
    _check_replaced(Path(out), asked or runs)
    # Runs of one text share its sample.
    draw = functools.cache(sample)
    read = functools.partial(read_run, sentence=sentence, texts=texts, draw=draw)
    readings = [
        replace(read(folder), name=name)
        for folder, name in zip(folders, names(folders), strict=True)
    ]
    sections = [
        ("Result", (f"<p>{html.escape(note)}</p>" if note else "") + results_table(readings)),
        (
            "Loss",
            svg(
                figures.curves([(r.name, r.records) for r in readings]),
                "loss over tokens, a line a run",
            ),
        ),
        (
            "How much each token uses its memory",
            _memory_part([r for r in readings if r.gates is not None]),
        ),
        ("Load of the experts", "".join(_load_part(r) for r in readings if r.load is not None)),
        ("Speed by placement of the rows", "".join(map(_placements_part, readings))),
        ("Costs", costs_table(readings)),
        ("Configurations", "".join(_config_part(r) for r in readings)),
    ]
    body = "\n".join(
        f"<section><h2>{name}</h2>\n{content}</section>" for name, content in sections if content
    )
    parts = {"title": html.escape(title), "body": body, "runs": _mark(Path(out), asked or runs)}
    page = re.sub(
        r"\{\{(title|body|runs)\}\}",
        lambda gates: parts[gates[1]],
        _PAGE.read_text(encoding="utf-8"),
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def _check_replaced(out: Path, runs: Sequence[str | Path]) -> None:
    """Logs that a page of other runs will be replaced; ValueError for a file that is no page."""
    if out.is_dir():
        raise ValueError(
            f"report: got the folder {out} to write to, "
            f"expected a file in it: {out / 'report.html'}"
        )
    if not out.exists() or _is_of(out, runs):
        return
    with out.open("rb") as file:
        if not file.read(64).lstrip().lower().startswith(b"<!doctype html"):
            raise ValueError(
                f"report: got {out}, which is no page, to write over, "
                "expected another name: --out NAME.html"
            )
    runtime.log(f"{out}: replaces a page that was made from other runs")


def names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest end of each path that is the end of no other."""
    lengths = range(1, max(len(folder.parts) for folder in folders) + 1)

    def tail(folder: Path, length: int) -> str:
        return str(Path(*folder.parts[-length:]))

    def shortest_tail(folder: Path) -> int:
        return next(
            n for n in lengths if sum(tail(other, n) == tail(folder, n) for other in folders) == 1
        )

    return [tail(folder, shortest_tail(folder)) for folder in folders]


def svg(figure: Any, label: str) -> str:
    """Returns a matplotlib figure as inline SVG whose black is the page's text colour.

    `label` is what a screen reader reads aloud.
    """
    buffer = io.StringIO()
    with figures.style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r'height="[\d.]+pt"', "", drawing, count=1)
    # The page limits the width by this property.
    drawing = re.sub(r'width="([\d.]+pt)"', r'style="--own: \1"', drawing, count=1)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
    return f"<figure>{drawing.replace(': #000000', ': currentColor')}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a sortable HTML table; cells are text and are escaped."""
    cells = "".join(f'<th scope="col"><button>{html.escape(name)}</button></th>' for name in head)
    lines = (
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def results_table(readings: Sequence[Reading]) -> str:
    """Returns losses and resources, one line per run; columns that no run has are left out."""
    columns = (
        ("validation, nats a token", "validation_loss", 4),
        ("bits a byte", "bits_per_byte", 4),
        ("answers found", "accuracy", 3),
        ("training loss", "loss", 3),
        ("tokens", "tokens", 0),
        ("seconds", "seconds", 0),
        ("max violation", "max_violation", 2),
    )
    column = [column for column in columns if any(r.last(column[1]) is not None for r in readings)]
    rows = [
        (r.name, *(_number(r.last(key), digits) for _, key, digits in column)) for r in readings
    ]
    return table(("run", *(words for words, _, _ in column)), rows)


def costs_table(readings: Sequence[Reading]) -> str:
    """Returns parameters, FLOPs and cache bytes, one line per run."""
    head = (
        "run",
        "total parameters",
        "of them memory",
        "activated",
        "FLOPs a token",
        "cache bytes a token",
    )
    rows = []
    for r in readings:
        c = r.costs
        values = (c.total, c.memory, c.activated, c.flops_per_token, c.cache_bytes_per_token)
        rows.append((r.name, *(f"{value:,}" for value in values)))
    return table(head, rows)


def _number(value: float | None, digits: int) -> str:
    """Formats a value with so many digits after the point; "" for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def _memory_part(readings: Sequence[Reading]) -> str:
    """Returns the gates of every run with a memory, then a table of its loss with and without."""
    if not readings:
        return ""
    head = ("run", "sampled text, nats a token", "without its memory", "difference, nats a token")
    seconds = [(r.name, r.memory_kept) for r in readings if r.memory_kept is not None]
    rows = [
        (name, _number(k.whole, 4), _number(k.without, 4), _number(k.without - k.whole, 4))
        for name, k in seconds
    ]
    return "".join(map(_gate_text, readings)) + table(head, rows)


def _gate_text(reading: Reading) -> str:
    """Returns the sentence with each token tinted by its gate, then a figure of all streams.

    There is one line per layer, and the tint is the mean over the streams.
    """
    gates = reading.gates
    assert gates is not None
    lines = []
    for n, layer in enumerate(gates.layers):
        means = gates.values[n].mean(-1).tolist()
        words = "".join(
            f'<span style="--g:{value:.3f}" title="{value:.2f}">{html.escape(word)}</span>'
            for word, value in zip(gates.tokens, means, strict=True)
        )
        lines.append(
            f'<p class="gates"><b>{html.escape(reading.name)}, block {layer}</b> {words}</p>'
        )
    return "".join(lines) + svg(
        figures.gate_map(gates), f"gates of {reading.name} by token, block and stream"
    )


def _placements_part(reading: Reading) -> str:
    """Returns the bars of tokens a second by placement; "" if they were not measured."""
    if not reading.placements:
        return ""
    listed = ", ".join(
        f"{placement} {speed:,.0f}" for placement, speed in reading.placements.items()
    )
    drawn = svg(
        figures.bars(reading.placements, x="tokens a second"),
        f"tokens a second by placement of the rows: {listed}",
    )
    return f"<h3>{html.escape(reading.name)}</h3>{drawn}"


def _load_part(reading: Reading) -> str:
    """Returns the map of the experts' load, with what the busiest experts take."""
    assert reading.load is not None
    load = reading.load
    rows = [(str(layer), str(expert), words) for layer, expert, words in reading.favourites]
    listed = ", ".join(f"{nats:.2f}" for nats in load.specialisation.tolist())
    largest = math.log(load.counts.shape[1])
    taken = table(("block", "expert", "tokens it takes most above their frequency"), rows)
    return (
        f"<h3>{html.escape(reading.name)}</h3>"
        + svg(
            figures.load_map(load), f"load of every expert of {reading.name} over the uniform load"
        )
        + f"<p>What an expert tells of its token, block by block: {listed} nats, "
        f"of at most {largest:.2f}.</p>"
        + f"<details><summary>what the busiest experts take</summary>{taken}</details>"
    )


def _config_part(reading: Reading) -> str:
    """Returns the run's model config as JSON, folded."""
    text = html.escape(json.dumps(to_dict(reading.config), indent=2))
    return f"<details><summary>{html.escape(reading.name)}</summary><pre>{text}</pre></details>"
