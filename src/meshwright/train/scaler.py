"""Dynamic loss scaling for fp16, whose smallest gradients would be rounded to zero (Micikevicius et al. 2017, arXiv
1710.03740, section 3.2).

The decision rests on the squared gradient norm, which is summed over all ranks: an overflow on one of them makes it infinite or
NaN on every one, so that all skip the same step.
"""

from __future__ import annotations

import math

from meshwright.spec.errors import UserError
from meshwright.spec.layout import Precision

FIRST_SCALE = 2.0**16
SMALLEST_SCALE = 1.0
GROWTH_INTERVAL = 2000
"""Steps without an overflow after which the scale is doubled."""


class LossScaler:
    """What the loss is multiplied by; always 1 but for fp16."""

    def __init__(self, precision: Precision):
        self.is_dynamic = precision == "fp16"
        self.scale = FIRST_SCALE if self.is_dynamic else 1.0
        self._steps_since_change = 0

    def accepts(self, squared_norm: float) -> bool:
        """Whether a step with this norm may be taken; adapts the scale.

        Raises UserError when the gradients overflow at the smallest scale too.
        """
        if not self.is_dynamic:
            return True
        if math.isfinite(squared_norm):
            self._steps_since_change += 1
            if self._steps_since_change == GROWTH_INTERVAL:
                self._change(2.0)
            return True
        if self.scale <= SMALLEST_SCALE:
            raise UserError(
                f"fp16: the gradients overflow at a loss scale of {self.scale:g} too: the model does not fit fp16's range; "
                "try bf16, or a lower --lr"
            )
        self._change(0.5)
        return False

    def _change(self, factor: float) -> None:
        self.scale *= factor
        self._steps_since_change = 0
