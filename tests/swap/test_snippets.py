"""The README's snippets, as they stand there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def test_snippet_for_an_own_unet() -> None:
    class Encoder(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [nn.functional.avg_pool2d(x[:, :1].expand(-1, c, -1, -1), c // 32) for c in (32, 64, 128, 256)]

    names: dict[str, Any] = {}
    exec(snippet("class UNet"), names)
    image = torch.randn(1, 3, 240, 272)
    skips, refined = Encoder()(image), names["UNet"](Encoder(), nn.Identity())(image)
    assert [x.shape for x in refined] == [x.shape for x in skips]
    assert not torch.equal(refined[0], skips[0])


def test_snippet_of_the_module() -> None:
    names: dict[str, Any] = {}
    exec(snippet("refined = dca(skips)"), names)
    assert [x.shape for x in names["refined"]] == [x.shape for x in names["skips"]]
