"""Gaussian priors over the weights of a network: where anchored members start and are held."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pantarhei.bayes.gaussian import GaussianHead
from pantarhei.errors import RequestError


@dataclass(frozen=True)
class Prior:
    """Independent Gaussians over the weights: ``sd`` and ``mean`` by the parameter's name.

    A parameter that ``mean`` does not name has the mean 0. Frozen parameters need no prior.
    """

    sd: Mapping[str, float]
    mean: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def fan_in(
        cls,
        model: nn.Module,
        *,
        first: float = 3.0**0.5,
        hidden: float = 1.3,
        last: float = 1.0,
        noise: float = 0.5,
        noise_level: float = 1.0,
    ) -> Prior:
        r"""Return the prior that keeps signals of order one: sd = gain / sqrt(inputs of a unit).

        ``first``, ``hidden`` and ``last`` are the gains of the first weight, of those between and
        of the last one (the fact sheet of arXiv 2107.06396, after the authors' public code: g = 3
        in the first layer, 1.26 to 1.4, 0.7 to 1.26); ``noise`` is that of the layer of a
        :class:`GaussianHead` that gives the log variance, and ``noise_level`` the sd of its bias:
        a narrow one would hold the noise at the variance of the targets. Other biases have the sd
        of their layer.
        Parameters of layers without a weight matrix (norms) keep their value as mean, sd 0.1.

        >>> prior = Prior.fan_in(nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1)))
        >>> prior.sd
        {'0.weight': 0.5, '0.bias': 0.5, '2.weight': 0.5, '2.bias': 0.5}
        """
        sd: dict[str, float] = {}
        mean: dict[str, float] = {}
        spread = {id(m.log_variance) for m in model.modules() if isinstance(m, GaussianHead)}
        layers = [
            (name, module, [p for p in module.parameters(recurse=False) if p.dim() > 1])
            for name, module in model.named_modules()
        ]
        weighty = [module for _, module, weights in layers if weights and id(module) not in spread]
        for name, module, weights in layers:
            prefix = f"{name}." if name else ""
            gain = hidden
            if id(module) in spread:
                gain = noise
            elif weighty and module is weighty[-1]:
                gain = last
            elif weighty and module is weighty[0]:
                gain = first
            for own, p in module.named_parameters(recurse=False):
                if not p.requires_grad:
                    continue
                inputs = (p if p.dim() > 1 else weights[0])[0].numel() if weights else 0
                sd[prefix + own] = gain / math.sqrt(inputs) if inputs else 0.1
                if id(module) in spread and p.dim() == 1:
                    sd[prefix + own] = noise_level
                if not inputs:
                    mean[prefix + own] = float(p.detach().mean())
        return cls(sd, mean)

    def draw(self, model: nn.Module, members: int, seed: int = 0) -> list[nn.Module]:
        """Return ``members`` copies of a model with weights of the prior."""
        self.check(model)
        drawn = []
        generator = torch.Generator().manual_seed(seed)
        for _ in range(members):
            one = copy.deepcopy(model)
            with torch.no_grad():
                for name, p in one.named_parameters():
                    if p.requires_grad:
                        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                        p.copy_(self.mean.get(name, 0.0) + self.sd[name] * noise)
            drawn.append(one)
        return drawn

    def distance(self, weights: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> Tensor:
        r"""Return :math:`\sum_k (\theta_k - \theta_{anc,k})^2 / sd_k^2` for each member, (M,)."""
        parts = [
            (((w - anchors[name]) / self.sd[name]) ** 2).flatten(1).sum(1)
            for name, w in weights.items()
        ]
        return torch.stack(parts).sum(0)

    def check(self, model: nn.Module) -> None:
        """Refuse a model with a parameter that this prior does not know."""
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        if missing := names - set(self.sd):
            raise RequestError(f"The prior has no sd for parameter '{min(missing)}': add it.")
        if bad := [name for name in names if not self.sd[name] > 0]:
            raise RequestError(f"The prior's sd of '{bad[0]}' is {self.sd[bad[0]]}: above 0 only.")
