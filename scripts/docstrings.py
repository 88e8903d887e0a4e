"""Prepares docstrings for the API reference: a Griffe extension that scripts/build_site.py names.

A docstring is plain text: a sentence, equations and tables indented by four spaces, shapes in
brackets. Markdown would take brackets for links and stars for emphasis, so these are escaped
outside of code. The comment of a dataclass's field becomes its docstring, as `rorqual config`
shows it.
"""

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`)")
SPECIAL = re.compile(r"([\[\]<>*_|#])")
INDENTED = "    "


def to_markdown(text: str) -> str:
    """Escapes what Markdown would interpret, except in `code` and in indented lines."""
    lines = []
    for line in text.splitlines():
        if line.startswith(INDENTED):
            lines.append(line)
            continue
        # Code spans stand at the odd positions.
        pieces = CODE.split(line)
        pieces[::2] = [SPECIAL.sub(r"\\\1", piece) for piece in pieces[::2]]
        lines.append("".join(pieces))
    return "\n".join(lines)


def field_comment(lines: list[str], first: int, last: int) -> str:
    """Returns the comment behind a field, or else the comment lines right above it.

    first, last: numbers of the field's lines, from 1.
    """
    _, sign, behind = lines[last - 1].partition("  # ")
    if sign:
        return behind.strip()
    above = []
    number = first - 1
    while number > 0 and lines[number - 1].lstrip().startswith("# "):
        above.insert(0, lines[number - 1].strip(" #"))
        number -= 1
    return " ".join(above)


class PlainDocstrings(griffe.Extension):
    """Makes Markdown of docstrings and of the comments of fields."""

    def on_object(self, *, obj: griffe.Object, loader: Any, **_: Any) -> None:
        """Replaces the docstring of an object that was read."""
        if obj.is_class:
            self.drop_plain_attributes(obj)
        parent = obj.parent
        if obj.docstring is None and obj.is_attribute and parent is not None and parent.is_class:
            lines = loader.lines_collection[obj.filepath]
            comment = field_comment(lines, obj.lineno, obj.endlineno) if obj.lineno else ""
            if comment:
                obj.docstring = griffe.Docstring(comment, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def drop_plain_attributes(self, cls: griffe.Object) -> None:
        """Leaves out what a constructor assigns to `self` without a word about it."""
        for name, member in list(cls.members.items()):
            if member.is_alias or member.docstring is not None:
                continue
            if "instance-attribute" in member.labels and "class-attribute" not in member.labels:
                del cls.members[name]
