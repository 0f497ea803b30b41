"""Convert checkpoints: the command `ebwm convert` (ebwm_scale/convert.py), under its old name.

python tools/convert_checkpoint.py export runs/mine converted/ [--dtype bfloat16] [--training]
"""

import sys

from ebwm_scale.convert import main

if __name__ == "__main__":
    sys.exit(main())
