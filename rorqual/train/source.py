"""The data of training and validation: a text, or questions about needles."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from rorqual import checkpoint, parallel, runtime
from rorqual import config as configs
from rorqual.data import chats
from rorqual.data.corpus import open_corpus
from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import QUESTION, NeedleStream, exams
from rorqual.data.stream import IGNORED, Stream, TokenFolder, tokenise, validation_batches
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.model_config import ModelConfig
from rorqual.train import run_folder
from rorqual.train.config import BYTE_VOCAB_SIZE, DataConfig, TrainConfig
from rorqual.train.scores import needle_accuracy, sample_continuation, validate

GOOD_EPOCHS = 4  # epochs up to which repeated text is nearly as good as new text
SAMPLE_SHARE = 0.01  # of a run's tokens, read by a validation within it: 3 % of the time in all
PROMPT_TOKENS = 8  # length of the prompt from a held-out document
SAMPLE_TOKENS = 32  # the maximum length of the continuation


class TextSource(NamedTuple):
    """A tokenized text."""

    tokenizer: Tokenizer
    tokens: TokenFolder

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @property
    def end_id(self) -> int:
        return self.tokenizer.end_id

    def canonical_map(self) -> np.ndarray:
        """Returns the canonical id of every token id, by which Engram addresses its rows."""
        return self.tokenizer.canonical_map()

    def stream(self, config: TrainConfig) -> Stream:
        """Returns this rank's endless training batches."""
        rank = parallel.rank()
        world = parallel.world()
        rows = config.batch_size // world
        return Stream(self.tokens.train, rows, config.seq_len, config.seed, rank, world)

    def score(self, model: nn.Module, config: TrainConfig, *, whole: bool) -> dict[str, float]:
        """Returns the loss over all held-out documents, or over a sample that never changes."""
        held_out = self.tokens.validation
        # Answers of chats may all be empty.
        bytes_per_token = max(held_out.bytes, 1) / held_out.labels
        batches = self._validation_batches(config, whole)
        return validate(model, batches, bytes_per_token, runtime.dtype(config.dtype))

    def _validation_batches(self, config: TrainConfig, whole: bool) -> Iterator[dict[str, Tensor]]:
        rank = parallel.rank()
        world = parallel.world()
        rows = config.batch_size // world
        batches = validation_batches(self.tokens.validation, rows, config.seq_len, rank, world)
        tokens_per_batch = config.batch_size * config.seq_len
        if config.validation_tokens is not None:
            count = -(-config.validation_tokens // tokens_per_batch)
        elif whole:
            return batches
        else:
            count = max(1, int(SAMPLE_SHARE * config.steps))
        # Of chats the first batches, of all ranks together, may have no label.
        joint = validation_batches(self.tokens.validation, config.batch_size, config.seq_len)
        labelled = next(n for n, one in enumerate(joint, 1) if (one["labels"] != IGNORED).any())
        return islice(batches, max(count, labelled))

    def sample(self, model: nn.Module, config: TrainConfig, tokens: int) -> dict[str, str]:
        """Continues the beginning of a held-out document; returns "prompt" and "sample"."""
        first = next(validation_batches(self.tokens.validation, 1, PROMPT_TOKENS + 1))
        prompt = first["ids"][0][first["document_ids"][0] == first["document_ids"][0, 0]]
        count = min(SAMPLE_TOKENS, tokens)
        dtype = runtime.dtype(config.dtype)
        sample = sample_continuation(model, prompt, count, self.vocab_size, dtype)
        text = [token for token in prompt.tolist() if token != self.tokenizer.begin_id]
        return {"prompt": self.tokenizer.decode(text), "sample": self.tokenizer.decode(sample)}

    def __str__(self) -> str:
        train = self.tokens.train
        held_out = self.tokens.validation
        about = self.tokens.about
        return (
            f"{about['name']} ({about['license']}): {len(train):,} tokens of {train.documents:,} "
            f"documents to train on, {len(held_out):,} of {held_out.documents:,} to validate; "
            f"vocabulary {self.vocab_size:,}"
        )


class NeedleSource(NamedTuple):
    """Questions about needles. Their language has no tokenizer."""

    needles: NeedleConfig
    tokenizer: None = None

    @property
    def vocab_size(self) -> int:
        return self.needles.vocab_size

    @property
    def pad_id(self) -> int:
        return QUESTION

    @property
    def end_id(self) -> int:
        return QUESTION

    def canonical_map(self) -> np.ndarray:
        """Returns the identity: no two ids of this language have the same meaning."""
        return np.arange(self.vocab_size)

    def stream(self, config: TrainConfig) -> NeedleStream:
        """Returns this rank's endless training batches."""
        rank = parallel.rank()
        world = parallel.world()
        rows = config.batch_size // world
        return NeedleStream(self.needles, rows, config.seq_len, config.seed, rank, world)

    def score(self, model: nn.Module, config: TrainConfig, *, whole: bool) -> dict[str, float]:
        """Returns the shares of right answers to the held-out questions; always to all of them."""
        del whole
        rank = parallel.rank()
        world = parallel.world()
        questions = exams(self.needles, config.batch_size, config.seq_len, rank, world)
        return needle_accuracy(model, questions, runtime.dtype(config.dtype))

    def sample(self, model: nn.Module, config: TrainConfig, tokens: int) -> dict[str, str]:
        """Returns nothing: there is no text to continue."""
        del model, config, tokens
        return {}

    def __str__(self) -> str:
        return (
            f"questions about {self.needles.needles} pairs hidden in a text; "
            f"vocabulary {self.vocab_size:,}"
        )


Source = TextSource | NeedleSource


def open_source(config: TrainConfig) -> Source:
    """Opens the data of a run, and logs it and the run's length.

    ValueError where the model's vocabulary is too small for it, or the batch size is no multiple of
    the number of ranks.
    """
    limit = config.model.vocab_size
    source: Source
    if config.needles is not None:
        source = NeedleSource(config.needles)
    else:
        data = config.data
        if config.init_from is not None and data.tokenizer is None:
            # A run that is resumed does not need the other one any more.
            resumed = run_folder.resumes(Path(config.folder))
            run = Path(config.folder) if resumed else checkpoint.run_of(config.init_from)
            data = configs.replace(data, "tokenizer", str(run))
        data = _data_for(data, limit)
        # Rank 0 runs first: the others find its files in the cache.
        source = parallel.first(lambda: prepare(data))
    if source.vocab_size > limit:
        whose = "needles'" if config.needles is not None else "tokenizer's"
        raise ValueError(
            f"model.vocab_size: got {limit}, expected at least the {whose} {source.vocab_size}; "
            f"try --model.vocab-size {source.vocab_size}"
        )
    if config.batch_size % parallel.world():
        raise ValueError(
            f"batch_size: got {config.batch_size}, "
            f"expected a multiple of the {parallel.world()} ranks"
        )
    runtime.log(str(source))
    if isinstance(source, TextSource) and (skipped := source.tokens.about["skipped"]):
        counts = sorted(skipped.items(), key=lambda item: -item[1])
        runtime.log("left out: " + ", ".join(f"{count:,} x {reason}" for reason, count in counts))
    _log_length(config, source)
    return source


def _data_for(data: DataConfig, limit: int) -> DataConfig:
    """Sets the vocabulary of a tokenizer that is to be trained to the model's."""
    if data.tokenizer is not None or data.vocab_size is not None:
        return data
    if limit < BYTE_VOCAB_SIZE:
        raise ValueError(
            f"model.vocab_size: got {limit}, expected at least {BYTE_VOCAB_SIZE} to write text "
            "in: the bytes and the end; try --model.vocab-size 4096"
        )
    return configs.replace(data, "vocab_size", limit)


def _log_length(config: TrainConfig, source: Source) -> None:
    """Logs how long the run is, and warns if it repeats the text more often than is useful."""
    tokens_per_step = config.batch_size * config.seq_len
    tokens = config.steps * tokens_per_step
    batch = f"{config.batch_size} x {config.seq_len} tokens"
    length = f"{config.steps:,} steps of {batch}: {tokens:,} tokens"
    if isinstance(source, NeedleSource):
        runtime.log(length)
        return
    text_tokens = len(source.tokens.train)
    epochs = tokens / text_tokens
    shown = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
    runtime.log(f"{length}, {shown} epochs of the text")
    if epochs > GOOD_EPOCHS:
        good_steps = GOOD_EPOCHS * text_tokens // tokens_per_step
        hint = f", or try --steps {good_steps:,}" if good_steps else ""
        runtime.log(
            f"the text is read more than {GOOD_EPOCHS} times, after which repeating it brings "
            f"little (arXiv 2305.16264): train on more text{hint}",
            style="bold",
        )


def prepare(data: DataConfig, *, progress: Callable[[int], None] | None = None) -> TextSource:
    """Trains or loads the tokenizer and tokenizes the text; cached files are reused.

    `progress` is called with the number of bytes that are tokenized so far.
    """
    cache = Path(data.cache)
    corpus = open_corpus(data.source, column=data.column, limit=data.limit)
    text_of = chats.plain if corpus.chats else str
    if data.tokenizer is not None:
        tokenizer = Tokenizer.load(data.tokenizer)
    else:
        vocab_size = data.vocab_size or ModelConfig().vocab_size
        described = f"{corpus.fingerprint} {vocab_size}"
        key = hashlib.blake2b(described.encode(), digest_size=10).hexdigest()
        folder = cache / "tokenizers" / key
        # `save` writes this file last.
        if not (folder / "tokenizer_config.json").is_file():
            texts = (text_of(text) for side, text in corpus.sided() if side == "train")
            first = next(texts, None)
            if first is None:
                raise ValueError(
                    f"{corpus.name}: got one document, "
                    "expected at least two, one of them to validate on"
                )
            train_tokenizer(chain([first], texts), vocab_size).save(folder)
        tokenizer = Tokenizer.load(folder)
    if corpus.chats:
        tokenizer.settings["chat_template"] = chats.TEMPLATE
    return TextSource(tokenizer, tokenise(corpus, tokenizer, cache / "tokens", progress=progress))
