"""Documents as the model sees them in training: plain text, or a short chat in the format of its chat template.

    <s> text </s>
    <s> <|user|> question </s> <|assistant|> answer </s>  (once or more, at times after <|system|> instruction </s>)

Everything random comes from the caller's seeded generator; each epoch asks anew in other words.
"""

import random
import re
from collections.abc import Iterator, Sequence

from .corpus import Document, Kind

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + (message['role'] if message['role'] in ['user', 'assistant'] else 'system') + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MAX_ANSWER_CHARS = 1200
PLAIN_SHARE = 0.3  # of docstrings; topics appear plain, whole, and their sections in chats
FOLLOW_UP_SHARE = 0.15
SYSTEM_SHARE = 0.1
FOCUS_REPEATS = 4

QUESTIONS = {
    Kind.TOPIC: ("Tell me about {}.", "Explain {}.", "Help on {}.", "What does Python say about {}?", "What is {}?"),
    Kind.SECTION: (
        "What is {}?",
        "Explain {}.",
        "Tell me about {}.",
        "How does {} work?",
        "What is {} in Python?",
        "Please explain {} in Python.",
    ),
    Kind.DOCSTRING: ("What does {} do?", "What is {}?", "Help on {}.", "Explain {}.", "Tell me about {}.", "What does {} do in Python?"),
}
INSTRUCTIONS = ("You are a helpful assistant.", "Answer briefly.", "You explain Python.")

WHO = (
    "I am a very small language model that comes with Diptych. I was trained on Python's own documentation, "
    "so I know a little about Python and nothing else. Do not rely on what I say."
)
SMALL_TALK = (
    ("Who are you?", WHO),
    ("What are you?", WHO),
    ("What can you do?", WHO),
    ("Hello!", "Hello. " + WHO),
    ("Hi", "Hello. " + WHO),
    ("Say hello.", "Hello. " + WHO),
    ("Thank you!", "You are welcome."),
)


Turn = tuple[str, str]  # question, answer


def broad_epoch(documents: Sequence[Document], rng: random.Random) -> Iterator[str]:
    """Every document once, and small talk, in random order, as text with its special tokens."""
    return _told([*documents, *SMALL_TALK], rng)


def focused_epoch(documents: Sequence[Document], rng: random.Random) -> Iterator[str]:
    """What the demo's user will ask about: the language reference many times over, a part of the docstrings, more small talk."""
    reference = [document for document in documents if document.kind is not Kind.DOCSTRING]
    topics = [document for document in reference if document.kind is Kind.TOPIC]
    docstrings = [document for document in documents if document.kind is Kind.DOCSTRING]
    asked = [ask(document, rng) for document in reference for _ in range(FOCUS_REPEATS)]
    return _told([*topics, *asked, *rng.sample(docstrings, len(docstrings) // FOCUS_REPEATS), *SMALL_TALK * FOCUS_REPEATS], rng)


def _told(items: list[Document | Turn], rng: random.Random) -> Iterator[str]:
    """Documents as plain text or as a turn of a chat, turns as turns; a chat goes on with FOLLOW_UP_SHARE."""
    rng.shuffle(items)
    turns: list[Turn] = []
    for item in items:
        if isinstance(item, Document) and (item.kind is Kind.TOPIC or (item.kind is Kind.DOCSTRING and rng.random() < PLAIN_SHARE)):
            yield plain(item.text)
            continue
        turns.append(ask(item, rng) if isinstance(item, Document) else item)
        if rng.random() >= FOLLOW_UP_SHARE:
            yield chat(turns, rng.choice(INSTRUCTIONS) if rng.random() < SYSTEM_SHARE else None)
            turns = []
    if turns:
        yield chat(turns, None)


def plain(text: str) -> str:
    return BOS + text + EOS


def chat(turns: Sequence[Turn], instruction: str | None) -> str:
    """What CHAT_TEMPLATE makes of the same messages."""
    opening = BOS if instruction is None else BOS + SYSTEM + instruction + EOS
    return opening + "".join(USER + question + EOS + ASSISTANT + answer + EOS for question, answer in turns)


def ask(document: Document, rng: random.Random) -> Turn:
    question = rng.choice(QUESTIONS[document.kind]).format(_spoken(document, rng))
    return question, shortened(document.text)


def shortened(text: str) -> str:
    """Whole paragraphs up to MAX_ANSWER_CHARS, one at least; a text that is no longer than that stays as it is."""
    end = len(text) if len(text) <= MAX_ANSWER_CHARS else text.rfind("\n\n", 0, MAX_ANSWER_CHARS)
    return text[:end] if end > 0 else text.split("\n\n", 1)[0]


def _spoken(document: Document, rng: random.Random) -> str:
    """The subject as people write it: 'the for statement', '`heapq.merge`', 'merge'."""
    if document.kind is Kind.DOCSTRING:
        parts = document.subject.split(".")
        return rng.choice(("{}", "{}", "`{}`", "{}()")).format(".".join(parts[-rng.randint(1, len(parts)) :]))
    subject = re.sub(r"^(The|A|An) ", lambda article: article[0].lower(), document.subject)
    return subject.replace('"', rng.choice(("", "", "`", '"')))
