"""The package's own pages: every promise of its README is held by a test that exists, and its
benchmarks are those of the result files.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ebwm_kernels
from ebwm_kernels import causal_attention

ROOT = Path(__file__).parents[2]
README = (ROOT / "kernels" / "README.md").read_text()


def test_every_test_that_the_readme_names_exists():
    written = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 15
    assert [name for name in named if f"def {name}(" not in written] == []


def test_every_row_of_the_table_of_modes_names_its_test():
    section = README.split("## What is differentiable")[1].split("How it works")[0]
    rows = [line for line in section.split("\n") if line.startswith("| ")][1:]
    assert len(rows) >= 12 and all("`test_" in row.split("|")[-2] for row in rows)


def test_every_export_is_in_the_readme():
    assert [name for name in ebwm_kernels.__all__ if f"`{name}`" not in README] == []


def test_the_benchmark_page_is_that_of_the_result_files():
    sys.path.insert(0, str(ROOT / "tools"))
    import kernels_page

    assert kernels_page.PAGE.read_text() == kernels_page.page(kernels_page.result_files())


def test_float16_gradients_beyond_its_range_are_infinite_not_wrong():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 8, generator=generator) for _ in range(3))
    tensors = [u.half().requires_grad_() for u in (q, 20 * k, 20 * v)]
    cotangent = torch.full((1, 1, 4, 8), 6e4, dtype=torch.float16)
    out = causal_attention(*tensors, backend="reference")
    gradients = torch.autograd.grad(out, tensors, cotangent)
    wide = [u.detach().float().requires_grad_() for u in tensors]
    out = causal_attention(*wide, backend="reference")
    right = torch.autograd.grad(out, wide, cotangent.float())
    assert any(bool(g.isinf().any()) for g in gradients)
    for mine, exact in zip(gradients, right):
        finite = mine.isfinite()
        assert bool((exact[~finite].abs() > 65000).all())
        torch.testing.assert_close(mine[finite].float(), exact[finite], rtol=2e-2, atol=1e2)


@pytest.mark.multiprocess
def test_importing_the_package_imports_no_compiler():
    """A second and 120 MiB of every start; a compiled function imports it when it is made."""
    program = "import sys, ebwm_kernels; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
