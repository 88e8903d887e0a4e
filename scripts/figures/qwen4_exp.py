"""Figures of docs/qwen4_exp.md: Qwen4-Exp."""

from figures.svg import SMALL, Figure


def qwen4_block(f: Figure) -> None:
    """Four streams through a block: two sites read them through gates and write back."""
    f.alt = f.say(
        "Four residual streams run down the left side. A site reads them through gates as one "
        "vector; the gated delta net, or in every fourth block QSA, makes an output, which is "
        "added to each stream with a weight of its own. A second site does the same around the "
        "mixture of experts. The second block adds rows of the n-gram memory first.",
        "左侧自上而下是四条残差流。一处通过门控把它们读成一个向量；门控 Delta 网络（每第四块为 Q"
        "SA）算出输出，再以各自的权重加到每条流上。"
        "第二处在混合专家前后做同样的事。第二个块先加上 n-gram 记忆的行。",
    )
    lines = [16.0, 34.0, 52.0, 70.0]
    f.text(6, 4, f.say("4 streams", "四条流"), anchor="start", size=SMALL, kind="soft")
    memory = f.box(
        120,
        24,
        230,
        f.say(
            "PLE: rows of n-grams\n(in the second block alone)", "PLE：n-gram 的行\n（只在第二块）"
        ),
        kind="memory",
        size=12,
    )
    y = memory.bottom + 26
    reads = []
    for name in (
        f.say("delta net; in every\nfourth block QSA", "Delta 网络；\n每第四块为 QSA"),
        f.say("mixture of experts", "混合专家"),
    ):
        read = f.box(
            120,
            y,
            230,
            f.say("read: u = mean_{i} a_{i} n_{i}", "读：u = mean_{i} a_{i} n_{i}"),
            kind="learned",
            size=12,
        )
        layer = f.box(150, read.bottom + 20, 170, name, kind="state", size=12)
        write = f.box(
            120,
            layer.bottom + 20,
            230,
            f.say("write: x_{i} ← x_{i} + w_{i} F(u)", "写：x_{i} ← x_{i} + w_{i} F(u)"),
            kind="learned",
            size=12,
        )
        f.connect((read.cx, read.bottom), layer.north())
        f.connect(layer.south(), (layer.cx, write.y))
        reads.append((read, write))
        y = write.bottom + 26
    bottom = y - 8
    for x in lines:
        f.connect((x, 22), (x, bottom))
    f.connect(memory.west(), (lines[-1] + 2, memory.cy))
    for read, write in reads:
        f.connect((lines[-1] + 2, read.cy), read.west())
        f.connect(write.west(), (lines[-1] + 2, write.cy))


def delta_rule(f: Figure) -> None:
    """What one token does to the state: forget, look up, correct, write."""
    f.alt = f.say(
        "The state is a matrix from keys to values. A token first lets it decay, then looks up "
        "what it holds for its key, and writes the difference to its value, times beta.",
        "状态是从键到值的矩阵。一个词元先让它衰减，再查出它对自己的键存了什么，然后写入与自己的"
        "值之差乘以 beta。",
    )
    state = f.cells(14, 26, [[0.9, 0.1], [0.2, 0.6]], size=28)
    f.text(state.cx, 6, "S_{t−1}", size=SMALL)
    faded = f.cells(142, 26, [[0.6, 0.07], [0.13, 0.4]], size=28)
    f.text(faded.cx, 6, "e^{g} S_{t−1}", size=SMALL)
    f.connect(state.east(), faded.west())
    f.text(
        (state.right + faded.x) / 2, state.cy - 18, f.say("decay", "衰减"), size=SMALL, kind="soft"
    )
    after = f.cells(296, 26, [[0.6, 0.07], [0.5, 0.9]], size=28)
    f.text(after.cx, 6, "S_{t}", size=SMALL)
    plus = f.circle(247, faded.cy, "+")
    f.connect(faded.east(), plus.west())
    f.connect(plus.east(), after.west())
    looked_up = f.box(
        100, faded.bottom + 30, 140, f.say("looked up: S^{T} k", "查出：S^{T} k"), size=12
    )
    f.connect(faded.south(), (faded.cx, looked_up.y))
    error = f.box(
        100,
        looked_up.bottom + 22,
        140,
        f.say("error: v − S^{T} k", "误差：v − S^{T} k"),
        size=12,
        kind="chosen",
    )
    f.connect((faded.cx, looked_up.bottom), (faded.cx, error.y))
    f.connect(error.east(), (plus.cx, error.cy), plus.south(), kind="chosen")
    f.text(
        plus.cx + 8,
        error.y - 4,
        f.say("k β (error)^{T}", "k β (误差)^{T}"),
        anchor="start",
        size=SMALL,
        kind="soft",
    )
