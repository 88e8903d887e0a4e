# %% [markdown] lang="en"
# # 5. Engram's addresses, by hand
#
# Engram is a memory that is addressed, not searched: the last two or three token ids are hashed to a few row numbers of a large table,
# and the rows are read. The address follows from the ids alone, before the first block computes anything. You compute
# the row numbers with plain integers and get the same bits as rorqual, and see what the primes and the several heads are for.
#
# Level: look inside. Takes 20 minutes. Paper: Conditional Memory via Scalable Lookup (arXiv 2601.07372), section 2.2.
# %% [markdown] lang="zh"
# # 5. 手算 Engram 的地址
#
# Engram 是按地址读取的记忆，而不是搜索出来的：把最近两三个词元 id 哈希成大表中的几个行号，再把这些行读出来。地址只取决于 id，在第一个块
# 开始计算之前就已知道。这里用普通整数算出行号，与 rorqual 逐位相同，并看看为什么要用素数、为什么要有多个头。
#
# 层次：深入内部。用时 20 分钟。论文：Conditional Memory via Scalable Lookup（arXiv 2601.07372）2.2 节。
# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch

import rorqual as rq
from rorqual.data.tokenizer import train
from rorqual.layers.context import context
from rorqual.layers.engram import Addresses, EngramConfig, draw_multipliers, head_primes

# %% [markdown] lang="en"
# ## Canonical ids
#
# A tokenizer has several ids for what reads alike: with and without a leading space, in small and in capital letters. Before hashing, Engram folds
# them into one canonical id, so that " Whale" and "whale" find the same memory.
# %% [markdown] lang="zh"
# ## 规范 id
#
# 读起来一样的内容，分词器常有好几个 id：前面带不带空格，大写还是小写。哈希之前，Engram 把它们折叠成同一个规范 id，于是 " Whale" 与 "whale"
# 找到的是同一份记忆。
# %% tags=["exact"]
text = "The blue whale is large. A small boat met THE BLUE WHALE at sea, and the blue whale sang."
tokenizer = train([text.lower(), text, "Blue Whale", "the sea"] * 20, vocab_size=330)
canonical_map = tokenizer.canonical_map()
ids = tokenizer.encode(text)
print(f"{tokenizer.vocab_size} ids, {canonical_map.max() + 1} canonical ids")
whale = canonical_map[tokenizer.encode(" whale")[0]]
print("one canonical id:", [tokenizer.token(i) for i in np.flatnonzero(canonical_map == whale)])


# %% [markdown] lang="en"
# ## Primes and multipliers
#
# The memory below has two orders (2-grams and 3-grams) with two hash heads each, so a token reads four rows. Every head has a number of
# rows of its own: the next prime from `rows_per_head` on that no head before it has. Different primes make the heads' collisions
# independent: two n-grams that meet in one head are apart in another.
#
# **Exercise 1.** Write the choice of primes for one layer, `[orders][heads]`.
# %% [markdown] lang="zh"
# ## 素数与乘数
#
# 下面的记忆有两个阶（2-gram 与 3-gram），每阶两个哈希头，所以一个词元读四行。每个头有自己的行数：从 `rows_per_head` 起，前面的头都没用过的
# 下一个素数。素数不同，各头的冲突就彼此独立：在一个头里相遇的两个 n-gram，在另一个头里是分开的。
#
# **练习 1.** 写出一层的素数选取，形如 `[orders][heads]`。
# %% tags=["exercise"]
def primes_of(rows_per_head: tuple[int, ...], heads: int) -> list[list[int]]:
    """Returns the primes of every order's heads; no prime occurs twice."""
    ### BEGIN SOLUTION
    taken = []
    result = []
    for rows in rows_per_head:
        order = []
        while len(order) < heads:
            prime = all(rows % divisor for divisor in range(2, math.isqrt(rows) + 1))
            if prime and rows not in taken:
                order.append(rows)
                taken.append(rows)
            rows += 1
        result.append(order)
    return result
    ### END SOLUTION


# %% tags=["wrong"]
def primes_of(rows_per_head: tuple[int, ...], heads: int) -> list[list[int]]:
    """Begins anew in every order, so that both have the same primes."""
    result = []
    for rows in rows_per_head:
        order = []
        while len(order) < heads:
            if all(rows % divisor for divisor in range(2, math.isqrt(rows) + 1)):
                order.append(rows)
            rows += 1
        result.append(order)
    return result


# %% tags=["gate"]
assert primes_of((500, 500), 2) == [[503, 509], [521, 523]]
for rows, heads in (((500, 500), 3), ((10, 12, 14), 4), ((4096, 1000), 8)):
    sample = EngramConfig(layers=(1,), rows_per_head=rows, heads=heads)
    assert primes_of(rows, heads) == head_primes(sample)[0]

# %% [markdown] lang="en"
# The multipliers are random odd numbers, one for each position of an n-gram, drawn from a seed. They are so large that an id times a
# multiplier just fits into 63 bits: nothing overflows and no number is negative, so that Python, NumPy, C and a GPU agree.
# %% [markdown] lang="zh"
# 乘数是随机奇数，n-gram 的每个位置一个，由种子抽出。它们大到“id 乘以乘数”恰好放得进 63 位：既不溢出，也没有负数，所以 Python、NumPy、C
# 与 GPU 的结果一致。
# %% tags=["exact"]
memory = EngramConfig(layers=(1,), rows_per_head=(500, 500), heads=2, head_dim=16)
primes = primes_of(memory.rows_per_head, memory.heads)
multipliers = draw_multipliers(memory, int(canonical_map.max()) + 1)[0].tolist()
print("primes", primes, "rows in all:", sum(map(sum, primes)))
for k, multiplier in enumerate(multipliers):
    bits = (int(canonical_map.max()) * multiplier).bit_length()
    print(f"m_{k} = {multiplier:,}, odd; the largest product has {bits} bits")


# %% [markdown] lang="en"
# ## The address
#
# With $x_t$ the canonical id at position $t$, $m_k$ the multipliers and $\oplus$ bitwise exclusive or, for $n = 2 \ldots N$:
#
# $$\mathrm{mix}_n = x_t m_0 \oplus x_{t-1} m_1 \oplus \cdots \oplus x_{t-n+1} m_{n-1}, \qquad
# \mathrm{row} = \mathrm{offset} + \mathrm{mix}_n \bmod \mathrm{prime}$$
#
# All heads of a layer share one table, one behind the other; the offset is the sum of the primes before. Before the start of a text stands
# the canonical id of `pad_id`.
#
# **Exercise 2.** Compute the four rows of position `t` with Python's integers.
# %% [markdown] lang="zh"
# ## 地址
#
# 设 $x_t$ 为位置 $t$ 的规范 id，$m_k$ 为乘数，$\oplus$ 为按位异或，对 $n = 2 \ldots N$：
#
# $$\mathrm{mix}_n = x_t m_0 \oplus x_{t-1} m_1 \oplus \cdots \oplus x_{t-n+1} m_{n-1}, \qquad
# \mathrm{row} = \mathrm{offset} + \mathrm{mix}_n \bmod \mathrm{prime}$$
#
# 一层的所有头共用一张表，前后相接；offset 是前面各素数之和。文本开头之前的位置用 `pad_id` 的规范 id 填充。
#
# **练习 2.** 用 Python 整数算出位置 `t` 的四个行号。
# %% tags=["exercise"]
def rows_of(ids: list[int], t: int) -> list[int]:
    """Returns the rows of token t: 2-grams first, one for each head."""
    ### BEGIN SOLUTION
    padded = [memory.pad_id] * (memory.ngram - 1) + ids
    canonical = [int(canonical_map[i]) for i in padded]
    last = t + memory.ngram - 1
    result = []
    offset = 0
    for n, heads in enumerate(primes, 2):
        mix = 0
        for k in range(n):
            mix ^= canonical[last - k] * multipliers[k]
        for prime in heads:
            result.append(offset + mix % prime)
            offset += prime
    return result
    ### END SOLUTION


# %% tags=["wrong"]
def rows_of(ids: list[int], t: int) -> list[int]:
    """Multiplies the oldest id by the first multiplier."""
    padded = [memory.pad_id] * (memory.ngram - 1) + ids
    canonical = [int(canonical_map[i]) for i in padded]
    last = t + memory.ngram - 1
    result, offset = [], 0
    for n, heads in enumerate(primes, 2):
        mix = 0
        for k in range(n):
            mix ^= canonical[last - n + 1 + k] * multipliers[k]
        for prime in heads:
            result.append(offset + mix % prime)
            offset += prime
    return result


# %% tags=["wrong"]
def rows_of(ids: list[int], t: int) -> list[int]:
    """Hashes raw ids, so that a capital letter finds other rows."""
    padded = [memory.pad_id] * (memory.ngram - 1) + ids
    last = t + memory.ngram - 1
    result, offset = [], 0
    for n, heads in enumerate(primes, 2):
        mix = 0
        for k in range(n):
            mix ^= padded[last - k] * multipliers[k]
        for prime in heads:
            result.append(offset + mix % prime)
            offset += prime
    return result


# %% tags=["gate"]
addresses = Addresses(memory, canonical_map)
expected = addresses(torch.tensor([ids]), context(1, len(ids), "cpu"))[0, 0].tolist()
assert [rows_of(ids, t) for t in range(len(ids))] == expected, "not bit for bit the same"

# %% tags=["exact"]
for t, i in enumerate(ids[:8]):
    print(
        f"{tokenizer.token(i)!r:9s} 2-gram rows {rows_of(ids, t)[:2]}, 3-gram {rows_of(ids, t)[2:]}"
    )

# %% [markdown] lang="en"
# ## What reads the same memory
#
# How many of the four rows do two positions share? Off the diagonal, a cell of 4 is a repeated 3-gram, whatever its case; 2 is a
# repeated 2-gram; 1 is a collision in one head.
# %% [markdown] lang="zh"
# ## 哪些位置读到同一份记忆
#
# 两个位置的四个行号里有几个相同？对角线之外，4 是重复出现的 3-gram，不论大小写；2 是重复的 2-gram；1 是某个头里的冲突。
# %%
rows = np.array([rows_of(ids, t) for t in range(len(ids))])
shared = (rows[:, None] == rows[None]).sum(-1)
words = [tokenizer.token(i).strip() for i in ids]
figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
image = axes.imshow(shared, cmap="viridis", vmin=0, vmax=4)
axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
axes.set_yticks(range(len(words)), words, fontsize=8)
axes.tick_params(length=0)
figure.colorbar(image, ax=axes, label="rows in common, of 4", shrink=0.8)
plt.show()

# %% [markdown] lang="en"
# The order of the words counts: positions have different multipliers.
# %% [markdown] lang="zh"
# 词的先后有区别：不同位置的乘数不同。
# %% tags=["exact"]
for pair in ("blue whale", "whale blue", "BLUE WHALE"):
    pair_ids = tokenizer.encode(" " + pair)
    print(f"{pair!r:13s} {rows_of(pair_ids, len(pair_ids) - 1)[:2]}")


# %% [markdown] lang="en"
# ## Why several heads
#
# A table has fewer rows than a language has n-grams: some share a row. If $n$ different n-grams fall on $p$ rows at random, an n-gram shares
# its row with another one with probability
#
# $$1 - \left(1 - \frac{1}{p}\right)^{n-1}$$
#
# **Exercise 3.** Write this probability for `heads` independent heads: that an n-gram shares its row *in every one of them*. Only then can the
# memory not tell it from others.
# %% [markdown] lang="zh"
# ## 为什么要有多个头
#
# 表的行数少于一种语言的 n-gram 数，所以有的会共用一行。若 $n$ 个不同的 n-gram 随机落在 $p$ 行上，一个 n-gram 与别人共用一行的概率是
#
# $$1 - \left(1 - \frac{1}{p}\right)^{n-1}$$
#
# **练习 3.** 对 `heads` 个独立的头写出这一概率：一个 n-gram *在每个头里*都与别人共用一行。只有这时，记忆才分辨不出它。
# %% tags=["exercise"]
def shared_everywhere(n: int, p: int, heads: int) -> float:
    """Returns the probability that an n-gram shares its row in all heads."""
    ### BEGIN SOLUTION
    return (1 - (1 - 1 / p) ** (n - 1)) ** heads
    ### END SOLUTION


# %% tags=["wrong"]
def shared_everywhere(n: int, p: int, heads: int) -> float:
    """Takes all heads for one table of as many rows."""
    return 1 - (1 - 1 / (p * heads)) ** (n - 1)


# %% tags=["gate"]
assert shared_everywhere(1, 100, 1) == 0
draws = np.random.default_rng(0).integers(0, 1009, (3, 2000))
alone = [np.isin(head, np.flatnonzero(np.bincount(head) == 1)) for head in draws]
for heads in (1, 2, 3):
    measured = 1 - np.any(alone[:heads], axis=0).mean()
    assert abs(measured - shared_everywhere(2000, 1009, heads)) < 0.05, heads

# %% [markdown] lang="en"
# Real n-grams: all 2-grams of two thousand entries of a dictionary, in tables of different sizes. Dots are counted with rorqual's
# hashes, lines are the formula: the hash behaves like a random one.
# %% [markdown] lang="zh"
# 真实的 n-gram：词典两千个条目中的全部 2-gram，放进不同大小的表。点是用 rorqual 的哈希数出来的，线是公式：这个哈希的表现与随机哈希一样。
# %%
entries = list(rq.open_corpus("wordnet", limit=2000, duplicate_threshold=None).documents())
words_tokenizer = train(entries, vocab_size=2048)
words_map = words_tokenizer.canonical_map()
stream = torch.tensor([[i for entry in entries for i in words_tokenizer.encode(entry)]])
folded = words_map[stream[0].numpy()]
first_of = np.unique(folded[1:].astype(np.int64) * 4096 + folded[:-1], return_index=True)[1] + 1
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
sizes = [2_000, 8_000, 32_000, 128_000]
for heads in (1, 2, 4):
    counted, expected = [], []
    for size in sizes:
        sample = EngramConfig(layers=(1,), rows_per_head=(size,), heads=heads)
        hashed = Addresses(sample, words_map)(stream, context(1, stream.shape[1], "cpu"))
        of_ngrams = hashed[0, 0].numpy()[first_of]  # [different 2-grams, heads]
        together = [np.bincount(head)[head] > 1 for head in of_ngrams.T]
        counted.append(np.all(together, axis=0).mean())
        expected.append(shared_everywhere(len(first_of), size, heads))
    (line,) = axes.semilogx(sizes, expected, label=f"heads: {heads}")
    axes.plot(sizes, counted, "o", color=line.get_color())
axes.set(
    xlabel="rows of a head",
    ylabel="2-grams that share all rows",
    title=f"{len(first_of):,} different 2-grams",
)
axes.legend(frameon=False)
axes.grid(alpha=0.2)
plt.show()

# %% [markdown] lang="en"
# ## Packed documents
#
# Where several texts share a sequence, the look-back ends where a document begins: a text finds the same rows as alone.
# %% [markdown] lang="zh"
# ## 打包的文档
#
# 几篇文本放在同一条序列里时，回看到文档开头为止：每篇文本读到的行与单独成列时相同。
# %% tags=["exact"]
first, second = tokenizer.encode("the blue whale"), tokenizer.encode("the sea")
packed = torch.tensor([first + second])
documents = torch.tensor([[0] * len(first) + [1] * len(second)])
together = addresses(packed, context(1, packed.shape[1], "cpu", document_ids=documents))[0, 0]
alone = addresses(torch.tensor([second]), context(1, len(second), "cpu"))[0, 0]
print("the second document has the rows it has alone:", torch.equal(together[len(first) :], alone))

# %% [markdown] lang="en"
# **Key finding.** An address needs no learning, no search and no hidden state. That is why a table of any size costs the same time for a
# token, and why its rows can be fetched from host memory or a disk while the first block computes. What the rows are
# worth is decided later, by the gate (notebook 6).
#
# The code: `rorqual/layers/addresses.py`. The page: docs/engram.md.
# %% [markdown] lang="zh"
# **关键结论。** 地址不需要学习，不需要搜索，也不需要隐藏状态。因此不论表有多大，每个词元花的时间都一样；也因此可以在第一个块计算的同时，
# 从主机内存或磁盘取行。这些行值多少，由后面的门控决定（第 6 个笔记本）。
#
# 代码：`rorqual/layers/addresses.py`。页面：docs/zh/engram.md。
