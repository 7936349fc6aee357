"""Class activation maps of a classifier: S = ReLU(sum_k alpha_k A^k).

In Grad-CAM alpha_k = mean_{h,w} d y_label / d A^k_{hw}. Maps are not normalized: dividing a nearly flat map by its
range would blow it up. No hook is registered and no second forward pass is made: the features come from the forward
pass that computed the logits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CamMethod = Literal["gradcam", "gradcam++", "cam"]


def closed_form_weights(
    linear_weight: Tensor, labels: Tensor, num_channels: int, pool_cells: int, spatial: int
) -> Tensor:
    """Return the Grad-CAM weights of a head "average pool, flatten, one linear layer", without a backward pass.

        alpha_k = sum over cells of W[label, k, cell] / (H W)

    Every pooled cell is a mean, so the derivatives of the positions in it add up to W[label, k, cell], whatever the
    size of the cell. Not valid with a non-linearity between pool and logits (MobileNetV3): use `autograd_weights`.

    Args:
        linear_weight: (K, C * cells), columns in the order of ``flatten``, channels first; fake-quantized in a student.
        labels: (N,) int64, classes of the maps.
        num_channels: C.
        pool_cells: Number of cells per channel after the pool (1 for a global pool, 4 for 2 x 2).
        spatial: H * W of the tensor that enters the pool.

    Returns:
        alpha (N, C), detached, dtype of ``linear_weight``.

    Raises:
        ValueError: If the linear layer does not have num_channels * pool_cells inputs.
    """
    if linear_weight.shape[1] != num_channels * pool_cells:
        raise ValueError(
            f"the classifier's inputs must number num_channels * pool_cells = {num_channels} * {pool_cells}, "
            f"but got {linear_weight.shape[1]}"
        )
    per_class = linear_weight.detach().reshape(-1, num_channels, pool_cells).sum(dim=2) / spatial
    return per_class[labels]


def logit_gradient(logits: Tensor, features: Tensor, labels: Tensor, retain_graph: bool) -> Tensor:
    """Return d logit_label / d A by autograd, for any head.

    ``torch.autograd.grad`` is called for ``features`` only: no parameter's gradient changes, so DDP's reducer does not
    run. One backward pass is enough for the batch; images must not influence one another (BatchNorm in eval mode).
    Quantizers after ``features`` use the straight-through estimator (zero where they clip).

    Args:
        logits: (N, K), computed from ``features`` with gradients enabled.
        features: (N, C, H, W), in the graph of ``logits``.
        labels: (N,) int64.
        retain_graph: True if the loss is differentiated through the same graph afterwards (the student's).

    Returns:
        (N, C, H, W), detached.
    """
    chosen = logits.gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, features, retain_graph=retain_graph)
    return gradient.detach()


def autograd_weights(logits: Tensor, features: Tensor, labels: Tensor, retain_graph: bool) -> Tensor:
    """Return the Grad-CAM weights alpha (N, C), detached, by autograd, for any head; see :func:`logit_gradient`."""
    return logit_gradient(logits, features, labels, retain_graph).mean(dim=(2, 3))


def cam_weights(features: Tensor, gradient: Tensor, method: CamMethod) -> Tensor:
    """Return the weight of every channel in the map of each image.

    With g = d logit / d A and sums and means over positions of a channel:

    gradcam:    mean g                                             (Selvaraju et al., ICCV 2017)
    gradcam++:  sum of g^2 / (2 g^2 + g^3 sum A) * ReLU(g)         (Chattopadhay et al., WACV 2018, score exp(logit))
    cam:        sum g, which is the classifier's weight if the head is a global average pool and one linear layer
                (Zhou et al., CVPR 2016)

    One channel of 4 positions with A = 1 and g = 0.5 everywhere has the weights 0.5, 0.5 and 2. The weight of
    the CAM term must be tuned per method, because the maps of the methods differ in magnitude.

    Args:
        features: A (N, C, H, W); a constant in gradcam++.
        gradient: g (N, C, H, W), or (N, C, 1, 1) if it is the same at every position.
        method: One of the three.

    Returns:
        (N, C), detached.
    """
    count = features.shape[2] * features.shape[3]
    repeats = count // (gradient.shape[2] * gradient.shape[3])
    if method == "gradcam":
        return gradient.mean(dim=(2, 3)).detach()
    if method == "cam":
        return repeats * gradient.sum(dim=(2, 3)).detach()
    square = gradient.square()
    # The formula assumes A >= 0: with a signed A the denominator could be near 0 at a positive g.
    total = features.detach().relu().to(gradient.dtype).sum(dim=(2, 3), keepdim=True)
    denominator = 2 * square + square * gradient * total
    share = square / denominator.where(denominator != 0, torch.ones_like(denominator))
    return repeats * (share * gradient.relu()).sum(dim=(2, 3)).detach()


def cam_map(features: Tensor, alpha: Tensor, rectified: bool = True) -> Tensor:
    """Return the class activation map ReLU(sum_k alpha_k A^k), not normalized.

    Args:
        features: A (N, C, H, W).
        alpha: (N, C).
        rectified: Whether to apply the ReLU; CAM has none.

    Returns:
        (N, H, W), in the wider dtype of the two, also under autocast: the loss squares these sums, for which bfloat16
        is too coarse.
    """
    dtype = torch.promote_types(features.dtype, alpha.dtype)
    with torch.autocast(features.device.type, enabled=False):
        total = torch.einsum("nchw,nc->nhw", features.to(dtype), alpha.to(dtype))
    return total.relu() if rectified else total
