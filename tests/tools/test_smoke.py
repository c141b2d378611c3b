"""The smoke test: it names what is wrong, and begins again where it ended; the kernels are interpreted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import reference
from benchmarks import cases, journal, parity, smoke
from dca_kernels import DCA
from tests.oracle import INTERPRETED

TINY = cases.SIZES["tiny"]

pytestmark = [pytest.mark.skipif(not INTERPRETED, reason="made for the interpreter"), pytest.mark.slow]

SMOKE = ["--size", "tiny", "--batch", "1", "--dtype", "float32", "--phase", "eval", "--kind", "parity", "graph"]


def smoked(tmp_path: Path) -> tuple[int, dict[str, journal.Entry]]:
    status = smoke.main([*SMOKE, "--journal", str(tmp_path / "journal.ndjson")])
    entries = [entry for entry in journal.read(tmp_path / "journal.ndjson") if entry["step"] == "smoke"]
    return status, {entry["case"]: entry for entry in entries}


def test_a_kernel_that_raises_is_named(
    tmp_path: Path, spoiled: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: dict[str, int], **arguments: Any) -> None:
        raise RuntimeError("illegal memory access")

    spoiled("conv", fail)
    status, found = smoked(tmp_path)
    assert status == 1 and len(found) == 3 and not any(entry["well"] for entry in found.values())
    out = capsys.readouterr().out
    assert out.count("illegal memory access; last kernel launched: conv") == 3 and "3 cases, 3 failed" in out


def test_a_kernel_that_is_wrong_is_named(
    tmp_path: Path, spoiled: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled("conv", lambda config, z, planes, **arguments: (planes if z is None else z).mul_(1.001))
    status, found = smoked(tmp_path)
    wrong = [entry for entry in found.values() if not entry["well"]]
    assert status == 1 and len(found) == 3 and len(wrong) == 2  # a graph's replay is wrong in the same way
    assert all("upsample (" in entry["where"] and "conv" in entry["where"] for entry in wrong)
    assert "channel_attention" not in wrong[0]["where"]
    assert "parity tiny, float32, batch 1, eval, contiguous: FAILED" in capsys.readouterr().out


def test_an_element_that_is_not_written_is_found(tmp_path: Path, spoiled: Callable[..., None]) -> None:
    def forget(config: dict[str, int], tokens: torch.Tensor, **arguments: Any) -> None:
        tokens.copy_(torch.empty_like(tokens))

    spoiled("patch_embed", forget)
    assert not any(entry["well"] for case, entry in smoked(tmp_path)[1].items() if case.startswith("parity"))


def test_what_was_right_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = smoked(tmp_path)
    assert status == 0 and len(found) == 3 and all(entry["well"] for entry in found.values())
    monkeypatch.setattr(smoke, "perform", lambda case: pytest.fail(case.name))
    assert smoked(tmp_path) == (0, found)


def test_what_was_wrong_is_checked_again(tmp_path: Path, spoiled: Callable[..., None]) -> None:
    spoiled("patch_embed", lambda config, **arguments: arguments["tokens"].fill_(0))
    assert smoked(tmp_path)[0] == 1
    spoiled("no", lambda config, **arguments: None)
    status, found = smoked(tmp_path)
    assert status == 0 and all(entry["well"] for entry in found.values())


def test_a_case_that_never_ends_is_left_out_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(case: smoke.Case) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smoke, "perform", hang)
        for _ in range(smoke.TRIES):
            with pytest.raises(KeyboardInterrupt):
                smoked(tmp_path)
    status, found = smoked(tmp_path)
    first = next(iter(found.values()))
    assert status == 1 and len(found) == 3 and not first["well"] and "never ended" in first["found"]


def test_the_judge_sees_gradients_of_parameters() -> None:
    torch.manual_seed(0)
    plain, ours = reference.DCA(TINY.features, None, TINY.patch), DCA(TINY.features, None, TINY.patch, backend="torch")
    ours.load_state_dict(plain.state_dict())
    maps = [torch.randn(2, c, s, s) for c, s in zip(TINY.features, TINY.sides, strict=True)]
    judge = parity.Judge(plain, maps, cases.upstream(maps))
    assert all(value <= 1 for value in judge.excess(ours).values())
    weight = ours.upconvs[0].conv.conv.weight
    weight.register_hook(lambda gradient: 1.001 * gradient)
    ours.__deepcopy__ = lambda memo: ours  # a copy has no hooks
    excess = judge.excess(ours)
    assert {kind for kind, value in excess.items() if value > 1} == {"gradients of parameters"}
