"""A character-level GPT in plain PyTorch, and this project's documentation as its text.

The model knows nothing of tensor parallelism: train_char_gpt.py and serve_char_gpt.py apply it from outside.

    tokens [B, S]  →  logits [B, S, V]        V characters
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
TEXT = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Sizes(NamedTuple):
    """What a model is made of; `alphabet` are its characters in order."""

    alphabet: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    seq: int
    gated: bool

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(self._asdict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Sizes":
        """Read what `save` wrote. Raises: OSError, ValueError, TypeError: it is not there, or something else."""
        return cls(**json.loads(path.read_text()))

    def encode(self, text: str) -> Tensor:
        """Return characters as tokens [S]. Raises: ValueError: one is not in the alphabet."""
        if unknown := sorted(set(text) - set(self.alphabet)):
            raise ValueError(f"not among the model's characters: {unknown}")
        number = {character: token for token, character in enumerate(self.alphabet)}
        return torch.tensor([number[character] for character in text], dtype=torch.long)

    def decode(self, tokens: Tensor) -> str:
        """Return tokens [S] as characters."""
        return "".join(self.alphabet[token] for token in tokens.tolist())


class Attention(nn.Module):
    """Causal self-attention; x, y [B, S, H]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden), heads

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))); x, y [B, S, H]."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        return self.fc2(F.gelu(self.fc1(x)))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)); x, y [B, S, H]."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a residual connection."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(sizes.hidden), Attention(sizes.hidden, sizes.heads)
        self.norm2 = nn.LayerNorm(sizes.hidden)
        self.mlp = (GatedMLP if sizes.gated else MLP)(sizes.hidden, sizes.ffn)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [B, S, H]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharGPT(nn.Module):
    """The model; its blocks are `blocks.0` and so on, their MLPs `blocks.*.mlp`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(sizes.alphabet), sizes.hidden)
        self.positions = nn.Embedding(sizes.seq, sizes.hidden)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, len(sizes.alphabet))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_text(paths: list[Path]) -> str:
    """Return the files' characters, one after the other. Raises: OSError, UnicodeDecodeError."""
    return "".join(path.read_text(encoding="utf-8") for path in paths)
