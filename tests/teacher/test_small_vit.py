"""The bundled vision transformer: its sizes, its forward pass by hand, and its file."""

import pytest
import torch
from torch import Tensor

from synq.config.run import TeacherConfig
from synq.network.attention.locations import locate_attention
from synq.teacher.networks.small_vit import VisionTransformer, vision_transformer
from synq.teacher.teacher import load_teacher


def by_hand(net: VisionTransformer, image: Tensor) -> Tensor:
    """Logits of one image, with loops over patches and heads."""
    size = net.patches.kernel_size[0]
    rows = [
        net.patches.weight.flatten(1) @ image[:, y : y + size, x : x + size].flatten() + net.patches.bias
        for y in range(0, image.shape[1], size)
        for x in range(0, image.shape[2], size)
    ]
    tokens = torch.stack([net.cls_token[0, 0], *rows]) + net.positions[0]
    for block in net.blocks:
        qkv, heads = block.attention.qkv(block.norm1(tokens)), block.attention.heads
        query, key, value = qkv.chunk(3, -1)
        width = query.shape[1] // heads
        parts = []
        for head in range(heads):
            of_head = slice(head * width, (head + 1) * width)
            scores = query[:, of_head] @ key[:, of_head].T / width**0.5
            parts.append(scores.softmax(-1) @ value[:, of_head])
        tokens = tokens + block.attention.proj(torch.cat(parts, 1))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return net.head(net.norm(tokens[0]))


def test_logits_by_hand() -> None:
    torch.manual_seed(0)
    net = vision_transformer(12, 2, 3, classes=4, input_size=(2, 6, 9), patch=3).double().eval()
    with torch.no_grad():
        net.cls_token.normal_()
        images = torch.randn(2, 2, 6, 9, dtype=torch.float64)
        torch.testing.assert_close(net(images), torch.stack([by_hand(net, image) for image in images]))


def test_sizes_that_do_not_fit() -> None:
    for channels, patch, message in (
        (13, 2, "multiple of the 3 heads, but got 13"),
        (12, 5, "divide height and width"),
    ):
        with pytest.raises(ValueError, match=message):
            vision_transformer(channels, 1, 3, classes=4, input_size=(1, 16, 16), patch=patch)


def test_the_bundled_transformer_loads_without_a_download() -> None:
    teacher = load_teacher(TeacherConfig(spec="bundled:digits_vit"))
    assert teacher.input_size == (1, 16, 16) and teacher.num_classes == 10
    assert [(a.heads, a.tokens, a.extra) for a in locate_attention(teacher.graph)] == [(3, 17, 1)] * 4
    assert teacher.cam.node
