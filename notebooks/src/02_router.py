# %% [markdown] lang="en"
# # 2. What a router does
#
# In a mixture of experts a token does not use the whole feed-forward layer. A router, one small matrix, scores the experts for
# every token, and only the best few compute. You write a router by hand, follow tokens to their experts and back, and
# then train one on a dictionary and see which letters its experts specialise in.
#
# Level: understand. Takes 15 minutes. Papers: DeepSeekMoE (arXiv 2401.06066), section 3; DeepSeek-V3 (2412.19437),
# section 2.1.2.
# %% [markdown] lang="zh"
# # 2. 路由做什么
#
# 在混合专家模型里，一个词元并不使用整个前馈层。路由只是一个小矩阵：它为每个词元给各专家打分，只有得分最高的几个参与计算。
# 这里先手写一个路由，跟着词元去到专家那里再回来，然后在一部词典上训练，看看专家各自专长于哪些字母。
#
# 层次：理解。用时 15 分钟。论文：DeepSeekMoE（arXiv 2401.06066）第 3 节；DeepSeek-V3（2412.19437）2.1.2 节。
# %%
import string

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import rorqual as rq
from rorqual.analyze.measures import expert_load
from rorqual.layers.attention import MLAConfig
from rorqual.layers.moe import MoE, MoEConfig, sort_slots
from rorqual.layers.router import Router, RouterConfig

# %% [markdown] lang="en"
# ## Score, select, weigh
#
# For a token with hidden state $u$ and $E$ experts with vectors $w_i$:
#
# $$s_i = \sigma(\langle w_i, u \rangle), \qquad \text{selected} = \text{the } K \text{ largest } s_i + b_i, \qquad
# g_i = \lambda \frac{s_i}{\sum_{j\ \text{selected}} s_j}$$
#
# The bias $b_i$ only decides who is selected; the weight $g_i$ does not contain it. DeepSeek has changed the score three times: softmax
# over all experts (V1, V2), a sigmoid for each (V3), the root of a softplus (V4). Below, the same eight logits go through
# all four routers. A router whose matrix is the identity takes the logits as its input.
# %% [markdown] lang="zh"
# ## 打分、选择、加权
#
# 词元的隐藏状态为 $u$，共 $E$ 个专家，各有向量 $w_i$：
#
# $$s_i = \sigma(\langle w_i, u \rangle), \qquad \text{selected} = \text{the } K \text{ largest } s_i + b_i, \qquad
# g_i = \lambda \frac{s_i}{\sum_{j\ \text{selected}} s_j}$$
#
# 偏置 $b_i$ 只决定选谁，权重 $g_i$ 里没有它。DeepSeek 换过三次打分函数：对全部专家做 softmax（V1、V2），每个专家各自 sigmoid（V3），
# softplus 的平方根（V4）。下面让同样的八个 logits 经过这四种路由。矩阵为单位阵的路由，输入就是 logits。
# %%
logits = torch.tensor([2.0, 1.5, 0.9, 0.8, -3.0, 1.8, -2.0, -1.0])
routers = {
    "DeepSeekMoE": RouterConfig(score="softmax", renormalise=False, bias=False),
    "V2: 4 groups, 2 of them": RouterConfig(
        score="softmax",
        groups=4,
        groups_kept=2,
        group_score="max",
        renormalise=False,
        bias=False,
        scale=16.0,
    ),
    "V3: 4 groups, 2 of them": RouterConfig(
        score="sigmoid", groups=4, groups_kept=2, group_score="top2", scale=2.5
    ),
    "V4": RouterConfig(score="sqrtsoftplus", scale=1.5),
}
figure, panels = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
for (name, config), axes in zip(routers.items(), panels, strict=True):
    router = Router(config, dim=8, experts=8, active=2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
        routing = router(logits[None, None])
    weights = torch.zeros(8).scatter(0, routing.topk_indices[0, 0], routing.weights[0, 0])
    axes.bar(range(8), routing.scores[0, 0], color="lightgray", label="score")
    axes.bar(range(8), weights, width=0.4, label="weight")
    axes.set_title(name, fontsize=9)
    axes.set(xlabel="expert")
panels[0].legend(frameon=False, fontsize=8)
plt.show()


# %% [markdown] lang="en"
# In V2 and V3 experts are in groups, here of two neighbours, and a token may only use the best groups, so that it travels to few
# machines. V2 judges a group by its best expert, V3 by its best two. That changes the choice: V3 loses expert 5, whose neighbour is
# weak.
#
# **Exercise 1.** Write V3's router without groups, for logits and a bias. (`torch.topk` and `gather` help.)
# %% [markdown] lang="zh"
# 在 V2 与 V3 里专家分成若干组（这里相邻两个为一组），一个词元只能用最好的几组，这样它只需去少数机器。V2 按组内最好的专家评价一组，V3 按
# 最好的两个。选择因此改变：V3 里专家 5 落选，因为它的同组很弱。
#
# **练习 1.** 写出 V3 的路由（不分组），输入为 logits 与偏置。（可用 `torch.topk` 与 `gather`。）
# %% tags=["exercise"]
def route(logits: torch.Tensor, bias: torch.Tensor, k: int, scale: float):
    """Returns the indices of the K selected experts, best first, and their weights."""
    ### BEGIN SOLUTION
    scores = logits.sigmoid()
    indices = (scores + bias).topk(k, -1).indices
    weights = scores.gather(-1, indices)
    return indices, scale * weights / weights.sum(-1, keepdim=True)
    ### END SOLUTION


# %% tags=["wrong"]
def route(logits: torch.Tensor, bias: torch.Tensor, k: int, scale: float):
    """Lets the bias into the weights."""
    weights, indices = (logits.sigmoid() + bias).topk(k, -1)
    return indices, scale * weights / weights.sum(-1, keepdim=True)


# %% tags=["wrong"]
def route(logits: torch.Tensor, bias: torch.Tensor, k: int, scale: float):
    """Adds the bias to the logits."""
    indices = (logits + bias).topk(k, -1).indices
    weights = logits.sigmoid().gather(-1, indices)
    return indices, scale * weights / weights.sum(-1, keepdim=True)


# %% tags=["gate"]
torch.manual_seed(0)
router = Router(RouterConfig(scale=2.5), dim=8, experts=8, active=3)
with torch.no_grad():
    router.weight.copy_(torch.eye(8))
    router.e_score_correction_bias.copy_(torch.randn(8) * 0.3)
    many = torch.randn(1, 200, 8) * 2
    expected = router(many)
indices, weights = route(many, router.e_score_correction_bias, 3, 2.5)
assert torch.equal(indices, expected.topk_indices)
assert torch.allclose(weights, expected.weights, atol=1e-5)

# %% [markdown] lang="en"
# ## To the experts and back
#
# Every token is copied once for each expert that it uses; copies are sorted by expert, so that an expert is one matrix
# product over its rows; results return to their tokens, weighted and summed, beside the shared expert that every token uses:
#
# $$y = \mathrm{shared}(u) + \sum_{i\ \text{selected}} g_i\, \mathrm{expert}_i(u)$$
# %% [markdown] lang="zh"
# ## 去到专家，再回来
#
# 每个词元按它要用的专家各复制一份；副本按专家排序，于是一个专家就是对若干行做一次矩阵乘法；结果回到各自的词元，加权求和，再加上
# 每个词元都用的共享专家：
#
# $$y = \mathrm{shared}(u) + \sum_{i\ \text{selected}} g_i\, \mathrm{expert}_i(u)$$
# %%
torch.manual_seed(0)
words = ["the", "whale", "sings", "and", "the", "whale", "dives"]
of_word = {word: torch.randn(32) for word in sorted(set(words))}
hidden = torch.stack([of_word[word] for word in words])[None]
moe = MoE(MoEConfig(routed=4, active=2, shared=1, width=16), dim=32)
with torch.no_grad():
    out, routing = moe(hidden)

slots = sort_slots(routing, dropping=False)
owners = [words[slot // 2] for slot in slots.order.tolist()]
for expert, rows in enumerate(torch.arange(len(owners)).split(slots.counts.tolist())):
    print(f"expert {expert}: {', '.join(owners[row] for row in rows.tolist())}")


# %% [markdown] lang="en"
# **Exercise 2.** Compute $y$ for one token with a loop. An expert is $(\mathrm{silu}(a) \cdot b)\, W_{down}$ with $[a, b] = u W_{gate\,up}$;
# the matrices are `moe.experts.gate_up[i]` and `moe.experts.down[i]`, the shared expert is `moe.shared`.
# %% [markdown] lang="zh"
# **练习 2.** 用循环算出一个词元的 $y$。专家是 $(\mathrm{silu}(a) \cdot b)\, W_{down}$，其中 $[a, b] = u W_{gate\,up}$；矩阵为
# `moe.experts.gate_up[i]` 与 `moe.experts.down[i]`，共享专家为 `moe.shared`。
# %% tags=["exercise"]
def by_hand(u: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the output of the mixture for one token [D]."""
    ### BEGIN SOLUTION
    result = moe.shared(u)
    for i, weight in zip(indices.tolist(), weights, strict=True):
        a, b = (u @ moe.experts.gate_up[i]).chunk(2)
        result = result + weight * ((F.silu(a) * b) @ moe.experts.down[i])
    return result
    ### END SOLUTION


# %% tags=["wrong"]
def by_hand(u: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Forgets the shared expert."""
    result = torch.zeros_like(u)
    for i, weight in zip(indices.tolist(), weights, strict=True):
        a, b = (u @ moe.experts.gate_up[i]).chunk(2)
        result = result + weight * ((F.silu(a) * b) @ moe.experts.down[i])
    return result


# %% tags=["gate"]
with torch.no_grad():
    for t in range(len(words)):
        mine = by_hand(hidden[0, t], routing.topk_indices[0, t], routing.weights[0, t])
        assert torch.allclose(mine, out[0, t], atol=1e-5), words[t]

# %% [markdown] lang="en"
# ## What experts specialise in
#
# Nobody tells an expert what to be good for. A model of two blocks reads entries of a dictionary letter by letter; after
# a few hundred steps, look at who takes which letter.
# %% [markdown] lang="zh"
# ## 专家专长于什么
#
# 没有人规定专家该擅长什么。下面的模型有两个块，逐字母读词典条目；几百步之后，看看哪个专家接手哪些字母。
# %%
text = "\n".join(rq.open_corpus("wordnet", limit=4000, duplicate_threshold=None).documents())
letters = torch.tensor([min(ord(c), 127) for c in text])
print(f"{len(letters):,} letters, from {text[:60]!r}")
config = rq.ModelConfig(
    vocab_size=128,
    dim=64,
    layers=2,
    mla=MLAConfig(heads=4, kv_lora_rank=32, nope_dim=16, rope_dim=8, value_dim=16),
    moe=MoEConfig(routed=8, active=2, shared=1, width=32),
    init_std=0.1,
)


def batch(generator: torch.Generator, size: int = 16, time: int = 96) -> torch.Tensor:
    """Returns random pieces of the text, [B, T + 1]."""
    starts = torch.randint(len(letters) - time - 1, (size,), generator=generator)
    return torch.stack([letters[start : start + time + 1] for start in starts.tolist()])


def trained(steps: int) -> rq.LanguageModel:
    """Returns a model after so many steps of training."""
    from rorqual.layers.balance import update_bias

    model = rq.LanguageModel(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = batch(generator)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        for block, counts in zip(model.blocks, loss.counts, strict=True):
            update_bias(block.ffn.router.e_score_correction_bias, counts, rate=0.01)
    return model


held_out = batch(torch.Generator().manual_seed(1), size=64)[:, :-1]
untrained = trained(0)
model = trained(250)
for name, network in (("untrained", untrained), ("trained", model)):
    with torch.no_grad():
        nats = network.loss(held_out[:, :-1], held_out[:, 1:]).next_token.item()
    special = expert_load(network, [held_out]).specialisation.tolist()
    print(f"{name:9s} {nats:.2f} nats a letter, specialisation {special[0]:.2f} {special[1]:.2f}")

# %% [markdown] lang="en"
# Specialisation is the mutual information of expert and letter, in nats: 0 if every expert takes all letters alike. An untrained
# router is a random projection of the embedding, so it already sorts letters, by chance. The map shows each expert's share of a letter.
# %% [markdown] lang="zh"
# 专精度是专家与字母之间的互信息，单位奈特；若每个专家对所有字母一视同仁，它为 0。未训练的路由是嵌入的随机投影，因此已经在按
# 偶然的方式给字母分类。下图是每个专家在每个字母中所占的份额。
# %%
shown = " " + string.ascii_lowercase + ":,;()-"
columns = [ord(c) for c in shown]
figure, panels = plt.subplots(2, 1, figsize=(9, 4.4), layout="constrained")
loads = expert_load(model, [held_out])
for block, axes in enumerate(panels):
    counts = loads.by_token[block][:, columns].float()
    image = axes.imshow(counts / counts.sum(0).clamp_min(1), cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(shown)), ["␣", *shown[1:]])
    axes.set(ylabel=f"expert of block {block}")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="share of the letter's slots")
plt.show()

# %% [markdown] lang="en"
# The second map follows one sentence. The same letter may go to different experts: the hidden state holds what came before it, too.
# %% [markdown] lang="zh"
# 第二张图跟着一句话走。同一个字母可以去不同的专家：隐藏状态里还有它前面的内容。
# %%
sentence = "a whale is a large sea mammal; the sea is salt water"
ids = torch.tensor([[ord(c) for c in sentence]])
with torch.no_grad():
    _, auxes = model.hidden(ids)
figure, panels = plt.subplots(2, 1, figsize=(10, 3.6), layout="constrained", sharex=True)
for block, (aux, axes) in enumerate(zip(auxes, panels, strict=True)):
    weights = torch.zeros(len(sentence), 8)
    weights.scatter_(1, aux.routing.topk_indices[0], aux.routing.weights[0])
    axes.imshow(weights.T, cmap="magma", vmin=0, vmax=1, aspect="auto")
    axes.set(ylabel=f"expert, block {block}")
    axes.tick_params(length=0)
panels[1].set_xticks(range(len(sentence)), [c if c != " " else "␣" for c in sentence])
plt.show()

# %% [markdown] lang="en"
# ## As many experts as a token needs
#
# Top-K spends the same on every token. With `adaptive_mass` a token takes experts, best first, until they hold that share of all its
# scores (Huang et al., 2403.07652). With softmax scores an undecided router asks many experts, a sure one few.
# %% [markdown] lang="zh"
# ## 需要几个专家就用几个
#
# Top-K 对每个词元花费相同。用 `adaptive_mass` 时，词元按得分从高到低取专家，直到它们占到全部得分的这一份额（Huang 等，2403.07652）。
# 用 softmax 打分，路由拿不准时多问几个专家，有把握时少问。
# %% tags=["exact"]
decided = torch.tensor([4.0, 1.0, 0.0, 0.0, -1.0, -1.0, -2.0, -2.0])
for mass in (0.5, 0.7, 0.9):
    router = Router(RouterConfig(score="softmax", adaptive_mass=mass), dim=8, experts=8, active=8)
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
        taken = router(torch.stack([decided, decided / 4])[None]).taken().sum(-1)[0].tolist()
    print(f"mass {mass}: {taken[0]} experts where the router is sure, {taken[1]} where it is not")

# %% [markdown] lang="en"
# **Key finding.** A router is a linear classifier that nobody labels: it is trained only by how much its experts help. The choice is
# by score plus bias, the weight by score alone; that is what makes balancing by a bias harmless (notebook 3).
#
# The code: `rorqual/layers/router.py` and `moe.py`. The page: docs/moe.md.
# %% [markdown] lang="zh"
# **关键结论。** 路由是一个没有标签的线性分类器：训练它的只有“专家帮了多少忙”。选择看得分加偏置，权重只看得分；用偏置做均衡之所以无害，
# 原因就在这里（第 3 个笔记本）。
#
# 代码：`rorqual/layers/router.py` 与 `moe.py`。页面：docs/zh/moe.md。
