# %% [markdown] lang="en"
# # 6. Gates over a sentence: a case study
#
# Engram reads rows for every token, whether they fit or not: a hash cannot know what a sentence is about. A gate, computed from the hidden
# state, decides how much of what was read is let in. You compute the gate by hand, watch it over sentences, and measure what the
# memory is worth where it is open and where it is shut.
#
# Level: look inside. Takes 20 minutes. Paper: Conditional Memory via Scalable Lookup (arXiv 2601.07372), section 2.3 and the case study of
# gates.
# %% [markdown] lang="zh"
# # 6. 句子上的门控：案例研究
#
# 不管合不合适，Engram 为每个词元都读出若干行：哈希无从知道句子在说什么。由隐藏状态算出的门控决定放进来多少。这里手算门控，观察它在句子
# 上的变化，并测量在门控开着与关着的地方，记忆各值多少。
#
# 层次：深入内部。用时 20 分钟。论文：Conditional Memory via Scalable Lookup（arXiv 2601.07372）2.3 节与门控案例研究。
# %%
import math
import random
from collections import Counter

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import rorqual as rq
from rorqual.analyze import figures
from rorqual.analyze.measures import gates, suppression, without_memory
from rorqual.analyze.taps import Taps
from rorqual.layers.engram import gate

# %matplotlib inline

# %% [markdown] lang="en"
# ## A trained model
#
# `tiny-engram` comes with rorqual: a small mixture of experts with a memory, trained on the entries of a dictionary (WordNet).
# %% [markdown] lang="zh"
# ## 一个训练好的模型
#
# `tiny-engram` 随 rorqual 一起提供：一个带记忆的小型混合专家模型，在词典（WordNet）条目上训练。
# %%
run = rq.load("tiny-engram")
model, tokenizer, config = run.model, run.tokenizer, run.config
cost = rq.costs.costs(config)
print(f"{cost.total:,} parameters, {cost.memory:,} of them rows of the memory")
print(f"memory in blocks {config.engram.layers}, {config.engram.rows_per_token} rows a token")
print(f"{config.streams} residual streams, a gate for each")


# %% [markdown] lang="en"
# ## The gate
#
# What was read, $e$, is projected to a key. The hidden state of a stream, $h$, is the query; both are normed. With $D$ the width:
#
# $$s = \frac{\langle \mathrm{norm}(h), \mathrm{norm}(W_k e) \rangle}{\sqrt{D}}, \qquad
# g = \sigma\!\left(\mathrm{sign}(s) \sqrt{|s|}\right)$$
#
# It is attention with a single key: a sigmoid in place of a softmax, so that the answer may be "nothing of it". The signed root makes
# small scores larger and large ones smaller: the gate is decided early and saturates late. (It is in the authors' code, not in the paper's
# equation.) The slope at 0 would be infinite, so $|s|$ is at least $10^{-6}$.
#
# **Exercise 1.** Write the gate for a query and a key that are normed already.
# %% [markdown] lang="zh"
# ## 门控
#
# 读出的内容 $e$ 投影为键。一条残差流的隐藏状态 $h$ 作查询；两者都先归一化。设宽度为 $D$：
#
# $$s = \frac{\langle \mathrm{norm}(h), \mathrm{norm}(W_k e) \rangle}{\sqrt{D}}, \qquad
# g = \sigma\!\left(\mathrm{sign}(s) \sqrt{|s|}\right)$$
#
# 这是只有一个键的注意力：用 sigmoid 代替 softmax，于是答案可以是“一点也不要”。带符号的平方根放大小分数、缩小大分数：门控很早就表态，
# 很晚才饱和。（这一步见于作者的代码，论文的公式里没有。）在 0 处斜率会是无穷大，所以 $|s|$ 至少取 $10^{-6}$。
#
# **练习 1.** 对已经归一化的查询与键写出门控。
# %% tags=["exercise"]
def my_gate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Returns the gate of each query on its key; both [..., D]."""
    ### BEGIN SOLUTION
    score = (query * key).sum(-1) / math.sqrt(query.shape[-1])
    return torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())
    ### END SOLUTION


# %% tags=["wrong"]
def my_gate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Loses the sign, so that no gate is below one half."""
    score = (query * key).sum(-1) / math.sqrt(query.shape[-1])
    return torch.sigmoid(score.abs().clamp_min(1e-6).sqrt())


# %% tags=["wrong"]
def my_gate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Leaves the root out, as the paper's equation does."""
    return torch.sigmoid((query * key).sum(-1) / math.sqrt(query.shape[-1]))


# %% tags=["gate"]
torch.manual_seed(0)
query, key = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 4, 16)
assert torch.allclose(my_gate(query, key), gate(query, key), atol=1e-6)
assert my_gate(query, -query).max() < 0.5, "a key that points away shuts the gate"

# %% tags=["exact"]
for score in (-4.0, -0.25, -0.01, 0.01, 0.25, 4.0):
    query, key = torch.ones(16), torch.full((16,), score / 4)
    plain = torch.sigmoid(torch.tensor(score)).item()
    print(
        f"score {score:5.2f}: gate {my_gate(query, key).item():.2f}, without the root {plain:.2f}"
    )

# %% [markdown] lang="en"
# Now with the model's own numbers: a tap records what goes into the gate of a block, the hidden states and the keys.
# %% [markdown] lang="zh"
# 再用模型自己的数：用 `Taps` 记下某个块门控的输入，即隐藏状态与键。
# %%
sentence = "The sperm whale is a large whale with a very large head."
inputs = []
layer = config.engram.layers[0]
module = model.blocks[layer].engram.gate
handle = module.register_forward_hook(lambda _, arguments, out: inputs.append(arguments))
measured = gates(model, tokenizer, sentence)
handle.remove()
hidden, key = inputs[0]
with torch.no_grad():
    normed = [
        F.rms_norm(x.float(), x.shape[-1:], None, module.eps) * weight
        for x, weight in ((hidden, module.query_norm), (key, module.key_norm))
    ]
    by_hand = my_gate(*normed)[0, 1:]  # the first token is the mark of a document's beginning
print("by hand as measured:", torch.allclose(by_hand, measured.values[0], atol=1e-5))

# %% [markdown] lang="en"
# ## Over a sentence
#
# Tokens across, one row a block and stream. Every stream has a gate of its own, so the same memory may be let into one and kept out of another.
# %% [markdown] lang="zh"
# ## 在一句话上
#
# 横向是词元，每个块的每条流占一行。每条流有自己的门控，所以同一份记忆可以进入一条流而被另一条拒之门外。
# %%
figures.gate_map(measured, sentence)

# %% [markdown] lang="en"
# The same words in another order look up other rows, most of them of n-grams that never occurred; what has trained these rows are other
# n-grams that share them. A gate cannot know that: it sees a key and a hidden state. In a model of this size a shuffled sentence opens gates
# about as far as a real one; which tokens open them is what changes.
# %% [markdown] lang="zh"
# 同样的词换个次序，读到的是别的行，其中多数属于从未出现过的 n-gram；训练过这些行的，是与它们共用行的其他 n-gram。门控无从知道这一点：
# 它只看到一个键和一个隐藏状态。在这样小的模型里，打乱的句子打开门控的程度与真句子差不多；变的是哪些词元打开门控。
# %%
words = sentence.rstrip(".").split()
random.Random(0).shuffle(words)
shuffled = gates(model, tokenizer, " ".join(words))
figures.gate_map(shuffled, " ".join(words))

# %%
for name, result in (("as written", measured), ("shuffled", shuffled)):
    print(f"{name:10s} mean gate {result.values.mean():.2f}, largest {result.values.max():.2f}")

# %% [markdown] lang="en"
# ## What opens a gate
#
# Rows of frequent n-grams have been trained often, rows of rare ones hardly. Below: the mean gate over the number of times that the 3-gram
# ending at a token occurs in the dictionary (folded to canonical ids, as the memory sees it).
# %% [markdown] lang="zh"
# ## 什么会打开门控
#
# 常见 n-gram 的行被训练过许多次，罕见的几乎没有。下面是平均门控随“以该词元结尾的 3-gram 在词典中出现的次数”（折叠为规范 id，与记忆所见
# 一致）的变化。
# %%
canonical = tokenizer.canonical_map()
documents = list(rq.open_corpus("wordnet", limit=20_000, duplicate_threshold=None).documents())
encoded = [[tokenizer.begin_id, *ids] for ids in tokenizer.encode_batch(documents)]
trigrams = Counter(
    tuple(canonical[i] for i in ids[t - 2 : t + 1]) for ids in encoded for t in range(2, len(ids))
)
name = f"blocks.{layer}.engram.gate"
values, occurrences = [], []
sample = random.Random(0).sample(encoded, 300)
for ids in sample:
    with torch.no_grad(), Taps(model, name) as taps:
        model(torch.tensor([ids]))
    values.append(taps[name][0][0, 2:].mean(-1))
    occurrences += [
        trigrams[tuple(canonical[i] for i in ids[t - 2 : t + 1])] for t in range(2, len(ids))
    ]
values = torch.cat(values)
power = torch.tensor(occurrences).log2().clamp_max(8).long()

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.boxplot(
    [values[power == p] for p in range(9)],
    tick_labels=[*(f"{2**p}-{2 ** (p + 1) - 1}" if p else "1" for p in range(8)), "256+"],
    showfliers=False,
)
axes.set(xlabel="occurrences of the 3-gram", ylabel="gate, mean of the streams")
plt.show()


# %% [markdown] lang="en"
# ## What the memory is worth
#
# Zero the memory's output and measure each token again. The difference is what the memory was worth for that token, in nats: positive where
# it helped.
#
# **Exercise 2.** Compute the surprise of every token but the first, $-\ln p(\mathrm{id}_t \mid \mathrm{id}_{<t})$.
# %% [markdown] lang="zh"
# ## 记忆值多少
#
# 把记忆的输出置零，再测一遍每个词元。两次之差就是记忆对这个词元的价值，单位奈特：有帮助则为正。
#
# **练习 2.** 算出除第一个以外每个词元的意外程度 $-\ln p(\mathrm{id}_t \mid \mathrm{id}_{<t})$。
# %% tags=["exercise"]
@torch.no_grad()
def surprise(ids: list[int]) -> torch.Tensor:
    """Returns the surprise of ids[1:], each after all before it, in nats [len(ids) - 1]."""
    ### BEGIN SOLUTION
    logs = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    return -logs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    ### END SOLUTION


# %% tags=["wrong"]
@torch.no_grad()
def surprise(ids: list[int]) -> torch.Tensor:
    """Looks each token up in the prediction that was made after it."""
    logs = model(torch.tensor([ids]))[0, 1:].log_softmax(-1)
    return -logs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


# %% tags=["gate"]
ids = sample[0]
inputs, labels = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
whole, suppressed = suppression(model, inputs, labels)
assert abs(surprise(ids).mean().item() - whole) < 1e-3
with without_memory(model):
    assert abs(surprise(ids).mean().item() - suppressed) < 1e-3

# %%
# The first token of an entry is left out: nothing but the mark of a beginning stands before it.
whole = torch.cat([surprise(ids)[1:] for ids in sample])
with without_memory(model):
    worth = torch.cat([surprise(ids)[1:] for ids in sample]) - whole
# The prediction of a token is made one position earlier, with the gate of that position.
gates_before = []
for ids in sample:
    with torch.no_grad(), Taps(model, name) as taps:
        model(torch.tensor([ids]))
    gates_before.append(taps[name][0][0, 1:-1].mean(-1))
gates_before = torch.cat(gates_before)
print(f"{whole.mean():.3f} nats a token with memory, {(whole + worth).mean():.3f} without")

order = gates_before.argsort()
fifths = order.chunk(5)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
labels = [f"{gates_before[f].min():.2f}\nto {gates_before[f].max():.2f}" for f in fifths]
left.bar(labels, [worth[f].mean() for f in fifths])
left.set(xlabel="gate, a fifth of the tokens each", ylabel="worth of the memory, nats a token")
right.hist(worth.clamp(-3, 3), bins=60)
right.set(xlabel="worth for a token, nats (cut at 3)", ylabel="tokens", yscale="log")
plt.show()

# %% [markdown] lang="en"
# ## Where it helped most
#
# The tokens for which the memory was worth most. Many complete a word that the n-gram before has decided: that is what a table can do as well as
# a network, and what the network need not learn.
# %% [markdown] lang="zh"
# ## 帮助最大的地方
#
# 下面是记忆价值最大的词元。其中许多是在补全一个词，而前面的 n-gram 已经决定了它：这种事查表做得和网络一样好，网络就不必再学。
# %%
spots = [(n, t) for n, ids in enumerate(sample) for t in range(2, len(ids))]
for i in worth.topk(16).indices.tolist():
    n, t = spots[i]
    before = tokenizer.decode(sample[n][max(1, t - 5) : t])
    print(f"{worth[i]:5.1f} nats  {before:>32s} | {tokenizer.token(sample[n][t])}")

# %% [markdown] lang="en"
# **Key finding.** The gate is the only thing that stands between a hash and the residual stream: here it opens for what is frequent,
# and where it is open the memory is worth most. It lets a model use a table in which different n-grams share rows.
#
# To see it live, with a text of your own: `rorqual explore tiny-engram`. The code: `rorqual/layers/engram.py`, `gate`. The page: docs/engram.md.
# %% [markdown] lang="zh"
# **关键结论。** 在哈希与残差流之间只有门控把关：这里它为常见的内容打开，而它开着的地方，记忆最有价值。
# 有了它，模型就能用一张不同 n-gram 共用行的表。
#
# 想用自己的文本实时查看：`rorqual explore tiny-engram`。代码：`rorqual/layers/engram.py` 的 `gate`。页面：docs/zh/engram.md。
