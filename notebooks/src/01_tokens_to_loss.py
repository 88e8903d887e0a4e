# %% [markdown] lang="en"
# # 1. From tokens to a loss: a DeepSeek-V3 of 50,000 parameters
#
# DeepSeek-V3 has 671 billion parameters, and every mechanism of it fits into a model that trains here in ten seconds.
# You follow one sentence through it: letters to ids, ids to vectors, vectors through attention and experts to
# probabilities, probabilities to a number that training makes small.
#
# Level: understand. Takes 10 minutes. Paper: DeepSeek-V3 (arXiv 2412.19437), sections 2.1 and 2.2.
# %% [markdown] lang="zh"
# # 1. 从词元到损失：五万参数的 DeepSeek-V3
#
# DeepSeek-V3 有 6710 亿参数，而它的每一种机制都装得进一个十秒就能训练完的小模型。这里跟着一句话走完全程：字母变成 id，
# id 变成向量，向量经过注意力与专家变成概率，概率变成一个数，训练就是让这个数变小。
#
# 层次：理解。用时 10 分钟。论文：DeepSeek-V3（arXiv 2412.19437）2.1、2.2 节。
# %%
import math
import string
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import rorqual as rq
from rorqual.layers.attention import MLAConfig
from rorqual.layers.balance import max_violation, update_bias
from rorqual.layers.mtp import MTPConfig

# %% [markdown] lang="en"
# ## Letters are tokens
#
# A tokenizer maps text to integers. The smallest one is a list of letters: `string.printable` has 100, and the id of a
# letter is its index. The batch has one sequence, so the ids are a matrix $[B, T]$ with $B = 1$.
# %% [markdown] lang="zh"
# ## 以字母为词元
#
# 分词器把文本映射为整数。最小的分词器就是一张字母表：`string.printable` 有 100 个字符，字符的 id 就是它的下标。这一批只有
# 一条序列，所以 id 是一个 $[B, T]$ 的矩阵，$B = 1$。
# %% tags=["exact"]
text = "the blue whale sings; the blue whale dives; the sea is blue and wide. " * 2
ids = torch.tensor([[string.printable.index(letter) for letter in text]])
print(list(ids.shape), ids[0, :9].tolist(), repr(text[:9]))

# %% [markdown] lang="en"
# ## The model, and where its parameters are
#
# Two blocks of width 64, each with multi-head latent attention (4 heads) and a mixture of 4 routed experts, of which a token
# takes 2, and a shared one; and a module that predicts one letter further (MTP). It is DeepSeek-V3 with small numbers.
# %% [markdown] lang="zh"
# ## 模型，以及参数都在哪里
#
# 两个块，宽 64；每块有多头潜在注意力（4 个头），以及 4 个路由专家与一个共享专家，每个词元选 2 个路由专家；另有一个多预测一个
# 字母的模块（MTP）。这就是把数字改小了的 DeepSeek-V3。
# %% tags=["exact"]
classroom = rq.preset("classroom")
attention = MLAConfig(
    heads=4, q_lora_rank=24, kv_lora_rank=16, nope_dim=16, rope_dim=8, value_dim=16
)
experts = replace(classroom.moe, shared=1)
config = replace(classroom, gqa=None, mla=attention, moe=experts, mtp=MTPConfig())
model = rq.LanguageModel(config, seed=0)

costs = rq.costs.costs(config)
print(f"{costs.total:,} parameters, {costs.activated:,} of them used by a token")
print(f"{costs.mtp:,} more in the module that predicts one letter further")
for name, module in (
    ("embedding, which is the head, too", model.embed),
    ("attention of block 0", model.blocks[0].attention),
    ("experts of block 0", model.blocks[0].ffn),
):
    print(f"{sum(p.numel() for p in module.parameters()):6,} {name}")

# %% [markdown] lang="en"
# ## Through the blocks
#
# A block adds twice to the residual stream $x$, which is $[B, T, D]$ everywhere:
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{experts}(\mathrm{norm}(x))$$
#
# `model.hidden` returns the stream after the last block and what each router did. Attention moves information from
# earlier letters to later ones; experts work on each letter by itself.
# %% [markdown] lang="zh"
# ## 穿过各块
#
# 一个块对残差流 $x$ 做两次加法，$x$ 的形状始终是 $[B, T, D]$：
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{experts}(\mathrm{norm}(x))$$
#
# `model.hidden` 返回最后一块之后的残差流，以及每个路由做了什么。注意力把信息从前面的字母搬到后面的字母；专家则各自处理单个字母。
# %% tags=["exact"]
with torch.no_grad():
    hidden, auxes = model.hidden(ids)
    logits = model.logits(hidden)
print("hidden", list(hidden.shape), "logits", list(logits.shape))
for block, aux in enumerate(auxes):
    routing = aux.routing
    print(f"block {block}: experts {list(routing.topk_indices.shape)} = [B, T, K]")

# %% [markdown] lang="en"
# The model is causal: what it says at a position must not depend on what comes later. Change the last letters and look at
# the first position whose logits change.
# %% [markdown] lang="zh"
# 模型是因果的：某个位置的输出不能依赖后面的内容。改掉最后几个字母，看看 logits 从哪个位置开始变化。
# %% tags=["exact"]
changed = ids.clone()
changed[0, 100:] = string.printable.index("z")
with torch.no_grad():
    differs = (model(changed) - logits).abs().amax(-1)[0] > 1e-4
print("the first position that changes:", int(differs.nonzero()[0]))


# %% [markdown] lang="en"
# ## The loss
#
# The logits at position $t$ are a guess of the letter at $t + 1$. The loss is the mean surprise, in nats:
#
# $$\mathcal{L} = -\frac{1}{T - 1} \sum_{t=1}^{T-1} \ln \mathrm{softmax}(\mathrm{logits}_t)[\mathrm{id}_{t+1}]$$
#
# An untrained model spreads its guess over all 100 letters, so the loss is about $\ln 100 = 4.61$.
#
# **Exercise 1.** Write this loss for logits $[B, T, V]$ and ids $[B, T]$.
# %% [markdown] lang="zh"
# ## 损失
#
# 位置 $t$ 的 logits 是对 $t + 1$ 处字母的猜测。损失是平均的“意外程度”，单位奈特：
#
# $$\mathcal{L} = -\frac{1}{T - 1} \sum_{t=1}^{T-1} \ln \mathrm{softmax}(\mathrm{logits}_t)[\mathrm{id}_{t+1}]$$
#
# 未训练的模型把猜测摊到全部 100 个字母上，损失约为 $\ln 100 = 4.61$。
#
# **练习 1.** 给定 logits $[B, T, V]$ 与 id $[B, T]$，写出这个损失。
# %% tags=["exercise"]
def next_letter_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the mean surprise of each next letter, in nats."""
    ### BEGIN SOLUTION
    logs = logits[:, :-1].log_softmax(-1)
    return -logs.gather(-1, ids[:, 1:, None]).mean()
    ### END SOLUTION


# %% tags=["wrong"]
def next_letter_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Compares the guess with the letter that the model has just read."""
    return -logits.log_softmax(-1).gather(-1, ids[:, :, None]).mean()


# %% tags=["wrong"]
def next_letter_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Averages logits, which are no logarithms of probabilities."""
    return -logits[:, :-1].gather(-1, ids[:, 1:, None]).mean()


# %% tags=["gate"]
expected = model.loss(ids[:, :-1], ids[:, 1:]).next_token.item()
assert abs(next_letter_loss(logits, ids).item() - expected) < 1e-4
certain = 50.0 * F.one_hot(ids.roll(-1, 1), 100).float()
assert next_letter_loss(certain, ids).item() < 1e-4, "a model that is right has no loss"

# %% tags=["exact"]
print(f"{next_letter_loss(logits, ids).item():.2f} nats; ln 100 = {math.log(100):.2f}")

# %% [markdown] lang="en"
# ## Training
#
# What is minimised has three parts: the next letter, 0.3 times the letter after it (MTP), and a small balance loss. The biases
# of the routers move once a step without a gradient, so that every expert gets its share of the letters; notebook 3 is about
# that.
# %% [markdown] lang="zh"
# ## 训练
#
# 被最小化的量有三部分：下一个字母、0.3 倍的再下一个字母（MTP），以及很小的均衡损失。路由的偏置每步移动一次，不经过梯度，
# 使每个专家分到自己那一份字母；这是第 3 个笔记本的主题。
# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
history = []
for _ in range(150):
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    for block, counts in zip([*model.blocks, model.mtp[0].block], loss.counts, strict=True):
        update_bias(block.ffn.router.e_score_correction_bias, counts, rate=0.02)
    history.append((loss.next_token.item(), loss.mtp.item(), max_violation(loss.counts[0])))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot([step[0] for step in history], label="next letter")
left.plot([step[1] for step in history], label="the letter after it (MTP)")
left.axhline(math.log(100), color="gray", ls=":", label="ln 100")
left.set(xlabel="step", ylabel="loss, nats a letter")
left.legend(frameon=False)
right.plot([step[2] for step in history], color="tab:green")
right.set(xlabel="step", ylabel="busiest expert / mean - 1", title="load of block 0")
plt.show()

# %% [markdown] lang="en"
# ## What attention looks at now
#
# The probabilities of MLA's expanded form, computed from its own parts: queries and keys of every head, scaled, masked, softmax.
# Row: the letter that asks; column: the letter that is read. Bright columns are letters that many later ones read; short
# diagonals are heads that read at a fixed distance.
# %% [markdown] lang="zh"
# ## 注意力现在看向哪里
#
# 用 MLA 自己的部件算出展开形式的概率：每个头的查询与键，缩放、掩码、softmax。行是发问的字母，列是被读的字母。亮的竖条
# 是被后面许多字母读取的字母；短斜线是按固定距离读取的头。
# %%
from rorqual.layers.context import context

clause = ids[:, :44]
time = clause.shape[1]
ctx = context(1, time, "cpu", rope=(config.rope, config.rope_dim))
layer = model.blocks[0].attention
with torch.no_grad():
    x = model.blocks[0].attention_norm(model.embed(clause))
    query, key, value = layer.expand(
        *layer.queries(layer.query_latent(x), ctx), layer.latents(x, ctx)
    )
    scores = layer.scale * torch.einsum("bthp,blhp->bhtl", query, key)
    scores = scores.masked_fill(~ctx.visible(), -torch.inf)
    probabilities = scores.softmax(-1)[0]

figure, panels = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
for head, axes in enumerate(panels):
    axes.imshow(probabilities[head].sqrt(), cmap="magma", vmin=0, vmax=1)
    axes.set_xticks(range(time), [letter.replace(" ", "␣") for letter in text[:time]], fontsize=5)
    axes.set_yticks(range(time), [letter.replace(" ", "␣") for letter in text[:time]], fontsize=5)
    axes.tick_params(length=0)
    axes.set_title(f"head {head}", fontsize=9)
figure.suptitle("attention of block 0 (square root of the probability)", fontsize=9)
plt.show()


# %% [markdown] lang="en"
# ## Letters in, letters out
#
# To generate, take the most likely next letter, append it, and repeat. A cache keeps what attention needs of the letters
# already read, so that each step reads one letter; notebook 4 opens it.
#
# **Exercise 2.** Complete the loop. `cache = model.new_cache(batch=1)` and `model(new_ids, cache=cache)` continue where the last call
# ended.
# %% [markdown] lang="zh"
# ## 字母进，字母出
#
# 生成就是取最可能的下一个字母，接在后面，再重复。缓存保存已读字母中注意力所需的内容，于是每步只读一个字母；第 4 个笔记本会打开它。
#
# **练习 2.** 补全循环。`cache = model.new_cache(batch=1)`，`model(new_ids, cache=cache)` 会接着上一次调用的末尾继续。
# %% tags=["exercise"]
@torch.no_grad()
def continued(prompt: str, letters: int) -> str:
    """Returns the most likely `letters` that follow the prompt, read through a cache."""
    new_ids = torch.tensor([[string.printable.index(letter) for letter in prompt]])
    ### BEGIN SOLUTION
    cache = model.new_cache(batch=1)
    result = ""
    for _ in range(letters):
        new_ids = model(new_ids, cache=cache)[:, -1:].argmax(-1)
        result += string.printable[int(new_ids)]
    return result
    ### END SOLUTION


# %% tags=["wrong"]
@torch.no_grad()
def continued(prompt: str, letters: int) -> str:
    """Forgets the prompt: a new cache in every step."""
    new_ids = torch.tensor([[string.printable.index(letter) for letter in prompt]])
    result = ""
    for _ in range(letters):
        new_ids = model(new_ids, cache=model.new_cache(batch=1))[:, -1:].argmax(-1)
        result += string.printable[int(new_ids)]
    return result


# %% tags=["gate"]
prompt = "the blue whale s"
answer = continued(prompt, 40)
assert len(answer) == 40
with torch.no_grad():
    whole = torch.tensor([[string.printable.index(letter) for letter in prompt + answer]])
    guesses = model(whole)[0, len(prompt) - 1 : -1].argmax(-1)
assert answer == "".join(string.printable[i] for i in guesses), "differs from a call without cache"

# %%
print(repr(prompt), "goes on", repr(continued(prompt, 53)))

# %% [markdown] lang="en"
# **Key finding.** Nothing in the way from tokens to a loss needs scale: the same classes, with larger numbers in the
# config, are DeepSeek-V3 (`rq.preset("deepseek-v3")`). The code you have just run is `rorqual/model.py`, `LanguageModel.loss`.
#
# Next: what the router did with these letters, in notebook 2.
# %% [markdown] lang="zh"
# **关键结论。** 从词元到损失的整条路都不依赖规模：同样的类，配置里换成大的数字，就是 DeepSeek-V3（`rq.preset("deepseek-v3")`）。
# 刚才运行的代码在 `rorqual/model.py` 的 `LanguageModel.loss`。
#
# 接下来：路由怎样处理这些字母，见第 2 个笔记本。
