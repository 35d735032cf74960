"""Importing this makes Triton's interpreter round to bfloat16 as a GPU does.

The interpreter cuts off the lower half of a float32, which doubles the largest error and is biased
towards 0; a GPU takes the nearest bfloat16, and the even one of two that are as near.
"""

from __future__ import annotations

import importlib.util
from typing import Any

if importlib.util.find_spec("triton"):
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _rounding(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.tensor(data, dtype=torch.float32).to(torch.bfloat16)
            return narrow.view(torch.int16).numpy().view(np.uint16)
        return _convert(data, source, target, rounding_mode)

    interpreter._convert_float = _rounding
