"""Two tasks of random tokens that teach a small model to copy and to choose, before it meets a function.

The base model has read too little to have learned to find a token again and to copy what follows it. Without that, the
choice among functions stays at chance, however long the model is tuned on conversations.
"""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from demo_pair.queries import HEADERS
from demo_pair.tokenizer import ASSISTANT, TURN_END, USER

Row = tuple[list[int], list[float]]  # token ids, and the weight of the loss on each
# The first token of a name is the choice. It is one token in some seventy of an answer.
NAME_WEIGHT = 5.0


@dataclass(frozen=True)
class WarmUp:
    """How much of each task, and how fast."""

    steps: int
    choices: int = 48
    repetitions: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 20


class CopyingTasks:
    """Draws rows of the two tasks. Weight zero marks what cannot be known: random tokens seen for the first time."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng = random.Random(seed)
        vocabulary = tokenizer.get_vocab().items()
        self.words = sorted(i for token, i in vocabulary if token[0] == "Ġ" and token[1:].isalpha() and len(token) > 2)
        self.pieces = sorted(i for token, i in vocabulary if token.isascii() and token.isalpha())
        self.user, self.assistant, self.end = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, TURN_END])
        headers = [f".\n{header}\n" for header in HEADERS]
        texts = ["#", "\n", "(x)\n", '{"name": "', '",']
        ids = tokenizer([*headers, *texts], add_special_tokens=False)["input_ids"]
        self.headers = ids[: len(headers)]
        self.comment, self.line_end, self.parameters, self.opening, self.closing = ids[len(headers) :]

    def repetition(self) -> Row:
        """A random string, twice."""
        source = self.words if self.rng.random() < 0.5 else self.pieces
        string = self.rng.choices(source, k=self.rng.randint(6, 14))
        return string * 2, [0.0] * (len(string) + 1) + [1.0] * (len(string) - 1)

    def choice(self, distractors: int) -> Row:
        """Names under descriptions, both of random tokens, and a request that leaves words of one description out."""
        rng = self.rng
        length = rng.randint(3, 5)
        descriptions = [rng.sample(self.words, length) for _ in range(distractors + 1)]
        names = [rng.choices(self.pieces, k=rng.randint(1, 3)) for _ in descriptions]
        request = [word for word in descriptions[0] if rng.random() > 0.1] or descriptions[0]
        ids = [self.user, *request, *rng.choice(self.headers)]
        weights = [0.0] * len(ids)
        for place in rng.sample(range(len(names)), len(names)):
            described = descriptions[place]
            ids += [*self.comment, *described, *self.line_end, *names[place], *self.parameters]
            known = [float(place == 0 and word in request) for word in described[1:]]
            weights += [0.0] * (len(self.comment) + 1) + known
            weights += [0.0] * (len(ids) - len(weights))
        ids += [self.end, self.assistant, *self.opening]
        weights += [0.0] * (len(ids) - len(weights))
        ids += [*names[0], *self.closing]
        weights += [NAME_WEIGHT] + [1.0] * (len(ids) - len(weights) - 1)
        return ids, weights

    def batch(self, size: WarmUp, most_distractors: int) -> list[Row]:
        """The rows of a step."""
        choices = [self.choice(self.rng.randint(1, most_distractors)) for _ in range(size.choices)]
        return choices + [self.repetition() for _ in range(size.repetitions)]
