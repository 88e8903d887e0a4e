# %% [markdown] lang="en"
# # 3. Balance, with and without a bias
#
# A router that prefers some experts trains them more, so that it prefers them more. Left alone, it wastes experts, and on a
# cluster the busiest expert sets the pace. Three models are trained on the same letters: one left alone, one with a balance
# loss, one with DeepSeek-V3's bias, which needs no loss.
#
# Level: understand. Takes 15 minutes. Papers: loss-free balancing (arXiv 2408.15664); DeepSeek-V3 (2412.19437), section 2.1.2;
# DeepSeekMoE (2401.06066), section 3.3.
# %% [markdown] lang="zh"
# # 3. 均衡：有偏置与没有偏置
#
# 路由偏爱某些专家，这些专家就得到更多训练，于是更受偏爱。放任不管，就有专家闲置；在集群上，最忙的专家决定整体速度。这里在同样的
# 字母上训练三个模型：一个放任不管，一个用均衡损失，一个用 DeepSeek-V3 的偏置，不需要损失。
#
# 层次：理解。用时 15 分钟。论文：无辅助损失的均衡（arXiv 2408.15664）；DeepSeek-V3（2412.19437）2.1.2 节；DeepSeekMoE（2401.06066）3.3 节。
# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import rorqual as rq
from rorqual.layers.attention import MLAConfig
from rorqual.layers.balance import BalanceConfig, losses, max_violation, update_bias
from rorqual.layers.moe import MoEConfig
from rorqual.layers.router import Router, RouterConfig


# %% [markdown] lang="en"
# ## How uneven is a load?
#
# With $c_i$ the number of tokens that took expert $i$:
#
# $$\mathrm{MaxVio} = \frac{\max_i c_i}{\frac{1}{E} \sum_i c_i} - 1$$
#
# It is 0 in balance. If all tokens take the same $K$ experts it is $E/K - 1$.
#
# **Exercise 1.** Write it.
# %% [markdown] lang="zh"
# ## 负载有多不均
#
# 设 $c_i$ 为选了专家 $i$ 的词元数：
#
# $$\mathrm{MaxVio} = \frac{\max_i c_i}{\frac{1}{E} \sum_i c_i} - 1$$
#
# 均衡时为 0。若所有词元都选同样的 $K$ 个专家，则为 $E/K - 1$。
#
# **练习 1.** 写出它。
# %% tags=["exercise"]
def violation(counts: torch.Tensor) -> float:
    """Returns MaxVio of the tokens that each expert took."""
    ### BEGIN SOLUTION
    load = counts.double()
    return (load.max() / load.mean() - 1).item()
    ### END SOLUTION


# %% tags=["wrong"]
def violation(counts: torch.Tensor) -> float:
    """Divides by the mean of the experts that were used."""
    load = counts.double()
    return (load.max() / load[load > 0].mean() - 1).item()


# %% tags=["gate"]
assert violation(torch.tensor([10, 10, 10, 10])) == 0
assert violation(torch.tensor([20, 20, 0, 0])) == 1, "E = 4 and K = 2: E/K - 1"
assert abs(violation(torch.tensor([3, 1, 0, 0])) - max_violation(torch.tensor([3, 1, 0, 0]))) < 1e-9


# %% [markdown] lang="en"
# ## Two cures
#
# The **balance loss** adds a term whose gradient lowers the scores of busy experts. Over the $T$ tokens of a sequence:
#
# $$f_i = \frac{E}{K T} c_i, \qquad P_i = \frac{1}{T} \sum_t \frac{s_{t,i}}{\sum_j s_{t,j}}, \qquad
# \mathcal{L}_{bal} = \alpha \sum_i f_i P_i$$
#
# It is exactly $\alpha$ in balance. Its gradient also pulls on everything below the router, against the gradient of the language
# model: a large $\alpha$ costs quality, a small one does not balance.
#
# The **bias** is added to the scores for the selection alone. Once a step it moves by a fixed amount, without any gradient:
#
# $$b_i \leftarrow b_i + \gamma\, \mathrm{sign}(\bar{c} - c_i)$$
#
# **Exercise 2.** Write this update, in place.
# %% [markdown] lang="zh"
# ## 两种办法
#
# **均衡损失**增加一项，它的梯度压低忙碌专家的得分。对一条序列的 $T$ 个词元：
#
# $$f_i = \frac{E}{K T} c_i, \qquad P_i = \frac{1}{T} \sum_t \frac{s_{t,i}}{\sum_j s_{t,j}}, \qquad
# \mathcal{L}_{bal} = \alpha \sum_i f_i P_i$$
#
# 均衡时它恰好等于 $\alpha$。它的梯度还会拉扯路由以下的一切，与语言模型的梯度相抵：$\alpha$ 大了损害质量，小了起不到均衡作用。
#
# **偏置**只在选择时加到得分上。每步按固定幅度移动一次，不经过任何梯度：
#
# $$b_i \leftarrow b_i + \gamma\, \mathrm{sign}(\bar{c} - c_i)$$
#
# **练习 2.** 写出这个就地更新。
# %% tags=["exercise"]
def move(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> None:
    """Moves the bias of every expert one step towards balance, in place."""
    ### BEGIN SOLUTION
    load = counts.float()
    bias += rate * (load.mean() - load).sign()
    ### END SOLUTION


# %% tags=["wrong"]
def move(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> None:
    """Moves the wrong way: busy experts get busier."""
    load = counts.float()
    bias += rate * (load - load.mean()).sign()


# %% tags=["wrong"]
def move(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> None:
    """Makes a new tensor and drops it."""
    load = counts.float()
    bias = bias + rate * (load.mean() - load).sign()


# %% tags=["gate"]
torch.manual_seed(0)
for _ in range(20):
    counts = torch.randint(50, (8,))
    mine, theirs = torch.zeros(8), torch.zeros(8)
    move(mine, counts, 0.01)
    update_bias(theirs, counts, 0.01)
    assert torch.equal(mine, theirs)

# %% [markdown] lang="en"
# ## A skewed router, cured by hand
#
# A direction that all tokens share raises the scores of some experts. The bias moves until the selection is even; the scores, and with
# them the weights of what is selected, stay as they are.
# %% [markdown] lang="zh"
# ## 手工纠正一个倾斜的路由
#
# 所有词元共有的一个方向会抬高某些专家的得分。偏置不断移动，直到选择变得均匀；得分以及选中专家的权重则保持不变。
# %%
torch.manual_seed(0)
crowd = torch.randn(4, 256, 32) + torch.randn(32)
router = Router(RouterConfig(), dim=32, experts=8, active=2)
shares, biases = [], []
with torch.no_grad():
    for _ in range(80):
        counts = router(crowd).counts()
        shares.append(counts / counts.sum())
        biases.append(router.e_score_correction_bias.clone())
        move(router.e_score_correction_bias, counts, rate=0.01)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.stackplot(range(80), torch.stack(shares).T, colors=plt.cm.viridis(torch.linspace(0, 1, 8)))
left.set(xlabel="step", ylabel="share of the tokens, an expert a colour", ylim=(0, 1), xlim=(0, 79))
right.plot(torch.stack(biases))
right.set(xlabel="step", ylabel="bias of each expert")
plt.show()

# %% tags=["exact"]
with torch.no_grad():
    even = losses(router(crowd), BalanceConfig(bias_rate=0.0, sequence=1.0), 2)["sequence"]
    router.e_score_correction_bias.zero_()
    skewed = losses(router(crowd), BalanceConfig(bias_rate=0.0, sequence=1.0), 2)["sequence"]
print(f"balance loss with coefficient 1: {skewed:.2f} skewed, {even:.2f} with the bias")

# %% [markdown] lang="en"
# ## The same three in training
#
# 16 experts, 2 of them a token, on the letters of a dictionary. The noise of a single run is larger than what the three losses differ
# by: whether one way costs quality needs more seeds and steps than fit here; the papers say that a strong balance loss does.
# %% [markdown] lang="zh"
# ## 放到训练里比较
#
# 16 个专家，每个词元选 2 个，数据是词典的字母。单次训练的噪声大于三者损失之差：哪种做法损害质量，需要比这里更多的种子与步数才能回答；
# 论文的结论是强的均衡损失会损害质量。
# %%
text = "\n".join(rq.open_corpus("wordnet", limit=4000, duplicate_threshold=None).documents())
letters = torch.tensor([min(ord(c), 127) for c in text])
config = rq.ModelConfig(
    vocab_size=128,
    dim=64,
    layers=2,
    mla=MLAConfig(heads=4, kv_lora_rank=32, nope_dim=16, rope_dim=8, value_dim=16),
    moe=MoEConfig(routed=16, active=2, shared=1, width=16),
    init_std=0.1,
)
STEPS = 120


def train(balance: BalanceConfig):
    """Returns the shares [steps, E] of block 1, MaxVio of each step, and the last losses' mean."""
    model = rq.LanguageModel(replace(config, moe=replace(config.moe, balance=balance)), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    shares, violations, nats = [], [], []
    for _ in range(STEPS):
        starts = torch.randint(len(letters) - 97, (16,), generator=generator).tolist()
        ids = torch.stack([letters[start : start + 97] for start in starts])
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        for block, counts in zip(model.blocks, loss.counts, strict=True):
            update_bias(block.ffn.router.e_score_correction_bias, counts, balance.bias_rate)
        shares.append(loss.counts[1] / loss.counts[1].sum())
        violations.append(max_violation(loss.counts[1]))
        nats.append(loss.next_token.item())
    return torch.stack(shares), violations, sum(nats[-30:]) / 30


ways = {
    "left alone": BalanceConfig(bias_rate=0.0, sequence=0.0),
    "balance loss, 0.01": BalanceConfig(bias_rate=0.0, sequence=0.01),
    "bias, rate 0.01": BalanceConfig(bias_rate=0.01, sequence=0.0),
}
runs = {name: train(balance) for name, balance in ways.items()}
for name, (_, violations, nats) in runs.items():
    print(f"{name:20s} MaxVio {sum(violations[-30:]) / 30:.2f}, {nats:.2f} nats a letter")

# %%
figure, panels = plt.subplots(2, 2, figsize=(8, 5), layout="constrained")
for (name, (shares, _, _)), axes in zip(runs.items(), panels.flat, strict=False):
    # Means of five steps.
    means = shares.unflatten(0, (-1, 5)).mean(1).T * 16
    image = axes.imshow(
        means, aspect="auto", cmap="cividis", vmin=0, vmax=3, extent=(0, STEPS, 15.5, -0.5)
    )
    axes.set_title(name, fontsize=9)
    axes.set(xlabel="step", ylabel="expert of block 1")
    figure.colorbar(image, ax=axes, label="load / uniform")
for name, (_, violations, _) in runs.items():
    means = torch.tensor(violations).unflatten(0, (-1, 5)).mean(1)
    panels[1, 1].plot(range(0, STEPS, 5), means, label=name)
panels[1, 1].set(xlabel="step", ylabel="MaxVio", ylim=(0, None))
panels[1, 1].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown] lang="en"
# **Key finding.** The bias evens the load because it acts on the selection alone. Its only setting is the rate $\gamma$: DeepSeek-V3 uses
# 0.001 for the first 14.3 of its 14.8 trillion tokens, then 0; a run of 120 steps needs a larger one. DeepSeek-V3 keeps a very small balance loss
# within each sequence ($10^{-4}$) beside it.
#
# The code: `rorqual/layers/balance.py`, one page with all five losses of V1 to V3. The page: docs/moe.md.
# %% [markdown] lang="zh"
# **关键结论。** 偏置能拉平负载，因为它只作用于选择。它只有一个参数，即速率 $\gamma$：DeepSeek-V3 在 14.8 万亿词元的前 14.3 万亿里用
# 0.001，之后为 0；只有 120 步的训练需要更大的值。此外 DeepSeek-V3 还保留一个很小的序列内均衡损失（$10^{-4}$）。
#
# 代码：`rorqual/layers/balance.py`，一页之内，含 V1 到 V3 的全部五种损失。页面：docs/zh/moe.md。
