"""Measures activations: logit lens, CKA, gates, expert load, suppression of the memory.

    lens_l       = KL(softmax(head(norm(x_n))) || softmax(head(norm(x_l))))
                   nats, mean over tokens
    hsic(K, L)   = [tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'K L 1] / (n (n-3))
                 = <centred(K), centred(L)> / (n (n-3))
                   K, L with zeroed diagonals
    cka(X, Y)    = hsic(XX', YY') / sqrt(hsic(XX', XX') hsic(YY', YY'))
                   each hsic a mean over minibatches
    special_l    = sum of p(e, v) ln [p(e, v) / (p(e) p(v))]
                   mutual information of the expert and its token
    alignment_j  = sum of i * s_ij / sum of s_ij over the k layers i most like j
                   position of layer j in the other model

All of them take our models and any causal model of transformers; gates and suppression need a
memory.

Unbiased HSIC: Song et al. 2012; minibatch CKA: Nguyen et al., arXiv 2010.15327; alignment: Engram,
arXiv 2601.07372.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.analyze.states import (
    block_states,
    expert_choices,
    gate_names,
    lens_logits,
    looking_up,
    ours,
    run,
)
from rorqual.analyze.taps import Taps, quiet
from rorqual.data.tokenizer import Tokenizer
from rorqual.layers.engram import Engram
from rorqual.model import IGNORED, LanguageModel


class Gates(NamedTuple):
    """The gate of every token of a text, in each block with Engram and each stream."""

    tokens: list[str]
    layers: tuple[int, ...]  # the blocks with Engram
    values: Float[Tensor, "Lm T S"]  # in (0, 1); 0 at dead tokens


def gates(model: nn.Module, tokenizer: Tokenizer, text: str) -> Gates:
    """Returns the gate of every token, layer and stream over `text`.

    The model is one of ours, or a host with an attached memory. ValueError for a model without
    memory or an empty text.
    """
    names = gate_names(model)
    if not names:
        raise ValueError("gates: got a model without Engram, expected one with memory")
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("gates: got an empty text, expected at least one token")
    input_ids = torch.tensor([[tokenizer.begin_id, *ids]], device=next(model.parameters()).device)
    with quiet(model), Taps(model, *names.values()) as taps:
        run(model, input_ids)
    alive = looking_up(model, input_ids)[0, 1:, None]
    values = torch.stack([(taps[name][0][0, 1:].float() * alive).cpu() for name in names.values()])
    return Gates([tokenizer.token(i) for i in ids], tuple(names), values)


class Load(NamedTuple):
    """Tokens that the experts of every mixture processed."""

    layers: tuple[int, ...]  # the blocks with experts
    counts: Int[Tensor, "L E"]  # tokens per expert
    by_token: Int[Tensor, "L E V"]  # tokens per expert and token id

    @property
    def shares(self) -> Float[Tensor, "L E"]:
        """Each expert's share of its layer's tokens; uniform is 1 / E."""
        return self.counts / self.counts.sum(-1, keepdim=True).clamp_min(1)

    @property
    def specialisation(self) -> Float[Tensor, " L"]:
        """Mutual information of the expert and the token id, in nats, at most ln E.

        It is 0 where every expert processes all token ids alike. Few tokens overstate it: an id
        that occurs once determines its expert.
        """
        joint = self.by_token.double() / self.by_token.sum((1, 2), keepdim=True).clamp_min(1)
        apart = joint.sum(1, keepdim=True) * joint.sum(2, keepdim=True)
        return torch.special.xlogy(joint, joint / apart.clamp_min(1e-300)).sum((1, 2)).float()

    def favourites(self, layer: int, expert: int, k: int = 8) -> list[tuple[int, float]]:
        """Returns the k ids that this expert processes most above their own frequency.

        Each is (id, share here / share everywhere).
        """
        here = self.by_token[layer, expert].float()
        everywhere = self.by_token[layer].sum(0).float()
        lift = (here / here.sum().clamp_min(1)) / (
            everywhere / everywhere.sum().clamp_min(1)
        ).clamp_min(1e-9)
        lift = torch.where(here >= max(2.0, float(here.sum()) * 2e-3), lift, 0.0)
        best = lift.topk(min(k, len(lift)))
        return [(int(i), float(v)) for v, i in zip(best.values, best.indices, strict=True) if v > 0]


def expert_load(model: nn.Module, batches: Iterable[Int[Tensor, "B T"]]) -> Load:
    """Counts the tokens that each expert processes over these batches.

    ValueError for a model without experts, and for no batch.
    """
    layers = tuple[int, ...]()
    by_token = torch.zeros(0, 0, 0, dtype=torch.long)
    for ids in batches:
        choices = expert_choices(model, ids)
        if not by_token.numel():
            layers = choices.layers
            by_token = torch.zeros(
                len(choices.layers), choices.experts, _words(model), dtype=torch.long
            )
        for table, slots in zip(by_token, choices.slots, strict=True):
            _add(table, slots, ids)
    if not by_token.numel():
        raise ValueError("expert load: got no batches, expected at least one")
    return Load(layers, by_token.sum(-1), by_token)


def _words(model: nn.Module) -> int:
    """Returns the number of ids that the model has embeddings for."""
    our_model = ours(model)
    return (
        our_model.config.vocab_size
        if our_model is not None
        else cast(Any, model).get_input_embeddings().weight.shape[0]
    )


def _add(table: Int[Tensor, "E V"], slots: Int[Tensor, "N K"], ids: Int[Tensor, "B T"]) -> None:
    """Counts the tokens by expert and token id, into `table`; a slot of -1 is not counted."""
    places = (slots * table.shape[1] + ids.reshape(-1, 1)).cpu()[(slots >= 0).cpu()]
    table.view(-1).index_add_(0, places, torch.ones_like(places))


def logit_lens(model: nn.Module, ids: Int[Tensor, "B T"]) -> Float[Tensor, " layers"]:
    """Returns the KL from the final prediction to that of each block, in nats; the last entry is 0.

    It takes any causal model.
    """
    final, early = lens_logits(model, ids)
    whole = final.log_softmax(-1)
    return torch.stack(
        [*(_kl(whole, logits.log_softmax(-1)) for logits in early), _kl(whole, whole)]
    ).cpu()


def _kl(p: Float[Tensor, "B T V"], q: Float[Tensor, "B T V"]) -> Float[Tensor, ""]:
    """Computes KL(p || q) in nats, the mean over tokens; p and q are log probabilities."""
    return (p.exp() * (p - q)).sum(-1).mean()


def hsic(x: Float[Tensor, "N D"], y: Float[Tensor, "N D2"]) -> Float[Tensor, ""]:
    """Estimates the Hilbert-Schmidt independence criterion with linear kernels, without bias.

    N is at least 4; the result is float64.
    """
    n = x.shape[0]
    if n < 4 or y.shape[0] != n:
        raise ValueError(
            f"hsic: got {n} and {y.shape[0]} samples, expected as many of both, at least 4"
        )
    return (centred(x) * centred(y)).sum() / (n * (n - 3))


def cka(pairs: Iterable[tuple[Float[Tensor, "N D"], Float[Tensor, "N D2"]]]) -> float:
    """Returns the linear centred kernel alignment of two representations of the same samples.

    The sums run over minibatches. It is 1 for representations that are equal up to rotation, scale
    and shift; about 0 for unrelated ones (it can fall a little below), and 0 where one of them is
    the same for every sample.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in pairs:
        sums += torch.stack([hsic(x, y), hsic(x, x), hsic(y, y)]).cpu()
    return float(sums[0] / (sums[1] * sums[2]).clamp_min(1e-300).sqrt())


def centred(x: Float[Tensor, "N D"]) -> Float[Tensor, "N N"]:
    """Returns the centred linear kernel of the samples, in float64.

    Then hsic(x, y) = <centred(x), centred(y)> / (n (n - 3)). Off the diagonal it is K_ij -
    (K1)_i/(n-2) - (K1)_j/(n-2) + 1'K1/((n-1)(n-2)), on it 0; samples that are all alike have 0
    everywhere. ValueError below 4 samples.
    """
    n = x.shape[0]
    if n < 4:
        raise ValueError(f"centred: got {n} samples, expected at least 4")
    x = x.double()
    # Subtracting the mean changes no entry of the result, apart from the rounding errors of a large
    # mean.
    about = x - x.mean(0)
    x = about.masked_fill(about.square().sum() <= 1e-24 * x.square().sum(), 0.0)
    k = (x @ x.T).fill_diagonal_(0.0)
    sums = k.sum(0) / (n - 2)
    return (k - sums - sums[:, None] + k.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0.0)


def similarity(
    a: nn.Module, b: nn.Module, batches: Iterable[Int[Tensor, "B T"]]
) -> Float[Tensor, "La Lb"]:
    """Returns the CKA of every layer of `a` with every layer of `b` over the same ids.

    HSICs are summed over the batches first.
    """
    across = own_a = own_b = torch.zeros(())
    for ids in batches:
        scale = max(1, ids.numel() * (ids.numel() - 3)) ** -0.5
        left, right = (
            torch.stack(
                [centred(state).flatten() * scale for state in block_states(model, ids)]
            ).cpu()
            for model in (a, b)
        )
        across = across + left @ right.T
        own_a = own_a + left.square().sum(1)
        own_b = own_b + right.square().sum(1)
    if not across.dim():
        raise ValueError("similarity: got no batches, expected at least one")
    return (across / (own_a[:, None] * own_b).clamp_min(1e-300).sqrt()).float()


def alignment(table: Float[Tensor, "La Lb"], k: int = 5) -> Float[Tensor, " Lb"]:
    """Returns for each column j the weighted mean row index of its k most similar rows.

    The weights are the similarities. NaN where no row is similar at all. ValueError for k below 1.
    """
    if k < 1:
        raise ValueError(f"alignment: got k {k}, expected at least 1")
    best = table.clamp_min(0).topk(min(k, table.shape[0]), dim=0)
    return (best.indices * best.values).sum(0) / best.values.sum(0)


@contextmanager
def without_memory(model: nn.Module) -> Iterator[nn.Module]:
    """Zeroes Engram's outputs inside the `with` block; the rest of the model is unchanged."""
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


def suppression(
    model: nn.Module, ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]
) -> tuple[float, float]:
    """Returns mean next-token nats with memory, and with its output suppressed.

    Labels of -100 do not count.
    """
    with quiet(model):
        whole = _nats(model, ids, labels)
        with without_memory(model):
            return whole, _nats(model, ids, labels)


def _nats(model: nn.Module, ids: Tensor, labels: Tensor) -> float:
    """Returns the mean cross-entropy of the labels, in nats; labels of -100 do not count."""
    if isinstance(model, LanguageModel):
        return float(model.loss(ids, labels).next_token)
    return float(
        F.cross_entropy(run(model, ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    )


class MemoryScores(NamedTuple):
    """Scores of a task with memory and without."""

    whole: float
    without: float

    @property
    def share(self) -> float:
        """Share of the score that remains without memory; NaN where the score is 0."""
        return self.without / self.whole if self.whole else math.nan


def suppressed(
    model: nn.Module, tasks: Mapping[str, Callable[[], float]]
) -> dict[str, MemoryScores]:
    """Scores each task with the memory of `model`, and with its output suppressed.

    A task is a function that scores the model.
    """
    with quiet(model):
        whole = {name: float(score()) for name, score in tasks.items()}
        with without_memory(model):
            return {
                name: MemoryScores(whole[name], float(score())) for name, score in tasks.items()
            }
