import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.probes import (
    Hessian,
    Preconditioned,
    edge_of_stability,
    lanczos,
    preconditioner,
    step_curvature,
    threshold,
)

HUGE = 1e60  # epsilon so large that an adaptive optimizer is a linear one with rate lr / epsilon


def sgd(weights, lr, **options):
    return torch.optim.SGD(weights, lr=lr, **options)


def adaptive(kind, **options):
    return lambda weights, lr: kind(weights, lr=lr * HUGE, eps=HUGE, **options)


@pytest.mark.parametrize(
    "make",
    [
        sgd,
        lambda w, lr: sgd(w, lr, momentum=0.9),
        lambda w, lr: sgd(w, lr, momentum=0.5, dampening=0.3),
        lambda w, lr: sgd(w, lr, momentum=0.8, nesterov=True),
        adaptive(torch.optim.Adam),
        adaptive(torch.optim.AdamW, betas=(0.6, 0.999), weight_decay=0.0),
        adaptive(torch.optim.RMSprop),
        adaptive(torch.optim.RMSprop, momentum=0.7),
        adaptive(torch.optim.Adagrad),
        adaptive(torch.optim.NAdam, momentum_decay=1.0),
        adaptive(torch.optim.Adamax),
    ],
)
@pytest.mark.parametrize(("factor", "stable"), [(0.98, True), (1.02, False)])
def test_the_optimizer_itself_diverges_just_past_its_threshold(make, factor, stable):
    curvature = 3.0
    theta = nn.Parameter(torch.ones((), dtype=torch.float64))
    scale = HUGE if make(nn.ParameterList([theta]), 1.0).param_groups[0]["lr"] == HUGE else 1.0
    limit = threshold(make([theta], 1.0)) * scale  # threshold in units of 1 / rate
    optimizer = make([theta], factor * limit / curvature)
    size = []
    for _ in range(500):
        optimizer.zero_grad()
        (0.5 * curvature * theta**2).backward()
        optimizer.step()
        size.append(abs(theta.item()))
    assert (max(size[-100:]) < max(size[200:300])) == stable  # the first steps are transient


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def setting():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, (torch.randn(20, 4).double(), torch.randint(3, (20,)))


def step(net, batch, optimizer):
    optimizer.zero_grad()
    cross_entropy(net, batch).backward()
    optimizer.step()


def test_the_matrix_of_an_optimizer_is_that_of_its_linearised_step():
    """A step from theta + d differs from a step from theta by (1 - eta D H) d, momentum apart."""
    net, batch = setting()
    groups = [{"params": net[0].parameters(), "lr": 0.4}, {"params": net[2].parameters()}]
    hessian = Hessian(net, cross_entropy, batch)
    matrix, limit = step_curvature(hessian, torch.optim.SGD(groups, lr=0.1))
    assert limit == pytest.approx(2 / 0.4)
    rates = torch.tensor([0.4] * 30 + [0.1] * 21, dtype=torch.float64)
    jacobian = torch.eye(51).double() - rates[:, None] * hessian.dense()
    largest = (1 - torch.linalg.eigvals(jacobian).real).max()
    assert lanczos(matrix, tol=1e-8).top * 0.4 == pytest.approx(largest.item(), rel=1e-8)

    single, limit = step_curvature(hessian, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    assert single is hessian and limit == pytest.approx(38)


def test_adam_is_measured_by_its_preconditioned_hessian():
    net, batch = setting()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(5):
        step(net, batch, adam)
    hessian = Hessian(net, cross_entropy, batch)
    matrix, limit = step_curvature(hessian, adam)
    assert isinstance(matrix, Preconditioned) and limit == pytest.approx(3800)
    p = preconditioner(hessian.objective, adam)
    exact = torch.linalg.eigvalsh(hessian.dense() / (p[:, None] * p).sqrt())[-1].item()
    assert lanczos(matrix, tol=1e-8).top == pytest.approx(exact, rel=1e-8)


def test_the_edge_of_a_series():
    steps = list(range(0, 100, 10))
    values = [5, 9, 12, 18.5, 21, 19.5, 23, 20, 20.4, 19.8]
    found = edge_of_stability(steps, values, 20.0)
    assert found.reached == 30 and found.inside == pytest.approx(6 / 7)
    assert found.stretch == (30, 50) and found.stayed == 20
    assert found.ratio == pytest.approx(sum(values[3:]) / 7 / 20)
    assert edge_of_stability(steps, values, 20.0, tolerance=0.2).stayed == 60
    never = edge_of_stability(steps, values, 40.0)
    assert never.reached is None and never.stayed == 0 and math.isnan(never.ratio)
    past = edge_of_stability([0, 1], [30.0, 40.0], 20.0)
    assert past.reached == 0 and past.inside == 0 and past.stretch is None


def test_a_schedule_moves_the_threshold_and_missing_records_are_left_out():
    found = edge_of_stability([1, 2, 3, 4], [2.0, math.nan, 8.0, 16.0], [4.0, 4.0, 8.0, 16.0])
    assert found.reached == 3 and found.stretch == (3, 4) and found.inside == 1


def test_gradient_descent_on_a_network_reaches_the_edge_and_stays():
    """Full-batch GD with MSE: progressive sharpening to 2 / lr, then a plateau."""
    torch.manual_seed(1)
    x = torch.linspace(-1, 1, 20)[:, None]
    batch = (x, torch.sin(3 * x))
    net = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1))
    sgd_ = torch.optim.SGD(net.parameters(), lr=0.1)

    def loss(model, b):
        return F.mse_loss(model(b[0]), b[1])

    steps, values, last = [], [], None
    for n in range(3000):
        sgd_.zero_grad()
        loss(net, batch).backward()
        sgd_.step()
        if n % 50 == 0:
            last = lanczos(Hessian(net, loss, batch), start=last)
            steps.append(n)
            values.append(last.top)
    found = edge_of_stability(steps, values, threshold(sgd_))
    assert values[0] < 0.9 * threshold(sgd_)
    assert found.reached is not None and 0 < found.reached < 2500
    assert found.inside > 0.9 and found.stayed >= 100


def test_bad_requests_are_one_sentence():
    weights = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(RequestError, match="Rprop is not known here"):
        threshold(torch.optim.Rprop(weights))
    with pytest.raises(RequestError, match="the learning rate is 0"):
        threshold(torch.optim.SGD(weights, lr=0.0))
    with pytest.raises(RequestError, match="differ in their momentum"):
        groups = [{"params": weights, "momentum": 0.5}, {"params": [nn.Parameter(torch.ones(1))]}]
        threshold(torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(RequestError, match="maximises"):
        threshold(torch.optim.SGD(weights, lr=0.1, maximize=True))
    with pytest.raises(RequestError, match="one number for each record"):
        edge_of_stability([1, 2], [1.0], 2.0)
    with pytest.raises(RequestError, match="do not rise"):
        edge_of_stability([2, 1], [1.0, 1.0], 2.0)
    with pytest.raises(RequestError, match="tolerance=0"):
        edge_of_stability([1], [1.0], 2.0, tolerance=0)
