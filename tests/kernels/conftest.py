"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before they are imported."""
import os
import sys

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before TRITON_INTERPRET was set: a test module collected before tests/kernels imports ebwm_kernels; "
                           "let it import that inside its tests")
    os.environ["TRITON_INTERPRET"] = "1"
