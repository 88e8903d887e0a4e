"""Activations -> numbers: logit lens, CKA, gates, expert load, suppression of the memory.

    lens_l       = KL(softmax(head(norm(x_n))) || softmax(head(norm(x_l))))            nats, mean over tokens
    hsic(K, L)   = [tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'K L 1] / (n (n-3))  K, L with zeroed diagonals
    cka(X, Y)    = hsic(XX', YY') / sqrt(hsic(XX', XX') hsic(YY', YY'))                each hsic a mean over minibatches
    alignment_j  = sum of i * s_ij / sum of s_ij over the k layers i most like j       where layer j stands in the other

Unbiased HSIC: Song et al. 2012; minibatch CKA: Nguyen et al., arXiv 2010.15327; alignment: Engram, arXiv 2601.07372.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.analyze.taps import Taps, quiet
from rorqual.data.tokenizer import Tokenizer
from rorqual.layers.engram import Engram
from rorqual.layers.router import Routing
from rorqual.model import LanguageModel


class Gates(NamedTuple):
    """How far each token trusted what was recalled."""

    tokens: list[str]
    layers: tuple[int, ...]  # the blocks that remember
    values: Float[Tensor, "Lm T S"]  # in (0, 1)


def gates(model: LanguageModel, tokenizer: Tokenizer, text: str) -> Gates:
    """The gate of every token, layer and stream over `text`. ValueError for a model without memory or an empty text."""
    if model.config.engram is None:
        raise ValueError("gates: got a model without Engram, expected one with memory")
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("gates: got an empty text, expected at least one token")
    names = [f"blocks.{layer}.engram.gate" for layer in model.config.engram.layers]
    with quiet(model), Taps(model, *names) as taps:
        model(torch.tensor([[tokenizer.begin_id, *ids]], device=model.embed.weight.device))
    values = torch.stack([taps[name][0][0, 1:].float().cpu() for name in names])
    return Gates([tokenizer.token(i) for i in ids], model.config.engram.layers, values)


class Load(NamedTuple):
    """What the experts of every mixture took."""

    layers: tuple[int, ...]  # the blocks with experts
    counts: Int[Tensor, "L E"]  # tokens an expert
    by_token: Int[Tensor, "L E V"]  # of which of this id

    @property
    def shares(self) -> Float[Tensor, "L E"]:
        """Each expert's part of its layer's tokens; uniform is 1 / E."""
        return self.counts / self.counts.sum(-1, keepdim=True).clamp_min(1)

    def favourites(self, layer: int, expert: int, k: int = 8) -> list[tuple[int, float]]:
        """The k ids this expert takes most above their own frequency: (id, share here / share everywhere)."""
        here = self.by_token[layer, expert].float()
        everywhere = self.by_token[layer].sum(0).float()
        lift = (here / here.sum().clamp_min(1)) / (everywhere / everywhere.sum().clamp_min(1)).clamp_min(1e-9)
        lift = torch.where(here >= max(2.0, float(here.sum()) * 2e-3), lift, 0.0)
        best = lift.topk(min(k, len(lift)))
        return [(int(i), float(v)) for v, i in zip(best.values, best.indices, strict=True) if v > 0]


def expert_load(model: LanguageModel, batches: Iterable[Int[Tensor, "B T"]]) -> Load:
    """Which tokens each expert took over these batches. ValueError for a model without experts."""
    moe = model.config.moe
    if moe is None:
        raise ValueError("expert load: got a model without experts, expected moe to be on")
    layers = tuple(i for i in range(model.config.layers) if model.config.has_experts(i))
    by_token = torch.zeros(len(layers), moe.routed, model.config.vocabulary, dtype=torch.long)
    with quiet(model):
        for ids in batches:
            for n, routing in enumerate(model.hidden(ids)[1]):
                _add(by_token[n], routing, ids)
    return Load(layers, by_token.sum(-1), by_token)


def _add(table: Int[Tensor, "E V"], routing: Routing, ids: Int[Tensor, "B T"]) -> None:
    chosen = routing.chosen.flatten(0, 1)  # [N, K]
    taken = (routing.weights.flatten(0, 1) != 0).cpu()
    places = (chosen * table.shape[1] + ids.reshape(-1, 1)).cpu()[taken]
    table.view(-1).index_add_(0, places, torch.ones_like(places))


def logit_lens(model: LanguageModel, ids: Int[Tensor, "B T"]) -> Float[Tensor, " layers"]:
    """KL from the final prediction to what each block's streams already say, in nats; the last entry is 0."""
    with quiet(model), Taps(model, *_blocks(model)) as taps:
        final = model(ids).log_softmax(-1)
        found = []
        for index in range(model.config.layers):
            streams, carried, _ = taps[f"blocks.{index}"][0]
            hidden = streams[:, :, 0] if model.exit is None else model.exit(streams, carried)
            found.append(_kl(final, model.logits(hidden).log_softmax(-1)))
    return torch.stack(found).cpu()


def _kl(p: Float[Tensor, "B T V"], q: Float[Tensor, "B T V"]) -> Float[Tensor, ""]:
    return (p.exp() * (p - q)).sum(-1).mean()


def _blocks(model: LanguageModel) -> list[str]:
    return [f"blocks.{index}" for index in range(model.config.layers)]


def hsic(x: Float[Tensor, "N D"], y: Float[Tensor, "N D2"]) -> Float[Tensor, ""]:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion with linear kernels; N at least 4, float64."""
    n = x.shape[0]
    if n < 4 or y.shape[0] != n:
        raise ValueError(f"hsic: got {n} and {y.shape[0]} samples, expected as many of both, at least 4")
    x, y = x.double(), y.double()
    k, l = (z @ z.T - torch.diag((z * z).sum(1)) for z in (x, y))
    both = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))
    return ((k * l).sum() + both) / (n * (n - 3))


def cka(pairs: Iterable[tuple[Float[Tensor, "N D"], Float[Tensor, "N D2"]]]) -> float:
    """Linear centred kernel alignment of two representations, over minibatches of the same samples: 1 for equal ones

    up to rotation and scale, about 0 for unrelated ones (it can fall a little below)."""
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in pairs:
        sums += torch.stack([hsic(x, y), hsic(x, x), hsic(y, y)]).cpu()
    return float(sums[0] / (sums[1] * sums[2]).clamp_min(1e-300).sqrt())


def layer_states(model: LanguageModel, ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "N D"]]:
    """What each block leaves, streams summed, tokens flattened."""
    with quiet(model), Taps(model, *_blocks(model)) as taps:
        model.hidden(ids)
        return [taps[f"blocks.{i}"][0][0].sum(2).flatten(0, 1).float() for i in range(model.config.layers)]


def similarity(a: LanguageModel, b: LanguageModel, batches: list[Int[Tensor, "B T"]]) -> Float[Tensor, "La Lb"]:
    """CKA of every layer of `a` with every layer of `b` over the same ids."""
    states = [(layer_states(a, ids), layer_states(b, ids)) for ids in batches]
    rows = range(a.config.layers), range(b.config.layers)
    return torch.tensor([[cka((x[i], y[j]) for x, y in states) for j in rows[1]] for i in rows[0]])


def alignment(table: Float[Tensor, "La Lb"], k: int = 5) -> Float[Tensor, " Lb"]:
    """For each column j the mean row index, weighted by similarity, of its k most similar rows."""
    best = table.clamp_min(0).topk(min(k, table.shape[0]), dim=0)
    return (best.indices * best.values).sum(0) / best.values.sum(0).clamp_min(1e-12)


@contextmanager
def without_memory(model: nn.Module) -> Iterator[nn.Module]:
    """Engram's outputs are zero inside the `with` block; the rest of the model is as it was."""
    handles = [
        module.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
        for module in model.modules()
        if isinstance(module, Engram)
    ]
    if not handles:
        raise ValueError("without_memory: got a model without Engram, expected one with memory")
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def suppression(model: LanguageModel, ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]) -> tuple[float, float]:
    """Mean next-token nats with memory, and with its output suppressed."""
    with quiet(model):
        whole = float(model.loss(ids, labels).next_token)
        with without_memory(model):
            return whole, float(model.loss(ids, labels).next_token)
