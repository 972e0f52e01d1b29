import csv
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.fit import Batches, fit
from pantarhei.probes import (
    GaussNewton,
    Hessian,
    Objective,
    Residual,
    Sharpness,
    Watch,
    edge_of_stability,
    preconditioner,
    subset,
)

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long() + (X[:, 0] > 1).long()


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.GELU(),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def sgd(weights):
    return torch.optim.SGD(weights, lr=0.1, momentum=0.9)


def train(net, steps=40, **options):
    batches = Batches(X, Y, batch_size=16, seed=3)
    options = {"optimizer": sgd, "quiet": True, "device": "cpu", "seed": 1, **options}
    return fit(net, batches, cross_entropy, steps=steps, **options)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_sharpness_is_that_of_the_dense_matrices():
    net, batch = mlp().double(), (X.double(), Y)
    row = Sharpness(k=3, tol=1e-6)(net, cross_entropy, batch, optimizer=sgd(net.parameters()))
    values, vectors = torch.linalg.eigh(Hessian(net, cross_entropy, batch).dense())
    assert [row["sharpness"], row["sharpness_2"], row["sharpness_3"]] == pytest.approx(
        values.flip(0)[:3].tolist(), rel=1e-6
    )
    for part, kind in (("gauss_newton", GaussNewton), ("residual", Residual)):
        top = torch.linalg.eigvalsh(kind(net, cross_entropy, batch).dense())[-1].item()
        assert row[part] == pytest.approx(top, rel=1e-6)
    gradient = Objective(net, cross_entropy, batch).gradient()
    along = (vectors[:, -3:].T @ gradient).norm() / gradient.norm()
    assert row["alignment"] == pytest.approx(along.item(), rel=1e-3)
    assert row["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-9)
    assert row["loss"] == pytest.approx(cross_entropy(net.eval(), batch).item(), rel=1e-9)
    assert row["threshold"] == pytest.approx(38) and row["converged"] == 1
    assert row["distance"] == pytest.approx(1 - row["sharpness"] / 38)
    assert row["step_sharpness"] == row["sharpness"]


def test_sharpness_of_adam_is_preconditioned():
    net = mlp()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        cross_entropy(net, (X, Y)).backward()
        adam.step()
    row = Sharpness(parts=(), dtype=torch.float64)(net, cross_entropy, (X, Y), optimizer=adam)
    hessian = Hessian(net, cross_entropy, (X, Y), dtype=torch.float64)
    p = preconditioner(hessian.objective, adam)
    exact = torch.linalg.eigvalsh(hessian.dense() / (p[:, None] * p).sqrt())[-1].item()
    assert row["step_sharpness"] == pytest.approx(exact, rel=1e-3)
    assert row["threshold"] == pytest.approx(3800) and "gauss_newton" not in row
    assert row["distance"] == pytest.approx(1 - row["step_sharpness"] / 3800)


def test_scale_multiplies_eigenvalues_and_threshold_alike():
    net = mlp()
    plain, scaled = (
        Sharpness(scale=s, tol=1e-5)(net, cross_entropy, (X, Y), optimizer=sgd(net.parameters()))
        for s in (1.0, 64.0)
    )
    for column in ("sharpness", "gauss_newton", "residual", "threshold", "step_sharpness"):
        assert scaled[column] == pytest.approx(64 * plain[column], rel=1e-4)
    assert scaled["distance"] == pytest.approx(plain["distance"], rel=1e-4)


def test_a_row_costs_no_more_than_its_bound_and_says_when_it_was_reached():
    net = mlp()
    row = Sharpness(max_products=3, tol=1e-9)(net, cross_entropy, (X, Y))
    assert row["products"] == 9 and row["converged"] == 0
    exact = torch.linalg.eigvalsh(Hessian(net, cross_entropy, (X, Y)).dense())[-1].item()
    assert row["sharpness"] <= exact * (1 + 1e-5)


@pytest.mark.parametrize("make", [mlp, convnet])
def test_attached_to_fit_it_records_and_does_not_disturb(make):
    watch = Watch(cross_entropy, (X, Y), every=10)
    watched = train(make(), on_step=watch)
    alone = train(make())
    for a, b in zip(
        watched.model.state_dict().values(), alone.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert watched.history == alone.history
    assert [row["step"] for row in watch.rows] == [10, 20, 30, 40]
    direct = Sharpness()(watched.model, cross_entropy, (X, Y))
    for column in ("loss", "sharpness", "gauss_newton"):
        assert watch.rows[-1][column] == pytest.approx(direct[column], rel=3e-3)
    assert all(row["threshold"] == pytest.approx(38) for row in watch.rows)
    steps, values = watch.series("sharpness")
    assert edge_of_stability(steps, values, watch.series("threshold")[1]).reached is None


def test_a_careless_probe_does_not_disturb_the_training_either():
    def careless(model, loss, batch):
        torch.manual_seed(5)
        model.eval()
        return {"noise": torch.randn(()), "training": float(model.training)}

    watched = train(mlp(), on_step=Watch(cross_entropy, (X, Y), every=3, probes=[careless]))
    assert watched.history == train(mlp()).history


def test_compiled_training_is_watched():
    watch = Watch(cross_entropy, (X, Y), every=2, probes=[Sharpness(parts=())])
    train(torch.compile(mlp(), backend="aot_eager"), steps=4, on_step=watch)
    plain = Watch(cross_entropy, (X, Y), every=2, probes=[Sharpness(parts=())])
    train(mlp(), steps=4, on_step=plain)
    assert [row["sharpness"] for row in watch.rows] == pytest.approx(
        [row["sharpness"] for row in plain.rows], rel=1e-3
    )


@pytest.mark.parametrize(("killed", "checkpoint_every"), [(27, 10), (10, 10), (3, 10), (36, 7)])
def test_a_killed_and_resumed_training_has_the_rows_of_an_uninterrupted_one(
    tmp_path, killed, checkpoint_every
):
    def watched(path, **options):
        net = mlp()
        watch = Watch(
            cross_entropy, (X, Y), every=5, path=path, probes=[Sharpness(parts=()), Distance()]
        )
        watch.record(net, 0)
        train(net, on_step=options.pop("wrap", lambda w: w)(watch), **options)
        return watch

    expected = watched(tmp_path / "whole.csv").rows
    assert [row["step"] for row in expected] == list(range(0, 41, 5))

    class Killed(Exception):
        pass

    def dying(watch):
        def on_step(step):
            watch(step)
            if step.number == killed:
                raise Killed

        return on_step

    options = {"checkpoint": tmp_path / "fit", "checkpoint_every": checkpoint_every}
    with pytest.raises(Killed):
        watched(tmp_path / "rows.csv", wrap=dying, **options)
    resumed = watched(tmp_path / "rows.csv", **options).rows
    assert [row["step"] for row in resumed] == list(range(0, 41, 5))
    for row, want in zip(resumed, expected, strict=True):
        for column in ("loss", "sharpness", "moved"):
            assert row[column] == pytest.approx(want[column], rel=3e-3, abs=1e-6)
    text = table(tmp_path / "rows.csv")
    assert [int(row["step"]) for row in text] == list(range(0, 41, 5))
    assert float(text[-1]["moved"]) == resumed[-1]["moved"] > 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")) == []

    again = watched(tmp_path / "rows.csv", **options).rows  # finished: nothing is lost either
    assert [row["step"] for row in again] == list(range(0, 41, 5))


class Distance:
    """A probe of the user's that has to remember where the training began."""

    def __init__(self):
        self.start = None

    def __call__(self, model, loss, batch):
        here = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        if self.start is None:
            self.start = here
        return {"moved": (here - self.start).norm()}

    def state_dict(self):
        return {"start": self.start}

    def load_state_dict(self, state):
        self.start = state["start"]


def test_the_users_own_probes_and_schedule():
    def accuracy(model, loss, batch):
        model.eval()
        return {"right": (model(batch[0]).argmax(1) == batch[1]).float().mean()}

    def rate(model, loss, batch, optimizer=None):
        return {"lr": optimizer.param_groups[0]["lr"]}

    watch = Watch(
        cross_entropy,
        every=lambda step: step in (1, 2, 4, 8),
        probes={"a": accuracy, "b": rate},
    )
    train(mlp(), steps=10, on_step=watch)  # on the batches of the training themselves
    assert [row["step"] for row in watch.rows] == [1, 2, 4, 8]
    assert watch.rows[0].keys() == {"step", "a_right", "b_lr"}
    assert all(0 <= row["a_right"] <= 1 and row["b_lr"] == 0.1 for row in watch.rows)


def test_recording_by_hand_replaces_a_row_of_the_same_step(tmp_path):
    net, count = mlp(), iter(range(10))
    watch = Watch(
        cross_entropy, (X, Y), path=tmp_path / "a.csv", probes=[lambda m, c, b: {"n": next(count)}]
    )
    for step in (0, 5, 0):
        watch.record(net, step)
    assert watch.rows == [{"step": 0, "n": 2}, {"step": 5, "n": 1}]
    assert Watch(cross_entropy, path=tmp_path / "a.csv").rows == watch.rows


def test_a_subset_of_the_examples():
    x, y = subset((X, Y), 10, seed=2)
    where = [torch.nonzero((row == X).all(1)).item() for row in x]
    assert len(set(where)) == 10 and torch.equal(Y[where], y)
    assert torch.equal(subset({"x": X}, 10, seed=2)["x"], x)
    with pytest.raises(RequestError, match="rows=65"):
        subset((X, Y), 65)


def test_bad_requests_are_one_sentence(tmp_path):
    net = mlp()

    def watch(*probes, **options):
        return Watch(cross_entropy, (X, Y), probes=probes, **options)

    with pytest.raises(RequestError, match="every=0"):
        watch(every=0)
    with pytest.raises(RequestError, match="not callable"):
        watch(3)
    with pytest.raises(RequestError, match="two probes report 'a'"):
        watch(lambda m, c, b: {"a": 1}, lambda m, c, b: {"a": 2}).record(net, 0)
    with pytest.raises(RequestError, match="returned str as 'a'"):
        watch(lambda m, c, b: {"a": "one"}).record(net, 0)
    with pytest.raises(RequestError, match="return a dict"):
        watch(lambda m, c, b: 1.0).record(net, 0)
    with pytest.raises(RequestError, match="no row has 'b': choose one of none yet"):
        watch().series("b")
    with pytest.raises(RequestError, match="names 'hessian'"):
        Sharpness(parts=("hessian",))
    with pytest.raises(RequestError, match="the loss is nan"):
        Sharpness()(net, cross_entropy, (X * float("nan"), Y))
    with pytest.raises(RequestError, match="at least one batch"):
        Watch(cross_entropy).record(net, 0)
    other = tmp_path / "other.csv"
    for text in ("name,age\nann,3\n", "step\nx\n", "\xff\xfe\0", "step,a\n1,2,3\n"):
        other.write_bytes(text.encode("latin-1"))
        with pytest.raises(RequestError, match="not a table of probes"):
            watch(path=other)
    kept = tmp_path / "rows.csv"
    Watch(cross_entropy, (X, Y), probes=[Distance()], path=kept).record(net, 0)
    os.truncate(kept.with_suffix(".safetensors"), 20)
    with pytest.raises(RequestError, match="not readable"):
        Watch(cross_entropy, (X, Y), probes=[Distance()], path=kept).record(net, 1)
