# %% [markdown] lang="en"
# # 12. A new attention and a new router
#
# You will write an attention that reads the tokens 0, 1, 2, 4, 8, 16, ... before, and a router that compares directions instead of sizes; thirty
# lines each, and the tests that say whether they are right. Both run in a whole model: packed documents, padding, a cache and generation included.
#
# Level: extend. Takes 60 minutes. Sparse attention at distances of powers of two: LogSparse Transformer (arXiv 1907.00235). Cosine routing: X-MoE (arXiv 2204.09179). Half a minute of one core.
# %% [markdown] lang="zh"
# # 12. 写一种新的注意力和一种新的路由
#
# 你将写一种注意力，它只读之前第 0、1、2、4、8、16……个词元；再写一种路由，它比较方向而不是大小。各三十行，外加判断对错的测试。两者都在完整的模型里
# 运行，打包文档、填充、缓存与生成都包括在内。
#
# 层次：扩展。用时 60 分钟。距离为 2 的幂的稀疏注意力：LogSparse Transformer（arXiv 1907.00235）；余弦路由：X-MoE（arXiv 2204.09179）。单核约半分钟。
# %%
import os

# Generation module by module: the compiled step would first have to be compiled on a new machine.
os.environ["RORQUAL_KERNELS"] = "decode_step=reference"

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import rorqual as rq
from rorqual.data.sources import find
from rorqual.layers.attend import attend
from rorqual.layers.attention import GQA, Attended, GQAConfig
from rorqual.layers.balance import BalanceConfig, max_violation, update_bias
from rorqual.layers.context import context
from rorqual.layers.moe import MoEConfig
from rorqual.layers.router import Router, RouterConfig, Routing
from rorqual.model import init
from rorqual.serve.decoding import decode

# %% [markdown] lang="en"
# ## The attention
#
# An attention is a module with `forward(hidden, ctx)`. It returns the output of the new tokens and, in second place, an indexer's loss or `None`. `hidden` are the new
# tokens $[B, T, D]$. `ctx` is all else that a call knows, and these are the parts that matter here:
#
# | field | what it is |
# | --- | --- |
# | `ctx.columns` $[B, T]$ | the column of each new token among all keys, cached ones included |
# | `ctx.key_count` | the number of keys, $L$ |
# | `ctx.visible()` $[B, 1, T, L]$ | which keys a token may see: causal, within its document, no padding |
# | `ctx.last_only`, `ctx.last()` | reading a prompt needs the output of its last token alone |
#
# `GQA.project` gives rotated queries of the new tokens, and keys and values of all: it appends the new ones to the cache. `attend` is the softmax. So a new pattern
# is a mask:
#
# $$\mathrm{sees}(t, s) \iff t - s \in \{0, 1, 2, 4, 8, \dots\}$$
# %% [markdown] lang="zh"
# ## 注意力
#
# 注意力是一个带有 `forward(hidden, ctx)` 的模块，返回新词元的输出，以及索引器的损失或 `None`。`hidden` 是新词元 $[B, T, D]$。`ctx` 是一次调用所知道的其余一切，
# 这里用到的有：
#
# | 字段 | 含义 |
# | --- | --- |
# | `ctx.columns` $[B, T]$ | 每个新词元在全部键（包括已缓存的）中的列号 |
# | `ctx.key_count` | 键的个数 $L$ |
# | `ctx.visible()` $[B, 1, T, L]$ | 每个词元可以看哪些键：因果、同一文档、不含填充 |
# | `ctx.last_only`、`ctx.last()` | 读提示时只需要最后一个词元的输出 |
#
# `GQA.project` 给出新词元旋转后的查询，以及全部词元的键与值：它会把新的追加到缓存。`attend` 就是 softmax 注意力。所以一种新的模式只是一个掩码：
#
# $$\mathrm{sees}(t, s) \iff t - s \in \{0, 1, 2, 4, 8, \dots\}$$
# %% [markdown] lang="en"
# ### The tests first
#
# A token's output must be the same however it reaches the model: in one call or in pieces behind a cache, alone or packed behind another document, with or without padding.
# Five small functions say so, for the whole model. `tests/layers/test_attention_kinds.py` does the same for the library's attentions, with more ways to go wrong.
# %% [markdown] lang="zh"
# ### 先写测试
#
# 无论词元以什么方式进入模型，它的输出都必须相同：一次调用或缓存之后分段，单独或打包在另一文档之后，有没有填充。下面五个小函数对整个模型检查这一点。
# `tests/layers/test_attention_kinds.py` 对库里的各种注意力做同样的检查，考虑的出错方式更多。
# %%
config = rq.ModelConfig(
    vocab_size=32,
    dim=32,
    layers=2,
    dense_width=64,
    mla=None,
    gqa=GQAConfig(heads=2, kv_heads=1, head_dim=16),
    init_std=0.1,
)


def with_attention(config: rq.ModelConfig, attention: type[GQA]) -> rq.LanguageModel:
    """Returns a model of `config` whose blocks have this attention."""
    model = rq.LanguageModel(config)
    for block in model.blocks:
        block.attention = attention(config.gqa, config.dim, config.rope)
    init(model, seed=0)
    return model


ids = torch.randint(32, (2, 50), generator=torch.Generator().manual_seed(0))


def test_it_reads_exactly_these_keys(model: rq.LanguageModel) -> None:
    hidden = torch.randn(1, 40, 32, requires_grad=True)
    ctx = context(1, 40, "cpu", rope=(config.rope, config.rope_dim))
    out = model.blocks[0].attention(hidden, ctx).out
    (gradient,) = torch.autograd.grad(out[0, -1].sum(), hidden)
    read = gradient[0].norm(dim=-1).nonzero().flatten()
    assert (39 - read).tolist() == [32, 16, 8, 4, 2, 1, 0]


def test_later_tokens_change_nothing(model: rq.LanguageModel) -> None:
    changed = ids.clone()
    changed[:, 30:] = 5
    assert torch.allclose(model(ids)[:, :30], model(changed)[:, :30], atol=1e-5)


def test_pieces_behind_a_cache(model: rq.LanguageModel) -> None:
    cache = model.new_cache(batch=2)
    pieces = [model(piece, cache=cache) for piece in ids.split(7, dim=1)]
    assert torch.allclose(model(ids), torch.cat(pieces, dim=1), atol=1e-5)


def test_a_packed_document(model: rq.LanguageModel) -> None:
    document_ids = (torch.arange(50) >= 20).long().expand(2, -1)
    packed = model(ids, document_ids=document_ids)
    assert torch.allclose(packed[:, 20:], model(ids[:, 20:]), atol=1e-5)


def test_padding(model: rq.LanguageModel) -> None:
    padded = model(ids, lengths=[50, 33])
    assert torch.allclose(padded[1:, :33], model(ids[1:, :33]), atol=1e-5)


ATTENTION_TESTS = (
    test_it_reads_exactly_these_keys,
    test_later_tokens_change_nothing,
    test_pieces_behind_a_cache,
    test_a_packed_document,
    test_padding,
)


# %% [markdown] lang="en"
# **Exercise 1.** Write the mask. Of two whole numbers, `a & b` has the bits that both have; 16 = 10000 and 15 = 01111 in binary.
# %% [markdown] lang="zh"
# **练习 1.** 写出这个掩码。对两个整数，`a & b` 保留两者都有的二进制位；16 = 10000，15 = 01111。
# %% tags=["exercise"]
class LogSparse(GQA):
    """Attends to the tokens 0, 1, 2, 4, 8, ... before: log2(T) + 1 keys a query."""

    def forward(self, hidden, ctx):
        """Returns the output of the new tokens."""
        projected = self.project(hidden, ctx)
        if ctx.last_only:
            projected = projected.last(ctx)
            ctx = ctx.last()
        mask = ctx.visible() & self.reads(ctx)[:, None]
        out = attend(projected.query, projected.key, projected.value, self.scale, mask)
        return Attended(self.finish(out, projected.gate))

    def reads(self, ctx):
        """Returns which keys are at a distance of 0 or a power of two, bool [B, T, L]."""
        ### BEGIN SOLUTION
        distance = ctx.columns[..., None] - torch.arange(ctx.key_count)
        return distance & (distance - 1) == 0
        ### END SOLUTION


# %% tags=["wrong"]
class LogSparse(GQA):
    """Takes columns of this call for columns of all keys: wrong behind a cache."""

    def forward(self, hidden, ctx):
        projected = self.project(hidden, ctx)
        if ctx.last_only:
            projected = projected.last(ctx)
            ctx = ctx.last()
        mask = ctx.visible() & self.reads(ctx)[:, None]
        out = attend(projected.query, projected.key, projected.value, self.scale, mask)
        return Attended(self.finish(out, projected.gate))

    def reads(self, ctx):
        steps = torch.arange(ctx.columns.shape[1])[None, :, None]
        distance = steps - torch.arange(ctx.key_count)
        return distance & (distance - 1) == 0


# %% tags=["wrong"]
class LogSparse(GQA):
    """Forgets what a token must not see."""

    def forward(self, hidden, ctx):
        projected = self.project(hidden, ctx)
        if ctx.last_only:
            projected = projected.last(ctx)
            ctx = ctx.last()
        mask = self.reads(ctx)[:, None]
        out = attend(projected.query, projected.key, projected.value, self.scale, mask)
        return Attended(self.finish(out, projected.gate))

    def reads(self, ctx):
        distance = (ctx.columns[..., None] - torch.arange(ctx.key_count)).abs()
        return distance & (distance - 1) == 0


# %% tags=["gate"]
model = with_attention(config, LogSparse).eval()
for test in ATTENTION_TESTS:
    test(model)

# %% tags=["exact"]
for test in ATTENTION_TESTS:
    test(model)
    print("passed:", test.__name__)
(answer,) = zip(*decode(model, [ids[0, :8].tolist()], max_new_tokens=5), strict=True)
print("generates:", len(answer), "ids after a prompt of 8")

# %% [markdown] lang="en"
# ### How far it sees
#
# One layer reaches the distances that are powers of two. Two layers reach all sums of two of them: the layer below has carried the token half the way. So a distance needs
# as many layers as it has ones in binary, and $\log_2 T$ layers see everything. Below, the number of layers until a query (row) can know of a key (column).
# %% [markdown] lang="zh"
# ### 它能看多远
#
# 一层能到达的距离是 2 的幂。两层能到达任意两个这样的数之和：下面一层已经把那个词元带到了半路。所以一个距离的二进制里有几个 1，就需要几层；
# $\log_2 T$ 层能看到一切。下图是某个查询（行）能得知某个键（列）所需的层数。
# %%
length = 64
ctx = context(1, length, "cpu", rope=(config.rope, config.rope_dim))
once = (model.blocks[0].attention.reads(ctx) & ctx.visible()[0])[0].float()
reached = torch.eye(length)
layers = torch.full((length, length), torch.nan)
for count in range(1, 7):
    reached = (once @ reached > 0).float()
    layers[(reached > 0) & layers.isnan()] = count

figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
image = axes.imshow(layers, cmap="viridis_r")
axes.set(xlabel="key", ylabel="query")
figure.colorbar(image, label="layers", ticks=range(1, 7))
plt.show()


# %% [markdown] lang="en"
# ### A task that shows it
#
# Random ids; the answer at each token is the id `distance` tokens before. A model of two blocks can answer 32 (one step) and 40 = 32 + 8 (two steps), and not 42 = 32 + 8 + 2. A
# window of as many keys, the last 7, reaches 12 tokens back through two blocks and can answer none of them.
# %% [markdown] lang="zh"
# ### 一个能显示它的任务
#
# id 是随机的；每个词元的答案是 `distance` 个词元之前的 id。两块的模型能回答 32（一步）和 40 = 32 + 8（两步），不能回答 42 = 32 + 8 + 2。键数相同的窗口
# （最近 7 个键）经过两块只能回看 12 个词元，一个也答不了。
# %%
def train(model: rq.LanguageModel, distance: int, steps: int = 100) -> list[float]:
    """Returns the losses of a model that learns to repeat the id `distance` tokens before."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(32, (16, 64), generator=draw)
        labels = torch.full_like(ids, -100)
        labels[:, distance:] = ids[:, :-distance]
        loss = model.loss(ids, labels).total
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


window = rq.replace(config, "gqa.window", 7)
figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True, layout="constrained")
for axes, distance in zip(panels, (32, 40, 42), strict=True):
    for name, made, dashes in (
        ("all keys", with_attention(config, GQA), "-"),
        ("7 keys, LogSparse", with_attention(config, LogSparse), "-"),
        ("7 keys, window", with_attention(window, GQA), ":"),
    ):
        axes.plot(train(made, distance), dashes, label=name)
    axes.set(xlabel="step", title=f"{distance} tokens before")
panels[0].set_ylabel("loss, nats")
panels[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown] lang="en"
# ## The router
#
# A router is a module with `forward(hidden, ids, valid)` that returns a `Routing`: the `active` experts of each token, their weights, the scores and logits of all. The usual one scores by
# an inner product, so that a large token or a large row of the matrix wins. The cosine router of X-MoE compares directions in a small space:
#
# $$\mathrm{logits}_e = \frac{\cos(P x, d_e)}{\tau}, \qquad s = \sigma(\mathrm{logits}), \qquad \text{chosen: the best of } s + b$$
#
# with learned $P$, $d_e$ and $\tau$. The rest is DeepSeek-V3's: the bias $b$ selects and does not weigh, moves without a gradient, and the weights of the chosen sum to `scale`.
#
# Again the tests first.
# %% [markdown] lang="zh"
# ## 路由
#
# 路由是一个带有 `forward(hidden, ids, valid)` 的模块，返回 `Routing`：每个词元的 `active` 个专家及其权重，以及全部专家的分数与 logits。常见的路由用内积打分，
# 于是模大的词元、模大的矩阵行占优。X-MoE 的余弦路由在一个小空间里比较方向：
#
# $$\mathrm{logits}_e = \frac{\cos(P x, d_e)}{\tau}, \qquad s = \sigma(\mathrm{logits}), \qquad \text{选中：} s + b \text{ 最大的几个}$$
#
# 其中 $P$、$d_e$、$\tau$ 是学到的。其余与 DeepSeek-V3 相同：偏置 $b$ 只参与选择、不参与加权，不经梯度移动；所选专家的权重之和为 `scale`。
#
# 仍然先写测试。
# %%
torch.manual_seed(0)
tokens = torch.randn(2, 200, 32) + torch.randn(32)  # a common direction, so that the load is uneven


def new_router() -> nn.Module:
    torch.manual_seed(1)
    return CosineRouter(RouterConfig(scale=2.5), 32, experts=8, active=2)


def test_weights_sum_to_the_scale(router: nn.Module) -> None:
    routing = router(tokens)
    assert torch.allclose(routing.weights.sum(-1), torch.tensor(2.5))
    assert routing.counts().sum() == 2 * 200 * 2


def test_the_size_of_a_token_does_not_matter(router: nn.Module) -> None:
    assert torch.equal(router(tokens).topk_indices, router(4 * tokens).topk_indices)
    assert torch.allclose(router(tokens).scores, router(4 * tokens).scores, atol=1e-5)


def test_the_bias_selects_and_does_not_weigh(router: nn.Module) -> None:
    router.e_score_correction_bias[3] = 10.0
    routing = router(tokens)
    assert (routing.topk_indices == 3).any(-1).all(), "every token takes expert 3"
    chosen_scores = routing.scores.gather(-1, routing.topk_indices)
    expected = 2.5 * chosen_scores / chosen_scores.sum(-1, keepdim=True)
    assert torch.allclose(routing.weights, expected, atol=1e-6)


def test_padding_takes_no_expert(router: nn.Module) -> None:
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[1, 150:] = False
    assert router(tokens, None, valid).counts().sum() == 2 * 350


def test_every_parameter_learns(router: nn.Module) -> None:
    (router(tokens).weights[..., 0] ** 2).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())


def test_the_bias_balances_the_load(router: nn.Module) -> None:
    before = max_violation(router(tokens).counts())
    for _ in range(200):
        update_bias(router.e_score_correction_bias, router(tokens).counts(), rate=0.005)
    assert max_violation(router(tokens).counts()) < 0.3 < before


ROUTER_TESTS = (
    test_weights_sum_to_the_scale,
    test_the_size_of_a_token_does_not_matter,
    test_the_bias_selects_and_does_not_weigh,
    test_padding_takes_no_expert,
    test_every_parameter_learns,
    test_the_bias_balances_the_load,
)


# %% [markdown] lang="en"
# **Exercise 2.** Write `forward`.
# %% [markdown] lang="zh"
# **练习 2.** 写出 `forward`。
# %% tags=["exercise"]
class CosineRouter(nn.Module):
    """Scores experts by the angle between a projected token and a direction of each."""

    def __init__(self, config: RouterConfig, dim: int, experts: int, active: int, width: int = 8):
        super().__init__()
        self.config = config
        self.active = active
        self.project = nn.Linear(dim, width, bias=False)
        self.directions = nn.Parameter(torch.randn(experts, width))
        self.log_temperature = nn.Parameter(torch.tensor(0.3).log())
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def forward(self, hidden, ids=None, valid=None):
        """Returns the routing of every token; `valid` [B, T] is False at padding."""
        ### BEGIN SOLUTION
        token = F.normalize(self.project(hidden).float(), dim=-1)
        cosines = token @ F.normalize(self.directions, dim=-1).T
        logits = cosines / self.log_temperature.exp()
        scores = logits.sigmoid()
        biased = scores.detach() + self.e_score_correction_bias
        topk_indices = biased.topk(self.active, dim=-1).indices
        weights = scores.gather(-1, topk_indices)
        weights = self.config.scale * weights / weights.sum(-1, keepdim=True)
        if valid is not None:
            weights = weights * valid[..., None]
        return Routing(topk_indices, weights, scores, logits, valid)
        ### END SOLUTION


# %% tags=["wrong"]
class CosineRouter(CosineRouter):
    """Weighs by the biased scores: the bias would change what the model computes."""

    def forward(self, hidden, ids=None, valid=None):
        token = F.normalize(self.project(hidden).float(), dim=-1)
        logits = token @ F.normalize(self.directions, dim=-1).T / self.log_temperature.exp()
        scores = logits.sigmoid()
        best = (scores + self.e_score_correction_bias).topk(self.active, dim=-1)
        weights = self.config.scale * best.values / best.values.sum(-1, keepdim=True)
        if valid is not None:
            weights = weights * valid[..., None]
        return Routing(best.indices, weights, scores, logits, valid)


# %% tags=["wrong"]
class CosineRouter(CosineRouter):
    """Routes padding, too, and does not norm the token."""

    def forward(self, hidden, ids=None, valid=None):
        token = self.project(hidden).float()
        logits = token @ F.normalize(self.directions, dim=-1).T / self.log_temperature.exp()
        scores = logits.sigmoid()
        topk_indices = (scores.detach() + self.e_score_correction_bias).topk(self.active).indices
        weights = scores.gather(-1, topk_indices)
        weights = self.config.scale * weights / weights.sum(-1, keepdim=True)
        return Routing(topk_indices, weights, scores, logits, valid)


# %% tags=["gate"]
for test in ROUTER_TESTS:
    test(new_router())

# %% tags=["exact"]
for test in ROUTER_TESTS:
    test(new_router())
    print("passed:", test.__name__)

# %% [markdown] lang="en"
# ### In a model
#
# Two models that read letters of WordNet, one with each router, and the same rate of the bias. Left the loss, right the load of the first mixture: MaxVio is the busiest expert over the mean, less one.
# %% [markdown] lang="zh"
# ### 放进模型
#
# 两个逐字母读 WordNet 的模型，路由各用一种，偏置的步长相同。左边是损失，右边是第一层混合专家的负载：MaxVio 是最忙的专家与平均之比减一。
# %%
source = find("wordnet").read(lambda reason, position: None)
text = torch.tensor(list(b"".join(line for _, (_, line) in zip(range(4000), source, strict=False))))
balance = BalanceConfig(bias_rate=0.01)
moe = MoEConfig(routed=16, active=2, width=16, balance=balance)
letters = rq.ModelConfig(vocab_size=256, dim=32, layers=2, moe=moe, init_std=0.1)


def read_letters(router: type[nn.Module], steps: int = 150) -> list[tuple[float, float]]:
    """Returns the loss and MaxVio of each step of a model whose mixtures have this router."""
    model = rq.LanguageModel(letters)
    for block in model.blocks:
        torch.manual_seed(0)
        block.ffn.router = router(moe.router, letters.dim, moe.routed, moe.active)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        starts = torch.randint(len(text) - 65, (16, 1), generator=draw)
        pieces = text[starts + torch.arange(65)]
        loss = model.loss(pieces[:, :-1], pieces[:, 1:])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        for block, counts in zip(model.blocks, loss.counts, strict=True):
            update_bias(block.ffn.router.e_score_correction_bias, counts, balance.bias_rate)
        history.append((loss.next_token.item(), max_violation(loss.counts[0])))
    return history


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for name, router in (("inner product", Router), ("cosine", CosineRouter)):
    losses, loads = torch.tensor(read_letters(router)).T
    left.plot(losses.unfold(0, 8, 1).mean(1), label=name)
    right.plot(loads.unfold(0, 8, 1).mean(1), label=name)
left.set(xlabel="step", ylabel="loss, nats a letter")
right.set(xlabel="step", ylabel="MaxVio of block 0", ylim=(0, None))
left.legend(frameon=False)
plt.show()

# %% [markdown] lang="en"
# One seed and 150 steps decide nothing about which router is better: that is the subject of notebook 10.
#
# ## To stay
#
# Swapped into a model, your modules are trained, cached and served as they are, but no configuration knows of them: a saved run could not be loaded. To make one part of the library takes
# a dataclass and a field in `model_config.py`, its choice in `model.py`, its formula in `costs.py`, its line in the contract of layers (`pyproject.toml`), a page, and its name among `KINDS` of
# `tests/layers/test_attention_kinds.py`. The list with reasons is at the end of `docs/architecture.md`, "How to add".
#
# **Key finding.** A layer takes `(hidden, ctx)`; what it must know stands in `ctx`. So thirty lines are enough for a new idea, and the tests are the larger half of the work.
#
# This was the last notebook.
# %% [markdown] lang="zh"
# 一个种子、150 步说明不了哪种路由更好：那是第 10 个笔记本的主题。
#
# ## 长期留下来
#
# 换进模型的模块可以照常训练、缓存和服务，但没有任何配置认识它们：存下的运行无法再读入。要成为库的一部分，需要：`model_config.py` 里的一个 dataclass 和一个字段，
# `model.py` 里的选择，`costs.py` 里的公式，`pyproject.toml` 分层约定里的一行，一页文档，以及 `tests/layers/test_attention_kinds.py` 的 `KINDS` 里的名字。完整清单与理由
# 见 `docs/architecture.md` 末尾的 “How to add”。
#
# **关键结论。** 一层只接受 `(hidden, ctx)`，它需要知道的一切都在 `ctx` 里。所以一个新想法三十行就够，而测试是工作的大半。
#
# 这是最后一个笔记本。
