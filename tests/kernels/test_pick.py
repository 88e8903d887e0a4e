"""Tests which kernel is chosen for names, devices and the environment variable."""

from collections.abc import Callable

import pytest
import torch

from rorqual import kernels


def reference() -> str:
    return "reference"


def fast() -> str:
    return "fast"


def on(kind: str) -> kernels.Twin:
    return kernels.Twin(
        kind,
        fast,
        lambda *where: "" if all(d.type == kind for d in where) else f"not on {where[0]}",
    )


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
def test_choice(
    text: str, one: str, two: str, twins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_what_cannot_be_is_refused(
    text: str, reason: str, twins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, text)
    with pytest.raises(ValueError, match=reason):
        kernels.pick("one", reference, CPU)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.device | None], None]:
    """Makes torch report this accelerator, or none, whatever the machine has."""
    return lambda device: monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **_: device
    )


def test_available_says_why_not(
    twins: None, accelerator: Callable[[torch.device | None], None]
) -> None:
    accelerator(None)
    assert kernels.available() == {
        "one": {"cuda": "not on cpu", "cpu": True},
        "two": {"cuda": "not on cpu"},
    }
    accelerator(torch.device("cuda"))
    assert kernels.available() == {"one": {"cuda": True, "cpu": True}, "two": {"cuda": True}}


def test_the_first_twin_that_is_available_is_picked(
    accelerator: Callable[[torch.device | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the numba kernels run, and the Triton kernels report that they need a GPU."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    accelerator(None)
    found = kernels.available()
    assert found.keys() == kernels.TWINS.keys()
    for name, usable in found.items():
        ours = {twin.kind: twin.function for twin in kernels.TWINS[name]}
        assert usable.keys() == ours.keys()
        assert usable.get("numba", True) is True
        assert "cuda" in str(usable.get("triton", "cuda"))
        assert kernels.pick(name, reference, CPU) is ours.get("numba", reference)
