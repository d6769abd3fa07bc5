"""What `bench generate` asks of a model: prompts of random tokens, and how many tokens are to follow each."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

NAMES = ("one", "uniform", "padded", "ragged", "beams", "samples", "chat", "many")


@dataclass(frozen=True)
class GenerateCase:
    """One call of generate, the calls of a chat, or the requests of generate_many.

    Attributes:
        name: as it is shown.
        prompts: token ids.
        wishes: new tokens of each, in each turn of a chat.
        turns: what the user of a chat says after each answer but the last; every call has all that was said before.
        options: of generate.
        fit: how many of the requests there shall be room for at a time; 0 = they are no requests of generate_many.
    """

    name: str
    prompts: list[list[int]]
    wishes: list[int]
    turns: list[list[int]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    fit: int = 0

    @property
    def is_ragged(self) -> bool:
        """Whether prompts have padding in a batch, or rows end before others."""
        return len({len(prompt) for prompt in self.prompts}) > 1 or len(set(self.wishes)) > 1

    @property
    def samples(self) -> bool:
        return bool(self.options.get("do_sample"))

    @property
    def beams(self) -> int:
        return int(self.options.get("num_beams", 1))

    @property
    def returned(self) -> int:
        """Sequences that come back for each prompt."""
        return int(self.options.get("num_return_sequences", 1))

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.prompts) * self.returned * self.beams

    @property
    def useful_tokens(self) -> int:
        return sum(self.wishes) * self.returned * (1 + len(self.turns))

    def shortened(self, prompt: int, new_tokens: int) -> "GenerateCase":
        """The same with at most that many tokens of each prompt, and after it."""
        prompts, turns = ([tokens[:prompt] for tokens in each] for each in (self.prompts, self.turns))
        return replace(self, prompts=prompts, turns=turns, wishes=[min(wish, new_tokens) for wish in self.wishes])

    def first(self) -> "GenerateCase":
        """The same with the first prompt alone."""
        return replace(self, prompts=self.prompts[:1], wishes=self.wishes[:1])


@dataclass(frozen=True)
class Sizes:
    """Sizes of all cases; ranges include both ends."""

    context: int
    new_tokens: int
    batches: tuple[int, ...]
    beams: int
    samples: int
    ragged_rows: int
    ragged_prompts: tuple[int, int]
    ragged_wishes: tuple[int, int]
    chat_system: int
    chat_turns: int
    chat_user: int
    chat_answer: int
    many_requests: int
    many_fit: int
    many_prompts: tuple[int, int]
    many_wishes: tuple[int, int]

    def positions(self, names: list[str]) -> int:
        """Positions that a model must have: a padded batch runs on until the last wish."""
        ragged = self.ragged_prompts[1] + self.ragged_wishes[1] if "ragged" in names else 0
        chat = self.chat_system + self.chat_turns * (self.chat_user + self.chat_answer) if "chat" in names else 0
        many = self.many_prompts[1] + self.many_wishes[1] if "many" in names else 0
        return max(ragged, chat, many, self.context + self.new_tokens)


def cases(names: list[str], sizes: Sizes, vocabulary: int, seed: int) -> list[GenerateCase]:
    """The named cases, in the order of `NAMES`; each draws from the seed alone, whichever others are named."""
    made = []
    for name in NAMES:
        if name not in names:
            continue
        for batch in sizes.batches if name in ("uniform", "padded") else (0,):
            rng = np.random.default_rng([seed, NAMES.index(name), batch])
            made.append(_case(name, sizes, batch, vocabulary, rng))
    return made


def _case(name: str, sizes: Sizes, batch: int, vocabulary: int, rng: np.random.Generator) -> GenerateCase:
    context, new = sizes.context, sizes.new_tokens

    def prompts(lengths: list[int]) -> list[list[int]]:
        # 0 is the pad token.
        return [rng.integers(1, vocabulary, size=length).tolist() for length in lengths]

    if name == "uniform":
        return GenerateCase(f"{batch} x {context}", prompts([context] * batch), [new] * batch)
    if name == "padded":
        shorter = rng.integers(max(1, context // 2), context, size=batch - 1, endpoint=True).tolist()
        return GenerateCase(f"{batch} x {max(1, context // 2)}-{context}", prompts([context, *shorter]), [new] * batch)
    if name == "ragged":
        lengths, wishes = _ragged(rng, sizes.ragged_rows, sizes.ragged_prompts, sizes.ragged_wishes)
        shortest, longest = sizes.ragged_prompts
        return GenerateCase(f"ragged, {sizes.ragged_rows} x {shortest}-{longest}", prompts(lengths), wishes)
    if name == "many":
        lengths, wishes = _ragged(rng, sizes.many_requests, sizes.many_prompts, sizes.many_wishes)
        title = f"{sizes.many_requests} requests, {sizes.many_fit} fit"
        return GenerateCase(title, prompts(lengths), wishes, fit=sizes.many_fit)
    if name == "beams":
        return GenerateCase(
            f"{sizes.beams} beams, {context}", prompts([context]), [new], options={"num_beams": sizes.beams}
        )
    if name == "chat":
        first, *turns = prompts([sizes.chat_system + sizes.chat_user, *[sizes.chat_user] * (sizes.chat_turns - 1)])
        return GenerateCase(f"{sizes.chat_turns} turns over {sizes.chat_system}", [first], [sizes.chat_answer], turns)
    if name == "samples":
        options = {"do_sample": True, "num_return_sequences": sizes.samples}
        return GenerateCase(f"{sizes.samples} samples, {context}", prompts([context]), [new], options=options)
    return GenerateCase(f"1 x {context}", prompts([context]), [new])


def _ragged(
    rng: np.random.Generator, rows: int, prompts: tuple[int, int], wishes: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Lengths of prompts, uniform in the logarithm: many short ones, few long ones; and what is to follow each."""
    drawn = np.exp(rng.uniform(np.log(prompts[0]), np.log(prompts[1] + 1), size=rows)).astype(int)
    return np.clip(drawn, *prompts).tolist(), rng.integers(*wishes, size=rows, endpoint=True).tolist()
