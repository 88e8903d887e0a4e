"""Scores a model on text or on tasks.

    nats per token = - sum of ln p(token | the tokens before it in its document) / tokens
    bits per byte  = the same sum / ln 2 / bytes of UTF-8 text     comparable between tokenizers

Every token of a document is predicted once, its end included; a document that is longer than the
window is read in windows.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rorqual import runtime
from rorqual.data import chats
from rorqual.data.corpus import open_corpus
from rorqual.data.tokenizer import Tokenizer
from rorqual.hub.auto import RorqualForCausalLM, fast_tokenizer
from rorqual.layers.cross_entropy import chunked_cross_entropy
from rorqual.model import IGNORED, LanguageModel

SPLITS = ("validation", "train", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The loss on a text; `tokens` counts each document's end, `bytes` its UTF-8 text alone."""

    nats_per_token: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    documents: int
    tokens_per_second: float


def texts(
    source: str | Path,
    *,
    split: str = "validation",
    limit: int | None = None,
    column: str = "text",
    within: int | None = None,
    as_chats: bool = False,
) -> Iterator[str]:
    """Returns documents of one part of a corpus (a name, a file, a folder), at most `limit`.

    The parts are those of training. `within`: the corpus ends after so many documents, as with a
    training's `data.limit`. `as_chats`: chats come as documents that `score` takes, else as text.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    corpus = open_corpus(str(source), column=column, limit=within)
    if split == "all":
        documents = corpus.documents()
    else:
        documents = (document for side, document in corpus.sided() if side == split)
    if corpus.chats and not as_chats:
        documents = map(chats.plain, documents)
    return itertools.islice(documents, limit)


def score(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    seq_len: int = 512,
    batch_size: int = 8,
    as_chats: bool = False,
) -> Score:
    """Measures the loss over documents, packed into sequences of `seq_len` tokens.

    Attention never crosses a document boundary. Of chats only the answers count. ValueError where
    there are no documents.
    """
    if seq_len < 1 or batch_size < 1:
        raise ValueError(
            f"got seq_len={seq_len} and batch_size={batch_size}, expected at least 1 of each"
        )
    clock = runtime.Clock()
    encoded = Encoded(tokenizer, chats.ChatEncoder(tokenizer) if as_chats else None)
    nats = tokens = 0.0
    packed = pack(encoded.of(documents), tokenizer, seq_len=seq_len, batch_size=batch_size)
    for ids, labels, owners in packed:
        nats += nats_of(model, ids, labels, owners)
        tokens += int((labels != IGNORED).sum())
    if encoded.spelled:
        runtime.log(f"left out: {encoded.spelled:,} x {chats.SPELLED}")
    if not encoded.documents:
        raise ValueError(
            "got no document to evaluate on, expected at least one "
            "(try --split all, or a larger corpus)"
        )
    return Score(
        nats_per_token=nats / tokens,
        bits_per_byte=nats / math.log(2) / max(encoded.bytes, 1),
        perplexity=math.exp(min(nats / tokens, 700.0)),
        tokens=int(tokens),
        bytes=encoded.bytes,
        documents=encoded.documents,
        tokens_per_second=tokens / max(clock.seconds, 1e-9),
    )


@dataclass(slots=True)
class Encoded:
    """Encodes documents, chats if there is a `chat_encoder`, and counts them and their bytes."""

    tokenizer: Tokenizer
    chat_encoder: chats.ChatEncoder | None = None
    documents: int = 0
    bytes: int = 0
    spelled: int = 0  # chats that are left out, since they spell a special token

    def of(self, documents: Iterable[str]) -> Iterator[tuple[list[int], list[bool]]]:
        """Yields the ids of each document and which of them are targets."""
        for document in documents:
            if self.chat_encoder is None:
                ids = self.tokenizer.encode(document)
                size = len(document.encode())
                encoded = ids, [True] * len(ids)
            else:
                (chat,) = self.chat_encoder.encode_batch([document])
                if chat is None:
                    self.spelled += 1
                    continue
                encoded = chat
                size = chats.answers_size(document)
            self.documents += 1
            self.bytes += size
            yield encoded


def pack(
    documents: Iterable[tuple[list[int], list[bool]]],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
) -> Iterator[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], Int[Tensor, "B T"]]]:
    """Yields (ids, labels, document_ids), each [at most batch_size, seq_len].

    A document is its ids and which of them are targets. The last sequence ends in padding, which
    is no target.
    """
    line: list[tuple[int, int, int]] = []  # id, label, document
    batch: list[list[tuple[int, int, int]]] = []
    for number, (ids, targets) in enumerate(documents):
        labels = [i if target else IGNORED for i, target in zip(ids, targets, strict=True)]
        ids = [tokenizer.begin_id, *ids]
        labels = [*labels, tokenizer.end_id]
        line += [(token, label, number) for token, label in zip(ids, labels, strict=True)]
        while len(line) >= seq_len:
            batch.append(line[:seq_len])
            line = line[seq_len:]
            if len(batch) == batch_size:
                yield _columns(batch)
                batch = []
    if line:
        batch.append(line + [(tokenizer.pad_id, IGNORED, -1)] * (seq_len - len(line)))
    if batch:
        yield _columns(batch)


def _columns(batch: list[list[tuple[int, int, int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Turns sequences of (id, label, document) into three tensors [B, T]."""
    ids, labels, document_ids = torch.tensor(batch).unbind(-1)
    return ids.contiguous(), labels.contiguous(), document_ids.contiguous()


@torch.inference_mode()
def nats_of(
    model: LanguageModel,
    ids: Int[Tensor, "B T"],
    labels: Int[Tensor, "B T"],
    document_ids: Int[Tensor, "B T"],
) -> float:
    """Returns the summed nats of the labels, without balance or MTP losses."""
    device = next(model.parameters()).device
    hidden: Float[Tensor, "B T D"] = model.hidden(
        ids.to(device), document_ids=document_ids.to(device)
    )[0]
    normed = model.norm(hidden).flatten(0, 1)
    return float(chunked_cross_entropy(normed, model.head.weight, labels.to(device).flatten()))


def tasks(
    model: LanguageModel, tokenizer: Tokenizer, names: list[str], *, limit: int | None = None
) -> dict[str, Any]:
    """Runs tasks of EleutherAI's evaluation harness: {task: {metric: value}}.

    A name may be a YAML file. ValueError where the harness is not installed or does not have a
    task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        missing = error.name or "lm_eval"
        hint = "pip install datasets evaluate sacrebleu tenacity; pip install --no-deps lm-eval"
        raise ValueError(f"tasks need the evaluation harness, got no {missing}: {hint}") from error

    # Reading the thousands of tasks of the harness takes many seconds.
    local = all(Path(name).is_file() for name in names)
    manager = TaskManager(include_defaults=not local)
    unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown:
        raise ValueError(
            f"tasks: got {', '.join(unknown)}, expected names that `lm-eval ls tasks` lists"
        )
    harness = HFLM(pretrained=RorqualForCausalLM.of(model), tokenizer=fast_tokenizer(tokenizer))
    results = lm_eval.simple_evaluate(model=harness, tasks=names, limit=limit, task_manager=manager)
    assert results is not None
    return results["results"]
