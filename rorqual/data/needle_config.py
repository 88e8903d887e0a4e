"""Defines the config of the needle tasks of data/needles.py, without loading torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleConfig:
    """The language of the needle tasks, their questions, and how training texts grow in length."""

    keys: int = 12
    values: int = 12
    filler: int = 16
    needles: int = 4  # pairs in a text; single has one
    asked: int = 2  # values that multi-value asks for, keys that multi-query asks for
    drill: int = 8  # keys of a multi-query of training, drawn with repetition; 0: as when held out
    shortest: int = 24  # tokens of the first training texts
    alone: int = 200  # first batches, all multi-query: it has the most labels that need the key
    grow: int = 60  # batches from then on before the length doubles, until it is the full one
    questions: int = 64  # held-out sequences of each task and length

    def __post_init__(self) -> None:
        positive = ("keys", "values", "filler", "needles", "asked", "shortest", "grow", "questions")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"needles.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("drill", "alone"):
            if getattr(self, name) < 0:
                raise ValueError(f"needles.{name}: got {getattr(self, name)}, expected at least 0")
        largest = min(self.keys, self.values)
        if not self.asked <= self.needles <= largest:
            raise ValueError(
                f"needles: got {self.needles} pairs, expected {self.asked}..{largest}: "
                "at least as many as are asked for, at most as many as there are keys and values"
            )

    @property
    def vocab_size(self) -> int:
        """The number of token ids in the language."""
        return 1 + self.filler + self.keys + self.values

    @property
    def least_tokens(self) -> int:
        """Tokens that the longest text and question of training take without any filler."""
        return 2 * self.needles + 2 * max(self.asked, self.drill)
