"""`add_dca` on the networks of three libraries and of the paper, and what other libraries do with a DCA.

A library that is not installed is skipped.
"""

import copy
import importlib
import importlib.util
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel

from dca_kernels import DCA, add_dca
from reference import unets
from tests.oracle import Config, assert_identical, assert_same, both_modes, pair, random_maps, randomise
from tests.readme import snippet

pytestmark = pytest.mark.slow


def _library(name: str) -> ModuleType:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' own, about PyTorch's next versions
        return importlib.import_module(name)


def smp(architecture: str, encoder: str) -> nn.Module:
    library = _library("segmentation_models_pytorch")
    return getattr(library, architecture)(encoder, encoder_weights=None, in_channels=3, classes=2)


def monai(backbone: str) -> nn.Module:
    return _library("monai.networks.nets").FlexibleUNet(3, 2, backbone)


def without_seam(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A network of MONAI whose forward has its skips as variables."""
    networks = _library("monai.networks.nets")
    return getattr(networks, name)(**({"spatial_dims": 2, "in_channels": 3, "out_channels": 2} | arguments))


def host(name: str) -> nn.Module:
    return getattr(unets, name)(dca=False)


def nnunet(architecture: str, blocks: str) -> nn.Module:
    library = _library("dynamic_network_architectures.architectures.unet")
    return getattr(library, architecture)(
        input_channels=3,
        n_stages=4,
        features_per_stage=[8, 16, 24, 32],
        conv_op=nn.Conv2d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2],
        num_classes=2,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
        **{blocks: 1},
    )


CHANNELS = {"channels": (4, 8, 16, 32), "strides": (2, 2, 2)}
KERNELS = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3, "filters": [4, 8, 16, 32]}
SUPERVISED = {"deep_supervision": True, "deep_supr_num": 2}
SMALL = {"img_size": (64, 96), "feature_size": 8, "hidden_size": 24, "mlp_dim": 24, "num_heads": 4}

# Builder, its arguments, and the channels of the skips that matter.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[Any, ...], list[int]]] = {
    "smp_unet": (smp, ("Unet", "resnet18"), [64, 64, 128, 256]),
    "smp_unet_efficientnet": (smp, ("Unet", "efficientnet-b0"), [32, 24, 40, 112]),
    "smp_unet_mit": (smp, ("Unet", "mit_b0"), [32, 64, 160]),  # one map has no channels
    "smp_unet_timm": (smp, ("Unet", "tu-resnet18"), [64, 64, 128, 256]),
    "smp_unetplusplus": (smp, ("UnetPlusPlus", "resnet18"), [64, 64, 128, 256]),
    "smp_linknet": (smp, ("Linknet", "resnet18"), [64, 64, 128, 256]),
    "smp_vgg": (smp, ("Unet", "vgg11"), [128, 256, 512, 512]),  # of six maps, the first is not used
    "smp_fpn": (smp, ("FPN", "resnet18"), [64, 128, 256]),  # nor here, nor by the next three
    "smp_upernet": (smp, ("UPerNet", "resnet18"), [64, 128, 256]),
    "smp_pan": (smp, ("PAN", "resnet18"), [64, 128, 256]),
    "smp_deeplab": (smp, ("DeepLabV3Plus", "resnet18"), [64]),
    "monai_resnet": (monai, ("resnet10",), [64, 64, 128, 256]),
    "monai_efficientnet": (monai, ("efficientnet-b0",), [16, 24, 40, 112]),
    "nnunet_plain": (nnunet, ("PlainConvUNet", "n_conv_per_stage"), [8, 16, 24]),
    "nnunet_residual": (nnunet, ("ResidualEncoderUNet", "n_blocks_per_stage"), [8, 16, 24]),
    "monai_unet": (without_seam, ("UNet", CHANNELS | {"num_res_units": 2}), [4, 8]),
    "monai_basic": (without_seam, ("BasicUNet", {"features": (4, 4, 8, 16, 32, 4)}), [4, 4, 8, 16]),
    "monai_basic_plusplus": (without_seam, ("BasicUNetPlusPlus", {"features": (4, 4, 8, 16, 32, 4)}), [4, 4, 8, 16]),
    "monai_attention": (without_seam, ("AttentionUnet", CHANNELS), [4, 8, 16]),
    "monai_segresnet": (without_seam, ("SegResNet", {}), [8, 16, 32]),
    "monai_dynunet": (without_seam, ("DynUNet", KERNELS | SUPERVISED), [4, 8, 16]),
    "monai_unetr": (without_seam, ("UNETR", SMALL), [8, 16, 32, 64]),
    "monai_swinunetr": (without_seam, ("SwinUNETR", {"feature_size": 12}), [12, 12, 24, 48, 96]),
    "monai_vnet": (without_seam, ("VNet", {"in_channels": 1}), [16, 32, 64, 128]),
    "host_unet": (host, ("UNet",), [32, 64, 128, 256]),
    "host_resunetpp": (host, ("ResUNetPP",), [32, 64, 128]),
    "host_doubleunet": (host, ("DoubleUNet",), [64, 128, 256, 512]),
}
# What `add_dca` needs to know of those whose skips do not come from one way down.
NAMES = {"monai_unetr": [f"encoder{i}" for i in (1, 2, 3, 4)]}
ONE_OF_EACH = ["smp_unet", "monai_resnet", "nnunet_plain", "monai_unet", "monai_dynunet"]
each_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def _torchvision(importable_torchvision: None) -> None: ...


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    make, arguments, _ = NETWORKS[name]
    return make(*arguments)


def added(name: str, model: nn.Module | None = None) -> nn.Module:
    return add_dca(model or build(name), patch=4, example=image(name), skips=NAMES.get(name))


def image(name: str) -> Tensor:
    if name == "smp_pan":
        return IMAGE.repeat(1, 1, 2, 2)  # it halves seven times
    return IMAGE[:, :1] if name == "monai_vnet" else IMAGE


def owner(model: nn.Module) -> nn.Module:
    """The module that has the DCA as a child."""
    return model.decoder if hasattr(getattr(model, "decoder", None), "dca") else model


def outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Masks, of one or several resolutions."""
    masks = model(image)
    return {str(i): mask for i, mask in enumerate(masks if isinstance(masks, (list, tuple)) else [masks])}


# PyTorch 2.13 warns about its own code when it traces a module with an autograd function.
tracing = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# Exporters warn about their own code, and onnxscript about PyTorch's.
of_exporters = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


class Passing(nn.Module):
    """In the place of a DCA: returns the maps as they are, times a factor."""

    def __init__(self, features: list[int], factor: float) -> None:
        super().__init__()
        self.features, self.factor = features, factor

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        assert [x.shape[1] for x in maps] == self.features
        return tuple(self.factor * x for x in maps)


@each_network
def test_the_skips_go_through_the_dca(name: str) -> None:
    plain = build(name).eval()
    model = added(name, copy.deepcopy(plain))
    features = NETWORKS[name][2]
    assert owner(model).dca.features == features
    assert [key for key in model.state_dict() if "dca." not in key] == list(plain.state_dict())
    expected = outputs(plain, image(name))
    owner(model).dca = Passing(features, 1.0)
    assert_identical(outputs(model, image(name)), expected)
    owner(model).dca = Passing(features, 2.0)
    assert not torch.equal(outputs(model, image(name))["0"], expected["0"])


@each_network
def test_forward_and_backward(name: str) -> None:
    plain = build(name).train()
    model = added(name, copy.deepcopy(plain))
    shapes, in_vain = [], []
    for network in (plain, model):
        masks = outputs(network, image(name))
        sum(y.square().sum() for y in masks.values()).backward()
        shapes.append({i: y.shape for i, y in masks.items()})
        in_vain.append({n for n, p in network.named_parameters() if p.grad is None})
    assert shapes[0] == shapes[1]
    assert in_vain[0] == in_vain[1]  # parameters that the plain network does not use either
    assert all(p.grad.isfinite().all() for p in owner(model).dca.parameters())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides do not match:UserWarning")  # of a network, without a DCA as well
@each_network
def test_two_steps_of_ddp(name: str, one_process: None) -> None:
    """The second raises where a parameter had no gradient in the first, as some of the plain networks' have none."""
    model = added(name).train()
    sum(y.square().sum() for y in outputs(model, image(name)).values()).backward()
    for p in model.parameters():
        p.requires_grad_(p.grad is not None)
    assert all(p.requires_grad for p in owner(model).dca.parameters())
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        sum(y.square().sum() for y in outputs(parallel, image(name)).values()).backward()


@pytest.mark.parametrize("make, arguments", [(smp, ("PSPNet", "resnet18")), (smp, ("DeepLabV3", "resnet18"))])
def test_a_network_that_uses_no_skips_is_refused(make: Callable[..., nn.Module], arguments: tuple[str, ...]) -> None:
    model = make(*arguments)
    message = f"model: expected a {arguments[0]} whose forward shows its skips, got no map that meets what it leads to"
    with pytest.raises(ValueError, match=f"^{message}"):
        add_dca(model, patch=4, example=IMAGE)
    assert not any(isinstance(m, DCA) for m in model.modules())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_checkpoint_of_the_plain_network_loads(name: str) -> None:
    plain, model = build(name), added(name)
    randomise(plain, 7)
    checkpoint = plain.state_dict()
    model.load_state_dict(checkpoint)  # strict
    assert_identical({key: value for key, value in model.state_dict().items() if key in checkpoint}, checkpoint)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_copy_of_a_library_s_network_uses_its_own_dca(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = added(name).eval()
    expected = outputs(model, IMAGE)
    other = duplicate(model)
    owner(model).dca = Passing([0], 0.0)  # raises where it is called
    assert_identical(outputs(other, IMAGE), expected)


@tracing
@torch.no_grad()
# FlexibleUNet and BasicUNet break the graph without a DCA, too.
@pytest.mark.parametrize("name", ["smp_unet", "nnunet_plain", "monai_segresnet", "host_unet"])
def test_compiled_without_graph_breaks(name: str) -> None:
    model = added(name).double().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(outputs(compiled, IMAGE.double()), outputs(model, IMAGE.double()))


@tracing
@torch.no_grad()
@pytest.mark.parametrize("name", ["smp_unet", "monai_basic"])
def test_exported(name: str) -> None:
    model = added(name).double().eval()
    exported = torch.export.export(model, (IMAGE.double(),)).module()
    assert_same(outputs(exported, IMAGE.double()), outputs(model, IMAGE.double()))


def test_a_saved_network_loads_after_add_dca(tmp_path: Path) -> None:
    model = add_dca(build("smp_unet"), patch=4).eval()
    model.save_pretrained(tmp_path)
    weights = _library("safetensors.torch").load_file(tmp_path / "model.safetensors")
    other = add_dca(smp("Unet", "resnet18"), patch=4).eval()
    other.load_state_dict(weights)  # strict
    assert_identical(outputs(other, IMAGE), outputs(model, IMAGE))


@both_modes
def test_maps_with_the_metadata_of_monai(train: bool) -> None:
    meta_tensor = _library("monai.data").MetaTensor
    results = []
    for module in pair(Config(), train=train):
        maps = [meta_tensor(x, affine=(i + 2) * torch.eye(4)) for i, x in enumerate(random_maps(Config()))]
        refined = module([x.requires_grad_() for x in maps])
        assert [(type(y), y.affine[0, 0].item()) for y in refined] == [(meta_tensor, 2.0), (meta_tensor, 3.0)]
        sum(y.square().sum() for y in refined).backward()
        tensors = [y.as_tensor().detach() for y in refined] + [x.grad for x in maps]
        results.append({str(i): t.as_subclass(Tensor) for i, t in enumerate(tensors)})
    assert_same(*results)


# ONNX


def run_in_onnxruntime(model: nn.Module, file: Path, example: Any, shapes: Any, batches: list[list[Tensor]]) -> None:
    """Exports by `example`, and compares what onnxruntime makes of each batch with the model's own."""
    _library("onnxscript")
    torch.onnx.export(model, (example,), file, dynamo=True, dynamic_shapes=(shapes,), verbose=False)
    session = _library("onnxruntime").InferenceSession(file)
    for inputs in batches:
        found = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})
        with torch.no_grad():
            expected = model(inputs if isinstance(example, list) else inputs[0])
        for y, e in zip(found, expected if isinstance(expected, tuple) else [expected], strict=True):
            torch.testing.assert_close(torch.from_numpy(y), e, rtol=1e-5, atol=1e-5)


@of_exporters
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_onnx_with_a_dynamic_batch(backend: str, tmp_path: Path) -> None:
    module, theirs = pair(Config(), backend, torch.float32, train=False)
    batches = [random_maps(Config(batch=batch), torch.float32) for batch in (1, 2, 5)]
    run_in_onnxruntime(module, tmp_path / "dca.onnx", batches[1], [{0: Dim("batch")}] * 2, batches)
    for maps in batches:
        torch.testing.assert_close(module(maps), theirs(maps))


@of_exporters
def test_onnx_of_a_network(tmp_path: Path) -> None:
    model = add_dca(build("smp_unet"), patch=4).eval()
    batches = [[IMAGE[:1]], [IMAGE], [torch.cat([IMAGE, IMAGE[:1]])]]
    run_in_onnxruntime(model, tmp_path / "unet.onnx", IMAGE, {0: Dim("batch")}, batches)


# torchvision


class Encoded(nn.Module):
    """The smallest network with a DCA that can be traced symbolically."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.dca = DCA([8, 16], patch=4)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.dca([x, self.down(x)])
        return high + self.up(low)


def test_feature_extractor_of_torchvision() -> None:
    extraction = _library("torchvision.models.feature_extraction")
    network = Encoded().eval()
    extract = extraction.create_feature_extractor(network, {"down": "low", "dca.getitem": "high", "up": "up"})
    x = torch.randn(3, 8, 16, 16)
    features = extract(x)
    high, low = network.dca([x, network.down(x)])
    assert_identical(features, {"low": network.down(x), "high": high, "up": network.up(low)})


def test_three_dimensions_are_refused() -> None:
    model = _library("monai.networks.nets").FlexibleUNet(1, 2, "resnet10", spatial_dims=3)
    with pytest.raises(
        ValueError, match=r"^model: expected a network on images \(B, C, H, W\), got one with a Conv3d$"
    ):
        add_dca(model)


def test_snippet_of_the_readme() -> None:
    _library("segmentation_models_pytorch")
    names: dict[str, Any] = {}
    exec(snippet("smp.Unet"), names)
    assert names["model"](torch.randn(1, 3, 224, 224)).shape == (1, 2, 224, 224)
