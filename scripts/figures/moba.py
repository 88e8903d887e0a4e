"""Figures of docs/moba.md: Mixture of Block Attention."""

from figures.svg import SMALL, Figure

CELL = 30.0


def moba_selection(f: Figure) -> None:
    """One query, the scores of its blocks, and the keys that it reads."""
    f.alt = f.say(
        "Twelve keys in four blocks of three. The query at key 10 is scored against the mean of "
        "each earlier block; it reads its own block, up to itself, and the best of the others, "
        "block 0. One softmax is over these keys.",
        "十二个键分成四块，每块三个。位于键 10 的查询与前面每一块的均值求内积打分；它读自己的块"
        "（到自己为止），"
        "再读其余中得分最高的块 0。对这些键只做一个 softmax。",
    )
    query = f.box(278, 6, 84, f.say("query t = 10", "查询 t = 10"), kind="learned", size=SMALL)
    top = query.bottom + 58
    means = []
    for block in range(3):
        box = f.box(
            10 + block * 3 * CELL + 9,
            top,
            72,
            f.say(f"mean {block}", f"均值 {block}"),
            kind="chosen" if block == 0 else "plain",
        )
        means.append(box)
    for box, score in zip(means, ("0.9", "0.1", "0.4"), strict=True):
        f.line((query.x, query.cy), (box.cx, query.cy), (box.cx, query.cy + 12))
        words = f.say(f"score {score}", f"得分 {score}")
        text = f.text(box.cx, query.cy + 14, words, size=SMALL, kind="soft")
        f.connect((box.cx, text.bottom + 1), box.north(), kind="chosen" if box == means[0] else "")
    keys = top + 58

    def kind(_: int, column: int) -> str:
        return "chosen" if column < 3 or column in (9, 10) else "plain"

    row = f.cells(10, keys, [[f"k_{{{i}}}" for i in range(12)]], size=CELL, kind=kind)
    for block, box in enumerate(means):
        middle = 10 + (3 * block + 1.5) * CELL
        f.connect((middle, keys), (middle, box.bottom))
    f.connect((10 + 10.5 * CELL, query.bottom), (10 + 10.5 * CELL, keys), kind="chosen")
    f.text(
        10 + 10.3 * CELL,
        top - 40,
        f.say("its block:\nalways", "自己的块：\n必选"),
        anchor="end",
        size=SMALL,
        kind="soft",
    )
    soft = f.box(
        70,
        row.bottom + 40,
        240,
        f.say(
            "one softmax over the keys\nof the two blocks, up to t",
            "对两块中不晚于 t 的键\n做一个 softmax",
        ),
        kind="chosen",
    )
    f.connect((10 + 1.5 * CELL, row.bottom), (10 + 1.5 * CELL, soft.cy), soft.west(), kind="chosen")
    f.connect(
        (10 + 10 * CELL, row.bottom),
        (10 + 10 * CELL, soft.y - 14),
        (290, soft.y - 14),
        (290, soft.y),
        kind="chosen",
    )
    future = 10 + 11.5 * CELL
    f.text(future, row.bottom + 2, f.say("unseen", "不可见"), size=SMALL, kind="soft")


def moba_mask(f: Figure) -> None:
    """The keys that each of twelve queries reads, for two blocks a query."""
    f.alt = f.say(
        "A matrix of twelve queries and twelve keys in blocks of three. Every query reads its own "
        "block up to itself, on the diagonal, and one whole earlier block, not the same for all.",
        "十二个查询、十二个键的矩阵，每块三个。每个查询读对角线上自己的块（到自己为止），以及前"
        "面的一整块，各查询选的不尽相同。",
    )
    best = [None, None, None, 0, 0, 0, 1, 0, 1, 2, 0, 0]

    def kind(query: int, key: int) -> str:
        if key // 3 == query // 3 and key <= query:
            return "learned"
        return "chosen" if key // 3 == best[query] and best[query] is not None else "plain"

    f.text(110, 4, f.say("keys →", "键 →"), anchor="start", size=SMALL, kind="soft")
    f.cells(110, 22, [[None] * 12 for _ in range(12)], size=15, kind=kind)
    f.text(104, 22, f.say("queries ↓", "查询 ↓"), anchor="end", size=SMALL, kind="soft")
    block = f.box(302, 60, 16, height=16, kind="learned")
    f.text(block.right + 5, block.y, f.say("its own", "自己的块"), anchor="start", size=SMALL)
    topk = f.box(302, 84, 16, height=16, kind="chosen")
    f.text(topk.right + 5, topk.y, f.say("best", "最好的块"), anchor="start", size=SMALL)
    unread = f.box(302, 108, 16, height=16, kind="plain")
    f.text(unread.right + 5, unread.y, f.say("unread", "不读"), anchor="start", size=SMALL)
