"""Trains a model into a run folder, or resumes its training when called again with the same config.

Resumed or not, the numbers are the same to the last bit (docs/train.md has the conditions).
train/run_folder.py lists the files of a run folder.
"""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rorqual import checkpoint, distributed, pretrained, runtime
from rorqual import config as configs
from rorqual.data.tokenizer import Tokenizer
from rorqual.distributed_config import refuse_layout
from rorqual.layers.engram import Engram
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, row_totals
from rorqual.sharded_rows import RowExchange, ShardedTable
from rorqual.tables import Table, write_rows
from rorqual.tables.thread import BackgroundThread
from rorqual.train import card, run_folder
from rorqual.train.config import TrainConfig
from rorqual.train.optim import Optimizer
from rorqual.train.scores import estimate_step_seconds
from rorqual.train.source import Source, check_sources, open_source
from rorqual.train.step import Diverged, TrainStep

# Options of a model that neither its weights' shapes nor what they compute once trained depend on.
# The tokenizer sets the last two.
TRAINING_ONLY = (
    "init_std",
    "moe.balance.",
    "moe.router.noise",
    "moba.full_from",
    "mtp.weight",
    "dsa.dense",
    "dsa.warmup",
    "dsa.weight",
    "csa.warmup",
    "csa.weight",
    "engram.pad_id",
    "engram.eos_id",
)


class Stopped(KeyboardInterrupt):
    """Training was interrupted (ctrl-C, SIGTERM) and saved first.

    The message tells how to resume.
    """


def train(
    config: TrainConfig, *, on_metrics: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """Trains, or resumes training, and returns the run folder with the finished model.

    A folder that has the finished model already is returned at once. `on_metrics` is called with
    every line of metrics.jsonl as it is written. Raises Stopped after ctrl-C or SIGTERM, when
    everything is saved; Diverged when losses or gradients stay NaN or infinite; ValueError for a
    folder with another run; Damaged when no checkpoint in it is good.
    """
    config = _resolved(config)
    if config.threads is not None:
        runtime.threads(config.threads)
    device = runtime.device(config.device)
    folder = Path(config.folder)
    if run_folder.finished(config):
        runtime.log(
            f"{folder} holds this model, finished; "
            "remove it or choose another --folder to train again"
        )
        return folder
    if run_folder.finished_with_more_steps(config):
        return folder
    refuse(config, runtime.ranks()[1])
    joined = distributed.join(device)
    try:
        with run_folder.explain_full_disk(folder), run_folder.exclusive(folder):
            run_folder.start_run(folder, config)
            _train(config, device, on_metrics)
            with distributed.together():
                if distributed.rank() == 0:
                    (folder / checkpoint.UNDER_WAY).unlink()
    finally:
        if joined:
            distributed.leave()
    return folder


def refuse(config: TrainConfig, ranks: int | None) -> None:
    """Raises ValueError for errors of a config beyond its single values, and writes nothing.

    `ranks` is the number of processes that will train, None where it is not known yet.
    These are tables elsewhere for a model without any, a layout that the model or the number of
    ranks does not allow, an unknown text, and a folder of runs.
    """
    config = _resolved(config)
    if config.placement != "device" and config.model.engram is None:
        raise ValueError(
            f"placement: got {config.placement} for a model without Engram, "
            "expected device, or a model with rows: --model.engram default"
        )
    refuse_layout(config.model, config.distributed, ranks)
    whole_rows = config.distributed.rows == "replicate" and (ranks is None or ranks > 1)
    if config.placement != "device" and whole_rows:
        raise ValueError(
            f"placement: got {config.placement} with ranks that have all rows each, expected "
            "device or --distributed.rows shard: ranks would write one file"
        )
    if config.seq_len % config.distributed.context:
        raise ValueError(
            f"seq_len: got {config.seq_len}, expected a multiple of the "
            f"{config.distributed.context} ranks that share a sequence"
        )
    if config.init_from is not None and not run_folder.resumes(Path(config.folder)):
        _refuse_init(config, config.init_from)
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"wandb: got {config.wandb!r} without the package: pip install wandb")
    if config.lm_eval is not None:
        _refuse_tasks(config, runtime.ranks()[1] if ranks is None else ranks)
    if config.needles is None:
        check_sources(config)
    run_folder.refuse_folder_of_runs(Path(config.folder))


def _resolved(config: TrainConfig) -> TrainConfig:
    """Returns the config with the folder of `init_from`, if that names a pretrained model."""
    if config.init_from is None:
        return config
    return replace(config, init_from=str(pretrained.resolve(config.init_from)))


def _refuse_tasks(config: TrainConfig, ranks: int) -> None:
    """Raises ValueError where the tasks of lm-eval cannot be run during this training."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "lm_eval: got tasks without the harness: pip install 'rorqual[tasks]'; "
            "pip install --no-deps lm-eval"
        )
    if config.needles is not None:
        raise ValueError("lm_eval: got tasks with needles, which have no tokenizer, expected text")
    if ranks > 1:
        raise ValueError(
            f"lm_eval: got {ranks} ranks, expected one: evaluate checkpoints in another process, "
            "rorqual eval RUN --tasks ..."
        )


def _refuse_init(config: TrainConfig, run: str) -> None:
    """Raises ValueError where the weights of `run` are not those of such a model and tokenizer.

    A model may have Engram where the run's has none.
    """
    base = checkpoint.run_of(run)
    if base.resolve() == Path(config.folder).resolve():
        raise ValueError(f"init_from: got {run!r}, expected another folder than the run's")
    if not (base / "config.json").is_file():
        raise ValueError(f"init_from: got {run!r}, expected a run folder with config.json")
    model = checkpoint.read_config(base)
    if config.placement != "device" and model.engram is not None:
        raise ValueError(
            f"init_from: got {run!r} with rows on {config.placement}, expected --placement device"
        )
    theirs, ours = (run_folder.flat(configs.to_dict(each)) for each in (model, config.model))
    may_differ: tuple[str, ...] = TRAINING_ONLY
    if model.engram is None:
        may_differ = (*may_differ, "engram")
    wrong = [
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name) and not name.startswith(may_differ)
    ]
    if wrong:
        raise ValueError(
            f"init_from: got {run!r}, whose model has another {', '.join(sorted(wrong)[:4])}; "
            f"expected the model's: rorqual train {base} --init-from {run} --folder NEW ..."
        )
    if config.needles is None and config.data.tokenizer is not None:
        texts = (Tokenizer.load(path).templated() for path in (config.data.tokenizer, base))
        if len({tokenizer.to_str() for tokenizer in texts}) > 1:
            raise ValueError(
                f"data.tokenizer: got {config.data.tokenizer!r} with weights of {run!r}, expected "
                "its tokenizer, which is taken without --data.tokenizer"
            )


def _train(
    config: TrainConfig,
    device: torch.device,
    on_metrics: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Trains from the newest checkpoint to the last step, validates, and writes the model.

    Raises Stopped where training was interrupted, and Diverged where the last validation is not
    finite: then there is no model.
    """
    # OLMo-core reads both when it is imported; it would set the number of threads to 8.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    os.environ.setdefault("OLMO_SHARED_FS", "1")
    from rorqual.train import engine, metrics

    folder = Path(config.folder)
    source = open_source(config)
    runtime.seed_everything(config.seed)
    # Tables are closed however the run ends, so that another run of this process may train them.
    with ExitStack() as open_tables:
        model = _build_model(config, source, device, open_tables)
        step = TrainStep(model, Optimizer(model, config.optim), config)
        with distributed.together():
            if distributed.rank() == 0:
                checkpoint.describe_model(folder, model.config, source.tokenizer)

        def estimate() -> float:
            _, parts = config.distributed.data_rank(distributed.rank(), distributed.world())
            batch_size = config.batch_size // parts
            micro_batch_size = min(config.micro_batch_size or batch_size, batch_size)
            return estimate_step_seconds(
                model, source.vocab_size, batch_size, micro_batch_size, config.seq_len, step.dtype
            )

        writer = metrics.MetricsWriter(config, on_metrics, estimate)
        validation = metrics.Validation(model, source, config, writer, step.asked_to_stop)
        loader = engine.Loader(source.stream(config), folder, source.vocab_size)
        callbacks: dict[str, Any] = {
            "metrics": engine.MetricsCallback(writer),
            "validation": engine.ValidationCallback(validation),
        }
        if config.profile is not None:
            callbacks["profile"] = engine.ProfileCallback(folder / "profile", config.profile)
        if config.wandb is not None:
            sender = engine.WeightsAndBiases(config.wandb, folder, config)
            writer.senders.append(sender.send)
            callbacks["wandb"] = sender
            open_tables.push(sender.finish)
        made = engine.fit(step, loader, callbacks)
        if made < config.steps:
            message = (
                f"stopped at step {made} of {config.steps}, saved in {folder}; "
                "the same command goes on"
            )
            runtime.log(message)
            raise Stopped(message)
        scores = validation.run(made, whole=True)
        validation.run_tasks(made)
        if not all(map(math.isfinite, scores.values())):
            raise Diverged(
                f"got a validation loss that is not finite after step {made}",
                f", so {folder} gets no model: lower --optim.lr or raise --optim.warmup in another "
                "--folder",
            )
        _write_tables(folder, model)
        if distributed.rank() == 0:
            card.write_card(folder, config, model.config, source, scores, writer.seconds)
        checkpoint.save_model(folder, model, source.tokenizer)


def _build_model(
    config: TrainConfig, source: Source, device: torch.device, open_tables: ExitStack
) -> LanguageModel:
    """Builds the model with the source's special ids, sharded over the ranks if there are several.

    config.json describes it; train.json has the config as it was given.
    """
    shape = config.model
    canonical_map = None
    if shape.engram is not None:
        if shape.engram.canonical:
            canonical_map = torch.from_numpy(source.canonical_map())
        if shape.engram.eos_id is not None:
            shape = configs.replace(shape, "engram.eos_id", source.end_id)
        shape = configs.replace(shape, "engram.pad_id", source.pad_id)
    tables = _build_tables(config, shape, open_tables)
    if distributed.world() > 1:
        model = distributed.build(
            lambda: LanguageModel(shape, canonical_map, seed=None, tables=tables),
            distributed.make_mesh(config.distributed, device.type),
            config.distributed,
            device,
            config.seed,
        )
    else:
        model = LanguageModel(shape, canonical_map, seed=config.seed, tables=tables).to(device)
        distributed.parallelize(model, None, config.distributed)
    if config.init_from is not None and not run_folder.resumes(Path(config.folder)):
        _start_from(model, config.init_from)
        _log_warmup(config)
    return model


def _start_from(model: LanguageModel, run: str) -> None:
    """Loads the weights of a run. Engram that the run lacks adds nothing to the streams at first.

    Its value projection is 0, and so is its convolution; rows and keys are random, so that the
    projection, and then the rows, have gradients.
    """
    if not checkpoint.load_weights(run, model, without_engram=True):
        return
    for module in model.modules():
        if isinstance(module, Engram):
            for parameter in module.value_proj.parameters():
                parameter.detach().zero_()
    runtime.log(f"{run} has no Engram: it is added, and changes no output at first")


def _log_warmup(config: TrainConfig) -> None:
    """Logs that the indexers of trained weights warm up again, where they do."""
    indexer = config.model.indexer
    if indexer is None:
        return
    section = "csa" if indexer is config.model.csa else "dsa"
    phases = {name: getattr(indexer, name, 0) for name in ("dense", "warmup")}
    options = " ".join(f"--model.{section}.{name} 0" for name, steps in phases.items() if steps)
    if options:
        alone = " and alone are trained" if config.indexer_alone and phases["warmup"] else ""
        runtime.log(
            f"the indexers of {config.init_from} warm up again{alone}, until step "
            f"{sum(phases.values()):,} of {config.steps:,}: {options} trains on as they are",
            style="bold",
        )


def _build_tables(
    config: TrainConfig, shape: ModelConfig, open_tables: ExitStack
) -> list[Table] | None:
    """Builds Engram's tables if they are sharded over ranks, or trained in host memory or on disk.

    None means that they are built with the model.
    """
    sharded = distributed.world() > 1 and config.distributed.rows == "shard"
    if shape.engram is None or (config.placement == "device" and not sharded):
        return None
    width = shape.engram.head_dim
    tables: list[Table] = []
    exchange = RowExchange() if sharded else None
    # One thread serves all tables in host memory; on disk, one table's reads would wait for
    # another's writes.
    options: dict[str, Any] = {}
    if config.placement == "host":
        options["thread"] = BackgroundThread()
    # A mark for every checkpoint that may exist, and one for that being written.
    marks = config.keep + 1
    for number, rows in enumerate(row_totals(shape.engram)):
        folder = Path(config.folder) / "learning" / str(number)
        # A rank may be unable to open its records.
        with distributed.together():
            if exchange is not None:
                options |= {"exchange": exchange, "folder": folder, "keep": marks}
                table: Table = ShardedTable(rows, width, config.placement, **options)
            elif config.placement == "host":
                table = Table(rows, width, "host", **options)
            else:
                table = Table.of_records(folder, rows, width, keep=marks)
            tables.append(open_tables.enter_context(closing(table)))
    return tables


def _write_tables(folder: Path, model: LanguageModel) -> None:
    """Writes rows that were trained on disk to FOLDER/tables.

    A run's rows are searched there first. Rank 0 writes those of all ranks.
    """
    learnt = [
        table for table in model.tables if isinstance(table, Table) and table.placement == "disk"
    ]
    if not learnt:
        return
    with distributed.together():
        for table in learnt:
            table.flush()
    with distributed.together():
        if distributed.rank() == 0:
            shutil.rmtree(folder / "tables", ignore_errors=True)
            for number, table in enumerate(learnt):
                path = folder / "tables" / str(number)
                write_rows(path, table.rows, table.width, table.read_trained)
    for table in learnt:
        table.close()
