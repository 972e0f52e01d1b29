"""pantarhei: dynamic deep neural networks, methods that run on your model and your data.

Every name below is imported when it is first used, so ``import pantarhei`` costs nothing::

    import pantarhei as pr

    net = pr.elastic(model, example_inputs, width=(0.25, 0.5, 1.0))
    y = net(x, pr.Choice(width=0.5))
    front = pr.frontier(net, loader, metric)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pantarhei import bayes as bayes
    from pantarhei import claims as claims
    from pantarhei import compute as compute
    from pantarhei import cost as cost
    from pantarhei import data as data
    from pantarhei import learning as learning
    from pantarhei import papers as papers
    from pantarhei import probes as probes
    from pantarhei import runs as runs
    from pantarhei import systems as systems
    from pantarhei.claims import Claim as Claim
    from pantarhei.claims import ClaimSpec as ClaimSpec
    from pantarhei.claims import Ledger as Ledger
    from pantarhei.cost import Cost as Cost
    from pantarhei.elastic import Choice as Choice
    from pantarhei.elastic import ElasticNet as ElasticNet
    from pantarhei.elastic import elastic as elastic
    from pantarhei.elastic.frontier import frontier as frontier
    from pantarhei.errors import RequestError as RequestError
    from pantarhei.fit import fit as fit
    from pantarhei.rollout import rollout as rollout

_MODULES = (
    "bayes",
    "claims",
    "compute",
    "cost",
    "data",
    "elastic",
    "errors",
    "fit",
    "learning",
    "papers",
    "probes",
    "rollout",
    "runs",
    "systems",
)
_NAMES = {
    "Claim": "claims",
    "ClaimSpec": "claims",
    "Ledger": "claims",
    "Cost": "cost",
    "Choice": "elastic",
    "ElasticNet": "elastic",
    "frontier": "elastic",
    "RequestError": "errors",
}
# These packages are named after their one main function: calling the package calls it.
_CALLABLE = ("elastic", "fit", "rollout")


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]](*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets a submodule here however it came to be imported.
        if name in _CALLABLE and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name == "__version__":
        return importlib.import_module(f"{__name__}.claims").library_versions()["pantarhei"]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*_MODULES, *_NAMES, "__version__"])
