"""Static networks that RBQE is compared with: DnCNN, DCAD, and its own net with a single exit.

All predict a residual: ``y = x + f(x)``, images (B, 1, H, W) in [0, 1], any size.
"""

from __future__ import annotations

from torch import Tensor, nn

from pantarhei.compute.enhancement.nested_unet import NestedUNet


class DnCNN(nn.Module):
    """The plain residual network of Zhang, Zuo, Chen, Meng and Zhang (IEEE TIP 26(7), 2017).

    ``depth`` 3x3 convolutions of ``width`` channels: the first with ReLU, the middle ones with
    batch normalisation (``norm``) and ReLU, the last bare. The blind model has depth 20. Weights
    start by He's rule, those of the last layer at zero: like :class:`NestedUNet`, a new network
    returns its input, and neither has a head start.

    >>> net = DnCNN()
    >>> sum(p.numel() for p in net.parameters()), round(net.macs(512, 512) / 1e9)
    (667073, 174)
    """

    def __init__(self, depth: int = 20, width: int = 64, norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(width)] if norm else []
            layers.append(nn.ReLU(inplace=True))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        last = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.body = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """Return the enhanced picture, not clamped."""
        enhanced: Tensor = x + self.body(x)
        return enhanced

    def macs(self, height: int, width: int) -> int:
        """Return the multiply-accumulates of one image."""
        convolutions = [layer for layer in self.body if isinstance(layer, nn.Conv2d)]
        return height * width * sum(layer.weight.numel() for layer in convolutions)


class DCAD(DnCNN):
    """The decoder-side network of Wang, Chen and Chao (DCC 2017): 10 layers, no normalisation.

    >>> sum(p.numel() for p in DCAD().parameters())
    296641
    """

    def __init__(self, depth: int = 10, width: int = 64) -> None:
        super().__init__(depth, width, norm=False)


class SingleExit(nn.Module):
    """A :class:`NestedUNet` of which only ``exit`` (default: the last) is computed and trained.

    The heads of the other exits are taken out of ``net``.

    >>> import torch
    >>> net = SingleExit(NestedUNet(levels=4, width=8))
    >>> net(torch.rand(1, 1, 16, 16)).shape
    torch.Size([1, 1, 16, 16])
    """

    def __init__(self, net: NestedUNet, exit: int | None = None) -> None:
        super().__init__()
        self.net, self.exit = net, net.exits if exit is None else exit
        for k in range(net.exits):
            if k != self.exit - 1:
                net.heads[k] = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the enhanced picture, not clamped."""
        return self.net(x, exit=self.exit)

    def macs(self, height: int, width: int) -> int:
        """Return the multiply-accumulates of one image."""
        return self.net.macs(height, width, self.exit)
