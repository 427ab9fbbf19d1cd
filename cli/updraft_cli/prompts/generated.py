"""Prompts from small generators: every combination of a few honest parts, in a fixed shuffled order.

Written here because no installed package brings such requests under a licence that is stated in the package.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

_MAX_PROMPTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table to ask about: `measure` is a number, `group` a category with `values`, `day` a date."""

    name: str
    label: str
    measure: str
    group: str
    day: str
    values: tuple[str, ...]

    @property
    def statement(self) -> str:
        return (
            f"CREATE TABLE {self.name} (id INTEGER PRIMARY KEY, {self.label} TEXT, {self.group} TEXT,"
            f" {self.measure} REAL, {self.day} DATE);"
        )


def _table(line: str) -> Table:
    name, label, measure, group, day, values = (cell.strip() for cell in line.split("|"))
    return Table(name=name, label=label, measure=measure, group=group, day=day, values=tuple(values.split(", ")))


# name, label, measure, group, day, values of the group
_ROWS = """
employees | name          | salary           | department | hire_date      | Sales, Research, Support, Finance
orders    | customer      | total            | status     | order_date     | open, shipped, returned
products  | title         | price            | category   | added_on       | books, garden, toys, sport
flights   | flight_number | delay_minutes    | airport    | departure_date | OSL, FRA, LIS
students  | name          | grade            | course     | enrolled_on    | Physics, History, Biology
songs     | title         | duration_seconds | genre      | released_on    | jazz, rock, folk
patients  | name          | weight_kg        | ward       | admitted_on    | A, B, C
invoices  | supplier      | amount           | currency   | due_date       | EUR, USD, CHF
tickets   | subject       | hours_open       | priority   | created_on     | low, normal, urgent
houses    | address       | area_m2          | city       | listed_on      | Porto, Graz, Ghent
"""
_TABLES = tuple(_table(line) for line in _ROWS.strip().splitlines())

_QUERIES: tuple[Callable[[Table, str, int], str], ...] = (
    lambda t, v, n: (
        f"lists the {t.label} and {t.measure} of all {t.name} with {t.group} '{v}', highest {t.measure} first"
    ),
    lambda t, v, n: f"counts the {t.name} per {t.group} with a {t.measure} above {n}",
    lambda t, v, n: f"returns the {n} {t.name} with the highest {t.measure} where {t.group} is not '{v}'",
    lambda t, v, n: f"computes the average {t.measure} per {t.group} and keeps only averages above {n}",
    lambda t, v, n: f"finds the {t.label} of the row with the lowest {t.measure} where {t.group} is '{v}'",
    lambda t, v, n: f"sums the {t.measure} of the {t.name} with {t.day} in {2000 + n} and {t.group} '{v}'",
    lambda t, v, n: f"raises the {t.measure} of all {t.name} whose {t.group} is '{v}' by {n} percent",
    lambda t, v, n: f"deletes the {t.name} with a {t.measure} below {n} and {t.group} '{v}'",
)

_PEOPLE = (
    "Anna Berg",
    "Tom Silva",
    "Mei Lin",
    "Omar Haddad",
    "Julia Novak",
    "Ben Carter",
    "Ines Costa",
    "Lars Holm",
)
_CITIES = ("Lyon", "Oslo", "Graz", "Porto", "Leeds", "Turin", "Ghent", "Malmo")
_JOBS = ("nurse", "teacher", "carpenter", "software developer", "pilot", "baker", "lawyer")
_RECORDS: tuple[Callable[[str, str, str, int], tuple[str, str]], ...] = (
    lambda person, city, job, n: (
        "name, age, city, job",
        f"{person} is {20 + n} years old, lives in {city} and works as a {job}.",
    ),
    lambda person, city, job, n: (
        "guest, city, nights, price_per_night",
        f"{person} booked a room in {city} for {1 + n % 9} nights at {60 + n} euros a night.",
    ),
    lambda person, city, job, n: (
        "sender, receiver_city, weight_kg, items",
        f"A parcel of {n % 12 + 1} kg from {person}, a {job}, goes to {city}; it holds {2 + n % 4} items.",
    ),
    lambda person, city, job, n: (
        "organiser, place, day, seats",
        f"{person} invites every {job} in {city} to a meeting on {n % 28 + 1} May, with {10 + n} seats.",
    ),
)

_TOPICS = (
    "photosynthesis", "the water cycle", "gravity", "inflation", "vaccines", "the French Revolution",
    "black holes", "electric cars", "the immune system", "bread making", "volcanoes", "the Roman Empire",
    "machine learning", "solar power", "jazz music", "the stock market", "chess", "sleep", "coral reefs",
    "the printing press", "democracy", "plate tectonics", "meditation", "recycling", "the Silk Road",
    "probability", "bees", "the human heart", "nutrition", "urban planning",
)  # fmt: skip
_QUESTIONS = (
    "Explain {topic} to a ten-year-old.",
    "What are the three most important facts about {topic}?",
    "Write a short introduction to {topic} for a school newspaper.",
    "What is a common misunderstanding about {topic}?",
    "How has our view of {topic} changed over the last hundred years?",
    "Give me a list of five questions about {topic} that a teacher could ask.",
    "Why does {topic} matter in daily life?",
    "Write a friendly letter to a neighbour who wants to learn about {topic}.",
    "Compare {topic} with something simple from a kitchen.",
    "What should I read first if I want to know more about {topic}, and why?",
    "Describe {topic} in exactly four sentences.",
    "Tell a short story in which {topic} plays a role.",
    "What are good and bad sides of {topic}?",
    "Which people are known for their work on {topic}?",
    "Write a quiz question about {topic} with four answers and say which is right.",
    "Summarise what an expert would say about {topic}.",
)


def sql() -> list[str]:
    """Return requests to write one SQL statement for a table whose definition is given."""
    return _shuffled(
        f"Given the table\n\n{table.statement}\n\nWrite a SQL query that {query(table, value, number)}."
        for table, query in product(_TABLES, _QUERIES)
        for value, number in product(table.values, (3, 5, 10, 12, 15, 20, 25))
    )


def json() -> list[str]:
    """Return requests to write the facts of a sentence as a JSON object."""
    return _shuffled(
        f"Write the facts of this sentence as a JSON object with the keys {keys}.\n\n{sentence}"
        for record in _RECORDS
        for person, city, job, number in product(_PEOPLE, _CITIES, _JOBS, (3, 8, 17, 24, 31))
        for keys, sentence in [record(person, city, job, number)]
    )


def chat() -> list[str]:
    """Return open questions on everyday topics."""
    return _shuffled(question.format(topic=topic) for question, topic in product(_QUESTIONS, _TOPICS))


def _shuffled(prompts: Iterable[str]) -> list[str]:
    """Shuffle the combinations, so that any part of the catalogue has all kinds."""
    found = list(prompts)
    random.Random(0).shuffle(found)
    return found[:_MAX_PROMPTS]
