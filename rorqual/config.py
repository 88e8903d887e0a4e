"""A frozen dataclass in -> JSON, and a changed dataclass, out.

A config is a frozen, keyword-only dataclass every field of which has a default, so that a part which is off (its
field is None) can be put in by naming one of its fields. Nested dataclasses, `X | None`, tuples, dicts, `Literal` and
paths are understood; everything read from outside is checked against the annotations, and each config's own
`__post_init__` checks the rest.
"""

import dataclasses
import difflib
import functools
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rorqual.io import write_json

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """The config as plain JSON values: dicts, lists, strings, numbers, booleans and None."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return os.fspath(config) if isinstance(config, os.PathLike) else config


def from_dict(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`; absent keys take their defaults.

    ValueError for an unknown key (it names the nearest one), a value of the wrong kind, or what the config refuses.
    """
    return _struct(cls, mapping, cls.__name__)


def save(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes the config as JSON; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, to_dict(config))


def load(cls: type[T], path: str | os.PathLike[str]) -> T:
    """Reads what `save` wrote; ValueError, naming the file, when it is not such a config."""
    try:
        return from_dict(cls, json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def replace(config: T, name: str, value: Any) -> T:
    """A copy in which the field with this dotted name has this value: replace(config, "engram.heads", 8).

    A part that is off and lies on the way is put in with its defaults. The copy is validated.
    """
    head, _, rest = name.partition(".")
    hint = _hint(type(config), head)
    if rest:
        part = getattr(config, head)
        if part is None:
            part = _default(hint, head)
        if not dataclasses.is_dataclass(part):
            raise ValueError(f"got {name!r}, expected {head!r} to have fields, but it is {_word(hint)}")
        value = replace(part, rest, value)
    copy: T = dataclasses.replace(config, **{head: _value(hint, to_dict(value), head)})  # type: ignore[type-var]
    return copy


def fill(config: T, argv: Sequence[str]) -> tuple[T, list[str]]:
    """Switches the parts that flags name on or off, before a parser that knows only parts which are there.

    `--model.engram.heads 8` puts a default EngramConfig in where config.model.engram is None; `--model.engram default`
    puts one in and is consumed; `--model.engram none` takes it out and is consumed (a plain field that may be None gets
    the parser's `None`). Returns the config and the remaining argv. The sum of all flags is what must be valid, not
    each step on the way, so the config that comes back has not been validated: the parser constructs it again. Unknown
    flags are left to the parser.
    """
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return config, [*rest, word, *words]
        flag, equals, given = word.partition("=")
        path = flag[2:].replace("-", "_").split(".") if flag.startswith("--") else []
        value = given if equals else (words[0] if words else "")
        hint = _hint_at(type(config), path)
        optional = type(None) in _members(hint)
        if optional and _part(hint) is not None and value in ("none", "default"):
            config = _put(config, path, value)
            del words[: 0 if equals else 1]
        elif optional and value == "none":
            rest += [flag, "None"]
            del words[: 0 if equals else 1]
        else:
            rest.append(word)
        config = _put(config, path[:-1], "present")
    return config, rest


def choose(kind: str, name: str, names: Iterable[str]) -> str:
    """`name` if it is among `names`, else a ValueError that names the nearest; kind says what it is the name of."""
    known = list(names)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, 1, 0.4)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"got {kind} {name!r}, expected one of {', '.join(known)}{guess}")


def has(cls: type, name: str) -> bool:
    """Whether a config has a field of this dotted name, in parts that are off too."""
    return _hint_at(cls, name.split(".")) is not None


def install(extra: str) -> str:
    """The pip command that adds an extra to the rorqual that is running: a checkout, or what is installed already."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "pyproject.toml").is_file():
        return f"pip install 'rorqual[{extra}]'"
    return f"pip install -e '{'.' if checkout == Path.cwd() else checkout}[{extra}]'"


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _hint(cls: type, name: str) -> Any:
    names = [field.name for field in dataclasses.fields(cls)]
    return _hints(cls)[choose(f"{cls.__name__} field", name, names)]


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; any other hint is its own only one."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _part(hint: Any) -> type | None:
    """The dataclass that a hint allows, if it allows one."""
    return next((member for member in _members(hint) if dataclasses.is_dataclass(member)), None)  # type: ignore[return-value]


def _default(hint: Any, name: str) -> Any:
    cls = _part(hint)
    if cls is None:
        raise ValueError(f"got fields below {name!r}, expected none: it is {_word(hint)}")
    return cls()


def _hint_at(cls: type, path: Sequence[str]) -> Any:
    """The annotation of the field that the dotted path names, seen through parts that are off; None without one."""
    hint: Any = cls
    for name in path:
        part: Any = _part(hint)
        hint = _hints(part).get(name) if part is not None else None
    return hint if path else None


def _put(config: Any, path: Sequence[str], what: str) -> Any:
    """Makes the part at the path present, default or none; a path that names no part is left alone. Not validated."""
    if not path or not dataclasses.is_dataclass(config):
        return config
    head, *rest = path
    cls: Any = type(config)
    part = _part(_hints(cls).get(head))
    if part is None:
        return config
    old = getattr(config, head)
    new = part() if old is None or (what == "default" and not rest) else old
    new = None if what == "none" and not rest else _put(new, rest, what)
    return config if new is old else _unchecked(config, head, new)


def _unchecked(config: Any, name: str, value: Any) -> Any:
    copy = object.__new__(type(config))
    for field in dataclasses.fields(config):
        object.__setattr__(copy, field.name, value if field.name == name else getattr(config, field.name))
    return copy


def _struct(cls: Any, mapping: Any, where: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where}: got {_show(mapping)}, expected a mapping of {cls.__name__} fields")
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in mapping:
        choose(f"{where} key", key, names)
    return cls(**{key: _value(_hints(cls)[key], value, f"{where}.{key}") for key, value in mapping.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value as the hint wants it: lists become tuples, mappings dataclasses, whole numbers floats."""
    members = _members(hint)
    if value is None and type(None) in members:
        return None
    errors = []
    for member in members:
        try:
            return _one(member, value, where)
        except ValueError as error:
            errors.append(error)
    raise errors[0] if len([m for m in members if m is not type(None)]) == 1 else _wrong(where, value, hint)


def _one(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _struct(hint, value, where)
    if origin is typing.Literal:
        if value in inner:
            return value
    elif origin in (tuple, list) and isinstance(value, (list, tuple)):
        return _sequence(origin, inner, value, where, hint)
    elif origin is dict and isinstance(value, Mapping):
        return {key: _value(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    elif _plain(hint, value):
        return value if hint is bool or hint is type(None) else hint(value)
    raise _wrong(where, value, hint)


def _sequence(origin: Any, inner: tuple[Any, ...], value: Sequence[Any], where: str, hint: Any) -> Any:
    hints = inner[:1] * len(value) if origin is list or inner[-1:] == (...,) else inner
    if len(hints) != len(value):
        raise _wrong(where, value, hint)
    return origin(_value(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(zip(hints, value, strict=True)))


def _plain(hint: Any, value: Any) -> bool:
    """Whether a JSON scalar may stand for the hint. True is not 1 here, and 1 is a float."""
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    if isinstance(hint, type) and issubclass(hint, os.PathLike):
        return isinstance(value, str)
    return isinstance(hint, type) and isinstance(value, hint)


def _wrong(where: str, value: Any, hint: Any) -> ValueError:
    return ValueError(f"{where}: got {_show(value)}, expected {_word(hint)}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _word(hint: Any) -> str:
    """A hint as a person would write it."""
    if len(_members(hint)) > 1:
        return " or ".join(_word(member) for member in _members(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if hint is type(None):
        return "none"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
