"""Selects the experts of each token and computes their weights.

    logits  = W hidden                              float32; noise * N(0, 1) is added in training
    scores  = softmax(logits) | sigmoid(logits) | sqrt(softplus(logits))
    chosen  = the K best of scores + bias           from the best groups only; or by token id
    weights = scale * scores[chosen] (/ their sum + 1e-20)    without the bias

| model       | score        | groups    | group score                | weights      | scale |
|-------------|--------------|-----------|----------------------------|--------------|-------|
| DeepSeekMoE | softmax      | none      |                            | as scored    | 1     |
| DeepSeek-V2 | softmax      | 8, 3 kept | its best score             | as scored    | 16    |
| DeepSeek-V3 | sigmoid      | 8, 4 kept | sum of its two best biased | renormalised | 2.5   |
| DeepSeek-V4 | sqrtsoftplus | none      | (first layers: token ids)  | renormalised | 1.5   |

DeepSeekMoE arXiv:2401.06066, V2 2405.04434, V3 2412.19437; the bias: 2408.15664. Noise: Shazeer et
al. 1701.06538; as many experts as a token needs: Huang et al. 2403.07652; selection by token id:
Roller et al. 2106.04426.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.model_config import RouterConfig as RouterConfig

SUM_EPS = 1e-20  # avoids a division by zero where all scores of a token vanish


class Routing(NamedTuple):
    """The experts of each token in K slots, best first.

    A slot of weight 0 is not taken: adaptive k drops it, or the token is padding.
    """

    topk_indices: Int[Tensor, "B T K"]
    weights: Float[Tensor, "B T K"]
    scores: Float[Tensor, "B T E"]
    logits: Float[Tensor, "B T E"]  # without noise
    valid: Bool[Tensor, "B T"] | None = None  # False at padding; None: no padding
    fixed: bool = False  # selected by token id: no balance loss could change it
    # The routing of the whole sequences of which these tokens are a part; None: of these tokens.
    whole: Any = None

    def select(self, sequences: Int[Tensor, "B 1"], columns: Int[Tensor, "B T2"]) -> "Routing":
        """Returns the routing of the tokens at these sequences and columns."""
        return Routing(
            self.topk_indices[sequences, columns],
            self.weights[sequences, columns],
            self.scores[sequences, columns],
            self.logits[sequences, columns],
            None if self.valid is None else self.valid[sequences, columns],
            self.fixed,
        )

    def taken(self) -> Bool[Tensor, "B T K"]:
        """Marks the slots whose expert is computed: those with a weight other than 0."""
        return self.weights != 0

    def counts(self) -> Int[Tensor, " E"]:
        """Counts the slots of each expert that are taken, without padding."""
        taken = self.taken().flatten().long()
        return taken.new_zeros(self.scores.shape[-1]).scatter_add_(
            0, self.topk_indices.flatten(), taken
        )


def score(logits: Float[Tensor, "*N E"], kind: str) -> Float[Tensor, "*N E"]:
    """Applies softmax, sigmoid or sqrt(softplus) to the logits.

    Where softplus underflows the score is 0 and has no gradient.
    """
    if kind == "softmax":
        return logits.softmax(-1)
    if kind == "sigmoid":
        return logits.sigmoid()
    return _SqrtSoftplus.apply(logits)


class _SqrtSoftplus(torch.autograd.Function):
    """Computes sqrt(softplus(x)) with a stable backward.

    Its slope sigmoid(x) / (2 sqrt(softplus(x))) goes to 0 with x. The product of the two slopes
    that autograd would form overflows on the way, or is infinity times 0.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        root = F.softplus(x).sqrt()
        ctx.save_for_backward(x, root)
        return root

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        x, root = ctx.saved_tensors
        slope = x.sigmoid() / (2 * root)
        return grads[0] * slope.masked_fill(root == 0, 0.0)


def within_groups(
    biased: Float[Tensor, "*N E"], groups: int, groups_kept: int, group_score: str
) -> Float[Tensor, "*N E"]:
    """Sets `biased` to -inf outside of each token's `groups_kept` best groups.

    A bias may be negative, so 0 would not exclude an expert.
    """
    if groups_kept == groups:
        return biased
    grouped = biased.unflatten(-1, (groups, -1))
    # [*N, groups]
    worth = grouped.amax(-1) if group_score == "max" else grouped.topk(2, -1).values.sum(-1)
    outside = torch.ones_like(worth, dtype=torch.bool).scatter(
        -1, worth.topk(groups_kept, -1).indices, False
    )
    return grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)


def within_mass(
    weights: Float[Tensor, "*N K"], total: Float[Tensor, "*N"], mass: float, least: int
) -> Bool[Tensor, "*N K"]:
    """Marks the first slots up to the one with which their share of `total` reaches `mass`.

    At least the first `least` slots are marked.
    """
    before = weights.cumsum(-1) - weights
    return (before < mass * total[..., None]) | (
        torch.arange(weights.shape[-1], device=weights.device) < least
    )


def token_table(vocab_size: int, experts: int, active: int, seed: int) -> Int[Tensor, "V K"]:
    """Draws K different experts for every token id, uniformly; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(vocab_size, experts, generator=generator, device="cpu").topk(active, -1).indices
    )


class Router(nn.Module):
    """Scores every expert for every token and selects `active` of them.

    In layers that select by token id, the scores still give the weights.
    """

    def __init__(
        self,
        config: RouterConfig,
        dim: int,
        experts: int,
        active: int,
        layer: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        """Builds the router of the block with index `layer`.

        ValueError if it selects by token id and `vocab_size` is None.
        """
        super().__init__()
        self.config = config
        self.active = active
        self.weight = nn.Parameter(torch.randn(experts, dim) * dim**-0.5)
        self.e_score_correction_bias: Tensor | None
        self.register_buffer(
            "e_score_correction_bias",
            torch.zeros(experts) if config.bias_of(layer) else None,
        )
        # The bias of image tokens: it stays as it is loaded, since no image is trained on here.
        self.image_bias: Tensor | None
        self.register_buffer("image_bias", torch.zeros(experts) if config.image_ids else None)
        self.table: Tensor | None
        self.register_buffer("table", None)
        if config.by_token_id(layer):
            if vocab_size is None:
                raise ValueError("router.token_id_layers: got no vocabulary, expected its size")
            # Weights may have no values yet where the table has them.
            device = torch.get_default_device()
            self.table = token_table(vocab_size, experts, active, layer).to(device)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        ids: Int[Tensor, "B T"] | None = None,
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> Routing:
        """Selects the experts of every token and computes their weights.

        `ids` are needed in layers that select by them; `valid` is False at padding.
        """
        logits = self._logits(hidden)
        noisy = logits
        if self.training and self.config.noise:
            noisy = logits + self.config.noise * torch.randn_like(logits)
        scores = score(noisy, self.config.score)
        topk_indices = self._topk_indices(scores.detach(), ids)
        weights = self._weights(scores, topk_indices, valid)
        return Routing(topk_indices, weights, scores, logits, valid, self.table is not None)

    def _apply(self, fn, recurse=True):
        """Keeps the bias in float32 when the model is converted.

        Steps of 0.001 would be lost in bfloat16.
        """
        biases = {name: getattr(self, name) for name in ("e_score_correction_bias", "image_bias")}
        super()._apply(fn, recurse)
        for name, before in biases.items():
            after = getattr(self, name)
            if before is not None and after is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _logits(self, hidden: Tensor) -> Tensor:
        """Computes the logits in float32 at least, also under autocast."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.weight.to(dtype))

    def _topk_indices(self, scores: Tensor, ids: Tensor | None) -> Tensor:
        """Selects the K experts of each token, [B, T, K].

        Where the layer has a table it is those of the token's id, else the K largest of scores +
        bias in the best groups, best first; image tokens have a bias of their own. ValueError where
        ids are needed and there are none.
        """
        if self.table is not None:
            if ids is None:
                raise ValueError(
                    "router: got no token ids, expected them in a layer that chooses by token id"
                )
            return self.table[ids]
        config = self.config
        bias = self.e_score_correction_bias
        if self.image_bias is not None and ids is not None:
            images = torch.isin(ids, torch.tensor(config.image_ids, device=ids.device))
            other = torch.zeros_like(self.image_bias) if bias is None else bias
            bias = torch.where(images[..., None], self.image_bias, other)
        biased = scores if bias is None else scores + bias
        allowed = within_groups(biased, config.groups, config.groups_kept, config.group_score)
        return allowed.topk(self.active, -1).indices

    def _weights(self, scores: Tensor, topk_indices: Tensor, valid: Tensor | None) -> Tensor:
        """Computes the weights of the selected experts from their scores, without the bias.

        Padding and slots beyond the adaptive mass get 0.
        """
        weights = scores.gather(-1, topk_indices)
        if self.config.adaptive_mass is not None:
            allowed = within_mass(
                weights.detach(),
                scores.detach().sum(-1),
                self.config.adaptive_mass,
                self.config.min_active,
            )
            weights = weights * allowed
        if self.config.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + SUM_EPS)
        if self.config.scale != 1.0:
            weights = weights * self.config.scale
        return weights if valid is None else weights * valid[..., None]
