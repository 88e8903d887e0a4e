"""Implements the commands that inspect text, runs or this machine: data, doctor and report."""

from dataclasses import dataclass
from pathlib import Path

from rorqual.cli.parse import Positional, emit, parse_new, take


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Describes a corpus: documents, bytes, licence, what was skipped and why, and a sample.

    rorqual data wordnet
    rorqual data notes/ --sample 3
    """

    source: Positional[str]  # a corpus name, a file, a folder, a Hugging Face data set
    column: str = "text"  # the field of JSON lines, parquet and data sets that holds the text
    limit: int | None = None  # stop after this many documents
    sample: int = 2  # documents to print


def data_command(argv: list[str]) -> int:
    """Describes a source of texts; returns the exit code."""
    as_json, argv = take("--json", argv)
    options = parse_new(Data, argv, "data")
    from rorqual.data.corpus import open_corpus

    corpus = open_corpus(options.source, column=options.column, limit=options.limit)
    sample: list[str] = []
    documents = size = validation = 0
    for side, document in corpus.sided():
        documents = documents + 1
        size = size + len(document.encode())
        validation += side == "validation"
        if len(sample) < options.sample:
            sample.append(document)
    description = {
        "name": corpus.name,
        "license": corpus.license,
        "documents": documents,
        "bytes": size,
    }
    description |= {"validation_documents": validation, "skipped": dict(corpus.skipped)}
    if as_json:
        emit(description | {"sample": sample})
        return 0
    skipped = (
        ", ".join(f"{count:,} {reason}" for reason, count in sorted(corpus.skipped.items()))
        or "nothing"
    )
    print(
        f"{corpus.name}: {documents:,} documents, {size:,} bytes, "
        f"{validation:,} of them kept for validation"
    )
    print(f"licence: {corpus.license}\nskipped: {skipped}")
    for document in sample:
        print(
            "  | "
            + document[:400].strip().replace("\n", "\n  | ")
            + (" ..." if len(document) > 400 else "")
        )
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """Checks this machine: versions, cores, devices, kernels, and how to repair what is wrong.

    The exit code is 1 if something is wrong.

    rorqual doctor --json
    """

    folder: str = "."  # where runs would be written


def doctor_command(argv: list[str]) -> int:
    """Describes this machine and what runs on it; returns the exit code."""
    as_json, argv = take("--json", argv)
    options = parse_new(Doctor, argv, "doctor")
    from rorqual import doctor

    report = doctor.examine(options.folder)
    if as_json:
        emit(report.to_dict())
    else:
        print(*doctor.lines(report), sep="\n")
    return 0 if report.well else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Writes one self-contained page about runs: costs, curves, gates over a sentence, expert load.

    rorqual report runs/demo --out runs/demo/report.html
    """

    runs: Positional[tuple[str, ...]]  # run folders, folders of them, or pretrained names
    # none: report.html in the first folder (of a pretrained name: here), report-2.html where that
    # is of other runs
    out: str | None = None
    sentence: str | None = None  # the text over which the gates are shown


def report_command(argv: list[str]) -> int:
    """Writes the page of one run or several; returns the exit code."""
    as_json, argv = take("--json", argv)
    options = parse_new(Report, argv, "report")
    from rorqual.analyze.report import page_for, write_report
    from rorqual.checkpoint import run_of
    from rorqual.pretrained import is_pretrained, resolve

    asked = [resolve(name) for name in options.runs]
    runs = [run for folder in asked for run in runs_in(folder)]
    folder = run_of(asked[0]) if asked else Path()
    # The package's own folders stay as they are.
    beside = Path() if is_pretrained(folder) else folder
    out = Path(options.out) if options.out else page_for(asked, beside)
    words = {} if options.sentence is None else {"sentence": options.sentence}
    page = write_report(runs, out, asked=asked, **words)
    if as_json:
        emit({"report": page, "runs": runs})
    else:
        print(f"{page}: {len(runs)} run{'s' * (len(runs) != 1)}; open it in a browser")
    return 0


def runs_in(folder: Path) -> list[Path]:
    """Returns the folder if it is a run, else the runs in it.

    Runs that a sweep moved aside (NAME.before-1) are left out; one that is not finished is included
    once it has a checkpoint. FileNotFoundError, with a hint on how to make one, if there are none.
    """
    from rorqual.checkpoint import is_checkpoint, readable

    if (folder / "config.json").is_file() or is_checkpoint(folder):
        return [folder]
    folders = (path.parent for path in folder.glob("*/config.json"))
    inside = sorted(
        run for run in folders if readable(run) and not run.suffix.startswith(".before-")
    )
    if not inside:
        hint = "a run folder or a folder of them (make one: rorqual train)"
        if (folder / "train.json").is_file():
            hint = f"a run that has a checkpoint or is finished (go on: rorqual train {folder})"
        raise FileNotFoundError(f"got {folder}, expected {hint}")
    return inside
