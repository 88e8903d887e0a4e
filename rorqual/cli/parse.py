"""Parses command lines into dataclasses of options."""

import argparse
import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

from rorqual import config
from rorqual.cli.other_names import explain

T = TypeVar("T")
Positional = Annotated[T, "positional"]  # a field that is given by its place, without its name
Changes = list[tuple[str, Any]]  # dotted names and what was typed for them, in order
USAGE = "[--OPTION VALUE | OPTION=VALUE ...]"


class UsageError(ValueError):
    """A wrong command line: exit code 2."""

    usage = True


def parse(start: T, argv: Sequence[str], command: str, epilogue: str = "") -> T:
    """Returns the options in `start`, changed by argv.

    UsageError for an unknown or invalid option; --help prints, the epilogue last, and exits.
    """
    return changed(start, read(start, argv, command, epilogue))


def parse_new(cls: type[T], argv: Sequence[str], command: str) -> T:
    """Builds options from argv, of a class that may have required fields; errors as `parse`."""
    return changed(typing.cast("T", cls), read(cls, argv, command))


def changed(start: T, changes: Changes) -> T:
    """Returns the config with these changes; UsageError for a change that does not fit."""
    try:
        return config.change(start, changes, lax=True)
    except ValueError as error:
        raise UsageError(str(error)) from None


def read(
    start: Any,
    argv: Sequence[str],
    command: str,
    epilogue: str = "",
    short: Mapping[str, str] | None = None,
) -> Changes:
    """Parses argv into changes, without checking the values.

    It takes --name value, --name=value or, where nothing is given by its place, name=value. `short`
    maps short names to longer ones.
    """
    cls = start if isinstance(start, type) else type(start)
    helped = any(word in ("-h", "--help") for word in argv)
    options = list(
        config.options(cls, None if isinstance(start, type) else start, commented=helped)
    )
    places = [
        name
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
        if _is_placed(hint)
    ]
    switched = [
        each
        for each in options
        if each.part is None or type(None) in config.members(each.annotation)
    ]
    names = {each.name: each.name for each in switched if each.name not in places} | dict(
        short or {}
    )
    words = list(
        _spelled(
            argv, names, {each.name for each in options if each.annotation is bool}, not places
        )
    )
    parser = _parser(cls, command, epilogue, places)
    groups: dict[str, Any] = {"": parser}
    for option in options:
        if option.part is not None:
            groups[option.name] = parser.add_argument_group(option.name, option.comment)
        group = groups[option.name if option.part is not None else option.name.rpartition(".")[0]]
        flags = [flag for flag, name in names.items() if name == option.name]
        if flags or option.name in places:
            _add(group, option, flags, bool(places))
    namespace, rest = parser.parse_known_intermixed_args(words, argparse.Namespace(changes=[]))
    if rest:
        raise UsageError(explain(rest[0], names, command))
    return namespace.changes


def _is_placed(hint: Any) -> bool:
    """Returns whether a field is given by its place on the command line, without a name."""
    return typing.get_origin(hint) is Annotated and "positional" in hint.__metadata__


def _parser(
    cls: Any, command: str, epilogue: str, places: Sequence[str]
) -> argparse.ArgumentParser:
    """Makes a parser whose help has the class's docstring.

    The help begins with the docstring's sentences and ends with its example commands.
    """
    text = "" if config.summary(cls) == "" else inspect.cleandoc(cls.__doc__)
    sentences = [line for line in text.splitlines() if not line.startswith("rorqual ")]
    commands = [f"  {line}" for line in text.splitlines() if line.startswith("rorqual ")]
    return _Parser(
        usage=" ".join(
            [
                f"rorqual {command}",
                *map(str.upper, places),
                "[--OPTION VALUE ...]" if places else USAGE,
            ]
        ),
        description="\n".join(sentences).strip(),
        epilog="\n".join([*(["examples:", *commands] if commands else []), epilogue]).strip(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=40
        ),
        allow_abbrev=False,
    )


class _Parser(argparse.ArgumentParser):
    """Raises a UsageError where argparse would print one and exit."""

    def error(self, message: str) -> NoReturn:
        """Raises the message of argparse."""
        raise UsageError(message)


class _Note(argparse.Action):
    """Records what was typed, and in which order."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        namespace.changes.append((self.dest, values))


def _add(group: Any, option: config.Option, flags: list[str], placed: bool) -> None:
    """Adds one option to a parser.

    `placed`: some options are given by their place, and another option's values must not take
    theirs.
    """
    hint = option.annotation
    kinds = config.members(hint)
    items = next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple), ())
    required = option.default is dataclasses.MISSING
    shown: dict[str, Any] = {
        "metavar": _metavar(items[0] if items else hint),
        "help": _help(option),
        "default": argparse.SUPPRESS,
    }
    if items:
        shown["nargs"] = len(items) if placed and ... not in items else "*"
    elif hint is bool:
        shown["nargs"] = "?"
    if flags:
        dashed = [f"--{flag.replace('_', '-')}" for flag in flags]
        group.add_argument(*dashed, dest=option.name, action=_Note, required=required, **shown)
    else:
        shown |= {
            "metavar": option.name.upper(),
            "nargs": "+" if items else None if required else "?",
        }
        group.add_argument(option.name, action=_Note, **shown)


def _metavar(hint: Any) -> str:
    """Returns what stands for a value in the help: its choices, or the name of its type."""
    if dataclasses.is_dataclass(hint):
        return "default"
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    kinds = config.members(hint)
    if len(kinds) > 1:
        return "|".join(map(_metavar, kinds))
    return (
        "none"
        if hint is type(None)
        else {str: "TEXT"}.get(hint, getattr(hint, "__name__", "VALUE").upper())
    )


def _help(option: config.Option) -> str:
    """Returns the comment of an option with its default; argparse needs % doubled."""
    default = option.default
    if option.part is not None:
        return f"switches it on or off (it is {'off' if default is None else 'on'})"
    if default is dataclasses.MISSING:
        return option.comment.replace("%", "%%")
    words = (
        " ".join(map(str, default))
        if isinstance(default, tuple)
        else "none"
        if default is None
        else str(default)
    )
    return f"{option.comment} (default: {words})".strip().replace("%", "%%")


def _spelled(
    argv: Sequence[str], names: Mapping[str, str], bools: set[str], pairs: bool
) -> Iterator[str]:
    """Rewrites the words as argparse takes them.

    Names get dashes, name=value becomes --name=value, and every bool gets a value.
    """
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            yield from [word, *words]
            return
        head, equals, value = word.partition("=")
        name = head.removeprefix("--").replace("-", "_")
        if name not in names or not (head.startswith("--") or (pairs and equals)):
            yield word
            continue
        if names[name] in bools and not equals:
            equals = "="
            value = words.pop(0) if words and words[0].lower() in ("true", "false") else "true"
        yield f"--{name.replace('_', '-')}{equals}{value}"


def split_first(argv: Sequence[str], what: str, example: str) -> tuple[str, list[str]]:
    """Splits argv into the word before all flags, and the rest."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        got = repr(argv[0]) if argv else "nothing"
        raise UsageError(f"got {got}, expected {what} first: {example}")
    return argv[0], list(argv[1:])


def emit(value: Any) -> None:
    """Prints one JSON object on standard output; dataclasses and named tuples become objects."""
    print(json.dumps(jsonable(value), ensure_ascii=False))


def jsonable(value: Any) -> Any:
    """Converts a value to plain JSON values.

    Takes dataclasses, named tuples, mappings, sequences and zero-dimensional tensors.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
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
    """Returns whether argv has a flag that every command has, and argv without it."""
    end = argv.index("--") if "--" in argv else len(argv)
    return flag in argv[:end], [word for i, word in enumerate(argv) if word != flag or i >= end]
