"""Names, devices and an environment variable in -> the twin that is picked, or the reference."""

import pytest
import torch

from rorqual import kernels


def reference() -> str:
    return "reference"


def fast() -> str:
    return "fast"


def on(kind: str) -> kernels.Twin:
    return kernels.Twin(kind, fast, lambda *where: "" if all(d.type == kind for d in where) else f"not on {where[0]}")


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "TWINS", {"one": (on("cuda"), on("cpu")), "two": (on("cuda"),)})
    kernels._wanted.cache_clear()
    yield
    kernels._wanted.cache_clear()


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "one", "two"),
    [
        ("", "fast", "reference"),
        ("reference", "reference", "reference"),
        ("one=reference", "reference", "reference"),
        (" one = cpu , two=reference", "fast", "reference"),
    ],
)
def test_choice(text: str, one: str, two: str, twins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, text)
    assert kernels.pick("one", reference, CPU)() == one
    assert kernels.pick("two", reference, CPU)() == two
    assert kernels.pick("nobody's", reference, CPU)() == "reference"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one", "expected 'reference' or name=kind"),
        ("ones=cpu", "did you mean 'one'"),
        ("one=cpus", "did you mean 'cpu'"),
        ("one=cuda", "which does not run here: not on cpu"),
    ],
)
def test_what_cannot_be_is_refused(text: str, reason: str, twins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, text)
    with pytest.raises(ValueError, match=reason):
        kernels.pick("one", reference, CPU)


def test_available_says_why_not(twins: None) -> None:
    found = kernels.available()
    assert found["one"]["cpu"] is True
    assert torch.cuda.is_available() or found["two"]["cuda"] == "not on cpu"


def test_every_twin_answers_for_this_machine() -> None:
    for twins in kernels.available().values():
        assert all(usable is True or (isinstance(usable, str) and usable) for usable in twins.values())
