r"""Deep ensembles and anchored ensembles of any network, trained in one vectorised pass.

The members' weights are stacked, (M, ...), and the network runs under ``torch.func.vmap``: a linear
layer becomes one batched matrix product. The sum of the members' losses has for each member its own
gradient, and optimizers such as Adam act on every weight alone, so that one ``fit`` of the stack is
M trainings. A network that cannot run so is trained one by one through ``fit``, to the same result.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pantarhei._fit_loss import Loss, scalar
from pantarhei._fit_random import own_randomness
from pantarhei._stacked import UNSTACKABLE, WithLoss, call_members
from pantarhei.bayes.gaussian import gaussian_loss
from pantarhei.bayes.predictive import Predictive
from pantarhei.bayes.prior import Prior
from pantarhei.errors import RequestError
from pantarhei.fit import Fit, fit


class Ensemble(nn.Module):
    """M networks of one architecture as one module: its parameters are theirs, stacked.

    Called, it returns what the members return, with the members first. ``together`` tells whether
    they run at once (set by :func:`fit_ensemble`); otherwise one after the other.

    Raises :class:`RequestError` for no members, and members whose weights differ in shape.

    >>> ensemble = Ensemble.of(lambda: nn.Linear(3, 2), members=4)
    >>> ensemble(torch.ones(5, 3)).shape
    torch.Size([4, 5, 2])
    >>> torch.equal(ensemble.member(1)(torch.ones(5, 3)), ensemble(torch.ones(5, 3))[1])
    True
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        if not members:
            raise RequestError("An ensemble has one member or more.")
        try:
            tensors = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in members]
            stacks = {
                id(first): torch.stack([held[name].detach() for held in tensors])
                for name, first in tensors[0].items()
            }
        except (RuntimeError, KeyError) as error:
            raise RequestError(
                f"Members of an ensemble have weights of the same names and shapes ({error})."
            ) from error
        for p in members[0].parameters():
            stacks[id(p)] = nn.Parameter(stacks[id(p)], requires_grad=p.requires_grad)
        # The memo puts the stacks wherever the first member holds a weight, tied ones included.
        self.stacked: nn.Module = copy.deepcopy(members[0], dict(stacks))
        self.members = len(members)
        self.together = True

    @classmethod
    def of(
        cls,
        factory: Callable[[], nn.Module],
        members: int,
        seed: int = 0,
        prior: Prior | None = None,
    ) -> Ensemble:
        """Build members with ``factory``, each from random numbers of its own.

        With a ``prior`` the weights are drawn from it: the starts and anchors of an anchored
        ensemble.
        """
        if members < 1:
            raise RequestError(f"An ensemble has one member or more, not {members}.")
        with own_randomness(torch.device("cpu")):
            torch.manual_seed(seed)
            if prior is not None:
                return cls(prior.draw(factory(), members, seed))
            return cls([factory() for _ in range(members)])

    def forward(self, *inputs: Any) -> Any:
        """Run every member on the same inputs; outputs (M, ...)."""
        if self.together:
            return call_members(self.stacked, self._tensors(), *inputs)
        outputs = [self.member(j)(*inputs) for j in range(self.members)]
        return tree_map(lambda *held: torch.stack(held), *outputs)

    def each(self, inputs: Tensor) -> Any:
        """Run every member on inputs of its own, (M, B, ...)."""
        if self.together:
            return call_members(self.stacked, self._tensors(), inputs, in_dims=(0,))
        outputs = [self.member(j)(own) for j, own in enumerate(inputs)]
        return tree_map(lambda *held: torch.stack(held), *outputs)

    def member(self, j: int) -> nn.Module:
        """Return a copy of a member, as a module of its own."""
        own: dict[int, Tensor] = {id(b): b[j].clone() for b in self.stacked.buffers()}
        for p in self.stacked.parameters():
            own[id(p)] = nn.Parameter(p.detach()[j].clone(), requires_grad=p.requires_grad)
        return copy.deepcopy(self.stacked, dict(own))

    @torch.no_grad()
    def predict(self, inputs: Tensor, *, rows: int = 16_384, correction: int = 0) -> Predictive:
        """Forecast with every member, ``rows`` inputs at a time and in evaluation mode.

        The members return (mean, variance), as a network that ends in a
        :class:`~pantarhei.bayes.GaussianHead` does.
        """
        training = self.training
        self.eval()
        parts = [self(part) for part in inputs.split(rows)]
        self.train(training)
        means, variances = (torch.cat(held, 1) for held in zip(*parts, strict=True))
        return Predictive(means, variances, correction)

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.stacked.named_parameters()), **dict(self.stacked.named_buffers())}

    @torch.no_grad()
    def _put(self, j: int, member: nn.Module) -> None:
        theirs = {**dict(member.named_parameters()), **dict(member.named_buffers())}
        for name, tensor in self._tensors().items():
            tensor[j] = theirs[name].to(tensor)


def fit_ensemble(
    ensemble: Ensemble,
    batches: Callable[[int], Any],
    loss: Loss | None = None,
    *,
    steps: int,
    prior: Prior | None = None,
    examples: int | None = None,
    by_member: Sequence[int] = (),
    together: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    weight_decay: float = 0.0,
    precision: Any = "32",
    **options: Any,
) -> list[Fit]:
    r"""Train the members in place; return the one :class:`Fit` of all, or one for each.

    Member j minimises

    .. math:: \mathrm{loss}(\theta_j, \mathrm{batch}) + \frac1{2N}\sum_k
              \frac{(\theta_{jk}-\theta^{anc}_{jk})^2}{sd_k^2}

    which, where ``loss`` is a mean negative log-likelihood, is 1/N of the negative log posterior
    centred on the member's anchor: the weights at the start (anchored ensembles, Pearce et al.,
    Uncertainty in Neural Networks: Approximately Bayesian Ensembling, 2020). Without a ``prior``
    there is no second term, a deep ensemble. All members see the same batches.

    Args:
        ensemble: The members. For anchoring, made with the same ``prior``.
        batches: Batches by the draw number, as for ``fit``.
        loss: ``loss(model, batch)`` of one member, default :func:`gaussian_loss`.
        steps: Updates of each member.
        prior: Holds the members to their starts. Not to be combined with ``weight_decay``.
        examples: N, the number of training examples; needed with a ``prior``.
        by_member: Positions in the batch of tensors (B, M, ...), of which member j gets [:, j]:
            targets with noise of each member's own (:func:`perturbed`).
        together: ``False``: one by one; ``None``: together where the network can run under vmap.
        checkpoint: Folder from which a killed training continues.
        weight_decay: Of the optimizer.
        precision: As for ``fit``.
        options: Everything else that ``fit`` takes, but clipping (the norm would be that of all
            members together).

    Dropout draws different numbers together than one by one; all else is the same to rounding.

    Raises :class:`RequestError` for settings that contradict each other, and as ``fit`` does.

    >>> from pantarhei.bayes import GaussianHead
    >>> from pantarhei.fit import Batches
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> ensemble = Ensemble.of(lambda: nn.Sequential(nn.Linear(1, 8), GaussianHead(8)), members=3)
    >>> batches = Batches(x, 2 * x, batch_size=32)
    >>> _ = fit_ensemble(ensemble, batches, steps=300, lr=0.03, schedule="cosine", quiet=True)
    >>> (ensemble.predict(x).mean - 2 * x).abs().max().item() < 0.1
    True
    """
    if options.get("clip"):
        raise RequestError("clip would scale all members by one norm: leave it out.")
    if prior is not None:
        prior.check(ensemble.stacked)
        if not examples:
            raise RequestError("An anchored ensemble needs examples=, the number N of its data.")
        if weight_decay:
            raise RequestError("A prior and weight_decay pull on the same weights: choose one.")
    options |= {"weight_decay": weight_decay, "precision": precision, "steps": steps}
    job = _Job(ensemble, batches, loss or gaussian_loss(), prior, examples or 1, tuple(by_member))
    folder = Path(checkpoint) if checkpoint else None
    if together is not False:
        start = copy.deepcopy(ensemble.state_dict())
        try:
            found = job.together(folder and folder / "together", options)
            ensemble.together = True
            return [found]
        except RequestError:
            raise
        except UNSTACKABLE as error:
            if together:
                raise RequestError(
                    f"the network cannot train under torch.func.vmap ({error}): leave together out."
                ) from error
            first = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"members train one by one, not together: {first}", stacklevel=2)
            ensemble.load_state_dict(start)
    ensemble.together = False
    return [
        job.alone(j, folder and folder / f"member-{j}", options) for j in range(ensemble.members)
    ]


class _Job:
    """What the two ways of training have in common: each member's loss and anchor."""

    def __init__(
        self,
        ensemble: Ensemble,
        batches: Callable[[int], Any],
        loss: Loss,
        prior: Prior | None,
        examples: int,
        by_member: tuple[int, ...],
    ):
        self.ensemble, self.batches, self.loss = ensemble, batches, loss
        self.prior, self.examples, self.by_member = prior, examples, by_member
        self.anchors = {n: p.detach().clone() for n, p in self._weights(ensemble.stacked).items()}

    def together(self, folder: Path | None, options: dict[str, Any]) -> Fit:
        module = WithLoss(self.ensemble.stacked, self.loss)

        def objective(ensemble: Ensemble, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            dims: Any = None
            if self.by_member:
                dims = tuple(1 if i in self.by_member else None for i in range(len(batch)))
                batch = tuple(batch)
            named = {f"model.{n}": t for n, t in ensemble._tensors().items()}
            losses = call_members(module, named, batch, in_dims=(dims,))
            held = losses + self._penalty(self._weights(ensemble.stacked), slice(None))
            return held.sum(), {"loss_of_data": losses.detach().mean()}

        return fit(self.ensemble, self.batches, objective, checkpoint=folder, **options)

    def alone(self, j: int, folder: Path | None, options: dict[str, Any]) -> Fit:
        member = self.ensemble.member(j)

        def objective(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            if self.by_member:
                batch = tuple(b[:, j] if i in self.by_member else b for i, b in enumerate(batch))
            value = scalar(self.loss(model, batch))
            weights = {name: p[None] for name, p in self._weights(model).items()}
            penalty = self._penalty(weights, slice(j, j + 1))
            return (value + penalty).sum(), {"loss_of_data": value.detach()}

        result = fit(member, self.batches, objective, checkpoint=folder, **options)
        self.ensemble._put(j, result.model)
        return result

    def _penalty(self, weights: dict[str, Tensor], of: slice) -> Tensor | float:
        if self.prior is None:
            return 0.0
        for name, w in weights.items():
            self.anchors[name] = self.anchors[name].to(w.device)  # moves once
        anchors = {name: self.anchors[name][of] for name in weights}
        return self.prior.distance(weights, anchors) / (2 * self.examples)

    @staticmethod
    def _weights(module: nn.Module) -> dict[str, Tensor]:
        return {name: p for name, p in module.named_parameters() if p.requires_grad}


def perturbed(y: Tensor, members: int, sd: float | Tensor, seed: int = 0) -> Tensor:
    r"""Return targets of each member's own, (N, M, ...): :math:`y_i + e_{ij}`, e ~ N(0, sd^2).

    The noise is fixed in advance. With ``sd`` that of the data's noise, anchored members are draws
    of the posterior, exactly so for a linear network (randomised maximum a posteriori). Without
    it their spread inside the data is too small: that of :math:`P S_0^{-1} P` in place of P.

    >>> perturbed(torch.zeros(5, 2), members=3, sd=0.1).shape
    torch.Size([5, 3, 2])
    """
    shape = (len(y), members, *y.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=y.dtype).to(y.device)
    return y[:, None] + (sd if isinstance(sd, float | int) else sd[:, None]) * noise
