# %% [markdown] lang="en"
# # 8. Sparse attention, drawn
#
# Full attention reads every earlier token. Sparse attention first decides, cheaply, what is worth reading. NSA, MoBA, DSA and DeepSeek-V4's CSA and HCA each have their own way to decide. You will hide needles in a text, train each of them to answer questions about the needles, and see on a map what every
# query read.
#
# Level: look inside. Takes 30 minutes. Papers: NSA (arXiv 2502.11089), MoBA (2502.13189), DSA (DeepSeek-V3.2, 2512.02556), CSA and HCA (DeepSeek-V4, section 2.3). A minute of one core.
# %% [markdown] lang="zh"
# # 8. 把稀疏注意力画出来
#
# 全注意力读取前面的每个词元。稀疏注意力先用很小的代价决定哪些值得读。NSA、MoBA、DSA 以及 DeepSeek-V4 的 CSA 与 HCA 各有各的决定方式。你将把针藏进文本，训练它们回答关于针的问题，
# 再从图上看每个查询到底读了什么。
#
# 层次：深入内部。用时 30 分钟。论文：NSA（arXiv 2502.11089）、MoBA（2502.13189）、DSA（DeepSeek-V3.2，2512.02556）、CSA 与 HCA（DeepSeek-V4 第 2.3 节）。单核约一分钟。
# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import rorqual as rq
from rorqual.data.sources import find
from rorqual.layers.attention import GQA, GQAConfig, MLAConfig
from rorqual.layers.rope import RopeConfig
from rorqual.layers.context import context
from rorqual.layers.csa import CSA, HCA, CSAConfig
from rorqual.layers.dsa import DSA, DSAConfig
from rorqual.layers.moba import MoBA, MoBAConfig, block_scores
from rorqual.layers.nsa import NSA, NSAConfig, importance_of
from rorqual.layers.sparse import best_blocks

plt.rcParams["figure.dpi"] = 65

# %% [markdown] lang="en"
# ## A text with needles
#
# One layer, no words: a text is 128 hidden states of width 64, in four parts of 16 numbers. Six tokens are needles, each with a key and a value. The last 40 tokens are questions: each has the key of one needle and must output its value. All other tokens are noise.
# %% [markdown] lang="zh"
# ## 藏着针的文本
#
# 只有一层，没有文字：一段文本是 128 个宽 64 的隐藏状态，分成四部分，每部分 16 个数。其中六个词元是针，各有一个键和一个值。最后 40 个词元是问题：每个带有某根针的键，必须输出它的值。其余词元都是噪声。
# %%
DIM, TIME, QUESTIONS, NEEDLES = 64, 128, 40, 6
FIRST = TIME - QUESTIONS  # the first question


def texts(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws texts: hidden states, the column of the needle of each question, and the answers."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(count, TIME, 4, 16)  # key | value | question | noise
    hidden[:, :, 3] = torch.randn(count, TIME, 16, generator=draw)
    rows = torch.arange(count)[:, None]
    columns = torch.rand(count, FIRST, generator=draw).argsort(1)[:, :NEEDLES]
    keys = F.one_hot(torch.rand(count, 16, generator=draw).argsort(1)[:, :NEEDLES], 16).float()
    values = torch.randn(count, NEEDLES, 16, generator=draw)
    hidden[rows, columns, 0] = 4 * keys
    hidden[rows, columns, 1] = values
    asked = torch.randint(NEEDLES, (count, QUESTIONS), generator=draw)
    hidden[:, FIRST:, 2] = 4 * keys[rows, asked]
    return hidden.flatten(2), columns[rows, asked], values[rows, asked]


# %% [markdown] lang="en"
# ## Six attentions
#
# | | what is scored | by | what a query reads here |
# | --- | --- | --- | --- |
# | full | nothing | | every key |
# | MoBA | blocks of 8 keys | the mean of their keys | its own block and the 2 best |
# | NSA | blocks of 8 keys | attention to compressed blocks | all compressed blocks, faintly; 5 blocks (first, own, previous, 2 best); a window of 16 |
# | DSA | single keys | an indexer, trained to agree with attention | the 16 best |
# | CSA | entries of 4 tokens | an indexer, likewise | a window of 16, and the 4 best entries |
# | HCA | nothing | | a window of 16, and every entry of 16 tokens |
#
# A block is named by its number, `key // 8`. No gradient passes through a choice: MoBA's queries and keys learn from what they read, NSA's compressed blocks from their own output, an indexer from a loss of its own, the divergence from attention.
# %% [markdown] lang="zh"
# ## 六种注意力
#
# | | 给什么打分 | 依据 | 这里一个查询读什么 |
# | --- | --- | --- | --- |
# | 完整 | 不打分 | | 全部键 |
# | MoBA | 每 8 个键一块 | 块内键的均值 | 自己的块和最好的 2 块 |
# | NSA | 每 8 个键一块 | 对压缩块的注意力 | 全部压缩块（很淡）；5 块（首块、自己的、前一块、最好的 2 块）；16 个键的窗口 |
# | DSA | 单个键 | 索引器，训练得与注意力一致 | 最好的 16 个键 |
# | CSA | 每 4 个词元一个条目 | 同样是索引器 | 16 个键的窗口，最好的 4 个条目 |
# | HCA | 不打分 | | 16 个键的窗口，全部条目（每 16 个词元一个） |
#
# 块以编号 `key // 8` 称呼。选择本身不传梯度：MoBA 的查询与键从读到的内容学习，NSA 的压缩块从自己的输出学习，索引器则靠自己的损失，即与注意力之间的散度。
# %%
ROPE = RopeConfig(base=1e6)
SHARED_KEY = GQAConfig(heads=2, kv_heads=1, head_dim=32)
LATENT = MLAConfig(heads=2, kv_lora_rank=48, nope_dim=24, rope_dim=8, value_dim=32)
ENTRIES = CSAConfig(
    heads=2,
    head_dim=32,
    rope_dim=8,
    q_lora_rank=48,
    groups=1,
    o_lora_rank=48,
    window=16,
    ratio=4,
    heavy_ratio=16,
    index_heads=4,
    index_dim=16,
    top_k=4,
    compress_rope=ROPE,
)
torch.manual_seed(0)
attentions = {
    "full": GQA(SHARED_KEY, DIM, ROPE),
    "MoBA": MoBA(MoBAConfig(block=8, top_k=3), SHARED_KEY, DIM, ROPE),
    "NSA": NSA(
        NSAConfig(block=8, stride=4, select_block=8, top_k=5, window=16), SHARED_KEY, DIM, ROPE
    ),
    "DSA": DSA(DSAConfig(heads=4, dim=16, top_k=16), LATENT, DIM, ROPE),
    "CSA": CSA(ENTRIES, DIM),
    "HCA": HCA(ENTRIES, DIM),
}


def facts(attention: torch.nn.Module, hidden: torch.Tensor, **more: bool):
    """Returns the context of a call: positions, rotations, the phase of an indexer's training."""
    rope = (ROPE, attention.rope_dim)
    return context(*hidden.shape[:2], "cpu", rope=rope, compress_rope=ROPE, **more)


# %% [markdown] lang="en"
# ## Training
#
# 200 steps of 10 texts each; the loss is the squared error of the answers, whose variance is 1. In the first half indexers warm up: attention reads everything and they learn to agree with it, on all keys; then attention reads only what they select.
# %% [markdown] lang="zh"
# ## 训练
#
# 200 步，每步 10 段文本；损失是答案的均方误差，答案的方差为 1。前一半步数里索引器在预热：注意力读取全部，索引器在全部键上学着与它一致；之后注意力只读它们选中的。
# %%
STEPS = 200


def learn(attention: torch.nn.Module) -> list[float]:
    """Trains one attention; returns the error of its answers at each step."""
    for parameter in attention.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    optimizer = torch.optim.Adam(attention.parameters(), lr=1e-2)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    errors = []
    for step in range(STEPS):
        hidden, _, answers = texts(step, 10)
        has_indexer = getattr(attention, "indexer", None) is not None
        phase = {"indexer_warmup": step < STEPS // 2} if has_indexer else {}
        attended = attention(hidden, facts(attention, hidden, **phase))
        error = F.mse_loss(attended.out[:, FIRST:, :16], answers)
        indexer_loss = attended.indexer_loss
        loss = error if indexer_loss is None else error + indexer_loss.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        errors.append(error.item())
    return errors


errors = {}
for number, (name, attention) in enumerate(attentions.items()):
    torch.manual_seed(number)
    errors[name] = learn(attention)

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for name, curve in errors.items():
    axes.plot(torch.tensor(curve).unfold(0, 8, 1).mean(1), label=name)
axes.axhline(1, color="gray", ls=":")
axes.set(xlabel="step", ylabel="squared error of the answers", ylim=(0, None))
axes.legend(frameon=False, ncols=2)
plt.show()


# %% [markdown] lang="en"
# What compresses its keys learns more slowly here; HCA, which squeezes 16 tokens into an entry, cannot answer well by the end.
#
# ## What is read
#
# The surest way to see what a query reads is to ask for derivatives: the output at row $t$ depends on the token in column $s$ exactly if the derivative is not zero. No attention has to be opened for that. White: not read, the derivative is exactly 0. Blue: read, darker the more it matters beside the row's largest. Red circles: the needle
# that a question asks for. Above each map: how many tokens a question reads in the mean, with both heads together, and how often its needle is one of them.
# %% [markdown] lang="zh"
# 在这里，压缩键的几种学得更慢；HCA 把 16 个词元压进一个条目，到最后也答不好。
#
# ## 读了什么
#
# 要看一个查询读了什么，最可靠的办法是求导：第 $t$ 行的输出依赖第 $s$ 列的词元，当且仅当导数不为零。这不需要打开任何注意力的内部。白色：没有读，导数恰为 0。蓝色：读了，颜色越深，相对该行最大值的影响越大。红圈：问题所问的那根针。图题：一个问题平均读多少个词元（两个头合计），其中有多少次包含所问的针。
# %%
def dependence(attention: torch.nn.Module, hidden: torch.Tensor, ctx) -> np.ndarray:
    """Returns the size of the derivative of each output (row) by each token (column)."""
    attention.double()
    hidden = hidden.double().requires_grad_()
    out = attention(hidden, ctx).out
    probe = torch.randn(16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    sizes = []
    for row in out[0, :, :16]:
        (derivative,) = torch.autograd.grad(row @ probe, hidden, retain_graph=True)
        sizes.append(derivative[0].norm(dim=-1))
    attention.float()
    return torch.stack(sizes).numpy()


def shades(sizes: np.ndarray) -> np.ndarray:
    """Returns 0 where nothing is read, and else six shades by the share of the row's largest."""
    share = sizes / sizes.max(1, keepdims=True)
    return np.where(sizes > 0, 0.15 + 0.85 * np.ceil(6 * share**0.5) / 6, 0)


hidden, needles, answers = texts(10_000, 1)
maps = {
    name: dependence(attention, hidden, facts(attention, hidden))
    for name, attention in attentions.items()
}

# %%
figure, panels = plt.subplots(2, 3, figsize=(10.5, 7.4), layout="constrained")
for axes, (name, sizes) in zip(panels.flat, maps.items(), strict=True):
    read = sizes > 0
    axes.imshow(shades(sizes), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    questions = np.arange(FIRST, TIME)
    axes.scatter(needles[0], questions, s=14, facecolors="none", edgecolors="tab:red", lw=0.9)
    count = read[FIRST:].sum(1).mean()
    right = read[questions, needles[0].numpy()].mean()
    axes.set_title(f"{name}: reads {count:.0f} tokens, the needle {right:.0%}", fontsize=9)
    axes.axhline(FIRST - 0.5, color="gray", lw=0.6, ls=":")
    axes.set_xticks(range(0, TIME + 1, 32))
    axes.set_yticks(range(0, TIME + 1, 32))
panels[1, 0].set(xlabel="token that is read", ylabel="query")
plt.show()


# %% [markdown] lang="en"
# ## The same in language models
#
# A layer that finds needles is an exercise. Five small language models come trained with the package, one for each attention, all on the glosses of WordNet. Below is the longest of the first 4,000 glosses, the method of Gram, cut at 96 tokens, and what the second block of each model reads of it (HCA: the third block
# of the same model as CSA). Their units fit such short texts: MoBA reads 3 blocks of 16, NSA 4 blocks of 8 and a window of 16, DSA 32 keys, CSA a window of 16 and 8 entries of 4, HCA the window and every entry of 16.
# %% [markdown] lang="zh"
# ## 在语言模型里
#
# 找针的一层只是练习。软件包自带五个训练好的小语言模型，每种注意力一个，都在 WordNet 的释义上训练。下面取前 4,000 条释义中最长的一条，即革兰氏染色法，截到 96 个词元，看每个模型的第二块读了什么（HCA 是 CSA 那个模型的第三块）。
# 它们的单位与这样的短文本相称：MoBA 读 3 块，每块 16 个键；NSA 读 4 块、每块 8 个键，加 16 个键的窗口；DSA 读 32 个键；CSA 读 16 个键的窗口和 8 个条目，每个条目 4 个词元；HCA 读窗口与全部条目，每个条目 16 个词元。
# %%
TRAINED = {
    "full": ("tiny-gqa", 1),
    "MoBA": ("tiny-moba", 1),
    "NSA": ("tiny-nsa", 1),
    "DSA": ("tiny-dsa", 1),
    "CSA": ("tiny-csa", 1),
    "HCA": ("tiny-csa", 2),
}
source = find("wordnet").read(lambda reason, position: None)
gloss = max((line.decode() for _, (_, line) in zip(range(4000), source, strict=False)), key=len)


def read_by(name: str, block: int, tokens: int = 96) -> np.ndarray:
    """Returns what a block of a trained model reads of the gloss, as `dependence` does."""
    run = rq.load(name, dtype="float32")
    attention = run.model.blocks[block].attention
    calls = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    with torch.no_grad():
        run.model(torch.tensor([run.tokenizer.encode(gloss)[:tokens]]))
    hook.remove()
    return dependence(attention, *calls[0])


of_language = {name: read_by(*trained) for name, trained in TRAINED.items()}

# %%
figure, panels = plt.subplots(2, 3, figsize=(10.5, 7.4), layout="constrained")
for axes, (name, sizes) in zip(panels.flat, of_language.items(), strict=True):
    read = sizes > 0
    axes.imshow(shades(sizes), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(f"{name}: the last token reads {read[-1].sum()} of {len(sizes)}", fontsize=9)
    axes.set_xticks(range(0, len(sizes) + 1, 32))
    axes.set_yticks(range(0, len(sizes) + 1, 32))
panels[1, 0].set(xlabel="token that is read", ylabel="query")
plt.show()


# %% [markdown] lang="en"
# Vertical stripes are tokens that many queries read: without a needle, what is worth reading is much the same for all of them. DSA picks such columns one by one and leaves the rest white. MoBA leaves out whole blocks, so a query
# meets a stripe only where its block was chosen. NSA's and HCA's summaries touch every token, faintly; what is dark is near. These are small models, trained for minutes, so the maps show the mechanisms and not what large models attend to. (A query depends on its own token even where it does not read its key: hence 33 for DSA.)
#
# ## MoBA's choice by hand
#
# For query $t$ and block $i$ MoBA's score is $\langle q_t, \bar k_i\rangle$ with $\bar k_i$ the mean of the block's keys; the query's own block is always read, and the best $K - 1$ complete blocks before it.
#
# **Exercise 1.** Return the chosen blocks of every query and head as booleans $[T, H, M]$, with `query` $[T, H, P]$, `key` $[T, P]$ (one key head), blocks of `size` keys.
# %% [markdown] lang="zh"
# 竖条是许多查询都读的词元：没有针的时候，值得读的对所有查询大致相同。DSA 逐个挑出这样的列，其余留白。MoBA 整块地舍弃，所以只有块被选中的地方，查询才遇到竖条。NSA 与 HCA 的摘要会淡淡地触及每个词元，颜色深的都在近处。
# 这些是训练了几分钟的小模型，图中显示的是机制，不代表大模型看什么。（查询即使不读自己的键，也依赖自己的词元，所以 DSA 是 33。）
#
# ## 手算 MoBA 的选择
#
# 对查询 $t$ 与块 $i$，MoBA 的分数是 $\langle q_t, \bar k_i\rangle$，$\bar k_i$ 是块内键的均值；查询自己的块必读，再加上它之前最好的 $K - 1$ 个完整的块。
#
# **练习 1.** 以布尔值 $[T, H, M]$ 返回每个查询、每个头选中的块；`query` 为 $[T, H, P]$，`key` 为 $[T, P]$（一个键头），每块 `size` 个键。
# %% tags=["exercise"]
def selected_blocks(query: torch.Tensor, key: torch.Tensor, size: int, top_k: int) -> torch.Tensor:
    """Returns which blocks each query and head reads, bool [T, H, M]."""
    ### BEGIN SOLUTION
    means = key.unflatten(0, (-1, size)).mean(1)
    scores = query @ means.T
    blocks = torch.arange(len(means))
    own_block = (torch.arange(len(query)) // size)[:, None, None]
    scores = scores.masked_fill(blocks > own_block, -torch.inf)
    scores = scores.masked_fill(blocks == own_block, torch.inf)
    best = scores.topk(top_k, dim=-1).indices
    result = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
    return result & (blocks <= own_block)
    ### END SOLUTION


# %% tags=["wrong"]
def selected_blocks(query: torch.Tensor, key: torch.Tensor, size: int, top_k: int) -> torch.Tensor:
    """Reads the future: the best blocks of the whole text."""
    scores = query @ key.unflatten(0, (-1, size)).mean(1).T
    best = scores.topk(top_k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


# %% tags=["wrong"]
def selected_blocks(query: torch.Tensor, key: torch.Tensor, size: int, top_k: int) -> torch.Tensor:
    """Counts the own block besides the others."""
    scores = query @ key.unflatten(0, (-1, size)).mean(1).T
    blocks = torch.arange(scores.shape[-1])
    own_block = (torch.arange(len(query)) // size)[:, None, None]
    earlier = scores.masked_fill(blocks >= own_block, -torch.inf)
    best = earlier.topk(top_k, dim=-1).indices
    result = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
    return (result & (blocks < own_block)) | (blocks == own_block)


# %% tags=["gate"]
moba = attentions["MoBA"]
with torch.no_grad():
    projected = moba.project(hidden, facts(moba, hidden))
query = projected.query
key = projected.key
answer = selected_blocks(query[0], key[0, :, 0], 8, 3)
means = key.unflatten(1, (-1, 8)).mean(2)
own_block = (torch.arange(TIME) // 8)[None]
expected = best_blocks(block_scores(query, means)[..., :-1], own_block, 0 * own_block, 3)[0]
expected = torch.zeros(TIME, 2, 17, dtype=torch.bool).scatter(-1, expected % 17, True)[..., :16]
assert torch.equal(answer, expected)
read = torch.tensor(maps["MoBA"] > 0).unflatten(1, (16, 8)).any(-1)
assert torch.equal(answer.any(1), read), "the map says the same"


# %% [markdown] lang="en"
# ## NSA's importance of a block
#
# NSA scores for nothing: its compressed branch attends to blocks of $l$ keys, one every $d$ keys, anyway, and a selection block of $l'$ keys is as important as the probability of the compressed blocks in it. With $l = 32$, $d = 16$, $l' = 64$ they overlap, and the paper counts pieces of $d$ keys:
# a compressed block counts once for each of its pieces that lies in the selection block.
#
# **Exercise 2.** How much do five compressed blocks, the first of which starts one piece before the selection block, count for it? Return five whole numbers.
# %% [markdown] lang="zh"
# ## NSA 的块重要性
#
# NSA 的打分不另花代价：它的压缩分支本来就要对长 $l$、每隔 $d$ 一个的压缩块做注意力；一个长 $l'$ 的选择块的重要性就是落在其中的压缩块的概率。$l = 32$、$d = 16$、$l' = 64$ 时二者互相重叠，论文按长 $d$ 的片段计数：
# 一个压缩块有几个片段落在选择块里，就计几次。
#
# **练习 2.** 有五个压缩块，第一个从选择块之前一个片段处开始。它们各计几次？返回五个整数。
# %% tags=["exercise"]
def pieces_inside() -> list[int]:
    """Returns how often the compressed blocks from one piece before a selection block on count."""
    ### BEGIN SOLUTION
    selection = set(range(4))  # pieces of 16 keys
    return [len(selection & {start, start + 1}) for start in range(-1, 4)]
    ### END SOLUTION


# %% tags=["wrong"]
def pieces_inside() -> list[int]:
    """Counts every block that touches the selection block once."""
    return [1, 1, 1, 1, 1]


# %% tags=["gate"]
sizes = NSAConfig(block=32, stride=16, select_block=64)
# Probability 1 on one compressed block after the other; selection block 1 holds keys 64 to 127.
importance = importance_of(torch.eye(11), 3, sizes)[:, 1]
assert pieces_inside() == importance[3:8].tolist()
assert importance[:3].sum() == importance[8:].sum() == 0

# %% tags=["exact"]
print("pieces of the five compressed blocks:", pieces_inside())

# %% [markdown] lang="en"
# ## What it saves
#
# How many keys or entries one query attends to, with the sizes of the papers. Scoring comes on top: DSA's and CSA's indexers look at every key or entry, with few and small heads; MoBA at one mean a block.
# %% [markdown] lang="zh"
# ## 省了多少
#
# 按论文的尺寸，一个查询对多少个键或条目做注意力。打分另计：DSA 与 CSA 的索引器要看每个键或条目，但头少而小；MoBA 每块看一个均值。
# %%
nsa, moba_sizes, dsa, csa = NSAConfig(), MoBAConfig(), DSAConfig(), CSAConfig()
context_lengths = 2.0 ** np.arange(9, 21)
attended = {
    "full": context_lengths,
    "NSA": context_lengths / nsa.stride + nsa.top_k * nsa.select_block + nsa.window,
    "MoBA": moba_sizes.top_k * moba_sizes.block + 0 * context_lengths,
    "DSA": dsa.top_k + 0 * context_lengths,
    "CSA": csa.window + np.minimum(csa.top_k, context_lengths / csa.ratio),
    "HCA": csa.window + context_lengths / csa.heavy_ratio,
}
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, counts in attended.items():
    axes.loglog(context_lengths, np.minimum(counts, context_lengths), label=name)
axes.set(xlabel="context, tokens", ylabel="attended to by a query")
axes.set_xticks([1e3, 1e4, 1e5, 1e6], ["1,000", "10,000", "100,000", "1,000,000"])
axes.legend(frameon=False, ncols=2)
plt.show()

# %% [markdown] lang="en"
# **Key finding.** All of them are softmax attention to fewer keys; they differ in the unit that is chosen, and in what the chooser learns from. A choice of single keys finds single needles and needs an indexer; blocks lie together in memory, and bring a needle's whole neighbourhood along; entries are few, and blur.
#
# With the papers' sizes, the same code: `rorqual/layers/moba.py`, `nsa.py`, `dsa.py`, `csa.py`. What it costs and brings in time: `python benchmarks/sparse.py`; how well trained models find needles: `docs/needle.md`. Next: several tokens a step, in notebook 9.
# %% [markdown] lang="zh"
# **关键结论。** 它们都是在更少的键上做 softmax 注意力；区别在于选择的单位，以及选择者从什么学习。选单个键能找到单根针，但需要索引器；同一块的键在内存里相邻，但要连针的整个邻域一起读；条目数少，但会模糊。
#
# 论文的尺寸用的是同样的代码：`rorqual/layers/moba.py`、`nsa.py`、`dsa.py`、`csa.py`。时间上的代价与收益：`python benchmarks/sparse.py`；训练好的模型找针的能力：`docs/needle.md`。接下来：一步多个词元，见第 9 个笔记本。
