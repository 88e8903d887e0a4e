"""Shows a mixture of experts step by step: routing, grouped products, and balancing the load.

It prints which experts each token takes, with what weight, and how the load evens out.

python examples/moe.py
"""

import torch

from rorqual.layers.balance import BalanceConfig, losses, max_violation, update_bias
from rorqual.layers.moe import MoE, MoEConfig, sort_slots
from rorqual.layers.router import RouterConfig

torch.manual_seed(0)
torch.set_printoptions(precision=2, sci_mode=False, linewidth=120)
words = ["the", "whale", "sings", "and", "the", "whale", "dives"]

# 8 experts, 2 a token, selected from 2 of 4 groups of two, as in DeepSeek-V3;
# one shared expert for all tokens.
config = MoEConfig(
    routed=8, active=2, shared=1, width=16, router=RouterConfig(groups=4, groups_kept=2, scale=2.5)
)
moe = MoE(config, dim=32)
of_word = {word: torch.randn(32) for word in sorted(set(words))}
# Each word has one random vector, so the same word is routed to the same experts.
hidden = torch.stack([of_word[word] for word in words])[None]

print(
    f"1. hidden states {list(hidden.shape)} = [batch, time, dim]; "
    f"the router scores {config.routed} experts a token"
)
routing = moe.router(hidden)
print(f"   scores of {words[1]!r}, sigmoid(W hidden): {routing.scores[0, 1].detach()}")

print("2. the best two of the best two groups, their scores scaled to sum to 2.5")
for word, expert_ids, weights in zip(
    words, routing.topk_indices[0].tolist(), routing.weights[0].tolist(), strict=True
):
    print(f"   {word:6s} -> experts {expert_ids} with weights {weights[0]:.2f} {weights[1]:.2f}")

print(
    "3. every token is copied to its two experts, and the copies are sorted by expert: "
    "one grouped product"
)
slots = sort_slots(routing, dropping=False)
owner = [words[slot // config.active] for slot in slots.order.tolist()]
for expert, rows in enumerate(torch.arange(len(owner)).split(slots.counts.tolist())):
    print(f"   expert {expert}: {len(rows)} rows {[owner[row] for row in rows.tolist()]}")

print(
    "4. SwiGLU of each expert on its rows, weighted and summed back; plus the shared expert, "
    "which has no weight"
)
out, _ = moe(hidden)
first = hidden[0, 0]
parts = [moe.shared(first)]
for expert, weight in zip(routing.topk_indices[0, 0], routing.weights[0, 0], strict=True):
    gate, up = (first @ moe.experts.gate_up[expert]).chunk(2)
    parts.append(weight * (torch.nn.functional.silu(gate) * up) @ moe.experts.down[expert])
print(
    f"   out {list(out.shape)}; by hand for {words[0]!r}: off by "
    f"{(sum(parts) - out[0, 0]).abs().max():.1e}"
)

print("5. balance: what a skewed router costs, and the bias that cures it without a loss")
# A common direction raises the scores of some experts and lowers those of others.
crowd = torch.randn(4, 256, 32) + torch.randn(32)
balance = BalanceConfig(
    sequence=1.0, expert=1.0, device=1.0, communication=1.0, devices=4, device_limit=2, z_loss=1.0
)
costs = losses(moe.router(crowd), balance, config.active)
print(
    "   "
    + ", ".join(f"{name} {value:.2f}" for name, value in costs.items())
    + "   (coefficients 1)"
)
for step in range(81):
    counts = moe.router(crowd).counts()
    if step % 20 == 0:
        print(
            f"   step {step}: tokens of each expert {counts.tolist()}, "
            f"MaxVio {max_violation(counts):.2f}"
        )
    update_bias(moe.router.e_score_correction_bias, counts, rate=0.01)
print(f"   bias {moe.router.e_score_correction_bias}")
