"""The alignment losses: pure functions of tensors, which import only torch and the tables of their names.

They are independent of models, layouts and settings. The functions for pairs and labelled answers return one loss for
each pair or answer. The caller sums the losses and divides by the global count, so that the result does not depend on
how a batch is divided; for sampled answers, ``policy.token_losses`` and ``reductions`` are the parts of such a sum.
Metrics are 0-d tensors without gradient. Those of pairs and labelled answers are means, except for ``scores/std`` and
the metrics of ``kto_loss``, which documents its own, so their means weighted by the number of pairs are the metrics of
the whole batch. Without any pair, they are 0.

Bad arguments raise a ``ValueError`` that names the argument and what is allowed.
"""

from megavlm.align.loss_tables import ADVANTAGES, POLICY_LOSSES, PolicyLoss
from megavlm.align.losses.advantages import advantages, gae
from megavlm.align.losses.correction import correction
from megavlm.align.losses.divergence import kl_estimate
from megavlm.align.losses.kto import kto_loss
from megavlm.align.losses.policy import check_policy, policy_loss
from megavlm.align.losses.preference import PREFERENCE_LOSSES, PreferenceLoss, check_preference, preference_loss
from megavlm.align.losses.reward import reward_loss
from megavlm.align.losses.value import value_loss

__all__ = [
    "ADVANTAGES",
    "POLICY_LOSSES",
    "PREFERENCE_LOSSES",
    "PolicyLoss",
    "PreferenceLoss",
    "advantages",
    "check_policy",
    "check_preference",
    "correction",
    "gae",
    "kl_estimate",
    "kto_loss",
    "policy_loss",
    "preference_loss",
    "reward_loss",
    "value_loss",
]
