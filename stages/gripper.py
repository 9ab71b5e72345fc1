"""AnchorRefine's gripper correction: how far, and which way, a gripper's probability must be moved.

    p = sigmoid(l);  s = g - 1[p > 0.5];  c* = s (|p - 0.5| + m)          (Secs 3.1-3.6, symbols ours)

A correct decision gets 0. A wrong one gets what carries it past 0.5 by the margin m exactly: p + c* = 0.5 +- m.
The direction is that of the decision, not of g - p: the text says the signal tells whether the decision already
matches. A tie p = 0.5 decides 0.
"""

import numpy as np
from numpy.typing import NDArray

MARGIN = 0.1


def gripper_target(
    gripper: NDArray[np.generic], logit: NDArray[np.floating], margin: float = MARGIN
) -> NDArray[np.float64]:
    """What is to be added to the probability: gripper g in {0, 1} and logits of one shape -> c*."""
    p = probability(logit)
    wrong = np.asarray(gripper, dtype=np.float64) - (p > 0.5)
    return wrong * (np.abs(p - 0.5) + margin)


def decide(logit: NDArray[np.floating], correction: NDArray[np.floating]) -> NDArray[np.bool_]:
    """1[p + c > 0.5]."""
    return probability(logit) + correction > 0.5


def probability(logit: NDArray[np.floating]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logit, dtype=np.float64)))


def logit_of(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """The logit of a probability, where a policy gives only that (X-VLA's postprocessor): clipped at 1e-6."""
    inside = np.clip(np.asarray(p, dtype=np.float64), 1e-6, 1 - 1e-6)
    return np.log(inside) - np.log1p(-inside)
