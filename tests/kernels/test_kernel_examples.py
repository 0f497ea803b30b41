"""The programs of kernels/examples run as they stand and reach what they are about."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "kernels" / "examples"
REACHED = {  # what main() returns, and what must hold for it
    "gradient_penalty": lambda before, after: after < 0.1 * before,
    "maml": lambda first, last: last < 0.5 * first,
    "pinn": lambda error, residual: error < 0.01 and residual < 0.1,
    "hessian_vector_product": lambda eigenvalue, change: eigenvalue > 0 and change < 1e-3,
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", REACHED)
def test_the_example_runs_and_reaches_what_it_is_about(name):
    numbers = load(name).main()
    assert REACHED[name](*numbers), numbers


def test_every_example_is_run_here_and_named_in_the_readme():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert names == set(REACHED)
    assert all(f"examples/{name}.py" in readme for name in names)
