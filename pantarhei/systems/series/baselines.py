"""What a forecast has to beat: the present value, a linear model, a recurrent network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pantarhei.bayes import GaussianHead, Predictive
from pantarhei.bayes.gaussian import Gaussian
from pantarhei.data.series import Layout, Windows
from pantarhei.errors import RequestError
from pantarhei.systems.series.encoder import Encoder
from pantarhei.systems.series.forecaster import Network


def persistence(train: Windows, test: Windows, leads: Sequence[int]) -> Predictive:
    """Forecast that the targets stay as they are; (1, N, leads, G).

    The variance at each lead is the mean square of what this misses in the training runs.
    """
    at = torch.tensor(list(leads)) - 1
    _, _, target = train.tensors()
    variance = ((target[:, at] - train.present[:, None]) ** 2).mean(0)
    means = test.present[None, :, None].expand(1, len(test), len(at), -1)
    return Predictive(means, variance.clamp(min=1e-12).expand_as(means[0])[None])


def linear(
    layout: Layout,
    train: Windows,
    test: Windows,
    leads: Sequence[int],
    groups: Sequence[str] | None = None,
) -> Predictive:
    """Forecast by ridge regression on the networks' own inputs; (1, N, leads, G).

    With the history of the targets and the planned controls among them this is a linear
    autoregression with exogenous inputs, one for each lead. The strength of the ridge is the one of
    15 with the smallest leave-one-out error in training; the variance at each lead is that of the
    residuals there, for which the degrees of freedom are counted.
    """
    from sklearn.linear_model import RidgeCV

    encoder = Encoder.of(layout, train, groups)
    at = torch.tensor(list(leads)) - 1
    past, future, target = train.tensors()
    x, y = encoder(past, future).double(), target[:, at].flatten(1).double()
    model = RidgeCV(alphas=torch.logspace(-3, 4, 15).tolist()).fit(x.numpy(), y.numpy())
    fitted = torch.from_numpy(model.predict(x.numpy())).view_as(y)
    eigen = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).clamp(min=0)
    freedom = 1 + float((eigen / (eigen + float(model.alpha_))).sum())
    variance = ((y - fitted) ** 2).sum(0) / max(len(y) - freedom, 1.0)
    inside = encoder(*test.tensors()[:2]).double()
    found = torch.from_numpy(model.predict(inside.numpy())).view(len(inside), -1)
    means = found.view(1, len(inside), len(at), -1).float()
    spread = variance.clamp(min=1e-12).view(len(at), -1).float()
    return Predictive(means, spread.expand_as(means[0])[None])


def recurrent(
    layout: Layout, history: int, groups: Sequence[str] | None = None, hidden: int = 32
) -> Network:
    """Return a network for ``train_forecaster(..., all_lags=True)``: a GRU over the past frames.

    Its last state and the planned controls go to a mean-variance head.
    """
    columns = sum(len(c) for name, c in layout.groups.items() if groups is None or name in groups)
    if not columns:
        raise RequestError("A recurrent network needs a sensor whose past it reads.")
    return lambda inputs, outputs: _Recurrent(history, columns, inputs, outputs, hidden)


class _Recurrent(nn.Module):
    def __init__(self, history: int, columns: int, inputs: int, outputs: int, hidden: int):
        super().__init__()
        self.shape = (history, columns)
        rest = inputs - history * columns
        self.gru = nn.GRU(columns, hidden, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(hidden + rest, hidden), nn.Tanh(), GaussianHead(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Gaussian:
        cut = self.shape[0] * self.shape[1]
        state = self.gru(x[:, :cut].reshape(-1, *self.shape))[0][:, -1]
        told: Gaussian = self.head(torch.cat([state, x[:, cut:]], 1))
        return told
