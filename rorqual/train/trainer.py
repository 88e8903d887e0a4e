"""A config in -> a run folder with a trained model out. The same config again goes on where it was stopped.

    FOLDER/train.json, metrics.jsonl, tensorboard/           from the first step on
    FOLDER/config.json, tokenizer.json                       what the model is and how it reads, from the first step on
    FOLDER/checkpoints/stepN/                                to resume from
    FOLDER/checkpoints/best/                                 the weights that validated best, to read
    FOLDER/model.safetensors                                 the model, when it is finished
    FOLDER/learning/, tables/                                rows that learn on the disk, and learnt, with `tables`

Resumed or not, the numbers are the same to the last bit (docs/train.md says on what that rests).
"""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from rorqual import checkpoint, parallel, runtime
from rorqual import config as configs
from rorqual.data.corpus import open_corpus
from rorqual.data.needles import QUESTION, NeedleConfig, NeedleStream, exams
from rorqual.data.stream import Stream, TokenFolder, tokenise, validation_batches
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.io import lock, remove_partial
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, row_totals
from rorqual.tables import Table, write_rows
from rorqual.tables.thread import BackgroundThread
from rorqual.train.optim import Diverged, OptimConfig, Optimizer

FIXED = (  # others may change on resuming
    *("model", "optim", "data", "needles", "rows", "length", "micro_rows", "seed", "dtype", "tables"),
    *("bias_rest", "mtp_late", "indexer_alone"),
)
SMALLEST = 257  # ids of a vocabulary that can write any text
EPOCHS = 4  # passes over a text up to which it is nearly as good as new text
VALIDATIONS = 10  # of a run, where nothing else is asked for
LEAST_BETWEEN = 10  # steps between two of them
SAMPLED = 0.01  # share of a run's tokens that each validation but the last reads at most: 3 % of the time in all


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text, in which tokens."""

    source: str = "wordnet"  # a corpus name, a file, a folder, or a Hugging Face dataset
    column: str = "text"  # of a jsonl, parquet or dataset source
    limit: int | None = None  # documents at most
    vocabulary: int | None = None  # of the tokenizer that is trained on the text; None: the model's
    tokenizer: str | None = None  # a folder, a tokenizer.json or a hub id to take instead
    cache: str = "runs/cache"  # tokenizers and token files, kept for the next time

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"limit: got {self.limit}, expected at least 2 documents, one of them to validate on")
        if self.vocabulary is not None and self.vocabulary < SMALLEST:
            least = f"expected at least {SMALLEST}: the bytes and the end"
            raise ValueError(f"vocabulary: got {self.vocabulary}, {least}; try --data.vocabulary 4096")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What is trained on what, for how long. A batch is `rows` sequences of `length` tokens over all ranks."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    needles: NeedleConfig | None = None  # questions made up as they are needed, in place of a text: data is not read
    folder: str = "runs/train"
    steps: int = 1000
    rows: int = 16
    length: int = 256
    micro_rows: int | None = None  # rows a forward pass; None: all of this rank's
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; parameters are float32
    tables: Literal["device", "host", "disk"] = "device"  # where Engram's rows learn; disk: in FOLDER/learning
    threads: int | None = None  # None: as many as torch takes
    bias_rest: float = 0.05  # share of the steps at the end in which router biases stay as they are
    mtp_late: float | None = None  # MTP's weight in the last third of the steps; None: as before
    indexer_alone: bool = False  # while DSA's indexers warm up nothing else learns: for a model that has learnt before
    log_every: int = 1  # steps between two looks at the metrics; the steps between are written too
    validate_every: int | None = None  # steps; None: ten times a run; 0: at the end only
    validation_tokens: int | None = None  # at most; None: all at the end, 1 % of the run's tokens before
    save_every: int = 250  # steps between two checkpoints
    keep: int = 2  # checkpoints
    skip_limit: int = 10  # steps in a row whose loss or gradient is not finite, so that nothing is learnt: the end

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "length", "log_every", "save_every", "keep", "skip_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("micro_rows", "threads", "validation_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if self.validate_every is not None and self.validate_every < 0:
            raise ValueError(f"validate_every: got {self.validate_every}, expected at least 0")
        if self.indexer_alone and self.model.dsa is None:
            raise ValueError("indexer_alone: got a model without DSA, expected --model.dsa, whose indexers it is about")
        if not 0 <= self.bias_rest <= 1:
            raise ValueError(f"bias_rest: got {self.bias_rest}, expected 0..1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, expected 0 <= seed < 2**32")


class Stopped(KeyboardInterrupt):
    """Training was asked to stop (ctrl-C, SIGTERM); it saved first. The message says how to go on."""


class Prepared(NamedTuple):
    """A text, ready to train on."""

    tokenizer: Tokenizer
    tokens: TokenFolder

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocabulary

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @property
    def end_id(self) -> int:
        return self.tokenizer.end_id

    def canonical_map(self) -> np.ndarray:
        return self.tokenizer.canonical_map()

    def __str__(self) -> str:
        train, held = self.tokens.train, self.tokens.validation
        about = f"{self.tokens.about['name']} ({self.tokens.about['license']})"
        return (
            f"{about}: {len(train):,} tokens of {train.documents:,} documents to train on, {len(held):,} of "
            f"{held.documents:,} to validate; vocabulary {self.vocabulary:,}"
        )


class Asked(NamedTuple):
    """Questions in place of a text; their language has no tokenizer."""

    needles: NeedleConfig
    tokenizer: None = None

    @property
    def vocabulary(self) -> int:
        return self.needles.vocabulary

    @property
    def pad_id(self) -> int:
        return QUESTION

    @property
    def end_id(self) -> int:
        return QUESTION

    def canonical_map(self) -> np.ndarray:
        return np.arange(self.vocabulary)

    def __str__(self) -> str:
        return f"questions about {self.needles.needles} pairs hidden in a text; vocabulary {self.vocabulary:,}"


def prepare(data: DataConfig, *, progress: Callable[[int], None] | None = None) -> Prepared:
    """Text -> tokenizer and token files, from the cache where they are there. `progress`: bytes tokenised so far."""
    cache, corpus = Path(data.cache), open_corpus(data.source, column=data.column, limit=data.limit)
    if data.tokenizer is not None:
        tokenizer = Tokenizer.load(data.tokenizer)
    else:
        vocabulary = data.vocabulary or ModelConfig().vocabulary
        key = hashlib.blake2b(f"{corpus.fingerprint} {vocabulary}".encode(), digest_size=10).hexdigest()
        folder = cache / "tokenizers" / key
        if not (folder / "tokenizer_config.json").is_file():  # which `save` writes last
            texts = (text for side, text in corpus.sided() if side == "train")
            if (first := next(texts, None)) is None:
                raise ValueError(f"{corpus.name}: got one document, expected at least two, one of them to validate on")
            train_tokenizer(chain([first], texts), vocabulary).save(folder)
        tokenizer = Tokenizer.load(folder)
    return Prepared(tokenizer, tokenise(corpus, tokenizer, cache / "tokens", progress=progress))


def train(config: TrainConfig, *, on_metrics: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Train, or go on training, and return the folder with the finished model; at once if it is there already.

    `on_metrics` is given every line of metrics.jsonl as it is written. Raises Stopped after ctrl-C or SIGTERM, when
    everything is saved; Diverged when losses or gradients stay NaN or infinite; ValueError for a folder that holds
    another run; Damaged when no checkpoint in it is good.
    """
    if config.threads is not None:
        runtime.threads(config.threads)
    folder, device = Path(config.folder), runtime.device(config.device)
    if finished(config):
        runtime.log(f"{folder} holds this model, finished; remove it or choose another --folder to train again")
        return folder
    if _holds_more(config):
        return folder
    refuse(config)
    joined = parallel.join(device)
    try:
        with _full_disk_said(folder), _alone(folder), ExitStack() as after:
            _claim(folder, config)
            _train(config, folder, device, on_metrics, after)
            if parallel.rank() == 0:
                (folder / checkpoint.UNDER_WAY).unlink()
            return folder
    finally:
        if joined:
            parallel.leave()


def finished(config: TrainConfig) -> bool:
    """Whether the folder holds the model of this very run, trained for as many steps."""
    folder = Path(config.folder)
    before = _before(folder)
    same = before is not None and not _differences(before, config) and before.steps == config.steps
    return same and checkpoint.is_finished(folder)


def _holds_more(config: TrainConfig) -> bool:
    """Whether the folder holds this run, finished, with more steps than are asked for: nothing is to be done.

    ValueError where it is not finished and has come further than that: there is no model yet that could be given.
    """
    folder = Path(config.folder)
    before = _before(folder)
    if before is None or _differences(before, config):
        return False
    if before.steps > config.steps and finished(configs.replace(before, "folder", config.folder)):
        held = f"{folder} holds this run with {before.steps} steps, {config.steps} were asked for"
        runtime.log(f"{held}: nothing to do; choose another --folder for a shorter run")
        return True
    made = max((step for step, _ in checkpoint.steps(folder / "checkpoints")), default=0)
    if made > config.steps:
        raise ValueError(
            f"{folder}: got --steps {config.steps}, expected at least the {made} that are made already (of "
            f"{before.steps}): go on with more, or choose another --folder"
        )
    return False


def _train(config: TrainConfig, folder: Path, device: torch.device, tell: Callable | None, after: ExitStack) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # which the engine would set to 8
    os.environ.setdefault("OLMO_SHARED_FS", "1")
    import olmo_core

    logging.getLogger(olmo_core.__name__).setLevel(logging.CRITICAL)  # what it raises is enough
    from rorqual.train import engine, record

    data = _prepared(config)
    runtime.seed_everything(config.seed)
    model, dtype = _model(config, data, device, after), runtime.dtype(config.dtype)
    late = round(config.steps * (1 - config.bias_rest))
    module = engine.Module(
        model,
        Optimizer(model, config.optim),
        steps=config.steps,
        micro_rows=config.micro_rows,
        dtype=dtype,
        late=late,
        mtp_late=config.mtp_late,
        indexer_alone=config.indexer_alone,
        skip_limit=config.skip_limit,
    )
    if parallel.rank() == 0:
        checkpoint.describe_model(folder, model.config, data.tokenizer)
    validator = record.Validator(
        score=lambda whole: _score(config, data, model, dtype, whole),
        recorder=record.Recorder(
            folder, config.rows * config.length, config.steps, tell, lambda: _trial(config, data, model, dtype)
        ),
        every=_validate_every(config),
        continued=lambda: _continued(config, data, model, dtype),
        # with one validation the best weights are the last, which the model is written from
        best=record.Best(folder / "checkpoints" / checkpoint.BEST, model) if _validate_every(config) else None,
    )
    loader = engine.Loader(_stream(config, data), folder, data.vocabulary)
    keeper = engine.Keeper(config.save_every, config.keep)
    callbacks = {"recorder": validator.recorder, "validator": validator, "checkpointer": keeper}
    step = engine.fit(module, loader, folder / "checkpoints", config.log_every, callbacks)
    if step < config.steps:
        raise _stopped(f"stopped at step {step} of {config.steps}, saved in {folder}; the same command goes on")
    if not all(map(math.isfinite, validator.write().values())):
        raise Diverged(
            f"got a validation loss that is not finite after step {step}, so {folder} gets no model: "
            "lower --optim.lr or raise --optim.warmup in another --folder"
        )
    _write_tables(folder, model)
    checkpoint.save_model(folder, model, data.tokenizer)


def _trial(config: TrainConfig, data: Prepared | Asked, model: LanguageModel, dtype: torch.dtype) -> float:
    """Estimates the seconds of one step."""
    from rorqual.train import record

    rows = config.rows // parallel.world()
    return record.trial(model, data.vocabulary, rows, min(config.micro_rows or rows, rows), config.length, dtype)


def _stopped(message: str) -> Stopped:
    runtime.log(message)
    return Stopped(message)


def _validate_every(config: TrainConfig) -> int:
    """Steps between two validations, 0 for none but the last."""
    if config.validate_every is not None:
        return config.validate_every
    # questions are asked in full each time, which is no small part of a short run
    return 0 if config.needles is not None else max(LEAST_BETWEEN, -(-config.steps // VALIDATIONS))


def _continued(config: TrainConfig, data: Prepared | Asked, model: LanguageModel, dtype: torch.dtype) -> dict[str, str]:
    """How the model goes on from the beginning of a document that it is never trained on."""
    from rorqual.train import record

    if isinstance(data, Asked):
        return {}
    first = next(validation_batches(data.tokens.validation, 1, record.PROMPT + 1))
    ids = first["ids"][0][first["documents"][0] == first["documents"][0, 0]]
    # a token takes a small part of a step's time, so that a run of few steps shows few
    count = min(record.CONTINUED, max(4, (_validate_every(config) or config.steps) // 4))
    prompt, sample = record.continued(model, ids, count, data.vocabulary, dtype)
    decode = data.tokenizer.decode
    return {"prompt": decode(token for token in prompt if token != data.tokenizer.begin_id), "sample": decode(sample)}


def _score(
    config: TrainConfig, data: Prepared | Asked, model: LanguageModel, dtype: torch.dtype, whole: bool
) -> dict[str, float]:
    """What validation finds: over all that is asked for, or over the sample that is read while training goes on."""
    from rorqual.train import record

    if isinstance(data, Asked):
        rank, world = parallel.rank(), parallel.world()
        return record.answer(model, exams(data.needles, config.rows, config.length, rank, world), dtype)
    held = data.tokens.validation
    return record.validate(model, _held_out(config, data, whole), held.bytes / len(held), dtype)


def _stream(config: TrainConfig, data: Prepared | Asked) -> Stream | NeedleStream:
    rank, world = parallel.rank(), parallel.world()
    if isinstance(data, Asked):
        return NeedleStream(data.needles, config.rows // world, config.length, config.seed, rank, world)
    return Stream(data.tokens.train, config.rows // world, config.length, config.seed, rank, world)


def _held_out(config: TrainConfig, data: Prepared, whole: bool) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's share of the documents that are never trained on."""
    rank, world = parallel.rank(), parallel.world()
    batches = validation_batches(data.tokens.validation, config.rows // world, config.length, rank, world)
    most, size = config.validation_tokens, config.rows * config.length
    if most is None and not whole:
        most = max(1, int(SAMPLED * config.steps)) * size
    return islice(batches, None if most is None else -(-most // size))


def _prepared(config: TrainConfig) -> Prepared | Asked:
    """What is trained on, with a vocabulary that the model has room for."""
    room = config.model.vocabulary
    found = Asked(config.needles) if config.needles is not None else _text(config.data, room)
    if found.vocabulary > room:
        whose = "the tokenizer's" if isinstance(found, Prepared) else "the needles'"
        wanted = f"expected at least {whose} {found.vocabulary}"
        raise ValueError(f"model.vocabulary: got {room}, {wanted}; try --model.vocabulary {found.vocabulary}")
    if config.rows % parallel.world():
        raise ValueError(f"rows: got {config.rows}, expected a multiple of the {parallel.world()} ranks")
    runtime.log(str(found))
    _say_what_is_ahead(config, found)
    return found


def _say_what_is_ahead(config: TrainConfig, data: Prepared | Asked) -> None:
    """Logs how long the run is, and warns where it reads the same text more often than brings anything."""
    tokens = config.steps * config.rows * config.length
    said = f"{config.steps:,} steps of {config.rows} x {config.length} tokens: {tokens:,} tokens"
    if isinstance(data, Asked):
        runtime.log(said)
        return
    epochs = tokens / len(data.tokens.train)
    runtime.log(
        f"{said}, {epochs:,.0f} epochs of the text" if epochs >= 10 else f"{said}, {epochs:.2g} epochs of the text"
    )
    if epochs > EPOCHS:
        fewer = EPOCHS * len(data.tokens.train) // (config.rows * config.length)
        try_fewer = f", or try --steps {fewer:,}" if fewer else ""
        runtime.log(
            f"the text is read more than {EPOCHS} times, after which repeating it brings little (arXiv 2305.16264): "
            f"train on more text{try_fewer}",
            style="bold",
        )


def _text(data: DataConfig, room: int) -> Prepared:
    """Rank 0 first, so that the others find it in the cache."""
    if data.tokenizer is None and data.vocabulary is None:
        if room < SMALLEST:
            least = f"expected at least {SMALLEST} to write text in: the bytes and the end"
            raise ValueError(f"model.vocabulary: got {room}, {least}; try --model.vocabulary 4096")
        data = configs.replace(data, "vocabulary", room)
    return parallel.first(lambda: prepare(data))


def _model(config: TrainConfig, data: Prepared | Asked, device: torch.device, after: ExitStack) -> LanguageModel:
    shape, canonical = config.model, None
    if shape.engram is not None and shape.engram.canonical:
        canonical = torch.from_numpy(data.canonical_map())
    if shape.engram is not None:  # train.json keeps what was asked for, config.json says what it came to
        ended = shape.engram.eos_id is not None
        shape = configs.replace(shape, "engram.pad_id", data.pad_id)
        if ended:
            shape = configs.replace(shape, "engram.eos_id", data.end_id)
    model = LanguageModel(shape, canonical, seed=config.seed, tables=_tables(config, shape, after)).to(device)
    if parallel.world() > 1:
        parallel.shard(model)
    return model


def _tables(config: TrainConfig, shape: ModelConfig, after: ExitStack) -> list[Table] | None:
    """Where the rows learn, if not on the device; as many marks as there may be checkpoints, and one on its way.

    Closed however the run ends, so that another of this process may train them."""
    if config.tables == "device" or shape.engram is None:
        return None
    if parallel.world() > 1:
        got = f"{config.tables} with {parallel.world()} ranks"
        raise ValueError(f"tables: got {got}, expected device: ranks would write one file, and exchange on the device")
    folder, width, thread = Path(config.folder) / "learning", shape.engram.head_dim, BackgroundThread()

    def table(n: int, rows: int) -> Table:
        if config.tables == "host":
            return Table(rows, width, "host", thread=thread)  # one thread for all
        # a thread for each, which need not wait for others' writes
        return Table.of_records(folder / str(n), rows, width, keep=config.keep + 1)

    return [after.enter_context(closing(table(n, rows))) for n, rows in enumerate(row_totals(shape.engram))]


def _write_tables(folder: Path, model: LanguageModel) -> None:
    """Rows that learnt on the disk -> FOLDER/tables, where a run's rows are looked for first."""
    learnt = [table for table in model.tables if isinstance(table, Table) and table.placement == "disk"]
    if learnt:
        shutil.rmtree(folder / "tables", ignore_errors=True)
    for n, table in enumerate(learnt):
        write_rows(folder / "tables" / str(n), table.rows, table.width, table.read_trained)
        table.close()


def _before(folder: Path) -> TrainConfig | None:
    path = folder / "train.json"
    return configs.load(TrainConfig, path) if path.is_file() else None


def begun(folder: str | os.PathLike[str]) -> TrainConfig | None:
    """The config of the run in this folder, if it has a checkpoint or a model to go on from."""
    folder = Path(folder)
    return _before(folder) if _kept(folder) else None


def _kept(folder: Path) -> bool:
    """Whether there is a checkpoint or a model to go on from."""
    return bool(checkpoint.steps(folder / "checkpoints")) or (folder / "model.safetensors").is_file()


def _differences(one: TrainConfig, other: TrainConfig) -> list[str]:
    """Dotted names of the fields that a resumed run may not change, and that differ."""

    def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for name, part in value.items():
                yield from flat(part, f"{path}.{name}".lstrip("."))
        else:
            yield path, value

    whole = [{name: configs.to_dict(getattr(config, name)) for name in FIXED} for config in (one, other)]
    left, right = (dict(flat(each, "")) for each in whole)
    return [n for n in sorted(left.keys() | right.keys()) if left.get(n) != right.get(n) and n != "data.cache"]


def refuse(config: TrainConfig) -> None:
    """ValueError for what can be told before anything is written or read: the folder, the tables, a text's name."""
    if config.tables != "device" and config.model.engram is None:
        put_in = "expected device, or a model with rows: --model.engram default"
        raise ValueError(f"tables: got {config.tables} for a model without Engram, {put_in}")
    if config.needles is None:
        open_corpus(config.data.source, column=config.data.column, limit=config.data.limit)
    _refuse_folder_of_runs(Path(config.folder))


def _refuse_folder_of_runs(folder: Path) -> None:
    """ValueError for a folder that is no run and holds some: a run's files would lie among them."""
    found = (path.parent for pattern in ("*/train.json", "*/*/train.json") for path in folder.glob(pattern))
    inside = sorted(str(path.relative_to(folder)) for path in found)
    if inside and not (folder / "train.json").is_file():
        names = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
        raise ValueError(
            f"{folder}: got a folder of runs ({names}), expected one for this run alone: --folder {folder / 'NAME'}"
        )


def _claim(folder: Path, config: TrainConfig) -> None:
    """Write train.json. ValueError where a run with another config has checkpoints or a model already.

    Without any, what that run's rows learnt on the disk goes: the new one draws its own.
    """
    before, kept = _before(folder), _kept(folder)
    names = _differences(before, config) if before is not None else []
    if kept and names:
        what = ", ".join(names[:4])
        raise ValueError(f"{folder} holds another run ({what} differ): choose another --folder, or remove it")
    if parallel.rank() == 0:
        if names and not kept and (folder / "learning").is_dir():
            shutil.rmtree(folder / "learning")
        # losses over another sample of the held-out documents do not compare with its own
        sampled = ("steps", "validate_every", "validation_tokens")
        if not kept or before is None or any(getattr(before, name) != getattr(config, name) for name in sampled):
            shutil.rmtree(folder / "checkpoints" / checkpoint.BEST, ignore_errors=True)
        (folder / checkpoint.UNDER_WAY).touch()
        configs.save(config, folder / "train.json")


@contextmanager
def _full_disk_said(folder: Path) -> Iterator[None]:
    """An OSError that the disk is full says in a line where, what stays, and how to go on."""
    try:
        yield
    except OSError as error:
        # a quota has a number on POSIX alone
        full_ones = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
        if error.errno is None or error.errno not in full_ones:
            raise
        full = OSError(
            f"{error.filename or folder}: got {os.strerror(error.errno).lower()}, expected room to write; checkpoints "
            "written before are good, and the same command goes on once there is room"
        )
        full.errno = error.errno
        raise full from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One training a folder: ValueError while another process holds it. The lock goes with its process, even killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if parallel.rank() == 0:
            refusal = f"{folder}: another process trains here; wait, or choose another --folder"
            held.enter_context(lock(folder / ".lock", refusal))
            # somebody else may be writing a report or edits of memory there
            remove_partial(folder, age=600.0)
        yield


def losses(folder: str | os.PathLike[str]) -> list[float]:
    """The training losses of a run, nats a token, one a step that was learnt from."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]
