"""Suggests the right name for a wrong one, and the command that installs a missing module."""

import difflib
from collections.abc import Iterable
from pathlib import Path


def choose(kind: str, name: str, names: Iterable[str]) -> str:
    """Returns `name` if it is among `names`; else a ValueError names the nearest.

    These are up to three names that begin with `name`, or the one that is most similar.
    `kind` is the kind of thing that the message calls it.
    """
    all_names = list(names)
    if name in all_names:
        return name
    similar = [each for each in all_names if name and each.startswith(name)][:3]
    similar = similar or difflib.get_close_matches(name, all_names, 1, 0.4)
    guess = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
    raise ValueError(f"got {kind} {name!r}, expected one of {', '.join(all_names)}{guess}")


def install(extra: str) -> str:
    """Returns the pip command that adds an extra to the rorqual that is running.

    That is a checkout, or what is installed already.
    """
    checkout = Path(__file__).parents[1]
    if not (checkout / "pyproject.toml").is_file():
        return f"pip install 'rorqual[{extra}]'"
    return f"pip install -e '{'.' if checkout == Path.cwd() else checkout}[{extra}]'"
