"""The simulator's prompts: seven families of traffic that differ in words, form and length, and follow-up turns.

A prompt is an opener, some details and a request of one of four levels, each from a bank of sentences that templates
and word lists fill in once; assembling one is then a handful of vectorised look-ups.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import polars as pl

LEVELS = 4
_BANK = 2_000
# Slot to its words; a word may hold slots itself. {n} is a small number, {ref} a long one.
_LISTS = {
    "name": "Amara, Benedikt, Chiara, Dmitri, Elif, Farid, Greta, Hiroshi, Ines, Jonas, Kofi, Leila, Mateo, Nadia",
    "city": "Lyon, Porto, Gdansk, Bergen, Turin, Leeds, Malmö, Graz, Split, Cork, Ghent, Tartu, Basel, Vigo, Aarhus",
    "month": "January, February, March, April, May, June, July, August, September, October, November, December",
    "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "colour": "black, white, teal, crimson, sand, olive, navy, amber, graphite",
    "house": "Halden, Vostra, Quillon, Merrow, Astley, Brandt, Okoro, Silva, Penrose, Tamm",
    "firm": "{house} Ltd, {house} GmbH, {house} SA, {house} BV, {house} & {house}",
    # support
    "product": "kettle, headphones, standing desk, air fryer, router, bicycle light, rucksack, coffee grinder, jacket, "
    "tablet stand, blender, garden hose, baby monitor, doorbell camera, mattress, e-reader",
    "fault": "will not switch on, arrived with a crack, makes a grinding noise, keeps losing its connection, smells of "
    "burnt plastic, is the wrong size, leaks from the bottom, came without its charger, shows error {ref}",
    "mood": "I am rather disappointed, this is the third time, no hurry, I need it by {day}, "
    "my patience is running out, thanks in advance, sorry to bother you",
    # code
    "table": "orders, customers, invoices, sessions, payments, shipments, employees, sensors, tickets, subscriptions",
    "column": "created_at, total_cents, customer_id, status, region, unit_price, closed_at, parent_id, score, attempts",
    "language": "Python, Rust, Go, TypeScript, Kotlin, Java, C#, Ruby",
    "structure": "linked list, binary heap, LRU cache, trie, ring buffer, hash map, priority queue, bloom filter",
    "defect": "a deadlock, an off-by-one error, a memory leak, a race condition, a stack overflow, a slow query",
    # extraction
    "document": "invoice, delivery note, job posting, lab report, purchase order, insurance claim, boarding pass",
    "field": "vendor, due date, net amount, VAT number, IBAN, line items, currency, reference, signatory, unit",
    "unit": "kg, pcs, litres, boxes, metres, hours, pallets",
    # translation
    "tongue": "German, French, Spanish, Italian, Polish, Dutch, Portuguese, Swedish, Turkish, Japanese",
    # legal
    "clause": "limitation of liability, indemnification, governing law, termination for convenience, assignment, "
    "confidentiality, force majeure, data protection, non-solicitation, audit rights, service credits",
    "statute": "the Sale of Goods Act, Regulation (EU) 2016/679, the Companies Act, Directive 93/13/EEC",
    # maths
    "thing": "pencils, apples, marbles, tickets, stamps, bricks, cupcakes, beads, notebooks, tiles",
    "vehicle": "train, cyclist, ferry, lorry, drone, tram",
    # chat
    "topic": "sourdough bread, stargazing, jazz guitar, the tides, board games, old maps, running shoes, houseplants, "
    "film noir, mushrooms, chess openings, bird song, lighthouses, origami, train journeys, coral reefs",
    "feeling": "cheerful, tired, curious, bored, nostalgic, restless, hopeful, puzzled",
}
_WORDS = {slot: words.split(", ") for slot, words in _LISTS.items()}


@dataclass(frozen=True)
class Family:
    """Templates of one family: openers, details, requests by level, and between how many details a prompt has."""

    name: str
    openers: tuple[str, ...]
    details: tuple[str, ...]
    asks: tuple[tuple[str, ...], ...]
    length: tuple[int, int]
    joint: str = " "


FAMILIES = (
    Family(
        "support",
        (
            "Hello, {name} here, order number {ref}.",
            "Hi, I bought a {colour} {product} from you in {month}.",
            "Good morning, customer {ref} writing from {city}.",
            "To the service team: my {product} (ref {ref}) {fault}.",
        ),
        (
            "The {product} {fault} since {day}.",
            "I already sent a photo on {day}; {mood}.",
            "Your colleague {name} promised a call back in {month}.",
            "I paid {ref} by card, and the {colour} one was out of stock.",
            "The parcel went to {city} instead; {mood}.",
        ),
        (
            ("Where is my parcel?", "How do I reset my password?", "Can I return the {product}?"),
            (
                "Please change the delivery address to {city} and confirm it.",
                "Which {product} would suit {name} better?",
            ),
            (
                "Please explain each charge on bill {ref} and say which of them is a mistake.",
                "Compare replacing the {product} with repairing it, with costs and dates for both.",
            ),
            (
                "Two of your agents said opposite things about the warranty: work out from the terms of {month} which "
                "of them applies, and write a reply that settles the refund, the voucher and the {product}.",
                "Reconcile the three partial refunds with bill {ref}, allow for the voucher, justify the rest.",
            ),
        ),
        (0, 4),
    ),
    Family(
        "code",
        (
            "We run PostgreSQL with a table {table}({column}, {column}, {column}).",
            "In our {language} service there is a module {table}_{column}.",
            "Given this {language} snippet:\nfunc load_{table}(id, limit={ref})",
            "Schema: {table}.{column} references {table}.{column}.",
        ),
        (
            "It holds about {ref} rows and grows daily.",
            "Tests for {column} fail with code {ref}.",
            "def fetch_{table}({column}): return [r.{column} for r in {table} if r.{column} > {ref}]",
            "SELECT {column}, count(*) FROM {table} WHERE {column} < {ref} GROUP BY {column};",
            "The {structure} is shared between threads.",
        ),
        (
            ("List all rows of {table} where {column} is above {ref}.", "Rename {column} to {column} everywhere."),
            ("Write a query for the ten largest {column} per {column}.", "Add a unit test for the {structure}."),
            (
                "Find {defect} in it and propose a patch that keeps the interface.",
                "Rewrite it with window functions so that {column} is a running total over {column}.",
            ),
            (
                "Implement a lock-free {structure} in {language} with a proof of linearisability, and migrate {table} "
                "without downtime.",
                "Write a recursive common table expression that finds cycles through {column}, bounded at depth {n}, "
                "and explain the plan under serialisable isolation.",
            ),
        ),
        (0, 5),
        "\n",
    ),
    Family(
        "extraction",
        (
            "{document} no. {ref}, {firm}, {city}",
            "Scanned {document}, page {n}, received {day}:",
            "Text of a {document} from {firm}:",
        ),
        (
            "{field}: {n} {unit}",
            "{field}: {firm}, attn. {name}, {city}",
            "pos. {n}: {product}, {colour}, {n} {unit} at {n}.{n} EUR",
            "{field} / {field}: {month} {n}",
            "contact: {name}, tel. {ref} {n}",
        ),
        (
            ("Return JSON with the {field}.", "Give me the {field} as a JSON string."),
            ("Return a JSON object with {field}, {field} and {field}; use null where absent.",),
            ("Return JSON with the line items as an array of objects with quantity and {field}, sorted by price.",),
            (
                "Return nested JSON that follows the schema of our {document}: reconcile the totals, convert every "
                "amount to cents, and list each contradiction between {field} and {field} with its position.",
            ),
        ),
        (3, 10),
        "\n",
    ),
    Family(
        "translation",
        ("Translate into {tongue}:", "Please put this into natural {tongue}:", "{tongue} version, please:"),
        (
            "The meeting in {city} has been moved to {day}.",
            "Der Zug nach {city} fährt heute leider erst um {n} Uhr.",
            "Nous avons reçu votre {colour} colis en {month}, merci beaucoup à {name}.",
            "El informe de {firm} llegó tarde, según dijo {name} el {day}.",
            "Our {product} comes in {colour} and ships within {n} days.",
            "La réunion prévue à {city} est reportée; {name} préviendra {firm}.",
        ),
        (
            ("Keep it simple.", "A plain translation will do."),
            ("Keep a friendly tone for {name}.", "Use the formal form of address."),
            ("Keep the puns working and adapt the idioms for readers in {city}.",),
            (
                "Preserve metre and rhyme, keep the legal register of {statute}, and annotate every untranslatable "
                "idiom with two alternatives.",
            ),
        ),
        (1, 5),
    ),
    Family(
        "legal",
        (
            "AGREEMENT between {firm} and {firm}, dated {n} {month}.",
            "Amendment no. {n}, ref. {ref}, to the master services agreement of {firm}.",
            "Lease of the premises at {city}, landlord {firm}.",
        ),
        (
            "Section {n} ({clause}): neither party shall be liable beyond the fees of the preceding {n} months, save "
            "where {statute} provides otherwise.",
            "The supplier shall, subject to section {n}, hold {firm} harmless from all claims arising out of {clause}.",
            "Notwithstanding the foregoing, {clause} survives for {n} years and is governed by the courts of {city}.",
            "Either party may give {n} days' written notice; {clause} and {clause} remain in force until settled.",
            "For the purposes of {clause}, affiliate means any entity that controls, or is controlled by, {firm}.",
        ),
        (
            ("Summarise this in two sentences.", "Who are the parties?"),
            ("List the obligations of {firm} as bullet points.", "Summarise the {clause} in plain words."),
            ("Compare the {clause} with the {clause} and name the risks for {firm}.",),
            (
                "Advise whether the {clause} is enforceable under {statute} in two jurisdictions, resolve the conflict "
                "between sections {n} and {n}, and redraft both.",
            ),
        ),
        (4, 9),
    ),
    Family(
        "maths",
        (
            "{name} has {n} {thing}.",
            "A {vehicle} leaves {city} at {n} km/h.",
            "In a class of {n} pupils, {name} counts {thing}.",
            "A box holds {n} {colour} {thing} and {n} {colour} ones.",
        ),
        (
            "{name} gives away {n} of them on {day}.",
            "Each costs {n} cents, with {n} percent off.",
            "A second {vehicle} leaves {city} {n} minutes later.",
            "Half of the remaining {thing} are {colour}.",
            "Every {day} the number grows by {n} percent.",
        ),
        (
            ("How many are left?", "What do they cost together?"),
            ("How many {thing} does {name} have on {day}?", "When do they meet?"),
            (
                "What is the probability that two drawn {thing} are both {colour}?",
                "Find the least {n} for which it holds.",
            ),
            (
                "Prove a closed form for the sequence and determine for which integers modulo {n} it vanishes.",
                "Derive the mean and variance of the number of draws without replacement until {n} are {colour}.",
            ),
        ),
        (1, 5),
    ),
    Family(
        "chat",
        (
            "Hey!",
            "I feel {feeling} today.",
            "So, {topic}.",
            "Good evening from {city}.",
            "Random question about {topic}.",
        ),
        (
            "I have been reading about {topic}.",
            "My friend {name} loves {topic}, I prefer {topic}.",
            "It is {day} and I am {feeling}.",
        ),
        (
            ("Tell me something nice.", "What do you think of {topic}?"),
            ("Recommend me {n} things to try about {topic}.", "Plan a {day} around {topic}."),
            ("Argue for and against {topic} as a hobby for {name}.",),
            ("Write a short story in which {topic} and {topic} turn out to be the same, told backwards by {name}.",),
        ),
        (0, 2),
    ),
)
FOLLOW_UPS = (
    "Yes, please.",
    "Yes, do that.",
    "Why? Are you sure about {n}?",
    "Make it shorter.",
    "And for {city}?",
    "Could you redo it for {name}?",
    "That is not what I meant; look at the {day} part again.",
    "Thanks! Now the same with {n}.",
    "Continue.",
)
REPLIES = (
    "Here is a first version for {name}.",
    "Understood. I looked at {n} and found one open point.",
    "Done; shall I go on with {city}?",
    "I can do that. The short answer is {n}.",
)


@dataclass(frozen=True)
class _Bank:
    openers: pl.Series
    details: pl.Series  # index 0 is the empty string: no detail
    asks: tuple[pl.Series, ...]


def _fill(templates: Sequence[str], size: int, rng: random.Random) -> list[str]:
    def word(slot: str) -> str:
        if slot in ("n", "ref"):
            return str(rng.randint(2, 99) if slot == "n" else rng.randint(1_000, 999_999))
        return fill(rng.choice(_WORDS[slot]))

    def fill(template: str) -> str:
        pieces = template.split("{")
        return pieces[0] + "".join(
            word(slot) + rest for slot, _, rest in (piece.partition("}") for piece in pieces[1:])
        )

    return [fill(rng.choice(templates)) for _ in range(size)]


@cache
def _banks() -> tuple[tuple[_Bank, ...], pl.Series, pl.Series]:
    # The banks are the same under every seed; the seed decides what is drawn from them.
    rng = random.Random(20_240_101)
    banks = tuple(
        _Bank(
            pl.Series(_fill(family.openers, _BANK, rng)),
            pl.Series(["", *(family.joint + text for text in _fill(family.details, _BANK, rng))]),
            tuple(pl.Series([family.joint + text for text in _fill(asks, _BANK, rng)]) for asks in family.asks),
        )
        for family in FAMILIES
    )
    return banks, pl.Series(_fill(FOLLOW_UPS, _BANK, rng)), pl.Series(_fill(REPLIES, _BANK, rng))


def draw_prompts(
    family: npt.NDArray[np.int64], level: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[pl.Series, npt.NDArray[np.float64]]:
    """First prompts of the given families and levels, each [n]: (texts, the share of the family's details used [n])."""
    banks = _banks()[0]
    texts, places = [], []
    fullness = np.zeros(len(family))
    for at, (kind, bank) in enumerate(zip(FAMILIES, banks, strict=True)):
        where = np.flatnonzero(family == at)
        n, (least, most) = len(where), kind.length
        count = rng.integers(least, most + 1, n)
        fullness[where] = (count - least) / (most - least)
        pieces = [bank.openers.gather(rng.integers(0, _BANK, n))]
        for slot in range(most):
            pieces.append(bank.details.gather(np.where(slot < count, rng.integers(1, _BANK + 1, n), 0)))
        asks = pl.concat(bank.asks).gather(level[where] * _BANK + rng.integers(0, _BANK, n))
        frame = pl.DataFrame([piece.alias(str(i)) for i, piece in enumerate([*pieces, asks])])
        texts.append(frame.select(pl.concat_str(pl.all()).alias("prompt")).to_series())
        places.append(where)
    back = np.empty(len(family), dtype=np.int64)
    back[np.concatenate(places)] = np.arange(len(family))
    return pl.concat(texts).gather(back), fullness


def draw_follow_ups(n: int, rng: np.random.Generator) -> tuple[pl.Series, pl.Series]:
    """(the assistant's last words, the user's next turn), n of each."""
    _, follow_ups, replies = _banks()
    return replies.gather(rng.integers(0, _BANK, n)), follow_ups.gather(rng.integers(0, _BANK, n))
