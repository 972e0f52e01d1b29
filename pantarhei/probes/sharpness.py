"""The sharpness of the training loss, as a probe to attach to a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from pantarhei.errors import RequestError
from pantarhei.probes._objective import Loss, Objective
from pantarhei.probes.curvature import GaussNewton, Hessian, Operator, Residual
from pantarhei.probes.eigen import Eigen, lanczos
from pantarhei.probes.stability import step_curvature

Part = Literal["gauss_newton", "residual"]


class Sharpness:
    r"""How curved the training loss is, and how far the training is from the edge of stability.

    Called on a model, a loss and batches it returns

    ``loss``, ``gradient_norm``
        of these batches;
    ``sharpness``
        the largest eigenvalue of the Hessian, times ``scale``;
    ``alignment``
        how much of the gradient lies along the eigenvectors found,
        :math:`\lVert V^\top g\rVert / \lVert g\rVert`, from 0 to 1;
    ``gauss_newton``, ``residual``
        the largest eigenvalues of the Hessian's two parts, times ``scale``;
    ``step_sharpness``, ``threshold``, ``distance``
        given an optimizer: the largest eigenvalue that its stability depends on (the preconditioned
        one for Adam, :func:`step_curvature`) and the threshold, both times ``scale``, and 1 minus
        their ratio, which is zero at the edge of stability and negative past it;
    ``products``
        matrix-vector products used, each of about two gradients;
    ``converged``
        1, or 0 where a search ended at its bound: its value is then too low, not too high.

    Args:
        parts: Which parts of the Hessian to measure; each is a search of its own. ``()``: none.
        k: Eigenvalues of the Hessian; the second to k-th are ``sharpness_2`` and so on.
        tol, max_products: Of each search, as for :func:`lanczos`. A row costs at most
            ``max_products`` times the number of searches: 1, plus 1 for each part, plus 1 with an
            optimizer whose matrix is not the Hessian itself.
        warm: Begin each search where the one before ended, which saves about half of it.
        scale: Factor on eigenvalues and threshold: gamma squared, to compare networks of different
            width whose learning rates are in proportion to it.
        parameters, dtype, train: As for :class:`Objective`.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
    >>> sharpness = Sharpness()
    >>> row = sharpness(net, lambda m, b: ((m(b[0]) - b[1]) ** 2).sum() / 2, (x, y))
    >>> round(row["sharpness"], 3), round(row["gauss_newton"], 3), row["residual"]
    (4.0, 4.0, 0.0)
    """

    def __init__(
        self,
        *,
        parts: Sequence[Part] = ("gauss_newton", "residual"),
        k: int = 1,
        tol: float = 1e-3,
        max_products: int = 100,
        warm: bool = True,
        scale: float = 1.0,
        parameters: Callable[[str, nn.Parameter], bool] | None = None,
        dtype: torch.dtype | None = None,
        train: bool = False,
    ):
        if unknown := set(parts) - _PARTS.keys():
            raise RequestError(
                f"parts={tuple(parts)} names '{min(unknown)}': choose among {', '.join(_PARTS)}."
            )
        self.parts, self.k, self.scale, self.warm = tuple(parts), k, scale, warm
        self._search: dict[str, Any] = {"tol": tol, "max_products": max_products}
        self._options: dict[str, Any] = {"parameters": parameters, "dtype": dtype, "train": train}
        self._last: dict[str, Eigen] = {}

    def __call__(
        self, model: nn.Module, loss: Loss, *batches: Any, optimizer: Optimizer | None = None
    ) -> dict[str, float]:
        """Measure at the model's weights now."""
        objective = Objective(model, loss, *batches, **self._options)
        hessian = Hessian(objective)
        value, gradient = hessian.value_and_gradient()
        found = [top := self._find("hessian", hessian, self.k)]
        row = {"loss": value, "gradient_norm": float(gradient.norm())}
        row["sharpness"] = self.scale * top.top
        row |= {f"sharpness_{i + 1}": self.scale * float(top.values[i]) for i in range(1, self.k)}
        along = (top.vectors.T @ gradient).norm() / gradient.norm()
        row["alignment"] = float(along) if row["gradient_norm"] else 0.0
        for part in self.parts:
            found.append(self._find(part, _PARTS[part](objective), 1))
            row[part] = self.scale * found[-1].top
        if optimizer is not None:
            matrix, limit = step_curvature(hessian, optimizer)
            if matrix is not hessian:
                found.append(top := self._find("step", matrix, 1))
            row["step_sharpness"] = self.scale * top.top
            row["threshold"] = self.scale * limit
            row["distance"] = 1 - top.top / limit
        row["products"] = sum(eigen.products for eigen in found)
        row["converged"] = float(all(eigen.converged for eigen in found))
        return row

    def _find(self, name: str, matrix: Operator, k: int) -> Eigen:
        last = self._last.get(name) if self.warm else None
        if last is not None and len(last.vectors) != matrix.size:
            last = None  # another model, or other parameters of it
        self._last[name] = lanczos(matrix, k, start=last, **self._search)
        return self._last[name]


_PARTS: dict[str, Callable[[Objective], Operator]] = {
    "gauss_newton": GaussNewton,
    "residual": Residual,
}
