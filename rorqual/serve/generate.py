"""Loads a model from a run folder, a hub folder or a hub id, and generates text with it.

The text is encoded; decoding.decode appends ids; a TextStream decodes them to text without
splitting a character.
"""

import difflib
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch

from rorqual import checkpoint, pretrained, runtime
from rorqual.data.files import hub_reason
from rorqual.data.tokenizer import Tokenizer
from rorqual.hub import checkpoints
from rorqual.hub.families import MODEL_TYPES
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig
from rorqual.presets import PRESETS
from rorqual.serve.decoding import decode
from rorqual.serve.drafts import AcceptanceStats
from rorqual.serve.sampling import GREEDY, Sampling
from rorqual.tables import TableConfig

TEMPLATE_SECONDS = 10.0  # the time limit of a chat template
TEMPLATE_BYTES = 1 << 30  # the memory that a chat template may use
TEMPLATE_PROGRAM = Path(__file__).with_name("template.py")


class TooLong(ValueError):
    """A text has more bytes than its context can hold; raised before it is tokenised."""

    def __init__(self, size: int, longest: int) -> None:
        self.tokens = -(-size // longest)
        super().__init__(
            f"got a text of {size} bytes, at least {self.tokens} tokens, expected a shorter one"
        )


class TextStream:
    """Decodes ids one by one to text that can be shown at once.

    A character is held back until its last byte has arrived, and text that may become a stop string
    until it cannot. The pieces concatenate to exactly the text of all ids (up to the first stop
    string). The ids of `hidden` have no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), hidden: Collection[int] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(word for word in stop if word)
        self.hidden = frozenset(hidden)
        self.stopped = False
        self._ids: list[int] = []  # since the last id at whose end every character was complete
        self._before = 0  # number of these ids that are context only
        self._shown = 0  # characters of their text that were already returned
        self._pending = ""

    def push(self, token: int) -> str:
        """Returns the text that can be shown after one more id."""
        if self.stopped or token in self.hidden:
            return ""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        # A broken last character may yet be completed; those before it cannot.
        whole = not text.endswith("\ufffd")
        fresh = text[self._shown : len(text) if whole else -1]
        self._shown += len(fresh)
        if whole:
            self._ids = self._ids[self._before :]
            self._before = len(self._ids)
            self._shown = len(self.tokenizer.decode(self._ids))
        return self._release(fresh)

    def flush(self) -> str:
        """Returns the text that was held back, at the end."""
        if self.stopped:
            return ""
        rest = self._release(self.tokenizer.decode(self._ids)[self._shown :]) if self._ids else ""
        if self.stopped:
            return rest
        pending = self._pending
        self._pending = ""
        self._ids = []
        self._before = 0
        self._shown = 0
        return rest + pending

    def _release(self, fresh: str) -> str:
        """Returns new text up to a stop string, less an end that may become one."""
        text = self._pending + fresh
        places = [position for word in self.stop if (position := text.find(word)) >= 0]
        if places:
            self.stopped = True
            self._pending = ""
            return text[: min(places)]
        keep = max(
            (n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n])),
            default=0,
        )
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The continuation of one prompt.

    `finish`: "stop" (end of document or a stop string) or "length".
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    acceptance_stats: AcceptanceStats | None = None


class Run:
    """A model with its tokenizer, as `load` returns it."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer | None, folder: Path | None = None
    ) -> None:
        self.model = model.eval()
        self._tokenizer = tokenizer
        self.folder = folder
        self._one_at_a_time = threading.Lock()
        self._chatty: subprocess.Popen[str] | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ValueError if its folder has none."""
        if self._tokenizer is None:
            raise ValueError(
                f"{self.folder} holds no tokenizer.json: "
                "put the tokenizer's files beside the weights"
            )
        return self._tokenizer

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        where = next(self.model.parameters())
        return (
            f"Run({self.folder or 'in memory'}: {size:,} parameters, "
            f"{self.config.layers} layers of width "
            f"{self.config.dim}, {' + '.join(self.config.parts)}, "
            f"{str(where.dtype).removeprefix('torch.')} on {where.device})"
        )

    def prompt(
        self, text: str, *, context: int | None = None, parse_special: bool = False
    ) -> list[int]:
        """Returns the ids of a text that begins a document.

        With `parse_special` the text of a special token is the token. TooLong, before anything is
        tokenised, for a text that cannot fit into `context` tokens.
        """
        longest = self.tokenizer.longest
        if context is not None and longest is not None:
            size = len(text.encode())
            if size > context * longest:
                raise TooLong(size, longest)
        # A batch of one: for a batch the tokenizers library releases the GIL.
        (ids,) = self.tokenizer.encode_batch([text], parse_special=parse_special)
        if not parse_special:
            self.tokenizer.refuse_special(ids)
        return [self.tokenizer.begin_id, *ids]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        context: int | None = None,
        options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """Returns the ids of messages ({"role": .., "content": ..}) by the tokenizer's template.

        `options` are other words of the template, as `tools` and `add_generation_prompt` are. The
        text of a special token in a message or an option is text, so that no message can end
        itself and begin another; with `parse_special` it is the token.
        ValueError where it has none, or where it takes more than TEMPLATE_SECONDS; TooLong as in
        `prompt`. jinja renders the template in a sandbox, in a separate process with a limit on its
        memory: no loop or product in a template can block this process.
        """
        if self.folder is None or not chat_template(self.folder):
            raise ValueError(
                f"{self.folder or 'this run'} has no chat template: ask for a completion instead"
            )
        longest = self.tokenizer.longest
        largest = context * longest if context is not None and longest is not None else None
        with self._one_at_a_time:
            if self._chatty is None or self._chatty.poll() is not None:
                self._chatty = self._open_template(self.folder)
            process = self._chatty
            assert process.stdin is not None and process.stdout is not None
            try:
                chat = {"messages": messages, "options": options or {}, "largest": largest}
                line = json.dumps(chat | {"parse_special": parse_special})
                process.stdin.write(line + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            if not line.endswith("\n"):
                process.kill()
                # After this, the next chat finds that the process has ended.
                process.wait()
                limit = f"more than {TEMPLATE_SECONDS:g} s, or ended its process"
                raise ValueError(f"messages: the chat template took {limit}")
        answer = json.loads(line)
        if "size" in answer:
            assert longest is not None
            raise TooLong(answer["size"], longest)
        if "error" in answer:
            raise ValueError(f"messages: the chat template refuses them: {answer['error']}")
        return answer["ids"]

    def _open_template(self, folder: Path) -> subprocess.Popen[str]:
        """Starts the process that renders the template.

        It ends with this process, or when `close` is called.
        """
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                str(TEMPLATE_PROGRAM),
                str(folder),
                str(TEMPLATE_SECONDS),
                str(TEMPLATE_BYTES),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            # A thread for each core would use address space that the memory limit counts.
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2"},
        )
        weakref.finalize(self, process.kill)
        return process

    def close(self) -> None:
        """Ends the process that renders the chat template; the next chat starts another."""
        if self._chatty is not None:
            self._chatty.kill()

    def complete(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        speculative: bool = False,
    ) -> list[Completion]:
        """Completes prompts of any lengths; returns ids, text and finish reasons, in order."""
        tokenizer = self.tokenizer
        acceptance_stats = AcceptanceStats() if speculative else None
        streams = [TextStream(tokenizer, stop) for _ in texts]
        ids: list[list[int]] = [[] for _ in texts]
        pieces: list[list[str]] = [[] for _ in texts]
        ended = [False] * len(texts)
        for step in self.steps(
            [self.prompt(text) for text in texts], max_new_tokens, sampling, acceptance_stats
        ):
            for index, token in enumerate(step):
                if token is None or ended[index]:
                    continue
                ids[index].append(token)
                if token != tokenizer.end_id:
                    pieces[index].append(streams[index].push(token))
                ended[index] = token == tokenizer.end_id or streams[index].stopped
            if all(ended):
                break
        return [
            Completion(
                text="".join([*pieces[index], streams[index].flush()]),
                ids=tuple(ids[index]),
                finish="stop" if ended[index] or streams[index].stopped else "length",
                acceptance_stats=acceptance_stats,
            )
            for index in range(len(texts))
        ]

    @overload
    def generate(self, text: str, **options: Any) -> str: ...

    @overload
    def generate(self, text: list[str], **options: Any) -> list[str]: ...

    def generate(
        self,
        text: str | list[str],
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        speculative: bool = False,
        **options: Any,
    ) -> str | list[str]:
        """Returns the continuation of a text, or of each of a list, without the text itself.

        `options` are Sampling's fields: temperature (0 is greedy), top_k, top_p, min_p,
        repetition_penalty, seed. Text i of a list is sampled with seed + i. `speculative` (a model
        with MTP) returns the same in fewer forwards. ValueError for a number out of range.
        """
        texts = [text] if isinstance(text, str) else text
        sampling = Sampling(**options)
        done = self.complete(
            texts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            speculative=speculative,
        )
        return done[0].text if isinstance(text, str) else [completion.text for completion in done]

    def stream(
        self,
        text: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        acceptance_stats: AcceptanceStats | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yields the continuation of a text, or of ids, piece by piece, as soon as it can be shown.

        `options` are Sampling's fields. With `acceptance_stats` the model drafts, and the drafts
        are counted there.
        """
        pieces = TextStream(self.tokenizer, stop)
        sampling = sampling or Sampling(**options)
        prompt = self.prompt(text) if isinstance(text, str) else list(text)
        for (token,) in self.steps([prompt], max_new_tokens, sampling, acceptance_stats):
            if token is None or token == self.tokenizer.end_id:
                break
            if piece := pieces.push(token):
                yield piece
            if pieces.stopped:
                return
        if piece := pieces.flush():
            yield piece

    def steps(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        acceptance_stats: AcceptanceStats | None = None,
    ) -> Iterator[Sequence[int | None]]:
        """Yields the new ids of every prompt, step by step, and None for one that has ended.

        With `acceptance_stats` the model drafts, and the drafts are counted there. ValueError for
        less than one new token, and for an empty prompt.
        """
        if max_new_tokens < 1:
            raise ValueError(f"got max_new_tokens={max_new_tokens}, expected at least 1")
        yield from decode(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end_id=self.tokenizer.end_id,
            vocab_size=min(self.tokenizer.vocab_size, self.config.vocab_size),
            acceptance_stats=acceptance_stats,
        )


Placement = Literal["device", "host", "disk"]


def load(
    where: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    placement: Placement | None = None,
    tables: Placement | None = None,
    **sizes: Any,
) -> Run:
    """Loads a run folder, a published model's, an exported one, a pretrained name, or a hub id.

    The pretrained models come with the package: `rorqual.pretrained.names()` lists them. A model in
    a folder of such a name here comes before them.

    Of a run that is not finished its newest checkpoint is read; RUN/checkpoints/stepN (or best) is
    that checkpoint. The log names the step.

    `tables` is the placement of Engram's tables, the device if it is not given; `placement` is its
    name in TableConfig, whose other fields (hot_bytes, folder) may follow. On a disk, the tables of
    a published model stay in its own files: the rows that are looked up are read by position.

    Only JSON and safetensors are read: no code of a checkpoint is ever run. dtype None keeps the
    stored one. FileNotFoundError where nothing is found; ValueError where a folder is not a model
    or contradicts itself, and for two placements.
    """
    if tables is not None and placement not in (None, tables):
        raise ValueError(
            f"tables: got {tables!r} and placement {placement!r}, expected one of them: both say "
            "where Engram's tables are"
        )
    folder = find(where)
    wanted = None if dtype is None else runtime.dtype(dtype)
    model = read(folder, TableConfig(placement=tables or placement or "device", **sizes), wanted)
    model.to(device=runtime.device(device), dtype=wanted)
    folder = checkpoint.run_of(folder)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
    return Run(model, tokenizer, folder)


def find(where: str | Path) -> Path:
    """Returns the folder of a model: a local one, a pretrained one, or the snapshot of a hub id.

    `owner/name` is a hub id where no folder `owner` exists here; anything else that is missing is
    taken as a wrong path. Of a hub id only safetensors and JSON are taken.
    """
    folder = pretrained.resolve(where).expanduser()
    if pretrained.is_pretrained(folder) and (Path("runs") / where / "config.json").is_file():
        runtime.log(f"{where}: the pretrained model of the package; your run is runs/{where}")
    if (folder / "config.json").is_file() or checkpoint.is_checkpoint(folder):
        return folder
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(where))
    if folder.exists() or not hub_id or Path(folder.parts[0]).exists():
        raise missing(where)
    return snapshot(str(where))


def missing(where: str | Path) -> Exception:
    """Returns the error for a path that is no model's folder.

    Its message names what exists there instead, or suggests similar paths.
    """
    folder = Path(where).expanduser()
    if (folder / "adapter_config.json").is_file():
        base = "load its base model with transformers and peft"
        return ValueError(
            f"{where} holds a PEFT adapter, expected a whole model with config.json: {base}"
        )
    if folder.is_dir():
        inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
        some = " or ".join(inside[:4]) + (
            f", or one of {len(inside) - 4} more" if len(inside) > 4 else ""
        )
        hint = f"did you mean {some}?" if inside else "has the run been trained and saved?"
        if (folder / "train.json").is_file():
            hint = f"its training has not begun to learn yet; go on: rorqual train {where}"
        elif (folder.absolute().parent / "config.json").is_file():
            hint = f"did you mean {folder.absolute().parent}?"
        return FileNotFoundError(f"{where} holds no config.json: {hint}")
    if folder.exists():
        return ValueError(
            f"{where} is a file, expected the folder it lies in, "
            "with config.json and model.safetensors"
        )
    guess = (
        f"did you mean {' or '.join(map(str, paths))}?" if (paths := similar_paths(folder)) else ""
    )
    if str(where) in PRESETS:
        guess = (
            f"{where} is a preset without trained weights: rorqual train {where}, then its folder, "
            f"runs/{where}; trained are {', '.join(pretrained.names())}"
        )
    hint = guess or (
        "expected a run folder (make one with `rorqual train`), a hub id or a pretrained model: "
        f"{', '.join(pretrained.names())}"
    )
    return FileNotFoundError(f"no folder {where}: {hint}")


def similar_paths(folder: Path) -> list[Path]:
    """Returns at most three existing folders with similar names.

    Each part of the path is corrected in turn.
    """
    paths = [Path(folder.anchor)]
    for piece in folder.relative_to(folder.anchor).parts:
        similar: list[Path] = []
        for parent in paths:
            exact = (parent / piece).is_dir()
            readable = not exact and os.access(parent, os.R_OK | os.X_OK)
            names = [path.name for path in parent.iterdir() if path.is_dir()] if readable else []
            close = [piece] if exact else difflib.get_close_matches(piece, names, 3)
            similar += [parent / name for name in close]
        paths = similar[:3]
    return paths


def snapshot(name: str) -> Path:
    """Downloads the JSON and safetensors of a hub id, and nothing else, unless they are cached."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError("a hub id needs huggingface_hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        message = (
            f"no folder {name}, and the hub did not give a model of that name: {hub_reason(error)}"
        )
        raise FileNotFoundError(message) from error


def read(
    folder: Path, tables: TableConfig | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Reads the model of a local folder, of the kind that its config.json names.

    Published weights are read into `dtype`, or as they are stored; others keep theirs.
    """
    if checkpoint.is_checkpoint(folder) or checkpoint.is_run(folder):
        return checkpoint.load_model(folder, tables=tables)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind == "rorqual":
        if tables not in (None, TableConfig()):
            raise ValueError(
                f"{folder}: got {tables}, expected a run of rorqual's own, "
                "whose tables can lie elsewhere"
            )
        from rorqual.hub.auto import RorqualConfig, RorqualForCausalLM

        if (weights := folder / "model.safetensors").is_file():
            stored = checkpoint.stored_shapes(weights).items()
            ours = {name.removeprefix("model."): shape for name, shape in stored}
            checkpoint.check_sizes(folder, RorqualConfig.from_pretrained(folder).model, ours)
        return RorqualForCausalLM.from_pretrained(folder).model
    if kind not in MODEL_TYPES:
        types = ", ".join(MODEL_TYPES)
        raise ValueError(f"{folder} is a {kind} model, expected a rorqual run, or one of {types}")
    return checkpoints.load(folder, dtype=dtype, tables=tables)


def read_config(where: Path) -> ModelConfig:
    """Reads the config of a local folder, of the kind that its config.json names.

    The log says in a line what `read` would skip of a published folder. The path of a config.json,
    of whatever name, stands for the file alone, without the weights beside it.
    """
    file = where if where.is_file() else where / "config.json"
    if file.name != "config.json":
        return checkpoints.read_config(file)
    if not checkpoint.is_run(file.parent):
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
        if kind in MODEL_TYPES:
            return checkpoints.read_config(where)
    return checkpoint.read_config(file.parent)


def chat_template(folder: Path) -> bool:
    """Returns whether the tokenizer beside a model has a chat template."""
    return bool(template_text(folder))


def template_text(folder: Path) -> str:
    """Returns the chat template of the tokenizer beside a model; empty where it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return ""
    template = json.loads(file.read_text(encoding="utf-8")).get("chat_template") or ""
    if isinstance(template, list):
        # several of them, each with a name
        named = {one["name"]: one["template"] for one in template}
        return named.get("tool_use") or named.get("default") or next(iter(named.values()), "")
    return template
