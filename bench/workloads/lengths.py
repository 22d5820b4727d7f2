# SPDX-License-Identifier: Apache-2.0
"""Distributions of prompt and output lengths, in tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LengthMixture:
    """A mixture of log-normal distributions: (weight, median, sigma of the logarithm) of each component."""

    components: tuple[tuple[float, float, float], ...]

    def __post_init__(self) -> None:
        if abs(sum(weight for weight, _, _ in self.components) - 1) > 1e-9:
            raise ValueError(f"the weights of {self.components} do not sum to 1")

    @property
    def mean(self) -> float:
        """Expected length, before rounding and limits."""
        return sum(weight * median * float(np.exp(sigma**2 / 2)) for weight, median, sigma in self.components)

    def draw(self, generator: np.random.Generator, count: int, low: int, high: int) -> list[int]:
        """`count` lengths, moved to [low, high]. Raises ValueError when the range is empty."""
        if not 1 <= low <= high:
            raise ValueError(f"lengths from {low} to {high} are no range; give a larger max_model_len")
        weights, medians, sigmas = (np.array(column) for column in zip(*self.components, strict=True))
        component = generator.choice(len(weights), size=count, p=weights)
        lengths = medians[component] * np.exp(sigmas[component] * generator.standard_normal(count))
        return [int(length) for length in np.clip(np.rint(lengths), low, high)]


#: Conversations: many short messages and some with pasted text. The means, 161 and 338 tokens, are those of ShareGPT
#: in the vLLM paper (arXiv:2309.06180, figure 11); the shape is ours.
CHAT_PROMPT = LengthMixture(((0.75, 32, 0.9), (0.25, 363, 0.8)))
CHAT_OUTPUT = LengthMixture(((0.25, 25, 0.7), (0.75, 359, 0.64)))

#: Retrieval: several passages and a question in, a short answer out.
RAG_PROMPT = LengthMixture(((0.6, 1500, 0.3), (0.4, 3000, 0.35)))
RAG_OUTPUT = LengthMixture(((1.0, 90, 0.6),))

#: Completion of code in an editor: the file so far in, a few lines out.
CODE_PROMPT = LengthMixture(((1.0, 600, 0.8),))
CODE_OUTPUT = LengthMixture(((1.0, 60, 0.7),))

#: Reasoning: short in, long out.
REASONING_PROMPT = LengthMixture(((1.0, 120, 0.6),))
REASONING_OUTPUT = LengthMixture(((1.0, 900, 0.5),))

#: Two kinds of mixture by name, for phases of a trace.
MIXTURES = {
    "chat": (CHAT_PROMPT, CHAT_OUTPUT),
    "rag": (RAG_PROMPT, RAG_OUTPUT),
    "code": (CODE_PROMPT, CODE_OUTPUT),
    "reasoning": (REASONING_PROMPT, REASONING_OUTPUT),
}


def draw_lengths(
    generator: np.random.Generator,
    mixtures: tuple[LengthMixture, LengthMixture],
    count: int,
    max_model_len: int,
    output_tokens: int | None = None,
    scale: float = 1.0,
    min_prompt: int = 4,
) -> list[tuple[int, int]]:
    """`count` pairs (prompt, output) that fit a context of `max_model_len` tokens together.

    Outputs are limited to half of the context, prompts to the rest. `output_tokens` fixes all outputs; `scale`
    multiplies both medians, for models with a small context. Raises ValueError when nothing fits.
    """
    if scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    prompt, output = (
        LengthMixture(tuple((weight, median * scale, sigma) for weight, median, sigma in mixture.components))
        for mixture in mixtures
    )
    if output_tokens is not None and not 1 <= output_tokens <= max_model_len - min_prompt:
        raise ValueError(
            f"output_tokens {output_tokens} does not fit max_model_len {max_model_len} beside a prompt of {min_prompt}"
        )
    if output_tokens is None:
        outputs = output.draw(generator, count, 1, max(1, max_model_len // 2))
    else:
        outputs = [output_tokens] * count
    # Drawn for the whole context and cut one by one, so that a limit changes no other request.
    prompts = prompt.draw(generator, count, min_prompt, max(min_prompt, max_model_len))
    return [(min(first, max_model_len - second), second) for first, second in zip(prompts, outputs, strict=True)]
