"""Figures of docs/dsa.md: DeepSeek Sparse Attention."""

from figures.svg import SMALL, Figure


def dsa_indexer(f: Figure) -> None:
    """The indexer selects keys, MLA attends to them, and MLA's probabilities train the indexer."""
    f.alt = f.say(
        "From the hidden states an indexer of a few narrow heads scores every earlier key and "
        "selects the best. MLA attends to the latents of these keys alone. In training MLA's "
        "probabilities are the target of the indexer, without a gradient into the model.",
        "索引器用几个窄的头，由隐藏状态给前面每个键打分，选出最好的若干个；MLA 只看这些键的潜在"
        "向量。训练时以 MLA 的概率为索引器的目标，"
        "梯度不传入模型。",
    )
    hidden = f.box(110, 6, 160, f.say("hidden states x", "隐藏状态 x"))
    left, right, width = 6.0, 214.0, 160.0
    query = f.box(
        left,
        62,
        width,
        f.say("q_{j}, w, k: a few heads\nof the indexer", "索引器的几个头：\nq_{j}、w、k"),
        kind="learned",
        size=12,
    )
    latent = f.box(
        right,
        62,
        width,
        f.say("query of 128 heads,\nlatents of all tokens", "128 个头的查询，\n全部词元的潜在向量"),
        kind="learned",
        size=12,
    )
    f.connect(hidden.west(), (query.cx, hidden.cy), query.north())
    f.connect(hidden.east(), (latent.cx, hidden.cy), latent.north())
    f.text(query.cx + 6, 34, f.say("detached", "梯度截断"), anchor="start", size=SMALL, kind="soft")
    scores = f.box(
        left, query.bottom + 34, width, "I_{t,s} = Σ_{j} w_{j} ReLU(q_{j}·k_{s})", size=12
    )
    f.connect(query.south(), scores.north())
    topk = f.box(
        left,
        scores.bottom + 34,
        width,
        f.say("S: the top 2048 keys", "S：前 2048 个键"),
        kind="chosen",
    )
    f.connect(scores.south(), topk.north())
    attend = f.box(
        right,
        topk.y - 8,
        width,
        f.say("MLA: softmax over\nthe latents of S", "MLA：只对 S 的\n潜在向量做 softmax"),
    )
    f.connect(topk.east(), (attend.x, topk.cy), kind="chosen")
    f.connect(latent.south(), attend.north())
    out = f.box(right + 35, attend.bottom + 26, 90, f.say("output", "输出"))
    f.connect(attend.south(), out.north())
    loss = f.box(
        left,
        attend.bottom + 26,
        width,
        f.say("KL(p ‖ softmax(I))\ntrains the indexer", "KL(p ‖ softmax(I))\n训练索引器"),
        size=12,
    )
    f.connect((attend.x + 20, attend.bottom), (attend.x + 20, loss.cy), loss.east(), dashed=True)
    f.text(attend.x + 14, attend.bottom + 2, "p", anchor="end", size=SMALL, kind="soft")


def dsa_mask(f: Figure) -> None:
    """Which keys each of sixteen queries reads when it may read four."""
    f.alt = f.say(
        "A matrix of sixteen queries and sixteen keys. The first four queries read all keys up to "
        "themselves; every later one reads four single keys, which lie anywhere before it.",
        "十六个查询、十六个键的矩阵。前四个查询读到自己为止的全部键；之后每个查询只读四个键，可"
        "以在前面任何位置。",
    )
    picked = {
        4: (0, 2, 3, 4),
        5: (0, 2, 4, 5),
        6: (0, 3, 5, 6),
        7: (0, 2, 6, 7),
        8: (0, 2, 5, 8),
        9: (0, 4, 8, 9),
        10: (0, 2, 9, 10),
        11: (0, 2, 7, 10),
        12: (0, 5, 11, 12),
        13: (0, 2, 12, 13),
        14: (2, 8, 13, 14),
        15: (0, 2, 9, 15),
    }

    def kind(query: int, key: int) -> str:
        seen = key in picked[query] if query in picked else key <= query
        return "chosen" if seen else "plain"

    f.text(110, 4, f.say("keys →", "键 →"), anchor="start", size=SMALL, kind="soft")
    f.cells(110, 22, [[None] * 16 for _ in range(16)], size=11, kind=kind)
    f.text(104, 22, f.say("queries ↓", "查询 ↓"), anchor="end", size=SMALL, kind="soft")
