"""Runs the command named on the command line and returns its exit code.

Neither torch nor the option parser is loaded here, so that `rorqual --help` is fast; a command
loads the package that it calls.

Exit codes: 0 done, 1 failed, 2 the command line is wrong, 130 stopped by ctrl-C.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rorqual import __version__
from rorqual.hints import choose, install

# The module that an optional part needs, and the extra that installs it.
EXTRAS = {
    "olmo_core": "train",
    "tensorboard": "train",
    "datasets": "hub",
    "pyarrow": "hub",
    "fastapi": "serve",
    "llguidance": "serve",
    "prometheus_client": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "matplotlib": "report",
}


class Command(NamedTuple):
    """What a command does, an example, and the file of this folder that has its function."""

    what: str
    example: str
    module: str


COMMANDS = {
    "demo": Command(
        "train a pure mixture of experts and one with Engram, compare them", "demo", "train"
    ),
    "data": Command(
        "what a corpus holds: documents, sizes, licence, a sample", "data wordnet", "inspect"
    ),
    "train": Command(
        "train a model; the same command resumes", "train tiny --data notes/ --steps 500", "train"
    ),
    "config": Command(
        "the whole configuration of a training as YAML, to start from",
        "config tiny > my.yaml",
        "train",
    ),
    "launch": Command(
        "train in several processes, restarted when one dies",
        "launch --nproc-per-node 2 tiny --data notes/",
        "train",
    ),
    "eval": Command(
        "loss in nats a token and bits a byte on text",
        "eval runs/demo/engram --data notes/",
        "infer",
    ),
    "generate": Command(
        "continue a text, as it comes", 'generate runs/demo/engram "A whale is"', "infer"
    ),
    "params": Command(
        "parameters, FLOPs and cache bytes of models, side by side",
        "params moe-27b engram-27b",
        "train",
    ),
    "export": Command(
        "write a model to a folder for transformers and the hub",
        "export runs/demo/engram exported --dtype bfloat16 --license mit",
        "infer",
    ),
    "report": Command("compare runs on one self-contained page", "report runs/demo", "inspect"),
    "explore": Command(
        "a live page of a model: experts, memory rows, gates", "explore runs/demo/engram", "infer"
    ),
    "memory": Command(
        "read and edit what a model remembers, with undo",
        'memory runs/demo/engram "sperm whale"',
        "infer",
    ),
    "table": Command(
        "build, inspect, verify and convert tables of any size",
        "table inspect runs/demo/engram",
        "table",
    ),
    "chat": Command("talk with a model in the terminal", "chat runs/demo/engram", "infer"),
    "serve": Command(
        "answer OpenAI-style requests over HTTP", "serve runs/demo/engram --port 8000", "infer"
    ),
    "bench": Command(
        "measure a server: throughput, latencies, goodput", "bench serve runs/demo/engram", "bench"
    ),
    "plan": Command(
        "find models of equal size and cost for a budget", "plan --like tiny --rho 0.75", "train"
    ),
    "sweep": Command(
        "train a row of models, say what is established", "sweep allocation --seeds 3", "train"
    ),
    "doctor": Command(
        "what this machine has: versions, cores, devices, kernels", "doctor", "inspect"
    ),
}

HELP = """usage: rorqual COMMAND [ARGUMENTS]      rorqual COMMAND --help says more

A laboratory for sparse language models: mixture of experts, Engram memory, \
latent attention, hyper-connections.

{commands}

A training is a preset's name or a YAML file, then what differs; \
a part that is off is switched on by naming it:
  rorqual train tiny --data notes/ model.engram.rows_per_head=5000,5000
  rorqual train my.yaml model.engram=none --model.dim 128
Start here: rorqual generate tiny-engram "A whale is". The small presets (tiny, tiny-engram, \
tiny-gqa, tiny-nsa, ...)
come trained, and every command that runs a model takes their names; \
a model in a folder ./tiny comes before them.
Then rorqual demo (minutes, offline). A run of yours is named by its folder, \
runs/demo/engram or runs/tiny.
--json prints for machines. RORQUAL_DEBUG=1 shows the traceback of an error. --version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    A user's mistake prints one or two lines on standard error, never a traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("\nrorqual: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone; python would raise again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _failed(error, words)


def _run(words: list[str]) -> int:
    """Runs the command that the first word names; 2 for a name that does not exist."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"rorqual {__version__}")
        return 0
    try:
        name = choose("command", words[0], COMMANDS)
    except ValueError as error:
        print(
            f"rorqual: error: {error}\nrorqual --help lists them, each with an example",
            file=sys.stderr,
        )
        return 2
    module = importlib.import_module(f"rorqual.cli.{COMMANDS[name].module}")
    command: Callable[[list[str]], int | None] = getattr(module, f"{name}_command")
    return command(words[1:]) or 0


def help_text() -> str:
    """Lists every command with what it does and an example."""
    width = max(map(len, COMMANDS))
    lines = (
        f"  {name:{width}}  {it.what}\n  {'':{width}}    rorqual {it.example}"
        for name, it in COMMANDS.items()
    )
    return HELP.format(commands="\n".join(lines))


def _failed(error: Exception, words: list[str]) -> int:
    """Prints an error and returns its exit code.

    An exception that no user can cause keeps its traceback, since it is a bug.
    """
    usage = bool(getattr(error, "usage", False))
    missing = isinstance(error, ModuleNotFoundError) and not (error.name or "rorqual").startswith(
        "rorqual"
    )
    expected_error = missing or isinstance(error, (ValueError, OSError, RuntimeError))
    if os.environ.get("RORQUAL_DEBUG") or not expected_error:
        traceback.print_exception(error)
        return 1
    print(f"rorqual: error: {_message(error)}", file=sys.stderr)
    if usage:
        print(f"rorqual {words[0]} --help says more", file=sys.stderr)
    return 2 if usage else 1


def _message(error: Exception) -> str:
    """Returns the line for an error, with the extra to install where a module is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = EXTRAS.get(error.name.partition(".")[0])
        hint = install(extra) if extra else f"pip install {error.name.partition('.')[0]}"
        return f"got no module {error.name} here, expected it installed: {hint}"
    if isinstance(error, FileNotFoundError) and error.filename and error.strerror:
        return f"got {os.fspath(error.filename)!r}, expected a file or folder that exists"
    return str(error) or type(error).__name__
