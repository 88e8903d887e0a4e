"""A dataclass of options and argv in -> the dataclass as the flags want it out."""

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from rorqual import config

T = TypeVar("T")


class UsageError(ValueError):
    """The command line itself is wrong: exit code 2."""

    usage = True


def parse(default: T, argv: Sequence[str], command: str, epilogue: str = "") -> T:
    """The dataclass changed by argv. Sub-configs that a flag names are put in, and `--name none` takes one out.

    UsageError, with the nearest flag, for what fits nothing; --help prints, the epilogue last, and leaves.
    """
    filled, words = config.fill(default, argv)
    return _parse(type(default), filled, words, command, epilogue)


def parse_new(cls: type[T], argv: Sequence[str], command: str) -> T:
    """A dataclass that may have required fields, from argv; errors as `parse`."""
    return _parse(cls, tyro.MISSING_NONPROP, list(argv), command)


def _parse(cls: type[T], default: Any, words: list[str], command: str, epilogue: str = "") -> T:
    heard = io.StringIO()
    switches = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
    try:
        with contextlib.redirect_stderr(heard):
            return tyro.cli(cls, default=default, args=words, prog=f"rorqual {command}", config=switches)
    except SystemExit as stop:
        if not stop.code:
            if epilogue:
                print(epilogue)
            raise
        raise UsageError(plain(heard.getvalue())) from None


def plain(box: str) -> str:
    """The parser's framed paragraphs as one line, with the nearest flag if it knows one. A terminal without Unicode has
    frames of + - and |."""
    lines = [re.sub(r"^[│|╭╰+─ ]+|[│|╮╯+─ ]+$|^[│|+─ -]+$", "", line) for line in box.splitlines()[1:]]
    said: list[str] = []
    for line in lines:
        if not line or line.startswith(("Perhaps", "Argument helptext", "For full helptext")):
            break
        said.append(line)
    near = re.search(r"Perhaps you meant.*?(--[\w.-]+)", " ".join(lines))
    text = " ".join(said) or "the arguments fit nothing"
    return text.rstrip(".") + (f"; did you mean {near[1]}?" if near else "")


def split_first(argv: Sequence[str], what: str, example: str) -> tuple[str, list[str]]:
    """The word that comes before all flags, and the rest."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        got = repr(argv[0]) if argv else "nothing"
        raise UsageError(f"got {got}, expected {what} first: {example}")
    return argv[0], list(argv[1:])


def emit(value: Any) -> None:
    """One JSON object on standard output; dataclasses and named tuples become objects."""
    print(json.dumps(jsonable(value), ensure_ascii=False))


def jsonable(value: Any) -> Any:
    """Plain JSON values of dataclasses, named tuples, mappings, sequences and zero-dimensional tensors."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return jsonable(value._asdict())
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def take(flag: str, argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether a flag that every command has is there, and argv without it."""
    end = argv.index("--") if "--" in argv else len(argv)
    return flag in argv[:end], [word for i, word in enumerate(argv) if word != flag or i >= end]
