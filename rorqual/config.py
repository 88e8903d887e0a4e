"""Reads dataclass configs from JSON, YAML and text, and writes them.

A config is a frozen, keyword-only dataclass whose fields have defaults. A part that is off is None,
in a field of the kind `X | None`; naming one of its fields switches it on. msgspec converts every
value to what its annotation requires. The functions here walk over nested dataclasses, so that an
error names the field and the nearest name, and so that comments find their fields. Each config's
own `__post_init__` checks the rest.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import yaml

from rorqual.hints import choose
from rorqual.io import write_json

# The earlier name of an option, and today's.
RENAMED = {
    "rows": "batch_size",
    "length": "seq_len",
    "micro_rows": "micro_batch_size",
    "tables": "placement",
    "vocabulary": "vocab_size",
    "chosen": "top_k",
    "decay": "schedule",
}
T = TypeVar("T")

NONE = ("none", "null", "None")  # the texts that mean None
WIDTH = 100  # columns of the YAML that is written


def to_dict(config: Any) -> Any:
    """Returns the config as plain JSON: dicts, lists, strings, numbers, booleans and None."""
    return json.loads(json.dumps(msgspec.to_builtins(config, enc_hook=os.fspath)))


def from_dict(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Builds a config from JSON values, as the inverse of `to_dict`.

    Absent keys take their defaults. ValueError for an unknown key (it names the nearest one), a
    value of the wrong kind, or what the config refuses.
    """
    return _build(cls, mapping, cls.__name__, lax=False)


def change(config: T, changes: Iterable[tuple[str, Any]], *, lax: bool = False) -> T:
    """Returns a copy with new values of fields with dotted names: [("engram.heads", 8)].

    A part that is off and lies on the way is switched on with its defaults; "default" does that
    too, "none" switches a part off, and a mapping changes several fields of it. Only the copy has
    to be valid, not each step on the way. A class in place of a config starts without any values.
    With `lax`, values may be text, as on a command line.
    """
    cls: Any = config if isinstance(config, type) else type(config)
    tree = {} if isinstance(config, type) else to_dict(config)
    for name, value in changes:
        _put(cls, tree, name, value, "")
    return _build(cls, tree, "", lax=lax)


def replace(config: T, name: str, value: Any) -> T:
    """Returns a copy with a new value of the field with a dotted name.

    For example: replace(config, "engram.heads", 8). A part that is off and lies on the way is
    switched on with its defaults. The copy is validated.
    """
    return change(config, [(name, to_dict(value))])


def differing(base: Any, other: Any, name: str = "") -> list[str]:
    """Returns the words of a command line that turn one config into the other: engram.heads=8.

    `name` is what their names begin with. Parts that are switched on or off are among them.
    """
    words: list[str] = []
    for field in dataclasses.fields(other):
        path = f"{name}.{field.name}".lstrip(".")
        was = getattr(base, field.name)
        now = getattr(other, field.name)
        if was == now:
            continue
        if dataclasses.is_dataclass(now):
            section: Any = type(now)  # switched on with its defaults where it was off
            words += differing(was or section(), now, path) or [f"{path}=default"]
            continue
        if isinstance(now, tuple) and any(isinstance(item, str) for item in now):
            # A comma may be part of a text.
            words += [f"--{path.replace('_', '-')}", *now]
            continue
        value = ",".join(map(str, now)) if isinstance(now, tuple) else str(now)
        words.append(f"{path}={'none' if now is None else value}")
    return words


def save(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes the config as JSON; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, to_dict(config))


def load(cls: type[T], path: str | os.PathLike[str], start: T | None = None) -> T:
    """Reads a config from JSON or, where the name ends in .yaml or .yml, from YAML.

    A YAML file changes `start`, or the class's defaults if there is none. ValueError, naming the
    file, for any other file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if is_yaml(path):
            return change(cls() if start is None else start, _yaml_mapping(text).items(), lax=True)
        return from_dict(cls, json.loads(text))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def is_yaml(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is called .yaml or .yml."""
    return Path(path).suffix in (".yaml", ".yml")


def to_yaml(config: Any) -> str:
    """Returns the config as YAML that `load` reads, with each field's comment beside it."""
    return "\n".join(_yaml_lines(config, "")) + "\n"


class Option(NamedTuple):
    """A field of a config or of one of its parts."""

    name: str  # dotted
    annotation: Any
    default: Any  # dataclasses.MISSING where one must be given
    part: type | None  # the dataclass that holds its fields, if it has some
    comment: str


def options(
    cls: Any, config: Any = None, path: str = "", *, commented: bool = False
) -> Iterator[Option]:
    """Yields every field of a config class and of its parts, on or off, in order.

    Defaults are those of `config`.
    """
    comments = field_comments(cls) if commented else {}
    for field in dataclasses.fields(cls):
        hint = _annotations(cls)[field.name]
        section = _part(hint)
        default = _default(field) if config is None else getattr(config, field.name)
        comment = comments.get(field.name, "")
        yield Option(path + field.name, hint, default, section, comment)
        if section is not None:
            yield from options(section, default, f"{path}{field.name}.", commented=commented)


def members(hint: Any) -> tuple[Any, ...]:
    """Returns the alternatives of a union; any other annotation is its own only one."""
    return (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )


def word(hint: Any) -> str:
    """Returns an annotation in the words of an error: "int or none", "'numpy' or 'splitmix64'"."""
    if len(members(hint)) > 1:
        return " or ".join(word(member) for member in members(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if hint is type(None):
        return "none"
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("typing.", "")
    )


@functools.cache
def field_comments(cls: Any) -> dict[str, str]:
    """Returns each field's comment in the source: the one behind it, or those on the lines above.

    A field that holds a part and has no comment takes the first line of that part's docstring.
    """
    by_name = {
        name: summary(section)
        for name, hint in _annotations(cls).items()
        if (section := _part(hint))
    }
    try:
        tree, comments, alone = _source(cls.__module__)
    except (OSError, TypeError, SyntaxError):
        return by_name
    classes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    ]
    for node in classes[0].body if classes else ():
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        lines = [
            comments[line]
            for line in (*range(first, node.lineno), node.end_lineno)
            if line in comments
        ]
        if lines:
            by_name[node.target.id] = " ".join(lines)
    return by_name


def summary(cls: Any) -> str:
    """Returns the first line of a class's docstring, "" if dataclasses generated it."""
    line = (cls.__doc__ or "").partition("\n")[0]
    return "" if line.startswith(f"{cls.__name__}(") else line


@functools.cache
def _annotations(cls: Any) -> dict[str, Any]:
    """Returns the types of a dataclass's fields, with those in quotes resolved."""
    return typing.get_type_hints(cls)


def _part(hint: Any) -> Any:
    """Returns the dataclass that an annotation allows, if it allows one."""
    return next((member for member in members(hint) if dataclasses.is_dataclass(member)), None)


def _default(field: "dataclasses.Field[Any]") -> Any:
    """Returns the default of a field, made anew if the field has a factory."""
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _annotation(cls: Any, name: str, where: str) -> Any:
    """Returns the type of the field `name`; `where` is the path of the dataclass in its file.

    ValueError with the nearest name for an unknown field, or with the new one of a renamed field.
    """
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    if name not in names and (now := RENAMED.get(name)) in names:
        raise ValueError(
            f"got {where or cls.__name__} key {name!r}, expected {now!r}, which is its name now; "
            "runs of an earlier version have to be trained again"
        )
    return _annotations(cls)[choose(f"{where or cls.__name__} key", name, names)]


def _put(cls: Any, tree: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Sets a value, under a dotted name, in nested dicts that hold a config of this class."""
    head, _, rest = name.partition(".")
    hint = _annotation(cls, head, where)
    section = _part(hint)
    if section is None:
        if rest:
            raise ValueError(
                f"got {name!r}, expected {head!r} to have fields, but it is {word(hint)}"
            )
        tree[head] = value
        return
    if not rest and isinstance(value, str) and value in (*NONE, "default"):
        value = to_dict(section()) if value == "default" else None
    if rest or isinstance(value, Mapping):
        if tree.get(head) is None:
            tree[head] = to_dict(section())
        for key, inner in [(rest, value)] if rest else value.items():
            _put(section, tree[head], str(key), inner, f"{where}.{head}".lstrip("."))
    else:
        tree[head] = value


def _build(cls: Any, mapping: Any, where: str, *, lax: bool) -> Any:
    """Builds a dataclass, and those inside it, from a mapping; `where` is its path in the file."""
    if not isinstance(mapping, Mapping):
        words = "default, none or " if lax else ""
        raise ValueError(
            f"{where}: got {_show(mapping)}, expected {words}a mapping of {cls.__name__} fields"
        )
    values = {}
    for name, value in mapping.items():
        hint = _annotation(cls, name, where)
        section = _part(hint)
        here = f"{where}.{name}".lstrip(".")
        if section is not None and value is not None:
            values[name] = _build(section, value, here, lax=lax)
        else:
            values[name] = _convert(hint, value, here, lax=lax)
    return cls(**values)


def _convert(hint: Any, value: Any, where: str, *, lax: bool) -> Any:
    """Converts a value to its annotation: a list to a tuple, an int to a float.

    With `lax`, a text becomes a number, too.
    """
    try:
        read = _read(hint, value) if lax else value
        return msgspec.convert(read, hint, strict=not lax, dec_hook=lambda kind, plain: kind(plain))
    except msgspec.ValidationError:
        raise ValueError(f"{where}: got {_show(value)}, expected {word(hint)}") from None


def _read(hint: Any, value: Any) -> Any:
    """Parses a text, or a list of texts, that msgspec does not: none, lists, dicts and 1_000."""
    kinds = members(hint)
    items = next(
        (typing.get_args(kind) for kind in kinds if typing.get_origin(kind) in (tuple, list)), ()
    )
    if items and str not in items and isinstance(value, list) and len(value) == 1:
        value = value[0] if isinstance(value[0], str) else value  # one word: 1,2 or [1, 2]
    if isinstance(value, list):
        return value if str in items else [_read(items[0], each) for each in value]
    if not isinstance(value, str):
        return value
    if value in NONE and type(None) in kinds:
        return None
    if str in kinds:
        return value
    if value.startswith(("[", "{")):
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(value)
    if str in items:
        return [value]
    if items:
        return [_read(items[0], each) for each in value.split(",") if value]
    return re.sub(r"(?<=\d)_(?=\d)", "", value)


def _show(value: Any) -> str:
    """Formats a value for an error, in at most 60 letters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def _source(module: str) -> tuple[ast.Module, dict[int, str], frozenset[int]]:
    """Returns a module's syntax tree, its comments by line, and the lines with nothing else."""
    source = inspect.getsource(sys.modules[module])
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_name = {token.start: token for token in tokens if token.type == tokenize.COMMENT}
    comments = {line: token.string.lstrip("# ") for (line, _), token in by_name.items()}
    alone = frozenset(
        line for (line, _), token in by_name.items() if token.line.lstrip().startswith("#")
    )
    return ast.parse(source), comments, alone


def _yaml_mapping(text: str) -> dict[str, Any]:
    """Returns the mapping in a YAML text; ValueError, with the line, for anything else."""
    try:
        mapping = yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{where}{error.problem}") from None
    if mapping is not None and not isinstance(mapping, dict):
        raise ValueError(f"got {_show(mapping)}, expected a mapping of fields")
    return {str(name): value for name, value in (mapping or {}).items()}


def _yaml_lines(config: Any, indent: str) -> Iterator[str]:
    """Yields the lines of a config as YAML, each field with its comment beside it or above it.

    A part that is off is null, and its comment says what switches it on.
    """
    cls: Any = type(config)
    comments = field_comments(cls)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        section = _part(_annotations(cls)[field.name])
        comment = comments.get(field.name, "")
        if section is not None and value is None:
            comment = f"{comment.removesuffix('.')} (off; {{}} switches it on)"
        line = f"{indent}{field.name}:" + (
            "" if value is not None and section is not None else f" {_yaml_value(value)}"
        )
        if len(line) + len(comment) + 4 > WIDTH:
            yield from textwrap.wrap(
                comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
            yield line
        else:
            yield f"{line}  # {comment}" if comment else line
        if value is not None and section is not None:
            yield from _yaml_lines(value, indent + "  ")


def _yaml_value(value: Any) -> str:
    """Returns a value as one line of YAML."""
    text = yaml.dump(
        to_dict(value),
        Dumper=_Dumper,
        default_flow_style=True,
        width=sys.maxsize,
        allow_unicode=True,
    )
    return text.removesuffix("\n").removesuffix("\n...")


class _Dumper(yaml.SafeDumper):
    """A dumper that escapes unprintable characters, which YAML's own leaves out of some texts."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Quotes a text with characters that cannot be printed, so that YAML reads it back."""
        return self.represent_scalar(
            "tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"'
        )


_Dumper.add_representer(str, _Dumper.represent_str)


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key that occurs twice in one mapping; YAML's own takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Makes a dict of a mapping. ConstructorError if a key occurs twice.

        YAML's own loader takes the last of them.
        """
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"got {key.value!r} twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
