"""Flows of CFDBench (arXiv 2310.05963), and the solver that makes them.

>>> problem = cavity()
>>> data = generate(problem, problem.cases(bc=2), cells=16, frames=3)
>>> data.shape, data.parameter_names[:2], data.settings["subset_names"]
((2, 3, 2, 16, 16), ('velocity', 'density'), ['bc', 'prop', 'geo'])
"""

from pantarhei.data.simulate.flow.cases import Case, Problem, Solution, generate
from pantarhei.data.simulate.flow.liquid import dam, tube
from pantarhei.data.simulate.flow.mac import Flow, Side, State
from pantarhei.data.simulate.flow.single_phase import cavity, cylinder

__all__ = [
    "Case",
    "Flow",
    "Problem",
    "Side",
    "Solution",
    "State",
    "cavity",
    "cylinder",
    "dam",
    "generate",
    "tube",
]
