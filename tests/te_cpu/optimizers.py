"""Updates and norms of many tensors at once; ``lists`` has one list of tensors for each kind."""

import torch


def multi_tensor_adam(chunk, skip, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay):
    """AdamW in place on (gradients, weights, first moments, second moments)."""
    assert mode == 1  # weight decay apart from the gradient
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, weight, m, v in zip(*lists, strict=True):
        grad = grad.float()
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (m / first) / ((v / second).sqrt() + eps) + weight_decay * weight.float()
        weight.sub_((lr * update).to(weight.dtype))


def multi_tensor_sgd(chunk, skip, lists, weight_decay, momentum, dampening, lr, nesterov, first, after, scale):
    """Gradient descent in place on (gradients, weights, momenta[, copies of the weights in 16 bits])."""
    assert momentum == 0
    for grad, weight, _, *copies in zip(*lists, strict=True):
        weight.sub_(lr * (grad.float() * scale + weight_decay * weight))
        for copy in copies:
            copy.copy_(weight)


def multi_tensor_scale(chunk, skip, lists, scale):
    for source, into in zip(*lists, strict=True):
        into.copy_(source * scale)


def multi_tensor_l2norm(chunk, skip, lists, per_tensor=False):
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.empty(0)


ANSWERS = [multi_tensor_adam, multi_tensor_sgd, multi_tensor_scale, multi_tensor_l2norm]
