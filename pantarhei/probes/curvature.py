r"""Curvature of the training loss, as matrices known by their products with vectors.

For a loss :math:`L(\theta) = c(f(\theta))`, criterion of outputs, averaged over batches,

.. math:: H = \nabla^2 L = G + R, \qquad
          G = J^\top (\nabla_f^2 c)\, J, \qquad
          R = \sum_i \frac{\partial c}{\partial f_i} \nabla^2 f_i, \qquad
          J = \frac{\partial f}{\partial\theta}.

The Gauss-Newton part G is what a model linear in its weights would have; the residual part R is
what the model's own bending adds. With MSE :math:`c = \frac1{2n}\sum_i (f_i - y_i)^2` the matrix G
shares its non-zero eigenvalues with the tangent kernel divided by n.

The graph of the gradient is built once and kept between products, so that a product costs one and a
half gradients (dense layers) to three (convolutions) and no forward pass; a block of vectors can go
through it in one vectorised pass.

Two warnings about what is measured. ReLU networks are piecewise linear: their Hessian ignores the
kinks, and R is that of the pieces; look at R with tanh or GELU. Batch normalisation makes the loss
invariant to the scale of the weights before it, so that sharpness falls when they merely grow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pantarhei.errors import RequestError
from pantarhei.probes._objective import Loss, Objective, differentiate, finite

_SMALL = 2**20  # weights times examples below which a product is mostly overhead (measured)
Product = Callable[[Tensor], Tensor]  # (size,) to (size,), or rows (k, size) to (k, size)


class Operator:
    """A symmetric matrix known by its products: ``operator @ v`` for v (size,) or (size, k).

    ``products`` counts the vectors multiplied so far.

    >>> operator = Operator.of(torch.diag(torch.tensor([3.0, 1.0])))
    >>> operator @ torch.ones(2), operator.products
    (tensor([3., 1.]), 1)
    """

    def __init__(
        self, rows: Product, size: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        self._rows, self.size, self.dtype = rows, size, dtype
        self.device = torch.device(device)
        self.products = 0

    @classmethod
    def of(cls, matrix: Tensor | Operator) -> Operator:
        """Return the operator of a symmetric matrix (size, size); an operator as it is."""
        if isinstance(matrix, Operator):
            return matrix
        if matrix.dim() != 2 or len(matrix) != matrix.shape[1]:
            raise RequestError(
                f"the matrix has shape {tuple(matrix.shape)}: give a square symmetric one."
            )
        return cls(lambda v: v @ matrix, len(matrix), dtype=matrix.dtype, device=matrix.device)

    def __matmul__(self, vector: Tensor) -> Tensor:
        if vector.dim() not in (1, 2) or len(vector) != self.size:
            raise RequestError(
                f"a tensor of shape {tuple(vector.shape)} does not fit a matrix of size "
                f"{self.size}: give ({self.size},) or ({self.size}, k)."
            )
        self.products += 1 if vector.dim() == 1 else vector.shape[1]
        vector = vector.to(self.device, self.dtype)
        return self._rows(vector) if vector.dim() == 1 else self._rows(vector.T.contiguous()).T

    def dense(self) -> Tensor:
        """Return the whole matrix, (size, size), from ``size`` products."""
        return self @ torch.eye(self.size, dtype=self.dtype, device=self.device)


class _Curvature(Operator):
    """What Hessian, Gauss-Newton and residual share: batches, blocks of vectors, kept graphs."""

    def __init__(
        self,
        model: nn.Module | Objective,
        loss: Loss | None = None,
        *batches: Any,
        parameters: Callable[[str, nn.Parameter], bool] | None = None,
        dtype: torch.dtype | None = None,
        train: bool = False,
        block: int | None = None,
        keep: bool | None = None,
    ):
        if isinstance(model, Objective):
            self.objective = model
        elif loss is None:
            raise RequestError(f"{type(self).__name__} needs a loss after the model: give one.")
        else:
            self.objective = Objective(
                model, loss, *batches, parameters=parameters, dtype=dtype, train=train
            )
        if block is not None and block < 1:
            raise RequestError(f"block={block}: choose at least 1 vector at a time.")
        o = self.objective
        super().__init__(self._all_batches, o.size, dtype=o.dtype, device=o.device)
        self._block = block or _block(o)
        self._keep = len(o.batches) == 1 if keep is None else keep
        self._kept: list[Product] = []

    def _prepare(self, batch: Any) -> Product:
        """Build the graph of one batch; the function returned multiplies through it."""
        raise NotImplementedError

    def _all_batches(self, rows: Tensor) -> Tensor:
        if rows.dim() == 2 and len(rows) > self._block:
            return torch.cat([self._all_batches(part) for part in rows.split(self._block)])
        batches = self.objective.batches
        if self._keep and not self._kept:
            self._kept = [self._prepare(batch) for batch in batches]
        products = (p(rows) for p in self._kept or map(self._prepare, batches))
        total = next(products)
        for product in products:
            total += product
        return total if len(batches) == 1 else total / len(batches)


class Hessian(_Curvature):
    r"""The Hessian of the training loss, :math:`H = \nabla^2 L(\theta)`.

    The product is that of double backward (Pearlmutter 1994):
    :math:`H v = \nabla_\theta \langle \nabla L(\theta), v\rangle`.

    Args:
        model, loss, batches, parameters, dtype, train: As for :class:`Objective`; or an
            ``Objective`` alone in place of the model, to share it between matrices.
        block: Vectors that go through the graph in one pass; memory grows in proportion. ``None``:
            8 on a GPU; on a processor as many as fit a small network, where the time goes into
            calls, and 1 for others, where it goes into arithmetic.
        keep: Keep the graphs of all batches between products, which costs the memory of their
            activations; ``None``: with a single batch only. Otherwise they are built anew for each
            block of vectors, at the price of one more gradient.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
    >>> hessian = Hessian(net, lambda m, b: ((m(b[0]) - b[1]) ** 2).sum() / 2, (x, y))
    >>> hessian.dense()
    tensor([[4., 0.],
            [0., 1.]])
    >>> hessian @ torch.ones(2), hessian.products
    (tensor([4., 1.]), 3)
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._values: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def _prepare(self, batch: Any) -> Product:
        leaves = self.objective.leaves()
        value = self.objective.evaluate(leaves, batch)
        finite(value)
        gradients = differentiate(value, leaves.values(), graph=True)
        if self._keep:
            self._values.append(value.detach())
            self._gradients.append(self.objective.join(gradients).detach())
        return _through(self.objective, gradients, tuple(leaves.values()))

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """Return the loss and its gradient (size,), at no cost where the graphs are kept."""
        if not self._keep:
            return self.objective.value(), self.objective.gradient()
        if not self._kept:
            self._kept = [self._prepare(batch) for batch in self.objective.batches]
        return float(torch.stack(self._values).mean()), torch.stack(self._gradients).mean(0)

    def check(self, seed: int = 0) -> float:
        r"""Return how far a product is from the finite difference of two gradients, relatively.

        Along a random direction; about 1e-3 in float32, 1e-8 in float64. Much more tells of an
        operation whose second derivative is missing: torch does not notice a custom
        ``autograd.Function`` that is differentiable once only, and the Hessian is then wrong.
        """
        objective = self.objective
        generator = torch.Generator(self.device).manual_seed(seed)
        v = torch.randn(self.size, generator=generator, dtype=self.dtype, device=self.device)
        at = objective.vector()
        step = torch.finfo(self.dtype).eps ** (1 / 3) * (1 + at.norm()) / v.norm()
        ahead, behind = (objective.gradient(at + sign * step * v) for sign in (1, -1))
        product = self @ v
        return float((product - (ahead - behind) / (2 * step)).norm() / product.norm())


class GaussNewton(_Curvature):
    r"""The Gauss-Newton matrix (generalised, for any criterion).

    .. math:: G = \frac1B \sum_b J_b^\top \left(\nabla_f^2 c_b\right) J_b

    With cross-entropy it is :math:`\frac1n J^\top(\mathrm{diag}\,p - pp^\top)J`, the Fisher
    information. It is positive semi-definite where the criterion is convex in the outputs. The loss
    must call the model exactly once; a penalty on the weights in it has no part in G.

    Arguments as of :class:`Hessian`.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> x, y = torch.tensor([[3.0]]), torch.zeros(1, 1)
    >>> GaussNewton(net, lambda m, b: ((m(b[0]) - b[1]) ** 2).sum() / 2, (x, y)).dense()
    tensor([[9.]])
    """

    def _prepare(self, batch: Any) -> Product:
        objective = self.objective
        outputs, criterion = objective.split(batch)
        leaves = tuple((named := objective.leaves()).values())
        output = outputs(named)
        at = output.detach().requires_grad_()
        value = criterion(at)
        finite(value)
        (slope,) = differentiate(value, (at,), graph=True)
        # J v in reverse mode: J^T u is linear in u, and its derivative along v is J v.
        u = torch.zeros_like(output, requires_grad=True)
        pulled = differentiate(output, leaves, u, graph=True)
        live = [i for i, p in enumerate(pulled) if p.requires_grad]

        def product(rows: Tensor) -> Tensor:
            many = rows.dim() == 2
            if not slope.requires_grad or not live:  # a criterion linear in the outputs
                return torch.zeros_like(rows)
            parts = objective.cut(rows)
            chosen = tuple(parts[i] for i in live)
            pushed = _passed(tuple(pulled[i] for i in live), (u,), chosen, many)
            curved = _passed((slope,), (at,), pushed, many)
            return objective.join(_passed((output,), leaves, curved, many), many)

        return product


class Residual(_Curvature):
    r"""What the Hessian has beyond the Gauss-Newton matrix, :math:`R = H - G`.

    .. math:: R = \frac1B \sum_b \sum_i \frac{\partial c_b}{\partial f_i} \nabla^2 f_i

    It is computed by itself, as the Hessian of the outputs weighted with the criterion's slope held
    fixed, not as a difference of two products. It is zero for a model linear in its weights.

    Arguments as of :class:`Hessian`. Raises :class:`RequestError` where the loss uses the weights
    beyond the model's outputs (a penalty on them): H would then be more than G + R.

    >>> net = nn.Linear(1, 1)
    >>> x, y = torch.tensor([[3.0]]), torch.zeros(1, 1)
    >>> Residual(net, lambda m, b: ((m(b[0]) - b[1]) ** 2).sum() / 2, (x, y)).dense().abs().max()
    tensor(0.)
    """

    _checked = False

    def _prepare(self, batch: Any) -> Product:
        objective = self.objective
        outputs, criterion = objective.split(batch)
        named = objective.leaves()
        output = outputs(named)
        at = output.detach().requires_grad_()
        value = criterion(at)
        finite(value)
        (slope,) = differentiate(value, (at,))
        gradients = differentiate(output, named.values(), slope, graph=True)
        if not self._checked:
            self._refuse_penalty(batch, objective.join(gradients).detach())
        return _through(objective, gradients, tuple(named.values()))

    def _refuse_penalty(self, batch: Any, gradient: Tensor) -> None:
        leaves = self.objective.leaves()
        whole = differentiate(self.objective.evaluate(leaves, batch), leaves.values())
        expected = self.objective.join(whole)
        if (gradient - expected).norm() > 1e-3 * expected.norm():
            raise RequestError(
                "the loss uses the weights beyond the model's outputs (a penalty on them?), and "
                "Hessian = Gauss-Newton + residual does not hold then: leave that out of the loss."
            )
        self._checked = True


class Preconditioned(Operator):
    r"""Curvature as an optimizer with its own step size for each weight meets it.

    .. math:: M = D^{1/2} A\, D^{1/2}, \qquad D = \mathrm{diag}(\text{rates} / P)

    The update :math:`\theta \leftarrow \theta - \eta D \nabla L` goes along M as gradient descent
    goes along the Hessian, so it is the largest eigenvalue of M that the threshold of stability is
    about. For Adam P is :math:`\sqrt{\hat v} + \epsilon` (Cohen et al. 2022, arXiv 2207.14484).
    To compare networks of other widths, ``rates`` is :math:`\gamma^2`, or a rate for each group of
    weights.

    Args:
        operator: The matrix A, for example :class:`Hessian`.
        by: P: an optimizer that has made a step (:func:`preconditioner`), or the diagonal (size,).
        rates: A number, or one for each weight, (size,) (:func:`learning_rates`).

    >>> hessian = Operator.of(torch.diag(torch.tensor([4.0, 9.0])))
    >>> Preconditioned(hessian, torch.tensor([4.0, 1.0]), rates=4.0).dense()
    tensor([[ 4.,  0.],
            [ 0., 36.]])
    """

    def __init__(
        self,
        operator: Operator,
        by: Optimizer | Tensor | None = None,
        *,
        rates: float | Tensor = 1.0,
    ):
        scale = torch.ones(operator.size, dtype=operator.dtype, device=operator.device)
        if isinstance(by, Optimizer):
            objective = getattr(operator, "objective", None)
            if objective is None:
                raise RequestError(
                    "this matrix is not tied to a model, so the optimizer's state cannot be laid "
                    "beside it: give the diagonal P as a vector."
                )
            by = preconditioner(objective, by)
        for given, name in ((by, "by"), (rates, "rates")):
            if isinstance(given, Tensor) and given.shape not in ((), (operator.size,)):
                raise RequestError(
                    f"{name} has shape {tuple(given.shape)}: give one number for each of the "
                    f"{operator.size} weights."
                )
        scale = scale * torch.as_tensor(rates, dtype=scale.dtype, device=scale.device)
        if by is not None:
            scale = scale / by.to(scale)
        if not (scale.isfinite().all() and (scale >= 0).all()):
            raise RequestError("rates / P must be finite and not negative: check both (epsilon?).")
        self.operator = operator
        if hasattr(operator, "objective"):
            self.objective = operator.objective
        root = scale.sqrt()

        def product(rows: Tensor) -> Tensor:
            scaled = root * rows
            return root * (operator @ scaled if rows.dim() == 1 else (operator @ scaled.T).T)

        super().__init__(product, operator.size, dtype=operator.dtype, device=operator.device)


def preconditioner(objective: Objective, optimizer: Optimizer) -> Tensor:
    r"""Return the diagonal P by which an optimizer divides its steps, laid out as the weights.

    Adam, AdamW, NAdam: :math:`\sqrt{v/(1-\beta_2^t)} + \epsilon` (the running maximum of v with
    AMSGrad). Adamax: its norm. RMSprop, Adagrad: :math:`\sqrt{v} + \epsilon`. SGD: 1.

    Raises :class:`RequestError` for other optimizers, for one that does not hold these weights, and
    before its first step.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> adam = torch.optim.Adam(net.parameters(), eps=0.5)
    >>> objective = Objective(net, lambda m, b: 3 * m(b).sum(), torch.ones(1, 1))
    >>> objective.evaluate(dict(net.named_parameters()), torch.ones(1, 1)).backward()
    >>> adam.step()
    >>> preconditioner(objective, adam)
    tensor([3.5000])
    """

    def diagonal(parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        kind = type(optimizer)
        if kind is torch.optim.SGD:
            return torch.ones_like(parameter)
        state = optimizer.state.get(parameter, {})
        if kind not in _DIAGONALS:
            raise RequestError(
                f"how {kind.__name__} scales its steps is not known here: give the diagonal P as a "
                "vector."
            )
        if not state or float(state["step"]) < 1:
            raise RequestError(
                f"{kind.__name__} has not made a step yet, and has no scale of its steps: measure "
                "after the first one."
            )
        return _DIAGONALS[kind](state, group)

    return _laid_out(objective, optimizer, diagonal)


def learning_rates(objective: Objective, optimizer: Optimizer) -> Tensor:
    """Return each weight's learning rate now, (size,).

    >>> net = nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD([{"params": [net.weight], "lr": 0.5}, {"params": [net.bias]}], lr=0.1)
    >>> learning_rates(Objective(net, lambda m, b: m(b).sum(), torch.ones(1, 2)), sgd)
    tensor([0.5000, 0.5000, 0.1000])
    """

    def rate(parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        past = max(0.0, float(optimizer.state.get(parameter, {}).get("step", 1)) - 1)
        now = float(group["lr"]) / (1 + past * group.get("lr_decay", 0.0))  # Adagrad's decay
        return torch.full_like(parameter, now, dtype=objective.dtype)

    return _laid_out(objective, optimizer, rate)


def _laid_out(
    objective: Objective,
    optimizer: Optimizer,
    of: Callable[[nn.Parameter, dict[str, Any]], Tensor],
) -> Tensor:
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in objective.parameters.items() if p not in groups]
    if missing:
        raise RequestError(
            f"the optimizer does not hold '{missing[0]}': give the one that trains this model, or "
            "leave such weights out with parameters=."
        )
    with torch.no_grad():
        return objective.flatten(
            {name: of(p, groups[p]) for name, p in objective.parameters.items()}
        )


def _adam(state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return (second / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]


def _rmsprop(state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    mean = state["grad_avg"] if group["centered"] else torch.zeros(())
    return (state["square_avg"] - mean.to(state["square_avg"]) ** 2).sqrt() + group["eps"]


_DIAGONALS: dict[type, Callable[[dict[str, Tensor], dict[str, Any]], Tensor]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _adam,
    torch.optim.Adamax: lambda state, group: state["exp_inf"],
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: lambda state, group: state["sum"].sqrt() + group["eps"],
}


def _block(objective: Objective) -> int:
    if objective.device.type != "cpu":
        return 8
    rows = [
        len(t)
        for t in pytree.tree_leaves(objective.batches[0])
        if isinstance(t, Tensor) and t.dim()
    ]
    return max(1, min(32, _SMALL // (objective.size * max(rows, default=1))))


def _through(
    objective: Objective, gradients: tuple[Tensor, ...], leaves: tuple[Tensor, ...]
) -> Product:
    """Return the product with the derivative of ``gradients``, through their kept graph."""
    live = [i for i, g in enumerate(gradients) if g.requires_grad]

    def product(rows: Tensor) -> Tensor:
        if not live:
            return torch.zeros_like(rows)
        parts = objective.cut(rows)
        many = rows.dim() == 2
        along = tuple(parts[i] for i in live)
        return objective.join(_passed(tuple(gradients[i] for i in live), leaves, along, many), many)

    return product


def _passed(
    of: tuple[Tensor, ...], by: tuple[Tensor, ...], along: tuple[Tensor, ...], many: bool
) -> tuple[Tensor, ...]:
    """Differentiate through a kept graph along one direction, or along many in one pass."""
    if many and len(along[0]) == 1:
        single = differentiate(of, by, tuple(a[0] for a in along), keep=True)
        return tuple(s[None] for s in single)
    return differentiate(of, by, along, keep=True, batched=many)
