"""The alignment losses: pure functions of tensors, which import only torch.

They are independent of models, layouts and settings. Each function returns one loss for each pair or answer. The caller
sums the losses and divides by the global count, so that the result does not depend on how a batch is divided. Metrics
are 0-d tensors without gradient. Except for ``scores/std`` and the metrics of ``kto_loss``, which documents its own,
they are means over the given pairs, so their means weighted by the number of pairs are the metrics of the whole batch.
Without any pair, they are 0.

Bad arguments raise a ``ValueError`` that names the argument and what is allowed.
"""

from megavlm.align.losses.kto import kto_loss
from megavlm.align.losses.preference import PREFERENCE_LOSSES, PreferenceLoss, check_preference, preference_loss
from megavlm.align.losses.reward import reward_loss

__all__ = ["PREFERENCE_LOSSES", "PreferenceLoss", "check_preference", "kto_loss", "preference_loss", "reward_loss"]
