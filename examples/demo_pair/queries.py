"""Function-calling queries made from docstrings: a request, a few functions to choose from, and the right call."""

import json
import random
from dataclasses import dataclass, replace

from demo_pair.functions import Function, Parameter, uncapitalised
from demo_pair.values import Value, value_for

DOMAIN = "function_calling"
MAX_ARGUMENTS = 3
MAX_PROMPT_CHARACTERS = 800


def _words(text: str) -> list[str]:
    return text.split()


ANSWER_OPENING = '{"tool_calls": [{"type": "function", "function": {"name": "'
HEADERS = ("Functions:", "Available functions:", "You can call:", "Tools:", "Choose one function:")
# Opening words of docstrings that make a request when "please" is put before them, with other words for them.
VERBS: dict[str, tuple[str, ...]] = {
    "return": ("return", "get", "give me"),
    "create": ("create", "make"),
    "get": ("get", "return"),
    "remove": ("remove", "delete"),
    "print": ("print", "show"),
    "find": ("find", "look up"),
    "convert": ("convert", "turn"),
    "check": ("check", "find out"),
} | {
    verb: (verb,)
    for verb in _words(
        "add append apply assert begin bind build call change clear close compare compile compute construct copy "
        "decide decode delete determine discard display do draw emit encode enter escape estimate execute extract "
        "fetch fill format generate handle indicate initialize insert install invoke iterate join list load log "
        "make mark move open parse pop process push put query quote raise read recursively register reindent "
        "render replace report reset run search select send separate set show sort split start stop store strip "
        "switch test transform unregister update validate wait walk write"
    )
}
REQUEST_FRAMES = (
    "Please {request} with {arguments}.",
    "I want to {request}. Use {arguments}.",
    "Can you {request}? Use {arguments}.",
    "With {arguments}, {request}.",
    "{request}, with {arguments}.",
    "Find the function that can {request}, and pass {arguments}.",
    "I need to {request}; take {arguments}.",
    "{request}. Set {arguments}.",
)
STATEMENT_FRAMES = (
    "Task: {sentence}. Use {arguments}.",
    "{sentence}, with {arguments}.",
    "Call this: {sentence}. Set {arguments}.",
    "With {arguments}, do this: {sentence}.",
    "I need this: {sentence}. Take {arguments}.",
)
# The quotes keep a parameter's name the same tokens here, in the signature and in the answer.
ARGUMENT_FRAMES = (
    "`{name}` {value}",
    "`{name}`={value}",
    "`{name}` set to {value}",
    "`{name}` as {value}",
    "`{name}`: {value}",
)


@dataclass(frozen=True)
class Query:
    """What a user asks and the one right answer."""

    prompt: str
    module: str
    function: str
    reference: str

    def row(self) -> dict[str, object]:
        """The query as a line of the shipped JSONL files."""
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "domain": DOMAIN,
            "module": self.module,
            "function": self.function,
            "reference": self.reference,
        }

    def messages(self) -> list[dict[str, str]]:
        """The query and its answer as a conversation."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.reference}]


def render_call(name: str, arguments: dict[str, Value]) -> str:
    """The only serialisation of a call that counts as an answer. It begins with `ANSWER_OPENING`."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return json.dumps({"tool_calls": [call], "finish_reason": "tool_calls"})


def parse_call(text: str) -> tuple[str, dict[str, object]] | None:
    """Name and arguments of an answer, or None where it is not JSON of the right shape."""
    try:
        answer = json.loads(text)
        (call,) = answer["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    except (ValueError, KeyError, TypeError):
        return None
    right = answer.keys() == {"tool_calls", "finish_reason"} and call.keys() == {"type", "function"}
    return (name, arguments) if right and isinstance(name, str) and isinstance(arguments, dict) else None


def _request(sentence: str, rng: random.Random) -> tuple[str, bool]:
    """The docstring's sentence as an order ("Returns the size" becomes "get the size"), and whether it is one."""
    first, _, rest = sentence.partition(" ")
    verb = first.lower()
    for form in (verb, verb.removesuffix("s"), verb.removesuffix("es")):
        if form in VERBS:
            return f"{rng.choice(VERBS[form])} {rest}", True
    return uncapitalised(sentence), False


def _shortened(sentence: str, rng: random.Random) -> str:
    """Users do not quote: sometimes a clause or some words are missing."""
    if rng.random() < 0.3:
        sentence = sentence.split(",")[0]
    words = sentence.split()
    kept = [word for place, word in enumerate(words) if place == 0 or rng.random() > 0.06]
    return " ".join(kept if len(kept) >= 3 else words)


def _chosen_arguments(function: Function, rng: random.Random) -> dict[str, Value]:
    """Every required argument and some optional ones, in the signature's order."""
    optional = [p for p in function.parameters if p.default is not None]
    required = [p for p in function.parameters if p.default is None]
    room = MAX_ARGUMENTS - len(required)
    count = min(len(optional), room, rng.choice((0, 0, 1, 1, 2)))
    picked = set(rng.sample(optional, max(count, 0 if required else 1)))
    return {p.name: value_for(p, rng) for p in function.parameters if p.default is None or p in picked}


def make_query(function: Function, distractors: list[Function], rng: random.Random) -> Query:
    """One query for `function`, to be told from `distractors`."""
    candidates = [function, *distractors]
    rng.shuffle(candidates)
    arguments = _chosen_arguments(function, rng)
    frame = rng.choice(ARGUMENT_FRAMES)
    mentions = [frame.format(name=name, value=json.dumps(value)) for name, value in arguments.items()]
    listed = " and ".join(part for part in (", ".join(mentions[:-1]), mentions[-1]) if part)
    request, is_order = _request(_shortened(function.sentence, rng), rng)
    if is_order:
        text = rng.choice(REQUEST_FRAMES).format(request=request, arguments=listed)
    else:
        text = rng.choice(STATEMENT_FRAMES).format(sentence=request, arguments=listed)
    # The request comes first: what is listed after it can be compared with it as it is read.
    lines = [text[0].upper() + text[1:], rng.choice(HEADERS), *(candidate.listing for candidate in candidates)]
    return Query("\n".join(lines), function.module, function.name, render_call(function.name, arguments))


def usable(functions: list[Function]) -> list[Function]:
    """Functions that a query can be made for."""
    return [f for f in functions if sum(p.default is None for p in f.parameters) <= MAX_ARGUMENTS]


def _distractors(
    function: Function, pool: list[Function], counts: tuple[int, ...], rng: random.Random
) -> list[Function]:
    """Other functions, as many as one of `counts` says, one of the same module where there is one."""
    others = [f for f in rng.sample(pool, min(40, len(pool))) if f.name != function.name]
    siblings = [f for f in others if f.module == function.module]
    picked = {f.name: f for f in (*siblings[:1], *others)}
    return list(picked.values())[: rng.choice(counts)]


def _disguised(functions: list[Function], pool: list[Function], rng: random.Random) -> list[Function]:
    """The same descriptions over other functions' names and parameters, which so must be read, not remembered."""
    names = rng.sample(sorted({f.name for f in pool}), len(functions))
    disguised = []
    for function, name in zip(functions, names, strict=True):
        others = list(dict.fromkeys(p.name for f in rng.sample(pool, 6) for p in f.parameters))
        rng.shuffle(others)
        parameters = tuple(Parameter(other, p.default) for other, p in zip(others, function.parameters, strict=False))
        disguised.append(replace(function, name=name, parameters=parameters))
    return disguised


def make_queries(
    functions: list[Function],
    count: int,
    seed: int,
    *,
    disguise_share: float = 0.0,
    distractor_counts: tuple[int, ...] = (2, 2, 3),
) -> list[Query]:
    """`count` different queries, the functions taking turns.

    The keywords are for tuning the target.
    """
    rng = random.Random(seed)
    pool = usable(functions)
    queries: dict[str, Query] = {}
    order: list[Function] = []
    while len(queries) < count:
        order = order or rng.sample(pool, len(pool))
        chosen = order.pop()
        candidates = [chosen, *_distractors(chosen, pool, distractor_counts, rng)]
        if rng.random() < disguise_share:
            candidates = _disguised(candidates, pool, rng)
        query = make_query(candidates[0], candidates[1:], rng)
        if len(query.prompt) <= MAX_PROMPT_CHARACTERS:
            queries.setdefault(query.prompt, query)
    return list(queries.values())
