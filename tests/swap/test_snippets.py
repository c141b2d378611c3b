"""The README's snippets, as they stand there."""

from typing import Any

import pytest
import torch

import dca_kernels
from tests.oracle import assert_same
from tests.readme import snippet
from tests.swap.models import IMAGE, host


def test_snippet_for_official_code(capsys: pytest.CaptureFixture[str]) -> None:
    model, expected = host(), {"output": host()(IMAGE)}
    before, replace, after = snippet("replace_dca(model)").partition("dca_kernels.replace_dca(model)\n")
    exec(before + replace, {"model": model})
    assert isinstance(model.DCA, dca_kernels.DCA)
    assert_same({"output": model(IMAGE)}, expected)
    exec(before + after, {"model": model})
    assert "DCA" in capsys.readouterr().out
    assert not isinstance(model.DCA, dca_kernels.DCA)
    assert_same({"output": model(IMAGE)}, expected)


def test_snippet_for_an_own_unet(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(snippet("class UNet"), names)
    said = snippet("class UNet").rpartition("print(inspect(model))  # ")[2]
    assert said.split() == capsys.readouterr().out.splitlines()[1].split()
    assert names["model"](torch.randn(1, 3, 240, 272)).shape == (1, 2, 240, 272)


def test_snippet_of_the_module() -> None:
    names: dict[str, Any] = {}
    exec(snippet("refined = dca(skips)"), names)
    assert [x.shape for x in names["refined"]] == [x.shape for x in names["skips"]]
