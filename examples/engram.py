"""Shows Engram step by step: the rows a token looks up, the gates that weigh them, their effect.

python examples/engram.py
"""

import torch

from rorqual.data.tokenizer import train
from rorqual.layers.context import context
from rorqual.layers.engram import EngramConfig
from rorqual.model import LanguageModel, ModelConfig

text = "The blue whale is large. A small boat met THE BLUE WHALE at sea, and the blue whale sang."
tokenizer = train([text.lower(), text, "Blue Whale", "the sea"] * 20, vocab_size=330)
ids = torch.tensor([tokenizer.encode(text)])  # [1, T]
words = [tokenizer.token(i).strip() for i in ids[0].tolist()]
canonical = torch.from_numpy(tokenizer.canonical_map())
print(
    f"1. {len(words)} ids of {tokenizer.vocab_size}; folded over case and spaces, "
    f"{canonical.max() + 1} are left:"
)
alike = [i for i in range(tokenizer.vocab_size) if canonical[i] == canonical[ids[0, 2]]]
print(f"   one canonical id for {', '.join(repr(tokenizer.token(i)) for i in alike)}")

memory = EngramConfig(layers=(1,), rows_per_head=(500, 500), heads=2, head_dim=16, conv=False)
config = ModelConfig(
    vocab_size=tokenizer.vocab_size, dim=32, layers=2, dense_width=64, engram=memory, init_std=0.1
)
model = LanguageModel(config, canonical)
# Addresses of all layers are computed at once, from the ids alone.
rows = model.addresses(ids, context(1, len(words), "cpu"))
primes = model.addresses.primes.flatten().tolist()
print(
    f"2. addresses {list(rows.shape)} = [layers, batch, time, rows]: "
    "the last 2 and the last 3 ids, 2 hashes of each"
)
for t, word in enumerate(words):
    print(
        f"   {word:6s} 2-gram rows {rows[0, 0, t, :2].tolist()!s:11s} 3-gram rows "
        f"{rows[0, 0, t, 2:].tolist()}"
    )
whale = [t for t, word in enumerate(words) if word.lower() == "whale"]
print(f"   'the blue whale' reads the same rows at positions {whale}, whatever its case")
print(
    f"   row = offset + (xor of id * multiplier) mod prime, primes {primes}: "
    f"a table of {sum(primes):,} rows"
)

# A model starts this prefetch before its first block runs.
looked_up = model.tables[0].prefetch(rows[0]).wait()
print(
    f"3. recall {list(looked_up.shape)}: as many values for any size of table, "
    "read while block 0 computes"
)

gates: list[torch.Tensor] = []
model.blocks[1].engram.gate.register_forward_hook(
    lambda module, arguments, out: gates.append(out[0, :, 0].detach())
)
# Only the rows that were read have a gradient, not the whole table.
model.tables[0].sparse = True
dense = torch.optim.AdamW(
    [p for name, p in model.named_parameters() if not name.startswith("tables.")], lr=1e-2
)
sparse = torch.optim.SparseAdam(model.tables.parameters(), lr=1e-1)
print("4. training on this one text; the gate opens where the rows have become worth trusting")
for step in range(61):
    loss = model.loss(ids[:, :-1], ids[:, 1:]).total
    model.zero_grad()
    loss.backward()
    if step % 20 == 0:
        touched = model.tables[0].weight.grad.coalesce().indices().shape[1]
        print(
            f"   step {step:2d}: {loss:.2f} nats, mean gate {gates[-1].mean():.2f}, "
            f"{touched} rows with a gradient"
        )
    dense.step(), sparse.step()
print(
    "   "
    + " ".join(f"{word} {gate:.2f}" for word, gate in zip(words, gates[-1].tolist(), strict=False))
)

with torch.no_grad():
    kept_loss = model.loss(ids[:, :-1], ids[:, 1:]).total
    model.tables[0].weight.zero_()
    lost = model.loss(ids[:, :-1], ids[:, 1:]).total
print(f"5. with its memory {kept_loss:.3f} nats; with every row set to zero {lost:.3f}")
