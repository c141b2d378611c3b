"""Which backend runs: argument, context, environment, automatic; and never another than the one named."""

import asyncio
import contextvars
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dca_kernels
from dca_kernels import backends, torch_backend, use_backend
from dca_kernels.torch_backend import patch_embed
from tests.oracle import Config, needs_triton, random_maps

CPU = torch.device("cpu")
WHY_NOT = backends.why_not


@pytest.fixture(autouse=True)
def triton_refuses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every request for the triton backend is visible: it raises. No choice is remembered from or for other tests."""
    monkeypatch.delenv("DCA_BACKEND", raising=False)
    monkeypatch.setattr(backends, "why_not", lambda name, device: "refused" if name == "triton" else None)
    backends._say_automatic.cache_clear()
    yield
    backends._say_automatic.cache_clear()


def assert_refused(source: str, argument: str = "auto") -> None:
    with pytest.raises(RuntimeError, match=f"^{source}: 'triton' cannot run on cpu: refused$"):
        backends.choose(argument, CPU, torch.float32)


def test_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.choose("auto", CPU, torch.float32) == "torch"
    monkeypatch.setenv("DCA_BACKEND", "triton")
    assert_refused("DCA_BACKEND")
    with use_backend("torch"):
        assert backends.choose("auto", CPU, torch.float32) == "torch"
        assert_refused("backend", argument="triton")
    with use_backend("triton"):
        assert_refused("use_backend")
        assert backends.choose("torch", CPU, torch.float32) == "torch"
    with use_backend("auto"):
        assert_refused("DCA_BACKEND")
    assert backends.choose("torch", CPU, torch.float32) == "torch"


def test_contexts_nest_and_end_with_an_exception() -> None:
    with use_backend("triton"):
        with pytest.raises(KeyError), use_backend("torch"):
            assert backends.choose("auto", CPU, torch.float32) == "torch"
            raise KeyError
        assert_refused("use_backend")
    assert backends.choose("auto", CPU, torch.float32) == "torch"


def chosen() -> str:
    """Of what a context names: here `triton` raises, so only its name is read."""
    return backends.requested()[0]


def test_a_backward_is_in_the_context_of_its_caller() -> None:
    """Checkpointed forwards run again in threads of autograd's, a GPU's: these have a context of their own."""
    found = []

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, dout: torch.Tensor) -> torch.Tensor:
            found.append(contextvars.Context().run(chosen))  # which is what those threads have
            return dout

    out = Backward.apply(torch.ones((), requires_grad=True))
    with use_backend("triton"):
        out.backward()
    assert found == ["triton"]
    assert chosen() == "auto"


def test_a_decorated_generator_is_in_the_context_while_it_runs() -> None:
    @use_backend("torch")
    def values() -> Iterator[str]:
        yield chosen()
        with use_backend("triton"):
            inner = chosen()
        yield inner
        yield chosen()

    found, outside = [], []
    for value in values():
        found.append(value)
        outside.append(chosen())
    assert found == ["torch", "triton", "torch"] and outside == ["auto"] * 3

    @use_backend("torch")
    def once() -> str:
        return chosen()

    assert (once(), once(), chosen()) == ("torch", "torch", "auto")


def test_a_suspended_generator_has_not_left_its_block() -> None:
    def suspended() -> Iterator[None]:
        with use_backend("torch"):
            yield

    generator = suspended()
    next(generator)
    assert chosen() == "torch"  # as torch.no_grad would be
    generator.close()
    assert chosen() == "auto"
    message = r"^use_backend: expected to leave the block of 'torch', entered within that of 'triton', first: "
    with pytest.raises(RuntimeError, match=message), use_backend("triton"):
        generator = suspended()
        next(generator)
    assert chosen() == "torch"
    generator.close()
    assert chosen() == "auto"


def test_a_block_that_is_suspended_within_two() -> None:
    def suspended() -> Iterator[None]:
        with use_backend("torch"), use_backend("auto"):
            yield

    message = r"^use_backend: expected to leave the block of 'auto', entered within that of 'triton', first: "
    with pytest.raises(RuntimeError, match=message), use_backend("triton"):
        generator = suspended()
        next(generator)
    generator.close()
    assert chosen() == "auto"


def test_one_block_is_entered_twice() -> None:
    found, block = [], use_backend("torch")
    with block:
        with use_backend("triton"):
            with block:
                found.append(chosen())
            found.append(chosen())
        found.append(chosen())
    assert (*found, chosen()) == ("torch", "triton", "torch", "auto")


def test_a_block_may_be_left_in_another_thread() -> None:
    context = use_backend("torch")
    context.__enter__()
    thread = threading.Thread(target=context.__exit__)
    thread.start()
    thread.join()
    assert chosen() == "auto"


def test_threads_and_tasks_have_contexts_of_their_own() -> None:
    both = threading.Barrier(2)
    of_threads: dict[str, list[str]] = {}

    def run(name: str) -> None:
        before = chosen()
        with use_backend(name):
            both.wait(60)  # the other thread is in its block, too
            of_threads[name] = [before, chosen()]
            both.wait(60)
        of_threads[name].append(chosen())

    with use_backend("triton"):
        threads = [threading.Thread(target=run, args=(name,)) for name in ("torch", "auto")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert chosen() == "triton"
    assert of_threads == {"torch": ["auto", "torch", "auto"], "auto": ["auto", "auto", "auto"]}

    async def task(name: str) -> list[str]:
        found = [chosen()]
        with use_backend(name):
            await asyncio.sleep(0)  # the other task runs
            found.append(chosen())
            await asyncio.sleep(0)
        return [*found, chosen()]

    async def tasks() -> list[list[str]]:
        with use_backend("triton"):  # which its tasks begin with
            return await asyncio.gather(task("torch"), task("auto"))

    assert asyncio.run(tasks()) == [["triton", "torch", "triton"], ["triton", "auto", "triton"]]
    assert chosen() == "auto"


def test_a_decorated_function_in_two_threads_at_once() -> None:
    entered, left = threading.Barrier(2), threading.Event()
    found: dict[str, list[str]] = {}

    @use_backend("torch")
    def decorated(name: str) -> None:
        entered.wait(60)
        if name == "second":
            assert left.wait(60)
        found[name] = [chosen()]

    def run(name: str) -> None:
        decorated(name)
        found[name].append(chosen())
        left.set()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"first": ["torch", "auto"], "second": ["torch", "auto"]}


def test_compiled_code_goes_by_the_outer_block_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with use_backend("triton"):
        with use_backend("torch"):
            assert backends.choose("auto", CPU, torch.float32) == "torch"
        assert_refused("use_backend")
    assert backends.choose("auto", CPU, torch.float32) == "torch"


@pytest.mark.parametrize("value", [None, "", "cuda", "Triton"])
def test_the_first_that_is_not_auto_counts(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("DCA_BACKEND", value)
    assert backends.choose("torch", CPU, torch.float32) == "torch"
    with use_backend("torch"):
        assert backends.choose("auto", CPU, torch.float32) == "torch"
    if value:
        with pytest.raises(
            ValueError, match=f"^DCA_BACKEND: expected one of 'auto', 'torch', 'triton', got '{value}'$"
        ):
            backends.choose("auto", CPU, torch.float32)
    else:
        assert backends.choose("auto", CPU, torch.float32) == "torch"


def test_auto_says_once_a_device_type_what_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dca_kernels")
    for device in ("cpu", "cpu", "meta", "cpu"):
        backends.choose("auto", torch.device(device), torch.float32)
    assert caplog.messages == [
        "backend 'auto' runs 'torch' on cpu in torch.float32 ('triton': refused)",
        "backend 'auto' runs 'torch' on meta in torch.float32 ('triton': refused)",
    ]


@pytest.mark.parametrize(
    ("capability", "dtype", "hip", "name", "reason"),
    [
        ((9, 0), torch.bfloat16, None, "triton", "measured to be faster than 'torch' at compute capability 9.0"),
        ((9, 0), torch.float32, None, "triton", "measured to be faster than 'torch' at compute capability 9.0"),
        ((9, 0), torch.float16, None, "torch", "'triton' was not measured in torch.float16 at compute capability 9.0"),
        ((9, 0), torch.float64, None, "torch", "'triton' was not measured in torch.float64 at compute capability 9.0"),
        (
            (8, 0),
            torch.bfloat16,
            None,
            "torch",
            "'triton' was not measured in torch.bfloat16 at compute capability 8.0",
        ),
        ((9, 0), torch.bfloat16, "6.4", "torch", "'triton' was not measured here"),
    ],
)
def test_auto_runs_the_kernels_where_they_were_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    dtype: torch.dtype,
    hip: str | None,
    name: str,
    reason: str,
) -> None:
    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    caplog.set_level(logging.INFO, "dca_kernels")
    assert backends.choose("auto", torch.device("cuda"), dtype) == name
    assert caplog.messages == [f"backend 'auto' runs {name!r} on cuda in {dtype} ({reason})"]


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
            backends.choose("auto", CPU, torch.float32)


@pytest.mark.parametrize("source", ["backend", "use_backend", "DCA_BACKEND"])
def test_a_named_backend_never_falls_back(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(patch_embed, "patch_embed", lambda *args: called.append(args))
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


# What the fixture replaces


def assert_why_not(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_not", WHY_NOT)
    assert WHY_NOT("triton", CPU) == reason
    with pytest.raises(RuntimeError, match=f"^backend: 'triton' cannot run on cpu: {re.escape(reason)}$"):
        dca_kernels.DCA([8, 16], patch=4, backend="triton")(random_maps(Config(), torch.float32))


@needs_triton
@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_compiled_kernels_do_not_run_on_a_cpu(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert_why_not("its kernels run on GPUs (for tests: TRITON_INTERPRET=1)", monkeypatch)


def test_triton_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert_why_not("triton is not installed", monkeypatch)


@needs_triton
def test_other_devices_are_named() -> None:
    assert WHY_NOT("triton", torch.device("meta")) == "its kernels run on CUDA and ROCm devices"


@needs_triton
@pytest.mark.parametrize(
    "capability, hip, reason",
    [
        ((7, 5), None, "it needs compute capability 8.0 or newer, got 7.5"),
        ((8, 0), None, None),
        ((9, 0), None, None),
        ((6, 0), "6.4", None),
    ],
)
def test_gpus(
    capability: tuple[int, int], hip: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert WHY_NOT("triton", torch.device("cuda")) == reason


def test_what_is_too_large_is_what_the_table_says() -> None:
    path = Path(backends.__file__).parent / "triton_backend" / "configurations.json"
    largest = {
        kernel: max(row.get("if", {}).get("max_size", 2**31) for row in entry["rows"])
        for kernel, entry in json.loads(path.read_text()).items()
    }
    assert min(largest[k] for k in ("tokens", "conv", "grid_gradient")) == backends.MOST_CHANNELS
    assert min(largest[k] for k in ("mixing", "mixing_backward")) == backends.MOST_OF_ALL
    assert min(largest[k] for k in largest if k.startswith("spatial")) == backends.MOST_A_HEAD
    assert min(largest[k] for k in largest if k.startswith(("map", "upsample"))) == backends.MOST_COLUMNS
    assert min(largest[k] for k in ("patch_embed", "patch_embed_train")) == backends.MOST_IN_A_ROW


@pytest.mark.parametrize(
    ("maps", "autocast", "dtype"),
    [
        (torch.float32, None, torch.float32),
        (torch.float32, torch.float16, torch.float16),
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_auto_goes_by_the_dtype_of_the_tokens(
    monkeypatch: pytest.MonkeyPatch, maps: torch.dtype, autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    asked = []
    monkeypatch.setattr(backends, "choose", lambda argument, device, dtype, large: asked.append(dtype) or "torch")
    module = dca_kernels.DCA([8, 16], patch=4).to(torch.float64 if maps == torch.float64 else torch.float32)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        module([torch.randn(2, c, 8, 8).to(maps) for c in (8, 16)])
    assert asked == [dtype]


@needs_triton
def test_auto_does_not_take_triton_even_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "why_not", WHY_NOT)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    caplog.set_level(logging.INFO, "dca_kernels")
    assert WHY_NOT("triton", CPU) is None
    assert backends.choose("auto", CPU, torch.float32) == "torch"
    (message,) = caplog.messages
    assert message == "backend 'auto' runs 'torch' on cpu in torch.float32 ('triton' was not measured here)"


@needs_triton
def test_each_way_of_naming_triton_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from dca_kernels import triton_backend

    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    monkeypatch.setattr(triton_backend, "refine", lambda maps, contract: ["refined"] * len(maps))
    monkeypatch.setattr(torch_backend, "refine", lambda *args: pytest.fail("the torch backend ran"))
    maps = random_maps(Config(), torch.float32)
    module = dca_kernels.DCA([8, 16], patch=4)
    assert dca_kernels.DCA([8, 16], patch=4, backend="triton")(maps) == ("refined", "refined")
    with use_backend("triton"):
        assert module(maps) == ("refined", "refined")
    monkeypatch.setenv("DCA_BACKEND", "triton")
    assert module(maps) == ("refined", "refined")
