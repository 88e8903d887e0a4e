"""Trains a small DeepSeek-V3 on one sentence, and prints the shape of the data at every step.

python examples/deepseek_v3.py
"""

import string
from dataclasses import replace

import torch

from rorqual.costs import costs
from rorqual.layers.attention import MLAConfig
from rorqual.layers.balance import max_violation, update_bias
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel
from rorqual.presets import preset
from rorqual.serve.decoding import speculate
from rorqual.serve.drafts import AcceptanceStats

text = "the blue whale sings; the blue whale dives; the sea is blue and wide. " * 2
# a vocabulary of 100 letters
ids = torch.tensor([[string.printable.index(letter) for letter in text]])

classroom = preset("classroom")
print(
    f"1. classroom: {costs(classroom).total:,} parameters, {costs(classroom).activated:,} "
    "activated a token"
)
attention = MLAConfig(
    heads=4, q_lora_rank=24, kv_lora_rank=16, nope_dim=16, rope_dim=8, value_dim=16
)
config = replace(
    classroom, gqa=None, mla=attention, moe=replace(classroom.moe, shared=1), mtp=MTPConfig()
)
model = LanguageModel(config)
size = costs(config)
print(
    "   with latent attention, a shared expert and multi-token prediction: "
    f"{size.total:,} + {size.mtp:,} for MTP"
)

hidden, auxes = model.hidden(ids)
print(
    f"2. ids {list(ids.shape)} -> embeddings -> {config.layers} blocks -> hidden "
    f"{list(hidden.shape)} = [B, T, D]"
)
for layer, routing in enumerate(aux.routing for aux in auxes if aux.routing is not None):
    shown = zip(
        text[:5], routing.topk_indices[0].tolist(), routing.weights[0].tolist(), strict=False
    )
    print(
        f"   block {layer}: "
        + ", ".join(f"{c!r} to {e} by {w[0]:.2f} {w[1]:.2f}" for c, e, w in shown)
    )
print(
    f"   logits {list(model.logits(hidden).shape)}, the head is the embedding "
    f"({model.head.weight.shape[0]} letters)"
)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
print(
    "3. training: next letter + 0.3 * the one after it (MTP) + balance; biases move once a step, "
    "without a gradient"
)
for step in range(101):
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    for block, counts in zip([*model.blocks, model.mtp[0].block], loss.counts, strict=True):
        update_bias(block.ffn.router.e_score_correction_bias, counts, rate=0.02)
    if step % 20 == 0:
        load = ", ".join(f"{max_violation(counts):.2f}" for counts in loss.counts)
        print(
            f"   step {step:2d}: next {loss.next_token:.3f} nats, the one after {loss.mtp:.3f}, "
            f"MaxVio {load}"
        )

cache = model.new_cache(batch=1)
model(ids[:, :20], cache=cache)
latent = cache.layers[0].attention.latent
cached = latent.buffer[:, : cache.length]
print(
    f"4. the cache after {cache.length} letters: {list(cached.shape)} a layer, latent and rope key"
)
print(
    f"   {cached.shape[-1]} values a token, where 4 heads of keys and values would keep "
    f"{4 * (16 + 8 + 16)}"
)

prompt = ids[0, :4].tolist()
acceptance_stats = AcceptanceStats()
generated = "".join(
    string.printable[i]
    for (i,) in speculate(model, [prompt], max_new_tokens=60, acceptance_stats=acceptance_stats)
)
print(f"5. {text[:4]!r} goes on {generated!r}")
print(
    f"   MTP drafted {acceptance_stats.drafted} letters, {acceptance_stats.accepted} stood; "
    f"60 letters took {acceptance_stats.rounds + 1} forwards"
)
