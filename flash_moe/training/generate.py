"""Text from a trained model, one byte after another; with the cached keys and values, each costs one position."""

import codecs
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flash_moe.training.model import VOCAB_SIZE, KeyValueCache, LanguageModel


def generate_bytes(
    model: LanguageModel,
    prompt: bytes,
    num_bytes: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> Iterator[int]:
    """Yield ``num_bytes`` sampled bytes that continue ``prompt``; the same ones for the same seed.

    Args:
        prompt: may be of any length; the model sees its last ``context_length`` bytes, and a line break for none.
        temperature: below 1 for safer text, above for wilder; 0 takes the likeliest byte every time.
        top_k: sample among this many of the likeliest bytes, 1 to 256.

    Raises:
        ValueError: ``num_bytes``, ``temperature`` or ``top_k`` is out of range.
    """
    if num_bytes < 0:
        raise ValueError(f"num_bytes: expected 0 or more; got {num_bytes}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number, 0 or more; got {temperature}")
    if not 1 <= top_k <= VOCAB_SIZE:
        raise ValueError(f"top_k: expected 1 to {VOCAB_SIZE}; got {top_k}")
    return _generate(model.eval(), prompt or b"\n", num_bytes, temperature, top_k, seed)


def to_text(byte_values: Iterable[int]) -> Iterator[str]:
    """Decode UTF-8 as it comes in. What is no text, or would steer a terminal, becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for value in byte_values:
        yield from map(_visible, decoder.decode(bytes([value])))
    yield from map(_visible, decoder.decode(b"", final=True))


def _visible(character: str) -> str:
    return character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"


def _generate(
    model: LanguageModel, prompt: bytes, num_bytes: int, temperature: float, top_k: int, seed: int
) -> Iterator[int]:
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    caches = [KeyValueCache(model.config.context_length) for _ in model.layers]
    fed = torch.tensor([list(prompt[-model.config.context_length :])], device=device)
    for _ in range(num_bytes):
        with torch.no_grad():
            logits = model(fed, caches)[0, -1]
        chosen = _sample(logits.float().cpu(), temperature, top_k, generator)
        yield chosen
        fed = torch.tensor([[chosen]], device=device)


def _sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    best, byte_values = logits.topk(top_k)
    drawn = torch.multinomial((best / temperature).softmax(dim=-1), 1, generator=generator)
    return int(byte_values[drawn])
