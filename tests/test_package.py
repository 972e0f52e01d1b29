from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pantarhei as pr

ROOT = Path(__file__).resolve().parent.parent


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, pantarhei; sys.exit(str({'torch', 'numpy', 'typer'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize("name", dir(pr))
def test_every_name_that_is_listed_exists(name):
    assert getattr(pr, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'pantarhei' has no attribute 'elastik'"):
        _ = pr.elastik


@pytest.mark.parametrize(
    "before", ["", "from pantarhei.elastic import elastic; from pantarhei.fit import fit"]
)
def test_a_package_named_after_its_function_is_called_like_it(before):
    program = f"""
{before}
import pantarhei as pr
from pantarhei import elastic as first, fit as second
for name, module in (("elastic", first), ("fit", second)):
    assert getattr(pr, name) is module and module.__file__
    try:
        module()
    except TypeError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "elastic() missing" in done.stdout and "fit() missing" in done.stdout


def test_the_five_line_example_runs():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    x = torch.rand(2, 3, 8, 8)
    net = pr.elastic(model, x, width=(0.5, 1.0))
    choice = net.space.smallest
    assert isinstance(choice, pr.Choice)
    assert torch.equal(net.extract(choice)(x), net(x, choice))
