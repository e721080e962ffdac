"""Argument values by what a parameter's name and default suggest: paths, numbers, text, flags and lists."""

import random

from demo_pair.functions import Parameter

STEMS = (
    "report", "notes", "data", "results", "config", "backup", "index", "main", "setup", "users", "orders", "image",
    "sales", "draft", "events", "access", "error", "summary", "archive", "budget", "letters", "photos", "music", "test",
    "build", "output", "input", "cache", "model", "table", "sensor", "survey", "invoice", "recipe", "journal", "map",
)  # fmt: skip
EXTENSIONS = (".txt", ".csv", ".json", ".py", ".log", ".zip", ".html", ".xml", ".bin", ".cfg")
FOLDERS = ("tmp", "home", "data", "var", "src", "docs", "logs", "work", "build", "lib", "static", "old")
WORDS = (
    "alpha", "beta", "gamma", "delta", "red", "green", "blue", "yellow", "left", "right", "first", "last", "open",
    "close", "north", "south", "apple", "pear", "plum", "lemon", "river", "stone", "cloud", "light", "paper", "letter",
    "number", "value", "title", "author", "color", "size", "width", "weight", "city", "street", "country", "server",
    "client", "worker", "parent", "child", "start", "stop", "hello", "world", "simple", "quick", "small", "large",
)  # fmt: skip
PEOPLE = ("alice", "bob", "carol", "david", "eve", "frank", "grace", "henry", "irene", "jack", "kate", "peter", "mary")
HOSTS = ("example.org", "example.com", "localhost", "mail.example.org", "python.org", "files.example.com")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FLAGS = _names("verbose dry_run strict force recursive quotetabs header forceload adaptive blocking")
NUMBERS = _names(
    "n i x y x1 y1 x2 y2 b1 index index1 index2 limit size timeout port level lineno width height count first last "
    "year month day weekday number start stop end delay when time priority nbytes offset position pos indent "
    "length angle radius distance total depth theyear themonth colwidth spacing interval denominator max_denominator "
    "code status maxlen flags mask signum pid fd whence rest lo hi mu xbar sigma compresslevel repeat line_number "
    "amount ratio theweek mode_bits step factor w h c m"
)
LISTS = _names(
    "data sequence list args items values iterable heap names members lines argv options extensions plist population "
    "weights rows attrs argument cols elements numbers choices seq"
)
PATHS = _names(
    "path file filename src dst source target root dir folder directory arcname archive fp pathname targetpath dirname "
    "infile outfile input output script module_path fullname entrypath root_dir inputfile name_or_path base_dir"
)
TEXTS = _names("text string s msg message line title prompt sentence data_string comment description doc sample")
USERS = _names("user username owner group login account")
NETWORK = _names("host hostname server address addr url domain netloc")

Value = str | int | bool | list[int] | list[str]


def _integer(rng: random.Random) -> int:
    return rng.choice((rng.randint(0, 9), rng.randint(10, 99), rng.randint(100, 999), rng.choice((1024, 2020, 8080))))


def _path(rng: random.Random) -> str:
    name = rng.choice(STEMS) + rng.choice(EXTENSIONS)
    return rng.choice((name, name, f"{rng.choice(FOLDERS)}/{name}", f"/{rng.choice(FOLDERS)}/{rng.choice(STEMS)}"))


def _list(rng: random.Random) -> list[int] | list[str]:
    length = rng.randint(2, 3)
    return rng.sample(WORDS, length) if rng.random() < 0.4 else [rng.randint(0, 99) for _ in range(length)]


def value_for(parameter: Parameter, rng: random.Random) -> Value:
    """A value that a user could plausibly pass to `parameter`."""
    name, default = parameter.name.lower(), parameter.default or ""
    if default in ("True", "False") or name in FLAGS:
        return default != "True" if rng.random() < 0.8 else default == "True"
    if default.lstrip("-").isdigit() or name in NUMBERS:
        return _integer(rng)
    if name in LISTS:
        return _list(rng)
    if name in PATHS or name.endswith(("file", "path", "dir")):
        return _path(rng)
    if name in TEXTS:
        return " ".join(rng.sample(WORDS, rng.randint(1, 2)))
    if name in USERS:
        return rng.choice(PEOPLE)
    if name in NETWORK:
        return rng.choice(HOSTS)
    return rng.choice(WORDS) if rng.random() < 0.8 else f"{rng.choice(WORDS)}_{rng.choice(WORDS)}"
