"""A DCA on the skips of an encoder-decoder that has none."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import reference
from dca_kernels import add_dca, inspect
from tests.oracle import assert_identical, assert_same, randomise
from tests.swap.models import Snapshot, assert_the_same_objects, tensors, through_a_file, tracing


class Encoder(nn.Module):
    """Maps of 4, 8 and 16 channels, each of half the side, after what `leading` puts before them."""

    def __init__(self, leading: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.leading = leading
        self.stages = nn.ModuleList(nn.Conv2d(*c, 3, 2, 1) for c in ((3, 4), (4, 8), (8, 16)))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.leading(x)
        for stage in self.stages:
            x = stage(x) if x.shape[1] != 4 else stage(self.norm(x))
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """Adds up its last three maps at the size of the first, and the sums of those before."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(c, 2, 1) for c in (4, 8, 16))

    def forward(self, maps: list[Tensor], unused: int = 0) -> Tensor:
        maps, leading = maps[-3:], maps[:-3]
        heads = [head(x) for head, x in zip(self.heads, maps, strict=True)]
        total = sum(nn.functional.interpolate(y, maps[0].shape[2:]) for y in heads)
        return total + sum(x.sum() for x in leading)


class TupleDecoder(Decoder):
    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(maps, tuple)
        return super().forward(list(maps))


class Levels(NamedTuple):
    large: Tensor
    small: Tensor
    bottom: Tensor


class NamedTupleDecoder(Decoder):
    def forward(self, maps: Levels) -> Tensor:
        return super().forward([maps.large, maps.small, maps.bottom])


class ManyDecoder(Decoder):
    def forward(self, *maps: Tensor) -> Tensor:
        return super().forward(list(maps))


class PoppingDecoder(Decoder):
    """Leaves nothing in the list that it is given."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return super().forward([maps.pop(0) for _ in range(len(maps))])


class ChannelsLastDecoder(Decoder):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return super().forward([x.permute(0, 3, 1, 2) for x in maps])


def skips_only(x: Tensor) -> list[Tensor]:
    return []


def image_first(x: Tensor) -> list[Tensor]:
    return [x]


def image_and_empty_map_first(x: Tensor) -> list[Tensor]:
    return [x, x[:, :0, ::2, ::2]]


def as_list(maps: list[Tensor]) -> tuple:
    return (maps,)


def as_list_and_more(maps: list[Tensor]) -> tuple:
    return (maps, 3)


def as_tuple(maps: list[Tensor]) -> tuple:
    return (tuple(maps),)


def as_named_tuple(maps: list[Tensor]) -> tuple:
    return (Levels(*maps),)


def with_channels_last(maps: list[Tensor]) -> tuple:
    return ([x.permute(0, 2, 3, 1) for x in maps],)


def as_many(maps: list[Tensor]) -> tuple:
    return tuple(maps)


class Network(nn.Module):
    """An encoder-decoder; what can be seen of its two skips is that the decoder gets them."""

    def __init__(
        self,
        leading: Callable[[Tensor], list[Tensor]] = skips_only,
        call: Callable[[list[Tensor]], tuple] = as_list,
        decoder: Callable[[], nn.Module] = Decoder,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.call = Encoder(leading), decoder(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(*self.call(self.encoder(x)))


def network(*args) -> Network:
    torch.manual_seed(0)
    return Network(*args).double()


ODD_IMAGE = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SEAMS = {
    "nnunet": (skips_only, as_list, Decoder),
    "smp": (image_first, as_list, Decoder),
    "smp_with_an_empty_map": (image_and_empty_map_first, as_list, Decoder),
    "monai": (skips_only, as_list_and_more, Decoder),
    "tuple": (image_first, as_tuple, TupleDecoder),
    "named_tuple": (skips_only, as_named_tuple, NamedTupleDecoder),
    "one_argument_each": (image_first, as_many, ManyDecoder),
    "popping": (image_first, as_list, PoppingDecoder),
}


@pytest.mark.parametrize("seam", SEAMS.values(), ids=SEAMS)
def test_the_skips_are_refined_and_nothing_else(seam: tuple) -> None:
    plain = network(*seam).eval()
    model = add_dca(copy.deepcopy(plain), patch=3, n=2)
    assert (model.decoder.dca.features, model.decoder.dca.grid, model.decoder.dca.n) == ([4, 8], (3, 3), 2)
    maps = plain.encoder(ODD_IMAGE)
    refined = [*maps[:-3], *model.decoder.dca(maps[-3:-1]), maps[-1]]
    assert_identical({"output": model(ODD_IMAGE)}, {"output": plain.decoder(*plain.call(refined))})


def test_skips_by_name_of_a_network_with_a_decoder() -> None:
    """What the decoder gets is not asked."""
    model = add_dca(network(), patch=3, skips=["encoder.stages.1"])
    assert model.dca.features == [8] and not hasattr(model.decoder, "dca")


class HalfDecoder(Decoder):
    """Leaves its first map unused."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return super().forward([torch.zeros_like(maps[0]), *maps[1:]])


def test_a_skip_that_changes_nothing_is_left_out() -> None:
    plain = network(skips_only, as_list, HalfDecoder).eval()
    model = add_dca(copy.deepcopy(plain), patch=3)
    assert model.decoder.dca.features == [8]
    maps = plain.encoder(ODD_IMAGE)
    expected = plain.decoder([maps[0], *model.decoder.dca(maps[1:2]), maps[2]])
    assert_identical({"output": model(ODD_IMAGE)}, {"output": expected})
    model.train()(ODD_IMAGE).square().sum().backward()
    assert [name for name, p in model.decoder.dca.named_parameters() if p.grad is None] == []


class SeveralOutputs(Decoder):
    """None of which tells of both skips, but the one that is not everywhere a number."""

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        total = super().forward(maps)
        total[..., 0] = torch.nan
        return {"nothing": total[:0], "small": self.heads[1](maps[1]), "large": total}


def test_all_outputs_tell_of_the_skips() -> None:
    assert add_dca(network(skips_only, as_list, SeveralOutputs), patch=3).decoder.dca.features == [4, 8]


def test_a_first_map_of_the_shape_of_the_image() -> None:
    model = add_dca(network(lambda x: [2 * x]), patch=3, spatial_att=False)
    assert model.decoder.dca.features == [3, 4, 8]


class OfBytes(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double() / 255)


def test_an_example_of_another_dtype() -> None:
    torch.manual_seed(0)
    model = add_dca(OfBytes().double(), patch=3, example=torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert {p.dtype for p in model.decoder.dca.parameters()} == {torch.float64}


class Grey(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None].expand(-1, 3, -1, -1))


def test_an_example_without_channels() -> None:
    assert add_dca(Grey().double(), patch=3, example=ODD_IMAGE[:, 0]).decoder.dca.features == [4, 8]


def test_a_first_convolution_of_groups() -> None:
    model = network()
    model.encoder.stages[0] = nn.Conv2d(6, 4, 3, 2, 1, groups=2, dtype=torch.float64)
    assert add_dca(model, patch=3).decoder.dca.features == [4, 8]


def test_a_dca_that_starts_as_the_identity_takes_its_maps_by_name() -> None:
    dca = add_dca(network(), patch=3, start="identity").decoder.dca.eval()
    randomise(dca, 7)
    maps = [torch.randn(1, c, 8, 8, dtype=torch.float64) for c in (4, 8)]
    by_name, by_place = dca(maps=maps), dca(maps)
    assert all(torch.equal(y, other) for y, other in zip(by_name, by_place, strict=True))
    assert not torch.equal(by_name[0], maps[0])


def test_a_dca_that_starts_as_the_identity_keeps_the_dtype_of_autocast() -> None:
    model = add_dca(network().float(), patch=3, start="identity")
    maps = [torch.ones(2, c, 4, 4, dtype=torch.bfloat16) for c in (4, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        assert [y.dtype for y in model.decoder.dca(maps)] == [torch.bfloat16] * 2


class Keeping(nn.Module):
    """Puts no map first, changes its image and keeps it."""

    def forward(self, x: Tensor) -> list[Tensor]:
        self.latest = x.sub_(0.5)
        return []


def test_a_network_that_changes_its_image_leaves_the_example() -> None:
    example = ODD_IMAGE.clone()
    model = add_dca(network(Keeping()), patch=3, example=example)
    assert_identical({"example": example}, {"example": ODD_IMAGE})
    assert not hasattr(model.encoder.leading, "latest")


def test_adding_changes_nothing_that_was_there() -> None:
    model = network().train()
    model.encoder.norm.eval()
    before, values = tensors(model), {name: t.clone() for name, t in tensors(model).items()}
    modes = {m: m.training for m in model.modules()}
    assert add_dca(model, patch=3) is model
    now = {name: t for name, t in tensors(model).items() if not name.startswith("decoder.dca.")}
    assert_the_same_objects(now, before)
    assert_identical(now, values)
    assert {m: m.training for m in modes} == modes
    assert all(m.training for m in model.decoder.dca.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert len(model.decoder._forward_pre_hooks) == 1


@pytest.mark.parametrize("decodes_in_training", [False, True])
def test_the_added_dca_is_in_the_mode_of_its_decoder(decodes_in_training: bool) -> None:
    model = network().train(not decodes_in_training)
    model.decoder.train(decodes_in_training)
    add_dca(model, patch=3)
    assert {m.training for m in model.decoder.dca.modules()} == {decodes_in_training}


def test_the_added_dca_has_the_official_initial_values() -> None:
    model = network()
    torch.manual_seed(3)
    add_dca(model, patch=3)
    torch.manual_seed(3)
    assert_identical(model.decoder.dca.state_dict(), reference.DCA([4, 8], patch=3).double().state_dict())


def test_a_checkpoint_of_the_plain_model_loads(caplog: pytest.LogCaptureFixture) -> None:
    plain, model = network(), add_dca(network(), patch=3)
    randomise(plain, 7)
    kept = {name: t.clone() for name, t in model.decoder.dca.state_dict().items()}
    for assign in (False, True):
        checkpoint = plain.state_dict()
        optimised = dict(model.decoder.dca.named_parameters())
        model.load_state_dict(checkpoint, assign=assign)  # strict
        assert checkpoint.keys() == plain.state_dict().keys()
        assert_the_same_objects(dict(model.decoder.dca.named_parameters()), optimised)
        now = model.state_dict()
        assert_identical({name: now[name] for name in checkpoint}, checkpoint)
        assert_identical(model.decoder.dca.state_dict(), kept)
    message = "the state dict has no decoder.dca.*: the DCA there keeps the values that it has"
    assert caplog.messages == [message] * 2


def test_a_checkpoint_with_half_a_dca_does_not_load() -> None:
    model = add_dca(network(), patch=3)
    checkpoint = model.state_dict()
    del checkpoint["decoder.dca.upconvs.0.conv.conv.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*decoder\.dca\.upconvs\.0\.conv\.conv\.bias"):
        model.load_state_dict(checkpoint)


def test_a_checkpoint_of_the_added_model_loads(caplog: pytest.LogCaptureFixture) -> None:
    model, other = add_dca(network(), patch=3).eval(), add_dca(network(), patch=3).eval()
    randomise(other, 7)
    model.load_state_dict(other.state_dict())
    assert_identical({"output": model(ODD_IMAGE)}, {"output": other(ODD_IMAGE)})
    assert caplog.messages == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file])
def test_a_copy_uses_its_own_dca(duplicate: Callable[[nn.Module], nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    model = add_dca(network(), patch=3).eval()
    expected = model(ODD_IMAGE)
    other = duplicate(model)
    assert_identical({"output": other(ODD_IMAGE)}, {"output": expected})
    randomise(model.decoder.dca, 8)
    assert_identical({"output": other(ODD_IMAGE)}, {"output": expected})
    assert not torch.equal(model(ODD_IMAGE), expected)
    other.load_state_dict(network().state_dict())  # the hook that fills in is the copy's, too
    assert_identical({"output": other(ODD_IMAGE)}, {"output": expected})


def test_every_parameter_of_an_added_dca_gets_a_gradient() -> None:
    model = add_dca(network(), patch=3).train()
    model(ODD_IMAGE).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.slow
@tracing
@torch.no_grad()
def test_added_and_compiled_without_graph_breaks() -> None:
    model = add_dca(network(image_first), patch=3).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same({"output": compiled(ODD_IMAGE)}, {"output": model(ODD_IMAGE)})


@tracing
@torch.no_grad()
def test_added_and_exported() -> None:
    model = add_dca(network(image_first), patch=3).eval()
    exported = torch.export.export(model, (ODD_IMAGE,)).module()
    assert_same({"output": exported(ODD_IMAGE)}, {"output": model(ODD_IMAGE)})


def test_an_example_of_the_input() -> None:
    def only_small(module: nn.Module, args: tuple) -> None:
        if args[0].shape[3] != 50:
            raise RuntimeError("too large")

    model = network()
    model.register_forward_pre_hook(only_small)
    before = Snapshot(model)
    message = (
        "example: expected an input that the model's forward takes, got shape (1, 3, 256, 256), at which it raises "
        "RuntimeError: too large"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        add_dca(model, patch=3)
    before.assert_unchanged(model)
    assert add_dca(model, patch=3, example=ODD_IMAGE).decoder.dca.features == [4, 8]


class _Reversed(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)[::-1])


class _ReversedDecoder(Decoder):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return super().forward(maps[::-1])


class _Alone(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder.heads[0](self.encoder(x)[0])


class _Bottleneck(Network):
    def forward(self, x: Tensor) -> Tensor:
        maps = self.encoder(x)
        return self.decoder.heads[2](maps[2]) + 0.0 * maps[2].sum()


class _ByName(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(maps=self.encoder(x))


class _WithoutEncoder(Network):
    def __init__(self) -> None:
        super().__init__()
        self._modules = {"stem": self.encoder, "decoder": self.decoder}

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.stem(x))


class _WithSide(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(*self.encoder(x), x.shape[-1])


class _SideDecoder(Decoder):
    def forward(self, *maps_and_side: Tensor | int) -> Tensor:
        *maps, side = maps_and_side
        return super().forward(maps) / side


class _WaryDecoder(Decoder):
    def forward(self, maps: list[Tensor]) -> Tensor:
        if maps[0].mean() > 0.6:
            raise RuntimeError("too bright")
        return super().forward(maps)


def _with(network: Network, **children: nn.Module) -> Network:
    for name, child in children.items():
        setattr(network, name, child)
    return network.double()


OTHER_SEAMS = {
    "sequential": lambda: _with(Network(), decoder=nn.Sequential(Decoder())),
    "from_the_smallest": lambda: _with(_Reversed(), decoder=_ReversedDecoder()),
    "by_name": lambda: _ByName().double(),
    "by_another_than_the_encoder": lambda: _WithoutEncoder().double(),
    "with_a_number": lambda: _with(_WithSide(), decoder=_SideDecoder()),
}


@pytest.mark.parametrize("make", OTHER_SEAMS.values(), ids=OTHER_SEAMS)
def test_a_decoder_that_is_called_in_another_way(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = add_dca(make(), patch=3)
    assert (model.dca.features, type(model).__name__[-7:]) == ([4, 8], "WithDCA")


WRITE_IT = (
    ". Name modules whose outputs are skips (skips=[...]), or call a DCA yourself:\n"
    "    self.dca = dca_kernels.DCA([64, 128])  # in __init__: the channels of the skip maps\n"
    "    x1, x2 = self.dca([x1, x2])  # in forward, before the decoder"
)
NO_SKIPS = "model: expected a {} whose forward shows its skips, got no map that meets what it leads to" + WRITE_IT
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict, type[Exception], str]] = {
    "no_convolution": (
        lambda: nn.Sequential(nn.ReLU()),
        {},
        ValueError,
        "example: expected an input of the model, since it has no convolution, got None",
    ),
    "twice": (
        lambda: add_dca(network(), patch=3),
        {},
        ValueError,
        "model: expected a Decoder without an attribute dca, got a DCA",
    ),
    "three_dimensions": (
        lambda: _with(Network(), encoder=nn.Conv3d(1, 8, 3)),
        {},
        ValueError,
        "model: expected a network on images (B, C, H, W), got one with a Conv3d",
    ),
    "not_called": (lambda: _Alone(), {}, ValueError, NO_SKIPS.format("_Alone")),
    "no_skips": (lambda: _Bottleneck(), {}, ValueError, NO_SKIPS.format("_Bottleneck")),
    "features": (
        network,
        {"features": [1]},
        TypeError,
        "features: expected to be read off the model, got [1]",
    ),
    "example": (network, {"example": [1]}, TypeError, "example: expected a tensor (B, C, H, W) or None, got list"),
    "strides": (network, {"strides": [1]}, TypeError, "strides: expected to be read off the model, got [1]"),
    "start": (network, {"start": "zero"}, ValueError, "start: expected one of official, identity, got 'zero'"),
    "patch": (network, {"patch": 0}, ValueError, "patch: expected integers of at least 1, got [0, 0]"),
    "other_maps": (
        lambda: network(skips_only, as_list, _WaryDecoder),
        {},
        ValueError,
        "example: expected an input that the model's forward takes, got shape (1, 3, 256, 256), at which it raises "
        "RuntimeError: too bright",
    ),
    "channels_last": (
        lambda: network(skips_only, with_channels_last, ChannelsLastDecoder),
        {},
        ValueError,
        "model: expected a decoder that is called with maps (B, C, H, W), got maps (B, H, W, C) as skips (map 0 of the "
        "decoder, map 1 of the decoder), which have to be permuted to (B, C, H, W)",
    ),
    "heads": (
        network,
        {"spatial_head": [4, 3]},
        ValueError,
        "spatial_head[1]: expected a divisor of features[1] = 8 and of their sum 12, got 3",
    ),
}


@pytest.mark.parametrize("make, arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_refused_stays(
    make: Callable[[], nn.Module], arguments: dict, error: type[Exception], message: str
) -> None:
    model = make()
    before = Snapshot(model)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        add_dca(model, **arguments)
    before.assert_unchanged(model)


def test_an_added_dca_is_fused_already() -> None:
    (found,) = inspect(add_dca(network(image_first), patch=3))
    assert (found.name, found.fused) == ("decoder.dca", True)
    assert found.skips == ("map 1 of the decoder (4 x 128 x 128)", "map 2 of the decoder (8 x 64 x 64)")
