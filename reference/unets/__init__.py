"""The six networks of the DCA paper in plain PyTorch, each without DCA, with the reference's or with any other.

Every host is `Host(in_channels=3, out_channels=1, dca=False, patch=28)`, and gives logits of the image's height and
width. `dca` is False for the network without attention, True for `reference.DCA`, or a factory, which is called as DCA
is, `factory(features, strides, patch)`; so a fused module can be given without being imported here. `patch` is the side
of the token grid, or (P_h, P_w): the paper's is the image's side over 8, 28 at 224 x 224 (ResUNetPP: over 4, 56). With
DCA the skip maps are taken before the last norm and activation of their level, since DCA ends with its own.

Source: section 4 of the paper, and the authors' MIT-licensed networks, whose layers and parameter counts these have;
`load_official` loads their checkpoints.
"""

from reference.unets.doubleunet import DoubleUNet
from reference.unets.multiresunet import MultiResUNet
from reference.unets.official import load_official
from reference.unets.r2unet import R2UNet
from reference.unets.resunetpp import ResUNetPP
from reference.unets.unet import UNet
from reference.unets.vnet import VNet

__all__ = ["HOSTS", "DoubleUNet", "MultiResUNet", "R2UNet", "ResUNetPP", "UNet", "VNet", "load_official"]

HOSTS = ("UNet", "VNet", "R2UNet", "ResUNetPP", "DoubleUNet", "MultiResUNet")  # their names
