"""A small byte-level language model, and the example of how to use ``FlashMoE``: it stands where the MLP would.

Legend: B sequences, S bytes each, H hidden size, V = 256 byte values, L layers.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_moe._checks import check_int
from flash_moe.modules.flash_moe import FlashMoE, FlashMoEConfig

VOCAB_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The shape of a model. ``context_length`` is how far back attention sees, in training and in generation."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 256
    num_experts: int = 1024
    num_experts_per_tok: int = 16
    norm_topk_prob: bool = True
    router_norm: Literal["batch", "rms", "none"] = "batch"
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    context_length: int = 128
    rope_theta: float = 10_000.0
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Of the mixtures of experts."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "context_length"):
            check_int(name, getattr(self, name), 1, 2**31 - 1)
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"num_heads: expected hidden_size / num_heads to be even; got {self.hidden_size} / {self.num_heads}"
            )
        self.moe()  # checks the rest

    def moe(self) -> FlashMoEConfig:
        """The configuration of every layer's mixture of experts."""
        return FlashMoEConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            norm_topk_prob=self.norm_topk_prob,
            router_norm=self.router_norm,
            router_aux_loss_coef=self.router_aux_loss_coef,
            router_z_loss_coef=self.router_z_loss_coef,
            track_expert_usage=True,
            backend=self.backend,
        )


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out. The embedding is also the output projection."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(VOCAB_SIZE, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.rotary = Rotary(config)
        nn.init.normal_(self.embed.weight, std=config.hidden_size**-0.5)

    def forward(self, byte_ids: Tensor, caches: "list[KeyValueCache] | None" = None) -> Tensor:
        """``[B, S]`` byte values to ``[B, S, V]`` logits; with ``caches``, the bytes that follow the cached ones."""
        start = caches[0].num_seen if caches else 0
        rotation = self.rotary(start, byte_ids.shape[1])
        x = self.embed(byte_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, caches[i] if caches else None)
        return F.linear(self.norm(x), self.embed.weight)

    def moe_layers(self) -> list[FlashMoE]:
        return [cast(DecoderLayer, layer).moe for layer in self.layers]

    def router_loss(self) -> Tensor | None:
        """The sum of the layers' auxiliary losses in the last forward, ``None`` where none is asked for."""
        losses = [moe.router_loss for moe in self.moe_layers() if moe.router_loss is not None]
        return torch.stack(losses).sum() if losses else None


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden_size)
        self.moe = FlashMoE(config.moe())

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: "KeyValueCache | None") -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, cache)
        y, _router_logits = self.moe(self.moe_norm(x))
        return x + y


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        head_size = config.hidden_size // config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.query_norm = nn.RMSNorm(head_size)
        self.key_norm = nn.RMSNorm(head_size)
        nn.init.normal_(self.qkv_proj.weight, std=config.hidden_size**-0.5)
        # Each layer adds to the residual stream twice: this keeps its size independent of the depth.
        nn.init.normal_(self.out_proj.weight, std=(2 * config.num_layers * config.hidden_size) ** -0.5)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: "KeyValueCache | None") -> Tensor:
        B, S, H = x.shape
        qkv = self.qkv_proj(x).view(B, S, 3, self.num_heads, H // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        # In float32 even under autocast, where a 16-bit input would not match the norms' weights.
        query = rotate(self.query_norm(query.float()), rotation)
        key = rotate(self.key_norm(key.float()), rotation)
        if cache is not None:
            key, value = cache.append(key, value)
        # Bytes fed one at a time may see every cached one; only a longer piece needs the causal mask.
        out = F.scaled_dot_product_attention(query, key, value, is_causal=S > 1)
        return self.out_proj(out.transpose(1, 2).reshape(B, S, H))


class Rotary(nn.Module):
    """Angles of rotary position embedding: position p turns the i-th pair of a head by p * theta^(-i / pairs)."""

    frequencies: Tensor

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        pairs = config.hidden_size // config.num_heads // 2
        frequencies = config.rope_theta ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + length, device=self.frequencies.device, dtype=torch.float32)
        angles = torch.outer(positions, self.frequencies)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x[i], x[i + half]) of every head; computed in float32 and returned in ``x.dtype``."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class KeyValueCache:
    """The keys and values of the last ``context_length`` bytes of one layer.

    Keys are stored rotated. Only differences of positions enter attention, so old ones can simply be dropped.
    """

    def __init__(self, context_length: int):
        self.context_length = context_length
        self.num_seen = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.num_seen += key.shape[2]
        if self._keys is not None and self._values is not None:
            key = torch.cat((self._keys, key), dim=2)
            value = torch.cat((self._values, value), dim=2)
        self._keys, self._values = key[:, :, -self.context_length :], value[:, :, -self.context_length :]
        return self._keys, self._values
