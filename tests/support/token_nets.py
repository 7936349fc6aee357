"""Small vision transformers in the spellings that people write, with weights that use the whole range of codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = (3, 16, 16)


class Joined(nn.Module):
    """Attention with query, key and value from one layer, as timm writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Separate(nn.Module):
    """Attention with three layers and the scale behind the product, as in transformers of Hugging Face."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** 0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) / self.scale).softmax(-1)
        return self.proj((scores @ v).permute(0, 2, 1, 3).flatten(2))


class Module(nn.Module):
    """PyTorch's own module, as torchvision uses it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), attention
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), activation, nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenNet(nn.Module):
    """A vision transformer; the class is read from a token of its own, or from the mean of all."""

    def __init__(
        self, attention: type[nn.Module] = Joined, *, token: bool = True, width: int = 24, depth: int = 1
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if token else None
        self.positions = nn.Parameter(torch.zeros(1, 16 + token, width))
        self.blocks = nn.Sequential(*(Block(width, attention(width, 2), nn.GELU()) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.positions))
        return self.head(x.mean(1) if self.token is None else x[:, 0])


def spread(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters, so that no LayerNorm is the identity and attention is not even."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data = 0.2 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            embedding = "token" in name or "positions" in name
            parameter.data = values * (0.5 if embedding else 1.5 / parameter[0].numel() ** 0.5)
    return net.eval()
