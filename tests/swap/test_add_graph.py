"""A DCA on the skips of a network that has them as variables of its forward."""

import copy
import dataclasses
import functools
import pickle
import pkgutil
import random
import re
import threading
import traceback
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import reference
from dca_kernels import DCA, add_dca, inspect
from dca_kernels.trace import STATES
from tests.oracle import assert_identical, assert_same, of_pytorch, randomise
from tests.swap import networks
from tests.swap.models import Snapshot, assert_the_same_objects, tensors, through_a_file, tracing
from tests.swap.networks import NETWORKS, make

each_network = pytest.mark.parametrize("name", NETWORKS)


def image(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


IMAGE = image(32, 48)
OTHER_SIZES = [(32, 48), (48, 80), (64, 64)]


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    result = model(x)
    if isinstance(result, dict):
        return result
    return {str(i): y for i, y in enumerate(result if isinstance(result, list) else [result])}


def added(name: str, **arguments) -> nn.Module:
    model = add_dca(make(name), patch=3, **arguments)
    randomise(model, 7)
    return model


class Recording(nn.Module):
    """In the place of a DCA: returns what it is given, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self.seen = [x.clone() for x in maps]
        return tuple(maps)


@each_network
def test_the_dca_gets_the_skips_and_all_else_is_as_it_was(name: str) -> None:
    plain, model = make(name), add_dca(make(name), patch=3)
    _, channels = NETWORKS[name]
    assert model.dca.features == channels
    model.dca = Recording()
    for training in (False, True):
        for size in OTHER_SIZES:
            results = []
            for m in (model.train(training), plain.train(training)):
                torch.manual_seed(3)
                results.append(outputs(m, image(*size)))
            assert_identical(*results)
    assert_identical(*(dict(m.named_buffers()) for m in (model, plain)))
    assert [x.shape[1] for x in model.dca.seen] == channels


BY_HAND = {
    "padded": networks.PaddedByHand,
    "nested": networks.NestedByHand,
    "dense": networks.DenseByHand,
    "full_scale_of_backbone": networks.FullScaleByHand,
    "siamese": networks.SiameseByHand,
    "edge": networks.EdgeByHand,
    "excited": networks.ExcitedByHand,
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_it_is_what_one_would_write_by_hand(name: str, training: bool) -> None:
    torch.manual_seed(0)
    by_hand = BY_HAND[name]()
    by_hand.dca = DCA(NETWORKS[name][1], patch=3)
    by_hand.double()
    model = add_dca(make(name), patch=3)
    assert list(model.state_dict()) == list(by_hand.state_dict())
    results = []
    for m in (model, by_hand):
        randomise(m, 5)
        torch.manual_seed(3)
        m.train(training)
        found = outputs(m, IMAGE)
        sum(y.square().sum() for y in found.values()).backward()
        gradients = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
        results.append({**found, **gradients, **dict(m.named_buffers())})
    largest = max(t.abs().max() for t in results[1].values())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12 * largest)


@each_network
def test_finding_skips_changes_nothing_that_was_there(name: str) -> None:
    model = make(name).train()
    kind, generator = type(model), torch.get_rng_state()
    next(model.children()).eval()
    before, values = tensors(model), {name: t.clone() for name, t in tensors(model).items()}
    modes = {m: m.training for m in model.modules()}
    torch.manual_seed(11)
    assert add_dca(model, patch=3) is model
    drawn = torch.get_rng_state()
    torch.manual_seed(11)
    reference.DCA(NETWORKS[name][1], patch=3)
    assert torch.equal(drawn, torch.get_rng_state())  # for the DCA's initial values alone
    torch.set_rng_state(generator)
    assert isinstance(model, kind)
    now = {name: t for name, t in tensors(model).items() if not name.startswith("dca.")}
    assert_the_same_objects(now, before)
    assert_identical(now, values)
    assert {m: m.training for m in modes} == modes
    assert all(m.training for m in model.dca.modules())


@each_network
def test_every_parameter_with_found_skips_gets_a_gradient(name: str) -> None:
    model = added(name).train()
    sum(y.square().sum() for y in outputs(model, IMAGE).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file])
@each_network
def test_a_copy_with_another_forward_uses_its_own_dca(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = added(name).eval()
    expected = outputs(model, IMAGE)
    other = duplicate(model)
    assert type(other) is type(model)
    randomise(model.dca, 8)
    assert_identical(outputs(other, IMAGE), expected)
    assert not all(torch.equal(y, expected[key]) for key, y in outputs(model, IMAGE).items())
    other.load_state_dict(make(name).state_dict())  # of the plain model, strictly


@each_network
def test_a_dca_that_starts_as_the_identity(name: str) -> None:
    plain, model = make(name), add_dca(make(name), patch=3, start="identity")
    for training in (False, True):
        results = []
        for m in (model.train(training), plain.train(training)):
            torch.manual_seed(3)
            results.append(outputs(m, IMAGE))
        assert_identical(*results)
    sum(y.square().sum() for y in results[0].values()).backward()
    assert all(gate.grad.any() for gate in model.dca.gates)
    randomise(model.dca, 3)
    assert not all(torch.equal(y, results[1][key]) for key, y in outputs(model, IMAGE).items())


def test_an_image_of_the_examples_size_behind_another() -> None:
    """Each has a forward of its own, which is kept."""
    model = added("multiple", example=IMAGE).eval()
    expected = outputs(model, IMAGE)
    outputs(model, image(64, 64))
    assert_identical(outputs(model, IMAGE), expected)


@pytest.mark.slow
@tracing
@pytest.mark.parametrize("name", ["padded", "nested", "dense", "pyramid"])
def test_found_and_compiled_without_graph_breaks(name: str) -> None:
    model = added(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for training in (False, True):
        model.train(training)
        torch.manual_seed(3)
        expected = outputs(model, IMAGE)
        torch.manual_seed(3)
        assert_same(outputs(compiled, IMAGE), expected)


@pytest.mark.slow
@tracing
@each_network
@torch.no_grad()
def test_found_and_exported(name: str) -> None:
    model = added(name, example=IMAGE).eval()
    exported = torch.export.export(model, (IMAGE,)).module()
    assert_same(outputs(exported, IMAGE), outputs(model, IMAGE))


@tracing
def test_a_model_that_was_compiled_before() -> None:
    model = make("padded").eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(IMAGE)
        add_dca(model, patch=3)
        assert_same({"": compiled(IMAGE)}, {"": model(IMAGE)})
        assert not torch.equal(model(IMAGE), plain)


def test_the_network_within_a_wrapper_gets_the_dca() -> None:
    model = networks.Wrapper(make("padded")).train()
    model.network.eval()
    add_dca(model, patch=3)
    assert model.training and not any(m.training for m in model.network.modules())
    model.eval()
    assert type(model) is networks.Wrapper
    assert_identical({"": model(IMAGE)}, {"": model.network(IMAGE)})
    assert all(name.startswith("network.") for name in model.state_dict())
    assert not model.network._forward_pre_hooks


class Flipping(networks.Wrapper):
    """Runs its network twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + self.network(x.flip(3)).flip(3)


def test_a_wrapper_that_calls_its_network_twice() -> None:
    assert add_dca(Flipping(make("padded")), patch=3, example=image(8, 8)).dca.features == [4, 4, 8, 8]


class Dropping(networks.Nested):
    """Whose code is in the graph, and asks whether it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.dropout(self.model(x), 0.5, self.training)], 1)


def test_what_a_call_would_have_seen_is_not_left_out() -> None:
    model = make("nested")
    model.model[1].__class__ = Dropping
    add_dca(model, patch=3)
    handle = model.model[1].register_forward_hook(lambda module, args, result: None)
    with pytest.raises(RuntimeError, match=r"^model\.1: expected no hook and no forward of its own, got one that "):
        model(IMAGE)
    handle.remove()
    model.model[1].eval()
    with pytest.raises(RuntimeError, match=r"^model\.1: expected training=True, as its network, got False"):
        model(IMAGE)
    model.model[1].train()
    model(IMAGE)


def test_a_hooked_module_stays_whole() -> None:
    model, called = make("pyramid"), []
    model.backbone.register_forward_hook(lambda module, args, result: called.append(len(args)))
    add_dca(model, patch=3)
    called.clear()
    model(IMAGE)
    assert called == [1]
    (found,) = inspect(model)
    assert found.skips == ("backbone[layer0] (4 x 128 x 128)", "backbone[layer1] (8 x 64 x 64)")


class Excitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weights = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)


class OfTorchvision(networks.Nested): ...


OfTorchvision.__module__ = "torchvision.models"


def test_a_hooked_module_that_pools_within() -> None:
    """And one of a library whose name begins as PyTorch's."""
    model = make("nested")
    model.model[1].__class__ = OfTorchvision
    model.model[0].append(Excitation(4).double())
    model.model[0].register_forward_hook(lambda module, args, result: None)
    assert add_dca(model, patch=3).dca.features == [4, 8]


def test_a_hooked_module_that_would_have_to_be_opened() -> None:
    model = make("nested")
    model.model[1].register_forward_hook(lambda module, args, result: None)
    with pytest.raises(ValueError, match=r"^model: expected a NestedUNet whose forward shows its skips, got no map "):
        add_dca(model, patch=3)


def test_no_more_is_opened_than_it_takes() -> None:
    model, called = add_dca(make("nested"), patch=3), []
    for path in ("model.0", "model.1.model.2.model"):  # within which there is no skip
        model.get_submodule(path).register_forward_hook(lambda module, args, result: called.append(module))
    model(IMAGE)
    assert called == [model.model[0], model.model[1].model[2].model]


def test_hooks_of_what_is_called_are_called() -> None:
    model, called = make("padded"), []
    model.down1.register_forward_hook(lambda module, args, result: called.append("before"))
    model.register_forward_hook(lambda module, args, result: called.append("of the model"))
    add_dca(model, patch=3)
    model.down2.register_forward_hook(lambda module, args, result: called.append("after"))
    called.clear()
    model(IMAGE)
    assert called == ["before", "after", "of the model"]


class Particular(networks.PaddedUNet):
    """Does something else for images of other sides."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 32:
            x = F.pad(x, (0, 32 - x.shape[-1] % 32))
        return super().forward(x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_code_that_asks_for_sizes(training: bool) -> None:
    torch.manual_seed(0)
    plain = Particular().double().train(training)
    model = add_dca(copy.deepcopy(plain), patch=3, example=image(32, 64), start="identity")
    for size in ((64, 96), (32, 48), (64, 80), (32, 64), (30, 50)):
        for network in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_identical(outputs(network, image(*size)), outputs(copy.deepcopy(plain), image(*size)))


@tracing
def test_another_graph_is_not_compiled_in_silence() -> None:
    model = add_dca(Particular().double(), patch=3, example=image(32, 64))
    compiled = torch.compile(model, backend="eager")
    assert_same({"": compiled(image(64, 96))}, {"": copy.deepcopy(model)(image(64, 96))})
    message = "input: expected one for which x.shape[-1] % 32 is 0, as for the example of add_dca, got 16: "
    with pytest.raises(ValueError, match=re.escape(message)):
        compiled(IMAGE)


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapper


def shifted(network: nn.Module, y: Tensor) -> Tensor:
    return y + network.shift


class Switched(networks.PaddedUNet):
    """Has attributes that say what it does, read in each way that its code may have."""

    def __init__(self) -> None:
        super().__init__()
        self.doubled, self.factor, self.power, self.sign, self.shift, self.least, self.flat = False, 2.0, 1, 1, 0, -9, 0

    @property
    def signed(self) -> int:
        return self.sign

    @staticmethod
    def clamped(network: nn.Module, y: Tensor) -> Tensor:
        return y.clamp(min=network.least)

    def scaled(self, y: Tensor) -> Tensor:
        return (lambda t: t * self.factor)(y) ** getattr(self, "power") * self.signed  # noqa: B009

    @decorated
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y = self.clamped(self, shifted(self, self.scaled(self.outc(self.inc(x)) if self.flat else super().forward(x))))
        return [y, y] if self.doubled else y


CHANGED = [{"doubled": True}, {"factor": 3.0}, {"doubled": False}, {"factor": torch.tensor(4.0)}]
CHANGED += [{"power": 2}, {"sign": -1}, {"shift": 2}, {"least": 1}]


def test_attributes_of_the_network_are_read_at_each_call() -> None:
    torch.manual_seed(0)
    plain = Switched().double().eval()
    model = add_dca(copy.deepcopy(plain), patch=3, start="identity")
    for settings in CHANGED:
        for network in (plain, model):
            vars(network).update(settings)
        assert_identical(outputs(model, IMAGE), outputs(plain, IMAGE))


@of_pytorch
def test_errors_of_a_forward_with_a_dca() -> None:
    model = add_dca(Switched().double().eval(), patch=3)
    with pytest.raises(RuntimeError, match="channels") as raised:
        model(IMAGE[:, :2])
    lines = [frame.line for frame in traceback.extract_tb(raised.tb) if frame.filename.startswith("<forward with DCA")]
    assert len(lines) == 2 and all(lines)
    model.factor = 7.0
    with pytest.raises(RuntimeError, match=r"^model: expected settings .*, as add_dca found them, got \(.*7\.0"):
        torch.jit.trace(model, (IMAGE,))
    model.flat = 1
    message = r"^input: expected one for which the skips inc, down1 of add_dca show, as for .*, got \(2, 3, 32, 48\): "
    with pytest.raises(RuntimeError, match=message):
        model(IMAGE)


class PaddedInEvaluation(Particular):
    """Asks for the image's size in one mode only."""

    def forward(self, x: Tensor) -> Tensor:
        return networks.PaddedUNet.forward(self, x) if self.training else super().forward(x)


@of_pytorch
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_code_that_asks_for_sizes_in_evaluation_only() -> None:
    torch.manual_seed(0)
    plain, example = PaddedInEvaluation().double().eval(), image(32, 64)
    model = add_dca(copy.deepcopy(plain), patch=3, example=example, start="identity")
    assert_identical({"": model(IMAGE)}, {"": plain(IMAGE)})
    assert_same({"": torch.jit.trace(model, (example,))(example)}, {"": plain(example)})


def test_a_part_of_the_same_code_in_both_modes_may_be_frozen() -> None:
    plain = make("nested").train()
    model = add_dca(copy.deepcopy(plain), patch=3, start="identity")
    for network in (model, plain):
        network.model[1].eval()
    assert_identical({"": model(IMAGE)}, {"": plain(IMAGE)})


def test_a_skip_that_is_computed_from_another() -> None:
    message = r"^skips: expected a DenseUNet whose forward .*, got x01 among them, which is computed from another one "
    with pytest.raises(ValueError, match=message):
        add_dca(make("dense"), patch=3, skips=["x00", "x01"])


class Vacant(Particular):
    """Could have an attention, and has none."""

    def __init__(self) -> None:
        super().__init__()
        self.dca = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.dca is None else self.dca([x]))


def test_a_network_that_has_none_where_the_dca_goes() -> None:
    torch.manual_seed(0)
    plain = Vacant().double().eval()
    model = add_dca(copy.deepcopy(plain), patch=3, example=image(32, 64), start="identity")
    for size in ((32, 64), (32, 48)):
        assert_identical({"": model(image(*size))}, {"": plain(image(*size))})


class Batched(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Batched, self).forward(x[i : i + 1]) for i in range(len(x))])


def test_code_that_asks_for_the_batch() -> None:
    torch.manual_seed(0)
    plain = Batched().double().eval()
    model = add_dca(copy.deepcopy(plain), patch=3, start="identity")
    for batch in (1, 3, 2):
        assert_same({"": model(image(32, 32, batch=batch))}, {"": plain(image(32, 32, batch=batch))})


class InPieces(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([piece - piece.mean() for piece in x.split(16, 2)], 2))


def test_code_that_takes_an_image_to_pieces() -> None:
    torch.manual_seed(0)
    plain = InPieces().double().eval()
    model = add_dca(copy.deepcopy(plain), patch=3, example=image(32, 32), start="identity")
    assert_identical({"": model(image(48, 32))}, {"": plain(image(48, 32))})


def test_in_inference_mode() -> None:
    """Nothing that stays is of it; an image of another size may come there first."""
    model = Particular().double().eval()
    with torch.inference_mode():
        add_dca(model, patch=3, example=image(32, 64))
        found = model(image(32, 48))
    assert not any(t.is_inference() for t in tensors(model).values())
    assert_identical({"": model(image(32, 48))}, {"": found})


def test_threads_with_images_of_other_sizes() -> None:
    torch.manual_seed(0)
    model = add_dca(Particular().double().eval(), patch=3, example=image(32, 64))
    sizes = [(32, 48), (32, 80), (64, 48), (48, 112)]
    expected = {size: copy.deepcopy(model)(image(*size)) for size in sizes}
    found = {}

    def run(size: tuple[int, int]) -> None:
        found[size] = model(image(*size))

    threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_identical({str(size): found[size] for size in sizes}, {str(size): y for size, y in expected.items()})


def test_skips_by_name() -> None:
    model = add_dca(make("padded"), patch=3, skips=["down1"])
    assert model.dca.features == [8]
    model = add_dca(make("pyramid"), patch=3, skips=["backbone.stages.1", "backbone.stages.0"])
    assert model.dca.features == [8, 4]
    model = added("pyramid", skips=["lateral.layer1"])  # that the network does not lead down from
    assert model.dca.features == [4]
    model = add_dca(networks.Wrapper(make("padded")), patch=3, skips=["down1"])
    assert model.network.dca.features == [8]


def test_a_skip_by_name_that_leads_further_down_for_another_image() -> None:
    plain = make("siamese").eval()
    model = add_dca(copy.deepcopy(plain), patch=3, skips=["mul"])
    seen: list[Tensor] = []
    for network in (plain, model):
        network.conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        network(IMAGE)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_skips_by_name_are_all_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Of a last layer that is zero at first, nothing counts yet."""
    network = make("padded")
    nn.init.zeros_(network.outc.weight)
    with pytest.raises(ValueError, match=r"got skips that change nothing \(inc, down1\)"):
        add_dca(copy.deepcopy(network), patch=3)
    assert add_dca(network, patch=3, skips=["inc", "down1"]).dca.features == [4, 8]
    assert "the skip down1 changes nothing that the model returns in evaluation" in caplog.text


class Classified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = (nn.Conv2d(*c, 3, 2, 1) for c in ((3, 4), (4, 8), (8, 16)))
        self.up2, self.up1 = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(16, 4, 2, 2)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.down1(x)
        x2 = self.down2(x1)
        y = self.up1(torch.cat([x2, self.up2(self.down3(x2))], 1))
        y = self.last(torch.cat([x1, y], 1))
        return y if self.training else y.argmax(1)


def test_skips_of_outputs_that_are_classes() -> None:
    """They change where a map changes much."""
    for seed in range(8):
        torch.manual_seed(seed)
        assert add_dca(Classified(), patch=3).dca.features == [4, 8]


def test_a_layer_that_has_the_skips_gets_the_dca() -> None:
    """The list of layers stays one."""
    plain = nn.Sequential(make("padded"), nn.Softmax(1)).eval()
    model = add_dca(copy.deepcopy(plain), patch=3, example=IMAGE, start="identity")
    assert type(model) is nn.Sequential and len(model) == 2 and model[0].dca.features == [4, 8]
    assert_identical({"": model(IMAGE), "first": model[:1](IMAGE)}, {"": plain(IMAGE), "first": plain[:1](IMAGE)})
    model.append(nn.Sigmoid())
    assert (model(IMAGE) >= 0.5).all()


@dataclasses.dataclass
class Result:
    logits: Tensor
    more: list[Tensor]


class OfADataclass(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Result:
        return Result(super().forward(x), [])


def test_outputs_may_be_a_dataclass() -> None:
    model = add_dca(OfADataclass().double().eval(), patch=3)
    assert model.dca.features == [4, 8] and model(IMAGE).logits.shape == (2, 2, 32, 48)


def test_parameters_need_values() -> None:
    def lazy() -> nn.Module:
        model = make("padded")
        model.inc[0] = nn.LazyConv2d(4, 3, padding=1)
        return model

    for model, got in ((lazy(), "lazy: call it once"), (make("padded").to("meta"), "on the meta device")):
        for example in (None, IMAGE):
            with pytest.raises(ValueError, match=rf"^model: expected parameters with values, got inc\..* is {got}"):
                add_dca(model, patch=3, example=example)


def test_a_skip_of_a_graph_that_changes_nothing_is_left_out() -> None:
    network = make("padded")
    nn.init.zeros_(network.up1.conv[0].weight[:, :8])
    assert add_dca(network, patch=3).dca.features == [4]


def test_other_threads_run_their_networks_meanwhile() -> None:
    other, wrong, stop = make("concatenating").eval(), [], threading.Event()
    expected = other(IMAGE)

    def run() -> None:
        while not stop.is_set():
            with torch.no_grad():
                wrong.append(not torch.equal(other(IMAGE), expected))

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(3):
        add_dca(make("nested"), patch=3)
    stop.set()
    thread.join()
    assert len(wrong) > 3 and not any(wrong)


class Classifier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Excited(nn.Module):
    """Weights of channels are no way down, pooled pyramids neither."""

    pools = F.adaptive_avg_pool2d, F.adaptive_max_pool2d

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.of_pooled = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self.pyramids = nn.ModuleList(
            nn.Sequential(pool(3), nn.Conv2d(4, 4, 1)) for pool in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * self.excite(x) * x.mean((2, 3), keepdim=True).sigmoid()
        pooled = [pyramid(x) for pyramid in self.pyramids] + [self.of_pooled(pool(x, 3)) for pool in self.pools]
        return torch.cat([x, *(F.interpolate(y, size=x.shape[2:]) for y in pooled)], 1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.down(x + self.conv(x))


class WithTheImage(networks.PaddedUNet):
    """Which its last convolution sees once more, smaller and normalised: no skip."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = F.avg_pool2d(x - self.mean, 2)
        return self.last(torch.cat([F.avg_pool2d(super().forward(x), 2), image], 1))


def test_the_image_is_no_skip() -> None:
    assert add_dca(WithTheImage().double(), patch=3).dca.features == [4, 8]


class LargestLast(networks.PaddedUNet):
    """Its skips come in another sequence than that of their sizes; and a block of its own does what no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.auxiliary = Apart(self.down1), Auxiliary()

    def forward(self, x: Tensor) -> Tensor:
        x2 = self.down1(self.inc(x))
        x = self.up2(self.up1(self.down2(x2), x2), self.inc(x))
        more = self.auxiliary(x)
        return self.outc(x if more is None else x + more)


class Apart(networks.Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.network(x) * torch.tensor(2.0)


class Auxiliary(nn.Module):
    def forward(self, x: Tensor) -> None: ...


def test_skips_come_by_their_sizes() -> None:
    assert add_dca(LargestLast().double(), patch=3).dca.features == [4, 8]


class ShallowInTraining(networks.PaddedUNet):
    """Has its largest skip in evaluation only."""

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x = self.up1(self.down2(x2), x2)
        return self.outc(self.up2(x, F.interpolate(x, scale_factor=2)[:, :4] if self.training else x1))


def test_skips_are_those_of_evaluation() -> None:
    """Also where the network is in training: one skip of two does not do."""
    with pytest.raises(ValueError, match=r"^model: .*, got other skips in training than in evaluation\."):
        add_dca(ShallowInTraining().double().train(), patch=3)


def test_a_bottleneck_of_one_pixel() -> None:
    assert add_dca(make("padded"), patch=2, example=image(4, 4)).dca.features == [4, 8]


class OfOneSize(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != 4:
            raise ValueError("expected a height of four")
        return super().forward(x)


def test_as_many_channels_as_rows_in_images_of_one_size() -> None:
    assert add_dca(OfOneSize().double(), patch=2, example=image(4, 4)).dca.features == [4, 8]


class Normalising(nn.Module):
    """Takes an image's mean off, as BatchNorm sees it: one value a channel and image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.norm(x.mean((2, 3), keepdim=True))


def test_a_batch_norm_that_one_image_is_not_enough_for() -> None:
    """In training it refuses the example: a random image."""
    model = make("padded")
    model.down2.append(Normalising(16).double())
    assert add_dca(model, patch=3).dca.features == [4, 8]


class Decorated(networks.PaddedUNet):
    """As the forwards of transformers are."""

    @decorated
    def forward(self, pixels: Tensor, side: int | None = None) -> Tensor:
        side = int(np.sqrt(pixels.shape[2] * pixels.shape[3])) if side is None else side
        return super().forward(pixels) * side


def test_a_decorated_forward_that_calls_numpy() -> None:
    torch.manual_seed(0)
    plain = Decorated().double().eval()
    model = add_dca(copy.deepcopy(plain), patch=3, start="identity")
    for side in (32, 48):
        assert_identical({"": model(pixels=image(side, side))}, {"": plain(image(side, side))})


class LooksAtTypes(networks.PaddedUNet):
    """Does something else where a value is not exactly a tensor, as those that are traced are not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if type(x) is Tensor else -x)


class Collects(networks.PaddedUNet):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


class CountsInABuffer(networks.PaddedUNet):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


class KeepsInADictionary(networks.PaddedUNet):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["latest"] = x
        return super().forward(x)


class Checkpointing(networks.PaddedUNet):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = checkpoint(self.inc[0], x, use_reentrant=self.reentrant)[:, :3]
        return super().forward(x)


class Reentrant(Checkpointing):
    reentrant = True


class WithoutGradients(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.inc(x)[:, :3]
        return super().forward(x)


class WithoutAutocast(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class SavingOnTheHost(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)


class Drawing(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if not self.training or torch.rand(1).item() < 0.5 else -x)


class DrawingInPython(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if not self.training or random.random() < 0.5 else -x)


class DrawingWithin(networks.Nested):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if not self.training or random.random() < 0.5 else -x)


class KeepingWithin(networks.Nested):
    def forward(self, x: Tensor) -> Tensor:
        self.latest = x
        return super().forward(x)


def nested_in(kind: type[networks.Nested]) -> nn.Module:
    model = make("nested")
    model.model[1].__class__ = kind
    return model


class TakesMemory(networks.PaddedUNet):
    """By functions in C, which would crash the process."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.Tensor(x.mean()))


class TakesANumber(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.as_tensor(x.mean() if isinstance(x, Tensor) else 1.0))


class WantsGradients(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.inc(x).requires_grad else -x)


class LooksForAGraph(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.inc(x).grad_fn is None else -x)


class LooksForALeaf(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.inc(x).is_leaf else -x)


class Asking(networks.PaddedUNet):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.change(x))


ASKING: dict[str, Callable[[Tensor], Tensor]] = {
    "a_set": lambda x: -x if x.shape[3] in {64, 128} else x,
    "a_float": lambda x: x * float(x.shape[2]),
    "a_name": lambda x: x * {"images: 3": 7.0}.get(f"images: {x.shape[0]}", 1.0),
}


@pytest.mark.parametrize("change", ASKING.values(), ids=ASKING)
def test_sizes_that_are_asked_for_in_other_ways(change: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    plain = Asking(change).double().eval()
    model = add_dca(copy.deepcopy(plain), patch=3, example=image(16, 32), start="identity")
    given = image(32, 64, batch=3)
    assert_identical({"": model(given)}, {"": plain(given)})


@functools.lru_cache
def _twice(side: int) -> int:
    return 2 * side


def _there_and_back(x: Tensor) -> Tensor:
    """As einops: what has no hash is computed anew."""
    try:
        side = _twice(x.shape[2])
    except TypeError:
        side = _twice.__wrapped__(x.shape[2])
    return F.interpolate(F.interpolate(x, size=(side, side)), size=x.shape[2:])


def test_what_a_function_keeps_is_of_no_graph() -> None:
    """It would hand a graph's sizes to the next one, and to networks that have no DCA."""
    torch.manual_seed(0)
    plain = Asking(_there_and_back).double().eval()
    model = add_dca(copy.deepcopy(plain), patch=3, example=image(16, 32), start="identity")
    for size in OTHER_SIZES:
        assert_identical({"": model(image(*size))}, {"": plain(image(*size))})


class LooksAtDtypes(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.dtype == x.dtype else y.to(x.dtype) + 1


def test_dtypes_that_are_asked_for() -> None:
    torch.manual_seed(0)
    plain = LooksAtDtypes().eval()
    model = add_dca(copy.deepcopy(plain), patch=3, start="identity")
    for low in (torch.bfloat16, torch.float16):
        assert_identical({"": model(IMAGE.float())}, {"": plain(IMAGE.float())})
        with torch.autocast("cpu", low):
            given = model(IMAGE.float())
            assert given.dtype == torch.float32
            assert_identical({"": given}, {"": plain(IMAGE.float())})
    for dtype in (torch.bfloat16, torch.float64):
        assert_identical({"": model.to(dtype)(IMAGE.to(dtype))}, {"": plain.to(dtype)(IMAGE.to(dtype))})
    assert copy.deepcopy(model).to("meta")(IMAGE.to("meta")).shape == (2, 2, 32, 48)  # which has no autocast
    with torch.autocast("cpu", torch.bfloat16):  # found under it
        plain.float()
        model = add_dca(copy.deepcopy(plain), patch=3, start="identity")
        assert_identical({"": model(IMAGE.float())}, {"": plain(IMAGE.float())})
    assert_identical({"": model(IMAGE.float())}, {"": plain(IMAGE.float())})


class GoesBy(networks.PaddedUNet):
    """Classes for one state of the process, logits for the other."""

    def __init__(self, state: str) -> None:
        super().__init__()
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.softmax(1) if pkgutil.resolve_name(self.state)() else y


class ChecksUnless(GoesBy):
    def forward(self, x: Tensor) -> Tensor:
        if not pkgutil.resolve_name(self.state)() and x.shape[2] % 4:
            raise ValueError("expected a height of whole fours")
        return networks.PaddedUNet.forward(self, x)


@pytest.mark.parametrize("state", STATES)
def test_a_forward_that_goes_by_the_state_of_the_process_is_refused(state: str) -> None:
    before = pkgutil.resolve_name(state)
    with pytest.raises(ValueError, match=rf"got what GoesBy\.forward does depends on {re.escape(state)}\(\)"):
        add_dca(GoesBy(state), patch=3)
    assert pkgutil.resolve_name(state) is before
    model = add_dca(ChecksUnless(state), patch=3)  # computes the same
    assert model.dca.features == [4, 8]


def test_torch_fx_takes_a_network_with_an_added_dca() -> None:
    for plain in (make("padded"), Asking(ASKING["a_set"]).double()):
        model = add_dca(copy.deepcopy(plain.eval()), patch=3, example=IMAGE, start="identity")
        randomise(model, 7)
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes].count("dca") == 1
        assert_identical({"": traced(IMAGE)}, {"": model(IMAGE)})
    with pytest.raises(ValueError, match=r"^input: expected one for which .* as for the example of add_dca"):
        torch.fx.symbolic_trace(model)(image(32, 64))


class ChannelsLast(nn.Module):
    """Its maps are (B, H, W, C), as those of Swin Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.down, self.up = nn.Conv2d(3, 44, 4, 4), nn.Linear(4 * 44, 44), nn.Linear(44, 44)
        self.last = nn.Linear(2 * 44, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        y = self.down(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], 3))
        y = self.up(y).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return self.last(torch.cat([x, y], 3)).permute(0, 3, 1, 2)


class Merging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up2, self.up1 = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[0] + self.up1(maps[1] + self.up2(maps[2]))


class DecodesInTorchScript(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = networks.Backbone(), torch.jit.script(Merging())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(list(self.encoder(x).values()))


def with_a_scripted_level() -> nn.Module:
    model = make("padded")
    model.down1 = torch.jit.script(model.down1)
    return model


def with_its_own_forward() -> nn.Module:
    model = make("padded")
    forward = model.forward
    model.forward = lambda x: forward(x)
    return model


class DependsOnValues(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        self.latest = x
        return super().forward(x if x.mean() > 0 else -x)


class KeepsMaps(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        self.latest = self.inc(x)
        return super().forward(x)


class MakesTensors(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.ones(3, 1, 1, dtype=torch.float64))


class TakesAnything(networks.PaddedUNet):
    def forward(self, *images: Tensor) -> Tensor:
        return super().forward(images[0])


class Unused(networks.PaddedUNet):
    """Has skips that change nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x = F.interpolate(self.down2(x2), size=x1.shape[2:])
        return torch.cat([x, 0.0 * x1.clamp(-1, 1)], 1)


class OtherInTraining(networks.PaddedUNet):
    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        up = self.up1(self.down2(x2), x2)
        return self.outc(self.up2(up, self.inc(x) if self.training else x1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "classifier": (Classifier, "Classifier whose forward shows its skips, got no map that meets what it leads to"),
    "excited": (Excited, "Excited whose forward shows its skips, got no map that meets what it leads to"),
    "residual": (Residual, "Residual whose forward shows its skips, got no map that meets what it leads to"),
    "values": (
        DependsOnValues,
        r".*x if x\.mean\(\) > 0 else -x\): TraceError: what it does depends on a tensor's values",
    ),
    "counts_in_a_buffer": (CountsInABuffer, r".*got CountsInABuffer\.forward sets its attribute _buffers\['count'\]"),
    "keeps_in_a_dictionary": (KeepsInADictionary, r".*sets its attribute cache\['latest'\]"),
    "checkpointing": (Checkpointing, ".*TraceError: it uses activation checkpointing"),
    "reentrant": (Reentrant, r".*TraceError: it uses a torch\.autograd\.Function"),
    "without_gradients": (WithoutGradients, ".*TraceError: it switches gradients off"),
    "without_autocast": (WithoutAutocast, r".*TraceError: it uses torch\.autocast"),
    "drawing": (Drawing, r".*TraceError: it draws random numbers \(aten::rand\)"),
    "drawing_in_python": (DrawingInPython, ".*TraceError: its code names random"),
    "drawing_within": (lambda: nested_in(DrawingWithin), ".*TraceError: its code names random"),
    "keeping_within": (lambda: nested_in(KeepingWithin), r".*KeepingWithin\.forward sets its attribute latest"),
    "saving_on_the_host": (SavingOnTheHost, ".*TraceError: it uses hooks on saved tensors"),
    "takes_memory": (TakesMemory, ".*TraceError: it hands a tensor to a function that takes its memory"),
    "takes_a_number": (TakesANumber, r".*TraceError: it uses torch\.as_tensor"),
    "wants_gradients": (WantsGradients, ".*TraceError: what it does depends on whether gradients are wanted"),
    "looks_for_a_graph": (LooksForAGraph, ".*TraceError: what it does depends on whether gradients are wanted"),
    "looks_for_a_leaf": (LooksForALeaf, ".*TraceError: what it does depends on whether gradients are wanted"),
    "channels_last": (ChannelsLast, r".*got maps \(B, H, W, C\) as skips \(permute\), which have to be permuted to"),
    "scripted_level": (with_a_scripted_level, ".*it calls down1, which is of TorchScript: script it afterwards"),
    "scripted_decoder": (DecodesInTorchScript, ".*it calls decoder, which is of TorchScript: script it afterwards"),
    "own_forward": (with_its_own_forward, "PaddedUNet with its class's forward, got one with its own"),
    "keeps_maps": (KeepsMaps, r".*got KeepsMaps\.forward sets its attribute latest"),
    "collects": (Collects, r".*got Collects\.forward sets its attribute seen"),
    "looks_at_types": (LooksAtTypes, ".*got a forward that its graph does not compute"),
    "makes_tensors": (MakesTensors, r".*TraceError: it makes a tensor by itself"),
    "takes_anything": (TakesAnything, ".*TraceError: its forward has no argument for the image"),
    "unused": (Unused, r".*got skips that change nothing \(inc\)"),
    "other_in_training": (OtherInTraining, ".*got other skips in training than in evaluation"),
    "compiled": (
        lambda: torch.compile(make("padded"), backend="eager"),
        "one that is not compiled, got one that is",
    ),
    "in_place_compiled": (
        lambda: (model := make("padded"), model.down1.compile(backend="eager"))[0],
        "one that is not compiled, got one with down1 that is: compile it afterwards",
    ),
    "data_parallel": (lambda: nn.DataParallel(make("padded")), "the network itself, got it in a DataParallel"),
    "taken": (
        lambda: add_dca(make("padded"), patch=3),
        "a PaddedUNetWithDCA without an attribute dca, got a DCA",
    ),
}


@of_pytorch
@pytest.mark.parametrize("build, message", REFUSED.values(), ids=REFUSED)
def test_a_network_that_is_refused_stays(build: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    model = build().double()
    before, kind = Snapshot(model), type(model)
    attributes = {m: dict(vars(m)) for m in model.modules()}
    functions = torch.tensor, torch.as_tensor, torch.asarray, torch.autocast.__enter__  # that a trace replaces
    with pytest.raises(ValueError, match=f"^model: expected (a )?{message}"):
        add_dca(model, patch=3)
    assert (torch.tensor, torch.as_tensor, torch.asarray, torch.autocast.__enter__) == functions
    before.assert_unchanged(model)
    assert type(model) is kind
    assert {m: dict(vars(m)) for m in model.modules()} == attributes


def test_names_of_no_skips_are_refused() -> None:
    model = make("padded")
    with pytest.raises(ValueError, match=r"^skips: expected a PaddedUNet whose forward shows \['down2', 'up'\], got "):
        add_dca(model, patch=3, skips=["down2", "up"])
    assert type(model) is networks.PaddedUNet


def test_a_dca_on_found_skips_is_fused_already() -> None:
    (found,) = inspect(add_dca(make("padded"), patch=3))
    assert (found.name, found.fused) == ("dca", True)
