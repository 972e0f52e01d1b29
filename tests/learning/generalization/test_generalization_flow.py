"""Exact flows against the slow way: stepping, layer by layer, on real matrices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from pantarhei.errors import RequestError
from pantarhei.learning.generalization import deep_flow, flow


def data(examples=8, size=12, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, size)) / np.sqrt(size)
    return x, rng.normal(size=examples), 0.1 * rng.normal(size=size)


@pytest.mark.parametrize("examples", [8, 12, 30])
def test_flow_is_the_ordinary_differential_equation(examples):
    x, y, start = data(examples)
    times = [0.0, 0.7, 5.0]
    stepped = solve_ivp(
        lambda _, w: x.T @ (y - x @ w), (0, 5), start, "DOP853", times, rtol=1e-12, atol=1e-13
    )
    np.testing.assert_allclose(flow(x, y, times, start), stepped.y.T, atol=1e-10)


def test_flow_is_the_limit_of_gradient_descent():
    x, y, start = data()
    w, lr = start.copy(), 1e-3
    for _ in range(3000):
        w += lr * x.T @ (y - x @ w)
    np.testing.assert_allclose(flow(x, y, [3.0], start)[0], w, atol=1e-3)


def test_the_end_is_the_nearest_interpolation():
    x, y, start = data()
    end = flow(x, y, [np.inf], start)[0]
    np.testing.assert_allclose(end, start + np.linalg.pinv(x) @ (y - x @ start), atol=1e-12)
    many = flow(x, np.stack([y, 2 * y], 1), [1.0, np.inf])
    assert many.shape == (2, 12, 2)
    np.testing.assert_allclose(many[:, :, 1], 2 * many[:, :, 0], atol=1e-12)


def test_what_no_input_reaches_stays_bit_for_bit():
    x, y, start = data()
    x[:, [2, 7]] = 0
    w = flow(x, y, np.geomspace(0.01, 1e6, 7), start)
    assert (w[:, [2, 7]] == start[[2, 7]]).all()
    basis = np.linalg.svd(x)[2][8:]  # directions without data
    np.testing.assert_allclose(w @ basis.T, np.tile(basis @ start, (7, 1)), atol=1e-12)


def layers_of(start, depth, width, rng):
    """Return a balanced start: every matrix of rank one and norm |w|^(1/L)."""
    size = np.linalg.norm(start) ** (1 / depth)
    inner = [v / np.linalg.norm(v) for v in rng.normal(size=(depth - 1, width))]
    ends = [start / np.linalg.norm(start), *inner, np.ones(1)]
    return [size * np.outer(b, a) for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("examples", [6, 20])
def test_deep_flow_agrees_with_the_full_simulation(depth, examples):
    x, y, start = data(examples, 10, seed=1)
    start = 3 * start
    layers = layers_of(start, depth, 5, np.random.default_rng(2))
    shapes = [w.shape for w in layers]
    cuts = np.cumsum([w.size for w in layers])[:-1]

    def unpack(flat):
        return [part.reshape(s) for part, s in zip(np.split(flat, cuts), shapes, strict=True)]

    def product(ws, size):
        total = np.eye(size)
        for w in ws:
            total = w @ total
        return total

    def velocity(_, flat):
        ws = unpack(flat)
        gradient = (y - product(ws, 10) @ x.T) @ x  # (1, N)
        moves = []
        for i, w in enumerate(ws):
            after = product(ws[i + 1 :], w.shape[0])
            moves.append((after.T @ gradient @ product(ws[:i], 10).T).ravel())
        return np.concatenate(moves)

    times = np.array([0.0, 0.5, 2.0, 6.0])
    flat = np.concatenate([w.ravel() for w in layers])
    full = solve_ivp(velocity, (0, 6), flat, "DOP853", times, rtol=1e-13, atol=1e-14)
    simulated = np.stack([product(unpack(state), 10)[0] for state in full.y.T])
    np.testing.assert_allclose(deep_flow(x, y, times, start, depth), simulated, atol=1e-9)


def test_depth_one_is_the_linear_student():
    x, y, start = data()
    np.testing.assert_array_equal(
        deep_flow(x, y, [0.1, 4.0], start, 1), flow(x, y, [0.1, 4.0], start)
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x, y: flow(x, y[:-1], [1.0]), "a target for each example"),
        (lambda x, y: flow(x, y, [1.0], np.zeros(3)), "start has shape"),
        (lambda x, y: flow(x, y * np.inf, [1.0]), "not finite"),
        (lambda x, y: deep_flow(x, y, [1.0], np.zeros(12), 2), "does not move"),
        (lambda x, y: deep_flow(x, y, [1.0], np.ones(12), 0), "at least 1"),
        (lambda x, y: deep_flow(x, y, [2.0, 1.0], np.ones(12), 2), "sort them"),
        (lambda x, y: deep_flow(x, y[:, None], [1.0], np.ones(12), 2), "one target an example"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    x, y, _ = data()
    with pytest.raises(RequestError, match=sentence):
        call(x, np.abs(y) + 1)
