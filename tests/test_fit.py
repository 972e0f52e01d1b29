from __future__ import annotations

import copy
import csv
import importlib.util
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from pantarhei.errors import RequestError
from pantarhei.fit import Batches, Fit, Step, fit

HERE = Path(__file__).parent
SCRIPT = HERE / "_fit_train.py"
_spec = importlib.util.spec_from_file_location("_fit_train", SCRIPT)
assert _spec and _spec.loader
trainings = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trainings)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def line(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, n)[:, None]
    return x, 3 * x + 1


def squares(model: nn.Module, batch: tuple) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def run(model: nn.Module, **options) -> Fit:
    defaults = {"steps": 20, "lr": 0.05, "log_every": 1, "quiet": True, "device": "cpu"}
    batches = options.pop("batches", Batches(*line(), batch_size=16))
    loss = options.pop("loss", squares)
    return fit(model, batches, loss, **{**defaults, **options})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a: nn.Module | dict, b: nn.Module | dict) -> bool:
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}


# --- the update -------------------------------------------------------------------------------


def test_the_same_as_the_loop_written_by_hand():
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    model = nn.Linear(3, 2)
    by_hand = copy.deepcopy(model)
    make = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)  # noqa: E731
    batches = Batches(x, y, batch_size=8, seed=5)
    result = run(
        model, batches=batches, optimizer=make, lr=None, schedule="cosine", warmup=3,
        accumulate=2, clip=0.3, steps=9,
    )  # fmt: skip

    optimizer = make(by_hand.parameters())
    losses = []
    for step in range(9):
        factor = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 6))
        optimizer.param_groups[0]["lr"] = 0.1 * factor
        optimizer.zero_grad()
        parts = [squares(by_hand, batches(2 * step + i)) for i in range(2)]
        for part in parts:
            (part / 2).backward()
        norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 0.3)
        optimizer.step()
        losses.append((sum(p.item() for p in parts) / 2, norm.item(), 0.1 * factor))
    assert same(model, by_hand)
    rows = [(r["loss"], r["gradient_norm"], r["lr"]) for r in result.history]
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(losses))
    assert (result.model, result.step, result.stopped) == (model, 9, "steps")
    assert not model.training


def test_a_callable_schedule_sees_the_fraction_done_after_the_warm_up():
    seen = []
    result = run(nn.Linear(1, 1), steps=6, warmup=2, schedule=lambda f: seen.append(f) or 1 - f)
    assert seen == [0.0, 0.25, 0.5, 0.75]
    rates = [row["lr"] / 0.05 for row in result.history]
    assert rates == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


def test_lr_and_weight_decay_are_set_in_every_group():
    kept: list[Step] = []
    run(
        nn.Linear(1, 1), steps=1, weight_decay=0.3, on_step=kept.append,
        optimizer=lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 9.0}]),
    )  # fmt: skip
    groups = kept[0].optimizer.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.05, 0.3), (0.05, 0.3)]


def test_an_unused_parameter_is_not_moved_by_weight_decay():
    model = nn.ModuleDict({"used": nn.Linear(1, 1), "unused": nn.Linear(1, 1)})
    before = weights(model)
    run(model, weight_decay=0.5, loss=lambda m, b: squares(m["used"], b))
    assert torch.equal(model["unused"].weight, before["unused.weight"])
    assert not torch.equal(model["used"].weight, before["used.weight"])


def test_a_model_given_in_evaluation_mode_is_trained_in_training_mode():
    modes = set()
    loss = lambda m, b: modes.add(m[2].training) or squares(m, b)  # noqa: E731
    model = run(small().eval(), loss=loss, steps=2).model
    assert modes == {True} and not model.training


def test_history_rows_are_means_since_the_row_before():
    batches = Batches(*line(), batch_size=16)
    loss = lambda m, b: (squares(m, b), {"twice": 2 * squares(m, b), "one": 1.0})  # noqa: E731
    every = run(nn.Linear(1, 1, bias=False), loss=loss, batches=batches, steps=20)
    for row in every.history:
        assert row["twice"] == pytest.approx(2 * row["loss"]) and row["one"] == 1
    every = run(small(), loss=loss, steps=20).history
    coarse = run(small(), loss=loss, steps=20, log_every=8).history
    assert [row["step"] for row in coarse] == [8, 16, 20]
    for row, part in zip(coarse, (every[:8], every[8:16], every[16:]), strict=True):
        assert row["loss"] == pytest.approx(sum(r["loss"] for r in part) / len(part))


def test_a_metric_that_only_some_draws_have_is_a_mean_over_those():
    values = iter([4.0, None, None, 8.0])

    def loss(model, batch):
        value = next(values)
        return squares(model, batch), {} if value is None else {"rare": value}

    result = run(nn.Linear(1, 1), loss=loss, accumulate=2, steps=2)
    assert [row["rare"] for row in result.history] == [4.0, 8.0]


def test_on_step_sees_gradients_and_can_stop():
    seen = []

    def on_step(step: Step) -> str | None:
        seen.append((step.number, step.model[0].weight.grad.norm().item(), len(step.batch)))
        return "enough" if step.number == 4 else None

    result = run(small(), on_step=on_step, clip=1e-3)
    assert (result.step, result.stopped, len(result.history)) == (4, "enough", 4)
    assert all(0 < norm <= 1e-3 and parts == 2 for _, norm, parts in seen)


# --- random numbers ---------------------------------------------------------------------------


def test_training_depends_on_the_seed_alone_and_leaves_the_generators_alone():
    def noisy(_: Step) -> None:  # a probe that draws must not change the training
        torch.rand(3), random.random(), np.random.rand()

    a, b, c = small(), small(), small()
    run(a, seed=1)
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    before = torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].copy()
    run(b, seed=1, on_step=noisy)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    run(c, seed=2)
    assert same(a, b) and not same(a, c)


def test_every_step_draws_other_random_numbers():
    masks = set()

    def loss(model, batch):
        masks.add((torch.rand(()).item(), np.random.rand(), random.random()))
        return squares(model, batch)

    run(nn.Linear(1, 1), loss=loss, steps=5, accumulate=2)
    assert len(masks) == 10
    assert all(len(set(kind)) == 10 for kind in zip(*masks, strict=True))


# --- averaged weights, validation -------------------------------------------------------------


def test_averaged_weights_are_what_is_validated_and_returned():
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    average = weights(model)
    raw: dict[str, torch.Tensor] = {}
    validated: list[dict[str, torch.Tensor]] = []

    def on_step(step: Step) -> None:
        raw.update(weights(step.model))
        d = min(0.8, (1 + step.number) / (10 + step.number))
        for name, t in raw.items():
            average[name] = d * average[name] + (1 - d) * t if t.is_floating_point() else t

    def validate(m: nn.Module) -> float:
        assert not m.training and not torch.is_grad_enabled()
        validated.append(weights(m))
        return 0.0

    run(model, ema=0.8, on_step=on_step, validate=validate, validate_every=10)
    assert model[1].num_batches_tracked == 20
    assert not torch.allclose(raw["0.weight"], average["0.weight"])
    for got in (weights(model), validated[-1]):
        for name, t in average.items():
            torch.testing.assert_close(got[name], t)


def test_training_goes_on_from_the_raw_weights_and_modes_after_validation():
    a, b = small(), small()
    a[1].eval = lambda: a[1]  # type: ignore[method-assign]
    run(a, ema=0.9)
    modes = []
    run(b, ema=0.9, validate=lambda m: 1.0, validate_every=3,
        on_step=lambda s: modes.append(s.model[2].training) and None)  # fmt: skip
    assert same(a, b) and all(modes)


@pytest.mark.parametrize(("best", "at"), [("max", 6), ("min", 2)])
def test_the_best_weights_are_returned(best, at):
    values = {2: 0.1, 4: 0.5, 6: 0.9, 8: float("nan"), 10: 0.3}
    kept: dict[int, dict] = {}
    step = 0

    def on_step(s: Step) -> None:
        nonlocal step
        step = s.number
        kept[step] = weights(s.model)

    result = run(small(), steps=10, on_step=on_step, validate=lambda m: {"score": values[step]},
                 validate_every=2, best=best)  # fmt: skip
    assert (result.best, result.best_step) == (values[at], at)
    assert same(result.model, kept[at])
    seen = {r["step"]: r["validation_score"] for r in result.history if "validation_score" in r}
    assert seen == pytest.approx(values, nan_ok=True)


def test_patience_ends_the_training():
    values = iter([0.5, 0.6, 0.4, 0.5, 0.9, 1.0])
    result = run(small(), steps=12, validate=lambda m: next(values), validate_every=2,
                 best="max", patience=2)  # fmt: skip
    assert (result.step, result.stopped, result.best_step) == (8, "patience", 4)


def test_validation_happens_once_at_the_end_unless_asked():
    calls: list[int] = []
    result = run(small(), steps=7, validate=lambda m: calls.append(1) or 2)
    assert len(calls) == 1 and result.history[-1]["validation"] == 2.0


# --- batches ----------------------------------------------------------------------------------


@given(st.integers(1, 40), st.data(), st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_an_epoch_is_a_permutation_and_nothing_is_remembered(n, data, seed):
    size = data.draw(st.integers(1, n))
    rows = torch.arange(n)
    a, b = (Batches(rows, -rows, batch_size=size, seed=seed) for _ in range(2))
    per_epoch = len(a)
    assert per_epoch == n // size
    epochs = [[a(e * per_epoch + i)[0] for i in range(per_epoch)] for e in range(2)]
    for epoch in epochs:
        drawn = torch.cat(epoch).tolist()
        assert len(set(drawn)) == len(drawn) == per_epoch * size
    for k in (2 * per_epoch - 1, 0, per_epoch - 1):
        x, y = b(k)
        assert torch.equal(x, epochs[k // per_epoch][k % per_epoch]) and torch.equal(x, -y)


def test_epochs_and_seeds_differ():
    rows = torch.arange(100)
    a, b = Batches(rows, batch_size=100, seed=0), Batches(rows, batch_size=100, seed=1)
    orders = [a(0)[0], a(1)[0], b(0)[0], b(1)[0]]
    assert len({tuple(o.tolist()) for o in orders}) == 4


def test_a_transform_depends_on_seed_and_draw_alone():
    x, y = line()
    noise = lambda g, x, y: (x + torch.randn(x.shape, generator=g), y)  # noqa: E731
    a, b = (Batches(x, y, batch_size=8, seed=2, transform=noise) for _ in range(2))
    first, second = a(0)[0], a(1)[0]
    torch.rand(5)
    assert torch.equal(b(1)[0], second) and torch.equal(b(0)[0], first)
    plain = Batches(x, y, batch_size=8, seed=2)
    assert not torch.equal(first - plain(0)[0], second - plain(1)[0])
    assert isinstance(Batches(x, batch_size=4, transform=lambda g, x: x)(0), tuple)


@pytest.mark.parametrize(
    ("tensors", "size", "word"),
    [([], 1, "rows"), ([3, 4], 1, r"\[3, 4\]"), ([3], 4, "1 to 3"), ([3], 0, "1 to 3")],
)
def test_batches_refuses_what_cannot_be_drawn(tensors, size, word):
    with pytest.raises(RequestError, match=word):
        Batches(*(torch.zeros(n) for n in tensors), batch_size=size)


class Choice(Mapping):
    """Like the library's Choice: a mapping that cannot be rebuilt from its items."""

    def __init__(self, **axes: float):
        self.axes = axes

    def __getitem__(self, key: str) -> float:
        return self.axes[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.axes)

    def __len__(self) -> int:
        return len(self.axes)


def test_whatever_a_batch_holds_reaches_the_loss():
    choice = Choice(width=0.5)
    x, y = line()

    def loss(model, batch):
        assert batch["choice"] is choice and batch["words"] == ["a", "b"]
        assert batch["ids"][0].dtype == torch.int64 and batch["mask"].dtype == torch.bool
        return squares(model, (batch["x"], y))

    run(
        nn.Linear(1, 1), loss=loss, steps=2,
        batches=lambda n: {"x": x, "choice": choice, "words": ["a", "b"],
                           "ids": (torch.arange(3),), "mask": torch.ones(2, dtype=torch.bool)},
    )  # fmt: skip


class Noisy(Dataset):
    """A data set that draws from the global generators, as augmentations do."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([i / 22 + 0.1 * random.random() + 0.1 * torch.rand(()).item()])
        return x, 2 * x


@pytest.mark.parametrize("generator", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_resumes_in_the_middle_of_an_epoch(tmp_path, generator, workers):
    def loader() -> DataLoader:
        own = torch.Generator().manual_seed(random.randrange(1000)) if generator else None
        return DataLoader(Noisy(), 4, shuffle=True, generator=own, num_workers=workers)

    a, b = small(), small()
    options = {"accumulate": 3, "seed": 3}
    run(a, batches=loader(), steps=6, **options)  # 6 batches an epoch, the last one short
    run(b, batches=loader(), steps=3, checkpoint=tmp_path, **options)
    b = small(9)
    run(b, batches=loader(), steps=6, checkpoint=tmp_path, **options)
    assert same(a, b)


def test_a_loader_shuffles_every_epoch_anew():
    drawn = []
    loss = lambda m, b: drawn.append(b[0].flatten().tolist()) or squares(m, b)  # noqa: E731
    dataset = torch.utils.data.TensorDataset(*line(16))
    run(nn.Linear(1, 1), batches=DataLoader(dataset, 8, shuffle=True), loss=loss, steps=4)
    first, second = drawn[0] + drawn[1], drawn[2] + drawn[3]
    assert sorted(first) == sorted(second) and first != second != sorted(second)


# --- precision, compiled models ---------------------------------------------------------------


@pytest.mark.parametrize(("precision", "inside"), [("bf16", torch.bfloat16), ("auto", None)])
def test_bf16_is_autocast_of_the_loss_alone(precision, inside):
    seen = []

    def loss(model, batch):
        out = model(batch[0])
        seen.append((out.dtype, batch[0].dtype, model.weight.dtype))
        return F.mse_loss(out.float(), batch[1])

    model = nn.Linear(1, 1)
    result = run(model, loss=loss, precision=precision, steps=30)
    assert set(seen) == {(inside or torch.float32, torch.float32, torch.float32)}
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_a_compiled_model_trains_and_shares_checkpoints_with_the_plain_one(tmp_path):
    plain, model = small(), small()
    compiled = torch.compile(model, backend="eager")
    run(plain, steps=6)
    run(compiled, steps=3, checkpoint=tmp_path)
    result = run(small(5), steps=6, checkpoint=tmp_path)
    assert same(plain, result.model)
    again = torch.compile(small(5), backend="eager")
    assert run(again, steps=6, checkpoint=tmp_path).model is again
    assert same(plain, again._orig_mod)


# --- checkpoints ------------------------------------------------------------------------------


class Odd(nn.Module):
    """Tied and frozen weights, channels_last, mixed types, buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.frozen = nn.Linear(4, 1).requires_grad_(False)
        self.wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.low = nn.Parameter(torch.randn(4).to(torch.bfloat16))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.b(torch.relu(self.a(self.conv(x).mean((2, 3)))))
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * h.detach().double().mean(0)  # replaced, not changed
        return self.frozen(h * self.wave.abs() * self.low.float()) + self.count * 0.01


def test_odd_models_resume_exactly(tmp_path):
    batches = Batches(torch.randn(16, 3, 5, 5), torch.randn(16, 1), batch_size=4)
    options = {"batches": batches, "ema": 0.9, "validate": lambda m: float(m.count), "best": "max"}
    torch.manual_seed(0)
    a = Odd()
    b = copy.deepcopy(a)
    run(a, steps=8, validate_every=4, **options)
    run(b, steps=4, validate_every=4, checkpoint=tmp_path, **options)
    torch.manual_seed(1)
    c = Odd()
    run(c, steps=8, validate_every=4, checkpoint=tmp_path, **options)
    assert same(a, c) and a.count == c.count == 8 and c.a.weight is c.b.weight
    assert c.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adafactor,
     torch.optim.ASGD, lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True)],
)  # fmt: skip
def test_any_optimizer_resumes_exactly(tmp_path, optimizer):
    a, b = small(), small()
    whole = run(a, optimizer=optimizer, steps=8)
    run(b, optimizer=optimizer, steps=4, checkpoint=tmp_path)
    resumed = run(small(3), optimizer=optimizer, steps=8, checkpoint=tmp_path)
    assert same(a, resumed.model) and whole.history == resumed.history


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    folder, out = tmp_path / "state", tmp_path / "end.safetensors"
    command = [sys.executable, str(SCRIPT), str(folder), str(out)]
    process = subprocess.Popen([*command, "0.03"], env=environment())
    while not (folder / "step-00000015" / "state.json").exists():
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.1)  # into the steps after the checkpoint
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    subprocess.run(command, env=environment(), check=True)
    assert same(load_file(out), trainings.train(None).model.state_dict())


def test_a_finished_training_is_loaded_and_not_repeated(tmp_path):
    options = {"validate": lambda m: 1.0, "best": "max", "ema": 0.5, "checkpoint": tmp_path}
    first = run(small(), **options)

    def never(model, batch):
        raise AssertionError("trained again")

    again = run(small(4), loss=never, **options)
    assert same(first.model, again.model) and not again.model.training
    assert (again.history, again.step, again.stopped) == (first.history, 20, "steps")
    assert (again.best, again.best_step) == (1.0, 20) == (first.best, first.best_step)


def test_patience_is_remembered(tmp_path):
    options = {"validate": lambda m: 1.0, "validate_every": 2, "best": "max", "patience": 3}
    stop = {"on_step": lambda s: "pause" if s.number == 7 else None}
    whole = run(small(), **options)
    run(small(), checkpoint=tmp_path, checkpoint_every=3, **options, **stop)
    state = tmp_path / "step-00000007"  # a validation had missed twice when step 6 was kept
    assert json.loads((state / "state.json").read_text())["stopped"] == "pause"
    for file in state.iterdir():
        file.unlink()
    resumed = run(small(1), checkpoint=tmp_path, checkpoint_every=3, **options)
    assert (whole.step, resumed.step, resumed.stopped) == (8, 8, "patience")
    assert same(whole.model, resumed.model)


def test_two_checkpoints_are_kept_and_the_history_as_csv(tmp_path):
    result = run(small(), checkpoint=tmp_path, checkpoint_every=6, validate=lambda m: 1.0)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["metrics.csv", "step-00000018", "step-00000020"]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["loss"]) for r in rows] == [r["loss"] for r in result.history]
    assert rows[-1]["validation"] == "1.0" and rows[0]["validation"] == ""


def test_resume_false_starts_anew(tmp_path):
    run(small(), steps=30, checkpoint=tmp_path)
    result = run(small(), steps=10, checkpoint=tmp_path, resume=False)
    assert result.step == 10
    assert sorted(p.name for p in tmp_path.glob("step-*"))[-1] == "step-00000010"
    fresh = run(small(), steps=10)
    assert same(fresh.model, result.model)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path, how, caplog):
    whole = run(small(), steps=20)
    run(small(), steps=10, checkpoint=tmp_path, checkpoint_every=4)
    damage(tmp_path / "step-00000010" / "state-0.safetensors", how)
    resumed = run(small(2), steps=20, checkpoint=tmp_path, checkpoint_every=4)
    assert same(whole.model, resumed.model)
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("pantarhei")]
    assert "step-00000010" in warning and "step-00000008' instead" in warning
    assert "\n" not in warning


@pytest.mark.parametrize("file", ["state-0.safetensors", "state.json"])
def test_when_no_checkpoint_is_whole_one_sentence_says_so(tmp_path, file):
    run(small(), checkpoint=tmp_path)
    for path in tmp_path.glob(f"step-*/{file}"):
        damage(path, "truncated")
    model = small()
    before = weights(model)
    with pytest.raises(RequestError, match=rf"step-00000020.*{file}.*resume=False") as error:
        run(model, checkpoint=tmp_path)
    assert "\n" not in str(error.value)
    assert same(model, before)


def test_a_checkpoint_that_was_being_written_does_not_count(tmp_path):
    whole = run(small(), steps=20)
    run(small(), steps=10, checkpoint=tmp_path)
    begun = tmp_path / "step-00000015"
    begun.mkdir()
    (begun / "state-0.safetensors").write_bytes(b"half")
    assert same(whole.model, run(small(), steps=20, checkpoint=tmp_path).model)
    assert not begun.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.1}, "hyperparameters"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"accumulate": 2}, "accumulate=1, not 2"),
        ({"optimizer": torch.optim.SGD, "weight_decay": 0.01}, "optimizer"),
        ({"ema": 0.9}, "ema=None, not 0.9"),
        ({"schedule": "cosine"}, "schedule=constant, not cosine|steps=None, not 20"),
        ({"precision": "bf16"}, "precision"),
        ({"steps": 5}, "already at step 20"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, words):
    run(small(), checkpoint=tmp_path)
    with pytest.raises(RequestError, match=words) as error:
        run(small(), checkpoint=tmp_path, **change)
    assert str(tmp_path) in str(error.value) and "resume=False" in str(error.value)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(1, 1), "it has"),
        (nn.Sequential(nn.Linear(1, 9), nn.Tanh(), nn.Dropout(), nn.Linear(9, 1)),
         r"\(8, 1\).*\(9, "),
        (nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 1, bias=False)),
         "it has '3.bias'"),
        (small().double(), "float32.*float64"),
    ],
)  # fmt: skip
def test_another_model_is_refused_and_untouched(tmp_path, other, words):
    run(small(), checkpoint=tmp_path)
    other = copy.deepcopy(other)
    before = weights(other)
    with pytest.raises(RequestError, match=words) as error:
        run(other, checkpoint=tmp_path)
    assert str(tmp_path) in str(error.value) and same(other, before)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    whole = run(small(), steps=20)
    run(small(), steps=10, checkpoint=tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.glob("step-*/*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(step: Step) -> None:  # the next file cannot grow past 500 bytes
        if step.number == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))

    try:
        with pytest.raises(RequestError, match=r"step-00000012.*state-0.*free some space"):
            run(small(), steps=20, checkpoint=tmp_path, on_step=on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in tmp_path.glob("step-*/*")} == before
    assert same(whole.model, run(small(), steps=20, checkpoint=tmp_path).model)


def test_a_weight_that_safetensors_cannot_hold_is_refused(tmp_path):
    model = nn.Linear(1, 1)
    model.register_buffer("wave", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(RequestError, match="complex128"):
        run(model, checkpoint=tmp_path)
    assert not list(tmp_path.glob("step-*"))


def test_a_changed_number_in_the_json_is_noticed(tmp_path):
    run(small(), steps=4, checkpoint=tmp_path, checkpoint_every=4)
    path = tmp_path / "step-00000004" / "state.json"
    path.write_text(path.read_text().replace('"step": 4,', '"step": 3,', 1))
    with pytest.raises(RequestError, match=r"state\.json' is not what was written"):
        run(small(), steps=4, checkpoint=tmp_path, checkpoint_every=4)


def test_an_optimizer_whose_state_json_cannot_hold_is_refused(tmp_path):
    class Keeps(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["past"] = [1, object()]

    with pytest.raises(RequestError, match=r"'past' as a list"):
        run(small(), optimizer=Keeps, checkpoint=tmp_path)


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tmp_path, value):
    drawn = iter(range(100))

    def loss(model, batch):
        return squares(model, batch) * (value if next(drawn) == 12 else 1.0)

    with pytest.raises(RequestError, match=rf"loss became {value} at step 13 .*lr.*clip") as error:
        run(small(), loss=loss, checkpoint=tmp_path, checkpoint_every=5, label="toy")
    assert str(tmp_path) in str(error.value) and "'toy'" in str(error.value)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000005", "step-00000010"]
    good = load_file(tmp_path / "step-00000010" / "state-0.safetensors")
    assert all(t.isfinite().all() for t in good.values())


def test_weights_broken_by_the_last_update_are_not_kept(tmp_path):
    def loss(model, batch):  # finite, with an infinite gradient
        return squares(model, batch) + model[0].bias.sub(model[0].bias.detach()).abs().sqrt().sum()

    with pytest.raises(RequestError, match=r"weights are no longer finite at step 1"):
        run(small(), loss=loss, steps=1, checkpoint=tmp_path)
    assert not list(tmp_path.glob("step-*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"accumulate": 1.5}, "accumulate=1.5"),
        ({"warmup": 21}, "warmup=21"),
        ({"clip": 0.0}, "clip=0"),
        ({"ema": 1.0}, "ema=1"),
        ({"schedule": "cosin"}, "cosin.*Did you mean 'cosine'"),
        ({"schedule": None}, "schedule=None"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"best": "most", "validate": len}, "best='most'"),
        ({"best": "max"}, "validate"),
        ({"validate_every": 3}, "validate"),
        ({"patience": 3, "validate": len}, "best"),
        ({"device": "gpu7"}, "Device 'gpu7'"),
        ({"strategy": "fastest"}, "strategy='fastest'"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"optimizer": torch.optim.Rprop, "weight_decay": 0.1}, "Rprop has no weight_decay"),
        ({"loss": lambda m, b: m(b[0])}, r"\(16, 1\).*scalar"),
        ({"loss": lambda m, b: 3.0}, "float.*scalar"),
        ({"loss": lambda m, b: squares(m, b).detach()}, "depend"),
        ({"loss": lambda m, b: (squares(m, b), {"out": m(b[0])})}, "'out'"),
        ({"loss": lambda m, b: (squares(m, b), {"lr": 1.0})}, "'lr'"),
        ({"checkpoint": __file__}, "is a file"),
        ({"batches": DataLoader([], 2)}, "empty"),
        ({"batches": DataLoader([1], 1, num_workers=1, persistent_workers=True)}, "persistent"),
    ],
)
def test_one_sentence_for_a_request_that_cannot_be_served(options, words):
    with pytest.raises(RequestError, match=words) as error:
        run(small(), **options)
    assert "\n" not in str(error.value)


def test_nothing_to_train():
    with pytest.raises(RequestError, match="requires_grad_"):
        run(small().requires_grad_(False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none():
    with pytest.raises(RequestError, match="no CUDA device"):
        run(small(), device=torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_in_bf16_with_exact_resume(tmp_path):
    whole = run(small(), device="auto", ema=0.9)
    run(small(), device="auto", ema=0.9, steps=10, checkpoint=tmp_path)
    resumed = run(small(2), device="cuda", ema=0.9, checkpoint=tmp_path)
    assert next(resumed.model.parameters()).is_cuda and same(whole.model, resumed.model)


# --- several processes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[dict, dict]:
    out = tmp_path_factory.mktemp("shared")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(SCRIPT), "--shared", str(out)]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("whole", lambda: trainings.train_shared(8)),
        ("loader", lambda: trainings.train_shared(8, loader=True)),
        ("sharded", lambda: trainings.train_sharded(8, sharded=False)),
    ],
)
def test_two_processes_give_the_losses_of_one(two_processes, name, alone):
    expected = trainings.report(alone())
    for rank in two_processes:
        got = rank[name]
        for key in ("loss", "gradient_norm"):
            losses = [row[key] for row in got["history"]]
            assert losses == pytest.approx([r[key] for r in expected["history"]], abs=1e-5)
        for parameter, values in expected["weights"].items():
            assert got["weights"][parameter] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize(
    ("whole", "resumed"), [("whole", "resumed"), ("sharded", "sharded resumed")]
)
def test_two_processes_resume_exactly(two_processes, whole, resumed):
    first, second = two_processes
    assert first[whole] == first[resumed] == second[whole] == second[resumed]


def test_a_batch_that_two_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    rows = torch.arange(10)
    with pytest.raises(RequestError, match="multiple of 2"):
        Batches(rows, batch_size=5)(0)
    share = Batches(rows, batch_size=6, transform=lambda g, x: x.flip(0))(0)[0]
    monkeypatch.undo()
    assert torch.equal(share, Batches(rows, batch_size=6)(0)[0].flip(0)[3:])
