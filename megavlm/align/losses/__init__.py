"""The losses of alignment: pure functions over plain tensors, importing torch alone.

They know no model, layout or setting. Each gives one loss per pair or example and leaves the sum, and its division by
the global count, to the caller: so no loss depends on how a batch was split. Metrics are 0-d tensors without gradient;
all but ``scores/std`` and what ``kto_loss`` says of its own are means over the pairs given, so means of them weighted
by the number of pairs are those of the whole batch. Without any pair they are 0.

Bad arguments raise ``ValueError``, which names the argument and what is allowed.
"""

from megavlm.align.losses.kto import kto_loss
from megavlm.align.losses.preference import PREFERENCE_LOSSES, PreferenceLoss, check_preference, preference_loss
from megavlm.align.losses.reward import reward_loss

__all__ = ["PREFERENCE_LOSSES", "PreferenceLoss", "check_preference", "kto_loss", "preference_loss", "reward_loss"]
