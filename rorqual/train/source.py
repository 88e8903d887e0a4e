"""The data of training and validation: a text, several in a mixture, or questions about needles."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor, nn

from rorqual import checkpoint, distributed, runtime
from rorqual import config as configs
from rorqual.data import chats
from rorqual.data.corpus import Corpus, open_corpus
from rorqual.data.files import token_paths
from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import QUESTION, NeedleStream, exams
from rorqual.data.stream import IGNORED, Mixture, Stream, Text, validation_batches
from rorqual.data.streamed import StreamedText
from rorqual.data.token_files import open_token_files
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.data.tokens import TokenFolder, Tokens, joined, tokenise
from rorqual.model_config import ModelConfig
from rorqual.train import run_folder
from rorqual.train.config import BYTE_VOCAB_SIZE, DataConfig, TrainConfig
from rorqual.train.scores import needle_accuracy, sample_continuation, validate

GOOD_EPOCHS = 4  # epochs up to which repeated text is nearly as good as new text
SAMPLE_SHARE = 0.01  # of a run's tokens, read by a validation within it: 3 % of the time in all
PROMPT_TOKENS = 8  # length of the prompt from a held-out document
LOGGED_EVERY = 30.0  # seconds between two lines about tokenising
SAMPLE_TOKENS = 32  # the maximum length of the continuation


class TextShare(NamedTuple):
    """One text of a run, and how much of the run it is."""

    name: str
    share: Fraction
    tokens: int | None  # to train on; None for a text that is streamed


@dataclass(frozen=True, slots=True)
class TextSource:
    """A tokenized text, or several.

    tokens    all of them together, but what is streamed: of that, only what validates
    text      what is trained on, sequence by sequence
    """

    tokenizer: Tokenizer
    tokens: TokenFolder
    text: Text
    shares: tuple[TextShare, ...]

    @property
    def vocab_size(self) -> int:
        """The number of ids of the tokenizer; the model may have more."""
        return self.tokenizer.vocab_size

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return self.tokenizer.pad_id

    @property
    def end_id(self) -> int:
        """The id that ends a document."""
        return self.tokenizer.end_id

    def canonical_map(self) -> np.ndarray:
        """Returns the canonical id of every token id, by which Engram addresses its rows."""
        return self.tokenizer.canonical_map()

    def stream(self, config: TrainConfig) -> Stream:
        """Returns this rank's endless training batches."""
        rank, world = _data_rank(config)
        batch_size = config.batch_size // world
        return Stream(self.text, batch_size, config.seq_len, config.seed, rank, world)

    def score(self, model: nn.Module, config: TrainConfig, *, whole: bool) -> dict[str, float]:
        """Returns the loss over all held-out documents, or over a sample that never changes."""
        held_out = self.tokens.validation
        # Answers of chats may all be empty.
        bytes_per_token = max(held_out.bytes, 1) / held_out.labels
        batches = self._validation_batches(config, whole)
        return validate(model, batches, bytes_per_token, runtime.dtype(config.dtype))

    def _validation_batches(self, config: TrainConfig, whole: bool) -> Iterator[dict[str, Tensor]]:
        """Returns this rank's batches of held-out documents, all of them or the first few.

        A sample has `validation_tokens` tokens, or SAMPLE_SHARE of the run's, and at least one
        label.
        """
        rank, world = _data_rank(config)
        batch_size = config.batch_size // world
        batches = validation_batches(
            self.tokens.validation, batch_size, config.seq_len, rank, world
        )
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
        trained = f"{len(train):,} tokens of {train.documents:,} documents"
        if any(share.tokens is None for share in self.shares):
            trained = f"{trained} and a stream" if len(train) else "a stream"
        return (
            f"{about['name']} ({about['license']}): {trained} "
            f"to train on, {len(held_out):,} of {held_out.documents:,} to validate; "
            f"vocabulary {self.vocab_size:,}"
        )


class NeedleSource(NamedTuple):
    """Questions about needles. Their language has no tokenizer."""

    needles: NeedleConfig
    tokenizer: None = None

    @property
    def vocab_size(self) -> int:
        """The number of ids of the language."""
        return self.needles.vocab_size

    @property
    def pad_id(self) -> int:
        """The question mark; these sequences need no padding."""
        return QUESTION

    @property
    def end_id(self) -> int:
        """The question mark, which ends a text."""
        return QUESTION

    def canonical_map(self) -> np.ndarray:
        """Returns the identity: no two ids of this language have the same meaning."""
        return np.arange(self.vocab_size)

    def stream(self, config: TrainConfig) -> NeedleStream:
        """Returns this rank's endless training batches."""
        rank, world = _data_rank(config)
        batch_size = config.batch_size // world
        return NeedleStream(self.needles, batch_size, config.seq_len, config.seed, rank, world)

    def score(self, model: nn.Module, config: TrainConfig, *, whole: bool) -> dict[str, float]:
        """Returns the shares of right answers to the held-out questions; always to all of them."""
        del whole
        rank, world = _data_rank(config)
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


def _data_rank(config: TrainConfig) -> tuple[int, int]:
    """Returns which of how many parts of every batch this rank reads."""
    return config.distributed.data_rank(distributed.rank(), distributed.world())


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
        with _progress_bar(data) as progress:
            source = distributed.first(lambda: prepare(data, progress=progress))
    if source.vocab_size > limit:
        whose = "needles'" if config.needles is not None else "tokenizer's"
        raise ValueError(
            f"model.vocab_size: got {limit}, expected at least the {whose} {source.vocab_size}; "
            f"try --model.vocab-size {source.vocab_size}"
        )
    _, parts = _data_rank(config)
    if config.batch_size % parts:
        whose = f"{parts} ranks" if config.distributed.context == 1 else f"{parts} groups of ranks"
        raise ValueError(f"batch_size: got {config.batch_size}, expected a multiple of the {whose}")
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
    epochs = [
        (one.name, float(tokens * one.share / one.tokens), one)
        for one in source.shares
        if one.tokens
    ]
    counted = ", ".join(
        f"{_rounded(number)} epochs of {name if len(source.shares) > 1 else 'the text'}"
        for name, number, _ in epochs
    )
    runtime.log(f"{length}, {counted}" if counted else length)
    repeated = [one for _, number, one in epochs if number > GOOD_EPOCHS]
    if repeated:
        good_steps = min(
            int(GOOD_EPOCHS * (one.tokens or 0) / one.share) // tokens_per_step for one in repeated
        )
        hint = f", or try --steps {good_steps:,}" if good_steps else ""
        names = ", ".join(one.name for one in repeated) if len(source.shares) > 1 else "the text"
        runtime.log(
            f"{names} is read more than {GOOD_EPOCHS} times, after which repeating it brings "
            f"little (arXiv 2305.16264): train on more text{hint}",
            style="bold",
        )


def _rounded(number: float) -> str:
    """Formats a number of epochs with two digits, or as a whole number from 10 on."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


@contextmanager
def _progress_bar(data: DataConfig) -> Iterator[Callable[[int], None] | None]:
    """Yields a callback that shows on rank 0 how many bytes are tokenised.

    On a terminal it is a bar, elsewhere a line of the log every half a minute; nothing where the
    files are there already.
    """
    if distributed.rank() > 0:
        yield None
        return
    bar = Progress(
        TextColumn("tokenising"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    clock = runtime.Clock()
    sizes: list[int | None] = []
    logged = [0.0]

    def show(done: int) -> None:
        """Shows the bytes done; the size of the texts is asked for at the first call."""
        if not sizes:
            sizes.append(text_bytes(data))
            if bar.console.is_terminal:
                bar.start()
                bar.add_task("tokenising", total=sizes[0])
        if bar.console.is_terminal:
            bar.update(bar.task_ids[0], completed=done)
        elif clock.seconds - logged[0] > LOGGED_EVERY:
            logged[0] = clock.seconds
            whole = f" of {sizes[0] / 1e6:,.0f}" if sizes[0] else ""
            runtime.log(f"tokenised {done / 1e6:,.0f}{whole} MB in {clock.seconds:,.0f} s")

    try:
        yield show
    finally:
        # One that never began would print an empty line.
        if bar.tasks:
            bar.stop()


def text_bytes(data: DataConfig) -> int | None:
    """Returns the bytes of all texts that have to be tokenised, or None where one is unknown."""
    sizes = [corpus.bytes for corpus in _corpora(data).values()]
    return None if None in sizes else sum(size or 0 for size in sizes)


def check_sources(config: TrainConfig) -> None:
    """Raises ValueError for a source that does not exist, or that needs a tokenizer by name."""
    data = config.data
    for name in data.shares:
        is_ids = bool(token_paths(Path(name)))
        has_tokenizer = data.tokenizer is not None or config.init_from is not None
        if (is_ids or data.is_streamed(name)) and not has_tokenizer:
            what = "token ids" if is_ids else "a stream"
            raise ValueError(
                f"data.tokenizer: got none for {what}, {name!r}, expected the one by name: "
                "--data.tokenizer openai-community/gpt2"
            )
    _corpora(data)


def _corpora(data: DataConfig) -> dict[str, Corpus]:
    """Opens the sources that are texts to be tokenised before the training."""
    return {
        name: open_corpus(name, column=data.column, limit=data.limit)
        for name in data.shares
        if not data.is_streamed(name) and not token_paths(Path(name))
    }


def prepare(data: DataConfig, *, progress: Callable[[int], None] | None = None) -> TextSource:
    """Trains or loads the tokenizer and tokenizes the text; cached files are reused.

    `progress` is called with the number of bytes that are tokenized so far.
    """
    cache = Path(data.cache)
    corpora = _corpora(data)
    tokenizer = _tokenizer_of(data, corpora.values())
    folders: list[TokenFolder] = []
    texts: list[Tokens | StreamedText] = []
    done = 0
    for name in data.shares:
        if data.is_streamed(name):
            text = StreamedText(name.removeprefix("hf:"), tokenizer, column=data.column)
            folders.append(_without_training(text, cache))
            texts.append(text)
            continue
        if name in corpora:
            corpus = corpora[name]
            show = progress and _after(progress, done)
            folder = tokenise(
                corpus, tokenizer, cache / "tokens", progress=show, processes=data.processes
            )
            done += corpus.bytes or 0
        else:
            folder = open_token_files(
                name,
                tokenizer,
                cache / "token-files",
                name=str(data.tokenizer),
                dtype=data.token_dtype,
                limit=data.limit,
            )
        folders.append(folder)
        texts.append(folder.train)
    shares = tuple(
        TextShare(name, share, len(text) if isinstance(text, Tokens) else None)
        for (name, share), text in zip(data.shares.items(), texts, strict=True)
    )
    mixed = Mixture(tuple(texts), tuple(data.shares.values())) if len(texts) > 1 else texts[0]
    return TextSource(tokenizer, joined(folders), mixed, shares)


def _after(progress: Callable[[int], None], before: int) -> Callable[[int], None]:
    """Returns a callback that counts on from the bytes of the texts before."""
    return lambda done: progress(before + done)


def _without_training(text: StreamedText, cache: Path) -> TokenFolder:
    """Describes a stream as a folder that has only what validates."""
    tokenizer = text.tokenizer
    nothing = np.zeros(0, dtype=np.int64)
    train = Tokens(nothing, np.zeros(1, dtype=np.int64), nothing, tokenizer.end_id, "")
    about = {
        "name": f"{text.name}, streamed",
        "license": text.license,
        "bytes": None,
        "skipped": dict(text.skipped),
    }
    return TokenFolder(cache, train, text.validation, tokenizer.vocab_size, tokenizer.end_id, about)


def _tokenizer_of(data: DataConfig, corpora: Iterable[Corpus]) -> Tokenizer:
    """Loads the tokenizer that is named, or trains one on all corpora; it is cached."""
    several = tuple(corpora)
    if data.tokenizer is not None:
        tokenizer = Tokenizer.load(data.tokenizer)
    elif len(several) < len(data.shares):
        raise ValueError(
            "data.tokenizer: got none, expected the name of the one that wrote the ids, or that a "
            "stream is encoded by"
        )
    else:
        vocab_size = data.vocab_size or ModelConfig().vocab_size
        described = " ".join([*(corpus.fingerprint for corpus in several), str(vocab_size)])
        key = hashlib.blake2b(described.encode(), digest_size=10).hexdigest()
        folder = Path(data.cache) / "tokenizers" / key
        # `save` writes this file last.
        if not (folder / "tokenizer_config.json").is_file():
            texts = (text for corpus in several for text in _training_texts(corpus))
            train_tokenizer(texts, vocab_size).save(folder)
        tokenizer = Tokenizer.load(folder)
    if any(corpus.chats for corpus in several):
        tokenizer.settings["chat_template"] = chats.TEMPLATE
    return tokenizer


def _training_texts(corpus: Corpus) -> Iterator[str]:
    """Yields the texts of a corpus that a tokenizer is trained on."""
    text_of = chats.plain if corpus.chats else str
    texts = (text_of(text) for side, text in corpus.sided() if side == "train")
    first = next(texts, None)
    if first is None:
        raise ValueError(
            f"{corpus.name}: got one document, expected at least two, one of them to validate on"
        )
    return chain([first], texts)
