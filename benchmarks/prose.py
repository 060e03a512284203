"""Plausible English for prompts, without end, from a random number generator."""

from __future__ import annotations

import random
from collections.abc import Iterator


def _phrases(text: str) -> list[str]:
    """The phrases between commas and line breaks."""
    return [phrase.strip() for phrase in text.replace("\n", ",").split(",") if phrase.strip()]


_SUBJECTS = _phrases("""
    ferry timetable, bakery oven, seed library, tram depot, weather balloon, village orchestra
    lighthouse lamp, paper archive, night clinic, glass workshop, honey harvest, chess club
    river lock, solar kiln, mountain hut, radio station, printing press, tea garden
    bicycle courier, star catalogue, wool market, fish ladder, school kitchen, cable car, map room
    salt works, repair counter, bird census, translation desk, concert hall
""")
_PEOPLE = _phrases("""
    Adaeze, Bertil, Camille, Dragan, Esra, Fintan, Gulnara, Henk, Ioana, Jarek, Keiko, Lucio, Maren
    Noor, Olivia, Pavel, Qiang, Ruth, Samir, Tove, Ugo, Vesna, Wim, Xenia, Yara, Zoltan
""")
_QUALITIES = _phrases("""
    brittle, calm, costly, curious, dusty, generous, heavy, hollow, narrow, odd, patient, quick
    reliable, rusty, seasonal, shallow, silent, stubborn, temporary, thorough, uneven, vivid
""")
_PARTS = _phrases("""
    pump, label, hinge, ledger, permit, cable, budget, roof, timer, recipe, key, window, password
    schedule, invoice, switch, chapter, bucket, antenna, signature, filter, staircase
""")
_DAYS = _phrases("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")

_TASKS = (
    "How would you run a {subject} with only {small} people?",
    "Put the notes on the {subject} below into order, and leave out what is said twice.",
    "{person} has never seen a {subject}. Describe it in {small} sentences.",
    "What could go wrong when a {subject} is moved closer to a {other}?",
    "Make a packing list for a {small}-day visit to the {subject}.",
    "Answer the complaint about the {subject}, and be polite.",
    "Which of these facts about the {subject} contradict each other?",
    "Turn this report on the {subject} into a letter to {person}.",
    "Name {small} reasons for closing the {subject} on {day}s.",
    "Write a riddle whose answer is a {subject}.",
)
_SENTENCES = (
    "On {day} the {part} of the {subject} was {quality}, so {person} wrote down {large} numbers.",
    "{person} paid {large} crowns for a {part}, which {friend} calls {quality}.",
    "Nobody could say why the {other} needs a {quality} {part} and the {subject} does not.",
    "Between {small} and {large} visitors come for the {subject}; few of them notice the {part}.",
    "If the {part} gets {quality}, stop the {subject}, wait {small} minutes, and ask {person}.",
    '"My {part} is {quality}," said {person}, "but yours is only {small} days old."',
    "The plan has {small} steps: the {part} comes first, the {other} last.",
    "Since {year} the {subject} has had a {quality} {part}; before that, it had {small}.",
    "{person} and {friend} share one {part}, although the rules of the {other} forbid it.",
    "A {quality} {other} uses {small}.{digit} litres an hour, or {large} in a {quality} month.",
    "Please check (again) whether {friend} has seen the {part} that was lost in {year}.",
    "There were {large} letters about the {subject}: most of them {quality}, all of them long.",
)


class Prose:
    """Texts that a generator's state decides; the same state gives the same texts."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def person(self) -> str:
        """A first name."""
        return self._rng.choice(_PEOPLE)

    def text(self, num_words: int) -> str:
        """A task and as many sentences of material as it takes to have `num_words` words."""
        subject = self._rng.choice(_SUBJECTS)
        words: list[str] = []
        for sentence in self._sentences(subject):
            words += sentence.split(" ")
            if len(words) >= num_words:
                break
        return " ".join(words)

    def _sentences(self, subject: str) -> Iterator[str]:
        yield self._fill(self._rng.choice(_TASKS), subject)
        while True:
            yield self._fill(self._rng.choice(_SENTENCES), subject)

    def _fill(self, pattern: str, subject: str) -> str:
        choice, number = self._rng.choice, self._rng.randint
        return pattern.format(
            subject=subject,
            other=choice(_SUBJECTS),
            person=choice(_PEOPLE),
            friend=choice(_PEOPLE),
            quality=choice(_QUALITIES),
            part=choice(_PARTS),
            day=choice(_DAYS),
            digit=number(0, 9),
            small=number(2, 9),
            large=number(12, 9_700),
            year=number(1931, 2026),
        )
