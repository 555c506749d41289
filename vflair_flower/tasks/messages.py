"""Made-up messages of customers to a company's support desk, with planted secrets: the data set of the examples.

No person, company, account or order in it exists, so it can be shown, leaked and attacked without harm to anybody.
It is not a measure of quality on real text; use a real data set for that.  `wording.py` holds the words.

What to expect on the test split: the largest of the twelve intents is 13 % of it, naive Bayes on words gets about
81 %, a small pretrained encoder that is fine-tuned about 97 %.  What it misses are the messages that could be either of
two intents (about one in eighteen), which nobody can know.
Invariant: the same arguments give the same rows; no text comes twice; every secret stands word for word in its row.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vflair_flower.errors import DataError
from vflair_flower.tasks import wording
from vflair_flower.tasks.dataset import SPLITS, Row, Secret, SecretKind, TextDataset

INTENT_NAMES = tuple(intent.name for intent in wording.INTENTS)

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_QUESTION = re.compile(
    r"(?:are|can|could|does|did|has|how|is|what|when|where|which|who|why|until|from when) ", re.IGNORECASE
)
# About what a word piece tokenizer makes of a text; made-up names fall into pieces of three letters or so.
_PIECES = re.compile(r"[A-Za-z]{1,5}|\d\d?|[^\w\s]")
_MOST_PIECES = 37
_SHARE_BETWEEN_TWO = 0.06
_SHARE_GENERAL = 0.3
_SHARE_DISTRACTED = 0.42
_TRIES_PER_ROW = 200


def generate_messages(
    *, num_train: int = 2400, num_validation: int = 400, num_test: int = 800, num_companies: int = 6, seed: int = 0
) -> TextDataset:
    """Make up a data set of support messages.

    Each split has a random stream of its own and shares only the list of used texts and numbers, so a longer train
    split leaves validation and test as they were.

    Parameters
    ----------
    num_train, num_validation, num_test : int
        Rows per split. Train needs 24 at least, so that every intent occurs; `num_test` may be 0.
    num_companies : int
        How many made-up companies the messages are addressed to.
    seed : int
        The same seed gives the same data set.

    Returns
    -------
    TextDataset
        With `secrets`: every account number, order number, person and sum of money, and the row that holds it.

    Raises
    ------
    DataError
        A number is out of range, or so many rows are asked for that texts would repeat.

    Examples
    --------
    >>> data = generate_messages(num_train=24, num_validation=1, num_test=0)
    >>> secret = data.secrets[0]
    >>> any(secret.value in row.text for row in data.train if row.id == secret.row_id)
    True
    """
    limits = {
        "num_train": (num_train, 2 * len(INTENT_NAMES)),
        "num_validation": (num_validation, 1),
        "num_test": (num_test, 0),
        "num_companies": (num_companies, 1),
        "seed": (seed, 0),
    }
    for setting, (value, least) in limits.items():
        if value < least:
            raise DataError(f"{setting} is {value}, but the messages need at least {least}. Choose a larger number.")
    companies = _companies(num_companies, random.Random(f"messages|{seed}|companies"))
    desk = _Desk(companies=companies)
    splits: dict[str, tuple[Row, ...]] = {}
    for split, count in (("test", num_test), ("validation", num_validation), ("train", num_train)):
        if count:
            rng = random.Random(f"messages|{seed}|{split}")
            splits[split] = tuple(
                desk.row(label, f"{split}-{index:05d}", rng) for index, label in enumerate(_labels(count, rng))
            )
    in_order = {split: splits[split] for split in SPLITS if split in splits}
    return TextDataset(
        name="messages",
        source=f"messages(seed={seed})",
        label_names=INTENT_NAMES,
        splits=in_order,
        secrets=tuple(secret for rows in in_order.values() for row in rows for secret in desk.secrets[row.id]),
    )


def account_is_valid(account: str) -> bool:
    """Whether the check digits of an account number such as ``"AC-4821-7730-19"`` fit (ISO 7064 MOD 97-10)."""
    match = re.fullmatch(r"AC-(\d{4})-(\d{4})-(\d{2})", account)
    return match is not None and int("".join(match.groups())) % 97 == 1


def made_up_secret(kind: SecretKind, rng: random.Random) -> str:
    """Return a value of the kind and format of those that are planted; it may be one that stands in a message."""
    makers = {"account": _account, "order": _order, "person": _person, "sum": _sum}
    return makers[kind](rng)


@dataclass(kw_only=True)
class _Desk:
    """Where the messages arrive: remembers which texts and numbers are used, and which secrets stand where."""

    companies: Sequence[str]
    secrets: dict[str, list[Secret]] = field(default_factory=dict)
    used_texts: set[str] = field(default_factory=set)
    used_numbers: set[str] = field(default_factory=set)

    def row(self, label: int, row_id: str, rng: random.Random) -> Row:
        for _ in range(_TRIES_PER_ROW):
            text, secrets = self._filled(_with_typos(_composed(label, rng), rng), row_id, rng)
            same = re.sub(r"[^a-z0-9]", "", text.lower())
            if same not in self.used_texts and len(_PIECES.findall(text)) <= _MOST_PIECES:
                self.used_texts.add(same)
                self.used_numbers.update(secret.value for secret in secrets)
                self.secrets[row_id] = secrets
                return Row(text=text, label=label, id=row_id)
        raise DataError(
            f"No new message was found in {_TRIES_PER_ROW} tries after {len(self.used_texts)} different ones, and no "
            "text may come twice. Ask for fewer rows."
        )

    def _filled(self, pattern: str, row_id: str, rng: random.Random) -> tuple[str, list[Secret]]:
        makers: dict[str, Callable[[], str]] = {
            "account": lambda: self._unused(_account, rng),
            "order": lambda: self._unused(_order, rng),
            "person": lambda: _person(rng),
            "sum": lambda: _sum(rng),
            "company": lambda: rng.choice(self.companies),
        }
        # One value per kind and message: whoever names an order twice means the same order.
        values = {slot: make() for slot, make in makers.items() if f"{{{slot}}}" in pattern}
        text = _SLOT.sub(lambda match: values[match[1]], pattern)
        kinds: tuple[SecretKind, ...] = ("account", "order", "person", "sum")
        return text, [Secret(kind, values[kind], row_id) for kind in kinds if kind in values]

    def _unused(self, make: Callable[[random.Random], str], rng: random.Random) -> str:
        value = make(rng)
        while value in self.used_numbers:
            value = make(rng)
        return value


def _labels(count: int, rng: random.Random) -> list[int]:
    """Exactly the shares of the intents, rounded by largest remainder, in random order."""
    total = sum(intent.share for intent in wording.INTENTS)
    exact = [count * intent.share / total for intent in wording.INTENTS]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda label: (counts[label] - exact[label], label))
    for label in by_remainder[: count - sum(counts)]:
        counts[label] += 1
    labels = [label for label, times in enumerate(counts) for _ in range(times)]
    rng.shuffle(labels)
    return labels


def _composed(label: int, rng: random.Random) -> str:
    """Write a message with its slots still open for company and secrets."""
    sentences = [_core(label, rng)]
    if rng.random() < _SHARE_DISTRACTED:
        other = rng.choice([index for index in range(len(INTENT_NAMES)) if index != label])
        if rng.random() < 0.5:
            sentences.insert(0, _about(other, rng.choice(wording.DISTRACTIONS_BEFORE), rng))
        else:
            sentences.append(_about(other, rng.choice(wording.DISTRACTIONS_AFTER), rng))
    elif rng.random() < 0.4:
        sentences.insert(rng.randint(0, 1), _expanded(rng.choice(wording.DETAILS), rng))
    if rng.random() < 0.35:
        sentences.insert(0, rng.choice(wording.GREETINGS))
    ending = rng.random()
    if ending < 0.25:
        sentences.append(rng.choice(wording.SIGNATURES))
    elif ending < 0.45:
        sentences.append(rng.choice(wording.CLOSINGS))
    return _punctuated(sentences, rng)


def _core(label: int, rng: random.Random) -> str:
    """Return the sentence that carries the intent."""
    name = INTENT_NAMES[label]
    chance = rng.random()
    unclear = [sentence for one, other, sentence in wording.BETWEEN_TWO if name in (one, other)]
    if unclear and chance < _SHARE_BETWEEN_TWO:
        return _expanded(rng.choice(unclear), rng)
    if chance < _SHARE_BETWEEN_TWO + _SHARE_GENERAL:
        return _about(label, rng.choice(wording.GENERAL_ASKS), rng)
    return _expanded(rng.choice(wording.INTENTS[label].asks), rng)


def _about(label: int, pattern: str, rng: random.Random) -> str:
    intent = wording.INTENTS[label]
    pattern = pattern.replace("{wish}", rng.choice(intent.wishes)).replace("{topic}", rng.choice(intent.topics))
    return _expanded(pattern, rng)


def _expanded(pattern: str, rng: random.Random) -> str:
    """Choose among `[a|b]`, innermost first, and fill the slots that hold no secret."""
    while match := _CHOICE.search(pattern):
        pattern = pattern[: match.start()] + rng.choice(match[1].split("|")) + pattern[match.end() :]
    pattern = pattern.replace("{item}", rng.choice(wording.ITEMS)).replace("{days}", rng.choice(wording.DAYS))
    return " ".join(pattern.split())


def _punctuated(sentences: Sequence[str], rng: random.Random) -> str:
    """Join as people do: with stops and capitals, or carelessly with commas or all in small letters."""
    manner = rng.random()
    if manner < 0.15:
        # Slot names are in small letters anyway; secrets are filled in later and keep their capitals.
        return " ".join(sentences).lower()
    if manner < 0.3:
        return _capital(", ".join(sentences))
    return " ".join(_capital(sentence) + _mark(sentence, rng) for sentence in sentences)


def _mark(sentence: str, rng: random.Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(("!", "...", ""))
    return "?" if _QUESTION.match(sentence) else "."


def _capital(sentence: str) -> str:
    return sentence if sentence.startswith("{") else sentence[:1].upper() + sentence[1:]


def _with_typos(pattern: str, rng: random.Random) -> str:
    """Misspell none to two of the longer words; slots are left alone, so secrets stay findable."""
    words = pattern.split(" ")
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        place = rng.randrange(len(words))
        word = words[place]
        if len(word) < 5 or not word.isalpha():
            continue
        at = rng.randrange(1, len(word) - 2)
        words[place] = rng.choice(
            (
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
            )
        )
    return " ".join(words)


def _account(rng: random.Random) -> str:
    number = rng.randrange(10_000_000, 100_000_000)
    check = 98 - number * 100 % 97
    return f"AC-{number // 10_000:04d}-{number % 10_000:04d}-{check:02d}"


def _order(rng: random.Random) -> str:
    return f"#{rng.randrange(100_000, 1_000_000)}"


def _sum(rng: random.Random) -> str:
    amount = rng.randrange(5, 900)
    cents = rng.choice(("", "", f".{rng.randrange(100):02d}"))
    return rng.choice((f"{amount}{cents} euros", f"€{amount}{cents}", f"{amount}{cents} EUR"))


def _person(rng: random.Random) -> str:
    return f"{_joined(wording.FIRST_SYLLABLES, rng)} {_joined(wording.LAST_SYLLABLES, rng)}"


def _joined(syllables: Sequence[Sequence[str]], rng: random.Random) -> str:
    return "".join(rng.choice(choices) for choices in syllables)


def _companies(count: int, rng: random.Random) -> list[str]:
    heads, tails = wording.COMPANY_SYLLABLES
    names = [head + tail for head in heads for tail in tails]
    if count > len(names):
        raise DataError(f"num_companies is {count}, but there are {len(names)} names. Choose at most {len(names)}.")
    return rng.sample(names, count)
