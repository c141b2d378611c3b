"""Which backend runs: argument, context, environment, automatic; and never another than the one named."""

import logging
from collections.abc import Iterator

import pytest
import torch

import dca_kernels
from dca_kernels import backends, fused, use_backend
from tests.oracle import Config, random_maps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def triton_refuses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every request for the triton backend is visible: it raises. No choice is remembered from or for other tests."""
    monkeypatch.delenv("DCA_BACKEND", raising=False)
    monkeypatch.setattr(backends, "why_not", lambda name, device: "refused" if name == "triton" else None)
    backends._automatic.cache_clear()
    yield
    backends._automatic.cache_clear()


def assert_refused(source: str, argument: str = "auto") -> None:
    with pytest.raises(RuntimeError, match=f"^{source}: 'triton' cannot run on cpu: refused$"):
        backends.choose(argument, CPU)


def test_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.choose("auto", CPU) == "torch"
    monkeypatch.setenv("DCA_BACKEND", "triton")
    assert_refused("DCA_BACKEND")
    with use_backend("torch"):
        assert backends.choose("auto", CPU) == "torch"
        assert_refused("backend", argument="triton")
    with use_backend("triton"):
        assert_refused("use_backend")
        assert backends.choose("torch", CPU) == "torch"
    with use_backend("auto"):
        assert_refused("DCA_BACKEND")
    assert backends.choose("torch", CPU) == "torch"


def test_contexts_nest_and_end_with_an_exception() -> None:
    with use_backend("triton"):
        with pytest.raises(KeyError), use_backend("torch"):
            assert backends.choose("auto", CPU) == "torch"
            raise KeyError
        assert_refused("use_backend")
    assert backends.choose("auto", CPU) == "torch"


def test_auto_says_once_a_device_type_what_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dca_kernels")
    for device in ("cpu", "cpu", "meta", "cpu"):
        backends.choose("auto", torch.device(device))
    assert caplog.messages == [
        "backend 'auto' runs 'torch' on cpu ('triton': refused)",
        "backend 'auto' runs 'torch' on meta ('triton': refused)",
    ]


@pytest.mark.parametrize("source", ["backend", "use_backend", "DCA_BACKEND"])
def test_unknown_names(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"^{source}: expected one of 'auto', 'torch', 'triton', got 'cuda'$"
    with pytest.raises(ValueError, match=message):
        if source == "backend":
            dca_kernels.DCA([8], backend="cuda")
        elif source == "use_backend":
            with use_backend("cuda"):
                pass
        else:
            monkeypatch.setenv("DCA_BACKEND", "cuda")
            backends.choose("auto", CPU)


@pytest.mark.parametrize("source", ["backend", "use_backend", "DCA_BACKEND"])
def test_a_named_backend_never_falls_back(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(fused, "patch_embed", lambda *args: called.append(args))
    module = dca_kernels.DCA([8, 16], patch=4, backend="triton" if source == "backend" else "auto")
    if source == "DCA_BACKEND":
        monkeypatch.setenv("DCA_BACKEND", "triton")
    before = {name: t.clone() for name, t in module.named_buffers()}
    with pytest.raises(RuntimeError, match=f"^{source}: 'triton' cannot run on cpu: refused$"):
        with use_backend("triton" if source == "use_backend" else "auto"):
            module(random_maps(Config(), torch.float32))
    assert not called
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())


def test_modules_follow_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: loaded.append(name) or load(name))
    dca_kernels.DCA([8, 16], patch=4)(random_maps(Config(), torch.float32))
    assert loaded == ["torch"]


def test_without_the_fixture_triton_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"^backend: 'triton' cannot run on cpu: \w+"):
        dca_kernels.DCA([8, 16], patch=4, backend="triton")(random_maps(Config(), torch.float32))
