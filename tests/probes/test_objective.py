import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.probes import Objective


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]), {"examples": float(len(batch[1]))}


class NormDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten()
        )
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.head(self.layers(x))


def convnet():
    torch.manual_seed(0)
    return NormDropout(), (torch.randn(8, 1, 6, 6), torch.randint(3, (8,)))


def test_gradient_is_that_of_backward_and_several_batches_are_averaged():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    batches = [(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(3)]
    objective = Objective(net, mse, *batches)
    total = sum(mse(net, batch) for batch in batches) / 3
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(net.parameters()))])
    torch.testing.assert_close(objective.gradient(), expected, rtol=1e-12, atol=1e-14)
    assert objective.value() == pytest.approx(total.item(), rel=1e-12)


def test_flatten_and_unflatten_are_inverse_and_in_the_order_of_the_parameters():
    net, batch = convnet()
    objective = Objective(net, cross_entropy, batch)
    assert objective.names == tuple(dict(net.named_parameters()))
    vector = torch.randn(objective.size)
    assert torch.equal(objective.flatten(objective.unflatten(vector)), vector)
    assert torch.equal(objective.vector(), nn.utils.parameters_to_vector(net.parameters()))
    with pytest.raises(RequestError, match="does not fit"):
        objective.unflatten(vector[1:])


@pytest.mark.parametrize("train", [False, True])
def test_nothing_of_the_model_changes(train):
    net, batch = convnet()
    net.train()
    net.layers[1].eval()  # a frozen norm stays frozen afterwards
    mse_state = {n: t.clone() for n, t in net.state_dict().items()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    objective = Objective(net, cross_entropy, batch, train=train)
    objective.gradient(), objective.value()
    objective.split(batch)[0](objective.params)
    assert all(torch.equal(t, mse_state[n]) for n, t in net.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert net.training and not net.layers[1].training and net.layers[3].training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_evaluation_mode_unless_told_otherwise():
    net, batch = convnet()
    net.train()
    with torch.no_grad():
        expected = cross_entropy(net.eval(), batch)[0].item()
    net.train()
    assert Objective(net, cross_entropy, batch).value() == pytest.approx(expected, rel=1e-6)
    dropped = Objective(net, cross_entropy, batch, train=True)
    assert dropped.value() != pytest.approx(expected, rel=1e-3)
    assert dropped.value() == dropped.value()  # the same dropout at every call


def test_stays_where_it_was_made():
    net, batch = convnet()
    objective = Objective(net, cross_entropy, batch)
    before = objective.value()
    with torch.no_grad():
        for tensor in (*net.parameters(), net.layers[1].running_mean):
            tensor.add_(0.1)
    assert objective.value() == before


def test_double_precision_when_asked_leaves_the_model_single():
    net, batch = convnet()
    double = Objective(net, cross_entropy, batch, dtype=torch.float64)
    assert double.dtype == double.gradient().dtype == torch.float64
    assert all(p.dtype == torch.float32 for p in net.parameters())
    single = Objective(net, cross_entropy, batch).gradient()
    torch.testing.assert_close(double.gradient().float(), single, rtol=1e-4, atol=1e-6)
    assert not torch.equal(double.gradient().float(), single)
    assert Objective(net.bfloat16(), cross_entropy, batch).dtype == torch.float32


def test_some_parameters_only():
    net, batch = convnet()
    whole = Objective(net, cross_entropy, batch)
    head = Objective(net, cross_entropy, batch, parameters=lambda name, p: name.startswith("head"))
    assert head.names == ("head.weight", "head.bias")
    torch.testing.assert_close(head.gradient(), whole.gradient()[-head.size :])
    net.head.requires_grad_(False)
    assert Objective(net, cross_entropy, batch).size == whole.size - head.size


def test_split_composes_to_the_loss_and_its_gradient():
    net, batch = convnet()
    objective = Objective(net, cross_entropy, batch, dtype=torch.float64)
    outputs, criterion = objective.split(objective.batches[0])
    leaves = objective.leaves()
    value = criterion(outputs(leaves))
    assert outputs(leaves).shape == (8, 3)
    assert value.item() == pytest.approx(objective.value(), rel=1e-12)
    gradient = objective.join(torch.autograd.grad(value, list(leaves.values())))
    torch.testing.assert_close(gradient, objective.gradient(), rtol=1e-12, atol=1e-15)


def test_split_goes_through_torch_func():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    batch = (torch.randn(4, 2), torch.randn(4, 2))
    objective = Objective(net, mse, batch)
    outputs, _ = objective.split(batch)
    jacobian = torch.func.jacrev(outputs)(objective.params)
    assert jacobian["0.weight"].shape == (4, 2, 3, 2)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(2, 3), nn.Linear(2, 1), nn.Linear(2, 2)

    def forward(self, x, *, scale=1.0):
        return {"a": self.a(x) * scale, "both": [self.b(x), self.unused(x)], "name": "two"}


def test_split_of_a_structured_output_takes_what_the_loss_uses():
    net, x = TwoHeads(), torch.randn(5, 2)

    def loss(model, batch):
        out = model(batch, scale=2.0)
        return out["a"].square().mean() + (out["a"].sum(1) * out["both"][0][:, 0]).mean()

    objective = Objective(net, loss, x, dtype=torch.float64)
    outputs, criterion = objective.split(objective.batches[0])
    assert outputs(objective.params).shape == (5 * 3 + 5,)
    value = criterion(outputs(objective.params))
    assert value.item() == pytest.approx(objective.value(), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda m, b: m(b).sum() + m(b).square().sum(), "calls the model 2 times"),
        (lambda m, b: m.weight.sum() + 0 * b.sum(), "calls the model 0 times"),
        (lambda m, b: m(b).detach().sum(), "does not depend on the model's output"),
    ],
)
def test_split_refuses_what_it_cannot_take_apart(loss, said):
    net, x = nn.Linear(2, 2), torch.randn(3, 2)
    with pytest.raises(RequestError, match=said):
        Objective(net, loss, x).split(x)


def test_split_refuses_a_model_that_computes_its_loss():
    class Own(nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).square().mean()}

    x = torch.randn(3, 2)
    with pytest.raises(RequestError, match="returns its loss itself"):
        Objective(Own(2, 2), lambda m, b: m(b)["loss"], x).split(x)


def test_compiled_models_are_measured_without_their_compiled_code():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    batch = (torch.randn(6, 3), torch.randn(6, 1))
    expected = Objective(net, mse, batch).gradient()
    compiled = torch.compile(net, backend="aot_eager")
    compiled(batch[0])
    assert Objective(compiled, mse, batch).names == Objective(net, mse, batch).names
    assert torch.equal(Objective(compiled, mse, batch).gradient(), expected)


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        inside = nn.Linear(2, 1)
        cpu = torch.device("cpu")
        outside = FullyShardedDataParallel(inside, use_orig_params=True, device_id=cpu)
        for net in (fully_shard(nn.Linear(2, 1)), inside, outside):
            with pytest.raises(RequestError, match="sharded"):
                Objective(net, mse, (torch.randn(3, 2), torch.randn(3, 1)))
        parallel = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        assert Objective(parallel, mse, (torch.randn(3, 2), torch.randn(3, 1))).size == 3
    finally:
        torch.distributed.destroy_process_group()


def test_bad_requests_are_one_sentence():
    net, x = nn.Linear(2, 1), torch.randn(3, 2)
    with pytest.raises(RequestError, match="at least one batch"):
        Objective(net, mse)
    with pytest.raises(RequestError, match="no trainable parameter"):
        Objective(net, mse, x, parameters=lambda name, p: False)
    with pytest.raises(RequestError, match="scalar"):
        Objective(net, lambda m, b: m(b), x).value()
    with pytest.raises(RequestError, match="the loss is nan"):
        Objective(net, lambda m, b: m(b).sum() * float("nan"), x).value()
    with pytest.raises(RequestError, match="the loss is inf"):
        Objective(net, lambda m, b: m(b).sum() + float("inf"), x).gradient()
