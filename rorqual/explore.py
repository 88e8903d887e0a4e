"""Serves a page that shows what a run reads and predicts, and what an edit of its memory changes.

    GET  /            explore.html, which loads nothing else
    GET  /api/model   its sizes, and which parts it has
    POST /api/read    {text}
                      tokens, n-grams, rows, gates, experts, predictions
    POST /api/edit    {text, token, order, source}
                      sets rows of the n-gram that ends at `token` to zero, or to those that the
                      last n-gram of `source` reads
    POST /api/undo    {all}
                      undoes the last edit, or every one

The server listens on this machine alone and takes JSON alone, so that a page of another site cannot
use it. Edits end with the process: the run's folder is never written.
"""

import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvicorn
from jaxtyping import Float, Int
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from rorqual import memory, runtime
from rorqual.analyze.measures import without_memory
from rorqual.analyze.states import looking_up
from rorqual.analyze.taps import Taps, quiet
from rorqual.config import from_dict
from rorqual.layers.router import Routing
from rorqual.memory import Editor
from rorqual.serve.body import body
from rorqual.serve.generate import Run, load

LOCAL = ("127.0.0.1", "localhost", "::1")
NAMES = ("127.0.0.1", "localhost", "[::1]")  # the same, as a browser writes them
LARGEST = 1 << 20  # most bytes of a request
MAX_TOKENS = 512  # most tokens of a text
BEST = 8  # predictions of each kind that are shown
ALIKE = 12  # other tokens of the same canonical id that are shown
_PAGE = Path(__file__).with_name("explore.html")
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; "
    # default-src does not cover these three.
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExploreConfig:
    """The run that is shown, and the address of the page."""

    run: str  # a run folder, a pretrained name, a DeepSeek folder or a hub id
    host: str = "127.0.0.1"
    port: int = 8765  # 0: any that is free
    open: bool = False  # open the page in the browser
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.host not in LOCAL:
            raise ValueError(
                f"host: got {self.host!r}, expected {' or '.join(LOCAL)}: "
                "who reaches the page can edit the memory, so "
                "other machines are kept out (an ssh tunnel lets you in)"
            )
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port: got {self.port}, expected 0..65535")


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """A request to read a text."""

    text: str = ""

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("text: got nothing, expected at least one character")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A request to edit the rows of the n-gram of `order` that ends at token `token` of `text`.

    Token 0 is the start of the document.
    """

    text: str = ""
    token: int = -1
    order: int = 2
    source: str | None = None  # the text whose last n-gram's rows are copied; None: zeros


@dataclass(frozen=True, kw_only=True, slots=True)
class Undo:
    """A request to undo the last change, or all."""

    all: bool = False


class Pass(NamedTuple):
    """Results of one forward pass over a text."""

    logs: Float[Tensor, "T V"]  # log-probabilities
    gates: list[Float[Tensor, "T S"]]  # of each block with Engram
    routings: list[Routing]


class Explorer:
    """Reads texts with a run, and keeps the edits of its memory.

    Calls may come from several threads.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = run.model
        self.tokenizer = run.tokenizer
        self.engram = run.config.engram
        self.name = run.folder.resolve().name if run.folder is not None else "a model in memory"
        self.editor = Editor(self.model, self.tokenizer) if self.engram is not None else None
        self.changes: list[str] = []  # each is an edit in every block with Engram
        self._lock = threading.RLock()
        self._vocab_size = min(run.config.vocab_size, self.tokenizer.vocab_size)

    def describe(self) -> dict[str, Any]:
        """Returns sizes and parts of the model, for the page's head."""
        config = self.run.config
        engram = self.engram
        experts = [i for i in range(config.layers) if config.has_experts(i)]
        return {
            "name": self.name,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": config.layers,
            "dim": config.dim,
            "vocab_size": config.vocab_size,
            "streams": config.streams,
            "parts": config.parts,
            "max_tokens": MAX_TOKENS,
            "memory": engram
            and {
                "layers": engram.layers,
                "orders": list(range(2, engram.ngram + 1)),
                "heads": engram.heads,
                "rows": [table.rows for table in self.model.tables],
            },
            "experts": config.moe
            and {"layers": experts, "routed": config.moe.routed, "active": config.moe.active},
        }

    def read(self, body: Read) -> dict[str, Any]:
        """Returns everything that the page shows of a text.

        Position 0 is the start of the document.
        """
        ids = self._ids(body.text)
        with self._lock:
            now = self._forward(ids)
            kinds = {"now": now.logs}
            if self.engram is not None:
                with without_memory(self.model):
                    kinds["without"] = self._forward(ids).logs
            if self.changes:
                with self._untouched():
                    kinds["before"] = self._forward(ids).logs
            return {
                "tokens": self._tokens(ids),
                "ngrams": self._ngrams(ids),
                "rows": []
                if self.engram is None
                else memory.rows(self.model, self._batch(ids))[:, 0].tolist(),
                "gates": [_round(values) for values in now.gates],
                "experts": [_experts(routing) for routing in now.routings],
                "kinds": list(kinds),
                "predictions": self._predictions(kinds),
                "effects": {
                    kind: _round(_effect(now.logs, kinds[kind])) for kind in kinds if kind != "now"
                },
                "surprise": _round(-now.logs[:-1].gather(1, _column(ids, now.logs)[1:])[:, 0]),
                "edits": self.standing(),
            }

    def standing(self) -> list[dict[str, Any]]:
        """Returns the changes not undone yet, oldest first, and the rows that each one edited."""
        if self.editor is None or self.engram is None:
            return []
        rows = [edit.rows.tolist() for edit in self.editor.edits]
        step = len(self.engram.layers)
        return [
            {"what": what, "rows": rows[n * step : (n + 1) * step]}
            for n, what in enumerate(self.changes)
        ]

    def edit(self, body: Change) -> dict[str, Any]:
        """Sets rows to zero or overwrites them, in every block with Engram.

        ValueError for what cannot be edited.
        """
        if self.editor is None or self.engram is None:
            raise ValueError("edit: got a model without Engram, expected one with memory")
        if not 2 <= body.order <= self.engram.ngram:
            raise ValueError(
                f"order: got {body.order}, expected 2..{self.engram.ngram}, "
                "the lengths of its n-grams"
            )
        ids = self._ids(Read(text=body.text).text)
        if not 0 <= body.token < len(ids):
            raise ValueError(
                f"token: got {body.token}, expected 0..{len(ids) - 1}, a position of the text"
            )
        source = None if body.source is None else self._ids(Read(text=body.source).text)
        what = self._words(ids, body.token, body.order)
        target = self._ngram(ids, body.token, body.order)
        with self._lock:
            for layer in self.engram.layers:
                if source is None:
                    self.editor.suppress(target, layer)
                else:
                    self.editor.transplant(
                        self._ngram(source, len(source) - 1, body.order), target, layer
                    )
            read = (
                "suppressed"
                if source is None
                else f"reads as {self._words(source, len(source) - 1, body.order)}"
            )
            self.changes.append(f"{what} {read}")
            return {"edits": self.standing()}

    def undo(self, body: Undo) -> dict[str, Any]:
        """Undoes the last change or all; ValueError where nothing was edited."""
        with self._lock:
            if self.editor is None or self.engram is None or not self.changes:
                raise ValueError("undo: got nothing to take back, expected an edit before it")
            for _ in range(len(self.changes) if body.all else 1):
                self.changes.pop()
                for _ in self.engram.layers:
                    self.editor.undo()
            return {"edits": self.standing()}

    def _ids(self, text: str) -> list[int]:
        """Returns the ids of a text, behind the one that begins every text.

        ValueError for more than MAX_TOKENS tokens, and for half a character.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(
                "text: got half of a character (a lone surrogate), expected whole ones"
            )
        ids = [self.tokenizer.begin_id, *self.tokenizer.encode(text)]
        if len(ids) > MAX_TOKENS + 1:
            raise ValueError(f"text: got {len(ids) - 1} tokens, expected at most {MAX_TOKENS}")
        return ids

    def _forward(self, ids: list[int]) -> Pass:
        """Runs the model on one text: log probabilities of known ids, gates and routings.

        ValueError where a prediction is not finite.
        """
        layers = self.engram.layers if self.engram is not None else ()
        names = [f"blocks.{layer}.engram.gate" for layer in layers]
        with quiet(self.model), Taps(self.model, *names) as taps:
            hidden, auxes = self.model.hidden(batch := self._batch(ids))
            logs = self.model.logits(hidden)[0, :, : self._vocab_size].log_softmax(-1)
        if not logs.isfinite().all():
            raise ValueError(
                "model: got predictions that are not finite, expected a run that has not diverged"
            )
        alive = looking_up(self.model, batch)[0, :, None]
        routings = [aux.routing for aux in auxes if aux.routing is not None]
        return Pass(logs, [taps[name][0][0] * alive for name in names], routings)

    def _batch(self, ids: list[int]) -> Int[Tensor, "1 T"]:
        """Returns the ids as a batch of one text on the model's device."""
        return torch.tensor([ids], device=self.model.embed.weight.device)

    def _ngram(self, ids: list[int], position: int, order: int) -> list[int]:
        """Returns the ids of the n-gram that ends at `position`.

        Positions before the document are filled with the id that Engram uses there.
        """
        assert self.engram is not None
        return ([self.engram.missing_id] * order + ids[: position + 1])[-order:]

    def _tokens(self, ids: list[int]) -> list[dict[str, Any]]:
        """Describes each token: its text and, with Engram, tokens of the same canonical id."""
        addresses = self.model.addresses
        tokens = []
        for token in ids:
            one: dict[str, Any] = {"id": token, "text": self.tokenizer.token(token)}
            if addresses is not None:
                canonical = int(addresses.canonical_map[token])
                alike = (addresses.canonical_map == canonical).nonzero()[: ALIKE + 1, 0].tolist()
                one |= {
                    "canonical": canonical,
                    "alike": [self.tokenizer.token(i) for i in alike if i != token][:ALIKE],
                }
            tokens.append(one)
        return tokens

    def _ngrams(self, ids: list[int]) -> list[list[str]]:
        """Returns each token's n-grams as text, shortest first.

        Positions before the document are left out.
        """
        orders = range(2, self.engram.ngram + 1) if self.engram is not None else ()
        return [[self._words(ids, index, order) for order in orders] for index in range(len(ids))]

    def _words(self, ids: list[int], position: int, order: int) -> str:
        """Returns the n-gram that ends at `index` as text; it marks the start of the document."""
        text = "".join(
            self.tokenizer.token(i) for i in ids[max(1, position - order + 1) : position + 1]
        )
        return "“" + ("⟨start⟩" if position < order else "") + text.replace("\n", "⏎") + "”"

    def _predictions(self, kinds: Mapping[str, Float[Tensor, "T V"]]) -> list[list[dict[str, Any]]]:
        """Returns the best predictions of every kind after each token.

        Each has its probability in all kinds; the likeliest with the present memory is first.
        """
        best = [logs.topk(min(BEST, logs.shape[1])).indices for logs in kinds.values()]
        ids = torch.cat(best, -1)  # [T, kinds * BEST]
        chances = torch.stack([logs.gather(1, ids).exp() for logs in kinds.values()], -1)
        predictions = []
        for names, rows in zip(ids.tolist(), chances.tolist(), strict=True):
            once = dict(zip(names, rows, strict=True))
            order = sorted(once, key=lambda i: -once[i][0])
            predictions.append(
                [
                    {"text": self.tokenizer.token(i), "p": [round(p, 5) for p in once[i]]}
                    for i in order
                ]
            )
        return predictions

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Restores the memory as it was before every edit, for a `with` block."""
        assert self.editor is not None and self.engram is not None
        tables = dict(zip(self.engram.layers, self.model.tables.parameters(), strict=True))
        rows_before = []
        for edit in reversed(self.editor.edits):
            rows = tables[edit.layer].detach()
            rows_before.append((rows, edit.rows, rows[edit.rows].clone()))
            rows[edit.rows] = edit.before
        try:
            yield
        finally:
            for rows, ids, values in reversed(rows_before):
                rows[ids] = values


def _column(ids: list[int], like: Tensor) -> Int[Tensor, "T 1"]:
    """Returns ids as a column [T, 1] on the device of `like`."""
    return torch.tensor(ids, device=like.device)[:, None]


def _effect(now: Float[Tensor, "T V"], without: Float[Tensor, "T V"]) -> Float[Tensor, " T"]:
    """Returns how far the memory, or its edits, moved each prediction: KL(now || without), nats."""
    return (now.exp() * (now - without)).sum(-1).clamp_min(0.0)


def _round(values: Tensor) -> Any:
    """Returns the numbers of a tensor, rounded to six digits, as lists for JSON."""
    return [
        [round(v, 6) for v in row] if isinstance(row, list) else round(row, 6)
        for row in values.float().tolist()
    ]


def _experts(routing: Routing) -> list[list[dict[str, Any]]]:
    """Returns the experts that each token selected, heaviest first."""
    rows = zip(routing.topk_indices[0].tolist(), routing.weights[0].float().tolist(), strict=True)
    return [
        [
            {"expert": e, "weight": round(w, 4)}
            for e, w in sorted(zip(*row, strict=True), key=lambda x: -x[1])
            if w
        ]
        for row in rows
    ]


def app(run: Run) -> Starlette:
    """Returns the ASGI application that serves the page of a run and answers its requests."""
    explorer = Explorer(run)
    page = _PAGE.read_text(encoding="utf-8")

    async def root(_: Request) -> Response:
        return HTMLResponse(
            page, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
        )

    async def model(_: Request) -> Response:
        return JSONResponse(explorer.describe())

    def answering(
        kind: type[Any], call: Callable[[Any], dict[str, Any]]
    ) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                answer_json = await run_in_threadpool(
                    call, from_dict(kind, _object(await body(request, LARGEST)))
                )
                return JSONResponse(answer_json)
            except ValueError as error:
                return JSONResponse({"error": str(error)}, status_code=400)

        return answer

    return Starlette(
        routes=[
            Route("/", root),
            Route("/api/model", model),
            Route("/api/read", answering(Read, explorer.read), methods=["POST"]),
            Route("/api/edit", answering(Change, explorer.edit), methods=["POST"]),
            Route("/api/undo", answering(Undo, explorer.undo), methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES))],
    )


def _object(value: Any) -> dict[str, Any]:
    """Returns a request's body if it is a JSON object; ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"body: got a {type(value).__name__}, expected an object")
    return value


def main(config: ExploreConfig) -> None:
    """Serves the page of a run until it is interrupted.

    ValueError for a port that is taken, and for what `load` refuses.
    """
    run = load(config.run, device=config.device)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ValueError(
            f"port: got {config.port} ({error.strerror}), expected a free one; 0 takes any"
        ) from error
    with listening:
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"http://{host}:{listening.getsockname()[1]}/"
        runtime.log(f"exploring {run!r}")
        runtime.log(f"{address} (ctrl-C ends it; edits are not saved)")
        # The socket listens already, so the browser waits for the first answer.
        if config.open:
            webbrowser.open(address)
        uvicorn.Server(uvicorn.Config(app(run), log_level="warning")).run(sockets=[listening])
