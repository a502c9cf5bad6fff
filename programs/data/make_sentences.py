#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the labelled sentences that finetune_bert and peft_shootout train on by default.

Invented opinions on films, meals and gadgets, lower-cased and with punctuation set apart, one a
line: ``sentence<TAB>label``, 1 for a favourable one. No single word decides: "not dull" praises,
"lovely but far too long" does not, and what "although" concedes does not count. Lengths are spread
like those of SST-2: 18 to 19 words on average, from 2 to 50.

The same files come out bit for bit on every run::

    python3 make_sentences.py > sentences.tsv
    python3 make_sentences.py --topics films,meals --seed 2027 > films_and_meals.tsv
    python3 make_sentences.py --topics gadgets --seed 2028 > gadgets.tsv
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Entry = TypeVar("Entry")

COUNT = 4000
SHORTEST, LONGEST = 2, 50


@dataclass(frozen=True)
class Topic:
    """What an opinion can be about.

    Attributes
    ----------
    whole : tuple of str
        Names of the thing itself.
    part : tuple of str
        Names of its parts.
    good, bad : tuple of str
        Adjectives that fit this topic alone.
    aside : tuple of str
        Phrases that say nothing about quality.
    """

    whole: tuple[str, ...]
    part: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    aside: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """Split a list that is written with bars between its entries.

    Parameters
    ----------
    text : str
        Entries and bars, over any number of lines.

    Returns
    -------
    tuple of str
        The entries, without blanks around them.
    """
    return tuple(" ".join(entry.split()) for entry in text.split("|"))


NAMES = ("films", "meals", "gadgets")
TOPICS = (
    Topic(
        whole=words(
            "film|movie|picture|comedy|thriller|drama|documentary|sequel|western|romance|"
            "mystery|adaptation|debut|remake|short film|costume drama|road movie"
        ),
        part=words(
            "plot|script|ending|cast|dialogue|camera work|soundtrack|lead actor|villain|first act|"
            "last hour|opening scene|editing|humor|love story|score|pacing|direction|second half|"
            "supporting cast|story|premise|final twist|narration"
        ),
        good=words(
            "gripping|moving|witty|suspenseful|touching|well acted|thoughtful|poetic|riveting|"
            "funny|haunting|beautifully shot|tender|sharp"
        ),
        bad=words(
            "predictable|wooden|badly acted|shallow|overlong|sentimental|incoherent|contrived|"
            "humorless|derivative|heavy handed|preachy|listless|muddled"
        ),
        aside=words(
            "in a small theater by the river|with my two brothers|on a rainy sunday afternoon|"
            "after reading the novel|during the festival week|from the director of three other "
            "features|set in a mining town in the north|about a retired judge and her neighbor|"
            "which runs for almost two hours|shown in the original language with subtitles|"
            "about a family that moves from one coast to the other|with a crowd of students|"
            "filmed over one summer with a borrowed camera"
        ),
    ),
    Topic(
        whole=words(
            "restaurant|cafe|bistro|diner|bakery|pizzeria|noodle bar|steakhouse|tavern|brunch|"
            "tasting menu|food truck|buffet|wine bar|tea room|fish shop"
        ),
        part=words(
            "soup|service|dessert|menu|waiter|bread|coffee|fish|music|terrace|wine list|salad|"
            "sauce|kitchen|table by the window|breakfast|roast|pasta|lunch special|curry|starter|"
            "staff|cheese plate|rice"
        ),
        good=words(
            "delicious|fresh|crisp|tasty|well seasoned|juicy|welcoming|attentive|fragrant|cozy|"
            "generous|perfectly cooked|savory|tempting"
        ),
        bad=words(
            "bland|greasy|stale|overcooked|soggy|rude|lukewarm|oversalted|inattentive|dry|noisy|"
            "burnt|watery|tasteless"
        ),
        aside=words(
            "near the old station|on a friday evening|with a party of six|after a long walk along "
            "the harbor|for my sister 's birthday|between the bank and the post office|"
            "which opened last spring|on the second floor of a former mill|with our two children|"
            "just before the theater|where they change the menu every month|"
            "on the way back from the mountains|when half of the town was on holiday"
        ),
    ),
    Topic(
        whole=words(
            "phone|camera|laptop|kettle|vacuum cleaner|headset|printer|keyboard|watch|speaker|"
            "lamp|drill|backpack|tent|router|blender|tablet"
        ),
        part=words(
            "battery|screen|manual|case|power button|strap|sound|software|charger|motor|handle|"
            "display|packaging|zipper|stand|cable|warranty|lid|filter|menu system|hinge|grip|"
            "setup|customer support"
        ),
        good=words(
            "sturdy|reliable|fast|lightweight|durable|quiet|responsive|well made|accurate|"
            "comfortable|easy to use|bright|efficient|solid"
        ),
        bad=words(
            "flimsy|unreliable|slow|clumsy|fragile|defective|unresponsive|badly made|inaccurate|"
            "uncomfortable|hard to use|loud|inefficient|wobbly"
        ),
        aside=words(
            "for my office at home|as a replacement for one that was ten years old|"
            "from a shop around the corner|after comparing four of them|for a trip to the coast|"
            "that came in a plain brown box|with two spare parts and a cloth|in the dark blue "
            "version|for my parents|which i use twice a week|that a colleague had mentioned|"
            "before the new model came out|to use in the garden and in the garage"
        ),
    ),
)

GOOD = words(
    "great|wonderful|excellent|delightful|charming|superb|lovely|brilliant|pleasant|impressive|"
    "fine|remarkable|memorable|satisfying|splendid|enjoyable|fantastic|terrific|refreshing|elegant"
)
BAD = words(
    "awful|terrible|disappointing|dull|dreadful|boring|poor|mediocre|annoying|horrible|weak|"
    "forgettable|tedious|unpleasant|lousy|miserable|frustrating|lifeless|pathetic|sloppy"
)
LIKED = words("loved|enjoyed|admired|liked|adored|appreciated")
DISLIKED = words("hated|disliked|regretted|could not stand|loathed|resented")
VERY = words("very|really|truly|quite|rather|simply|thoroughly|surprisingly|so|absolutely")
NOT = words("not|n't|never|hardly|anything but|far from|by no means")
PRAISE = words(
    "worth every penny|a joy from start to finish|one of the best i know|a small masterpiece|"
    "better than i had hoped|exactly what i was looking for|a treat|a real find"
)
BLAME = words(
    "a waste of money|a chore from start to finish|one of the worst i know|a complete mess|"
    "worse than i had feared|exactly what i wanted to avoid|a letdown|a real nuisance"
)
OPENING = words(
    "as far as i can tell|to be honest|all things considered|at the end of the day|in the end|"
    "for what it is|as my neighbor said|i have to say that|it turns out that|looking back|"
    "after thinking about it for a while|like many people i know|as everyone told us"
)
CLOSING = words(
    "and that is all there is to say|as the owner told us himself|if you ask me|and i have seen a "
    "few|at least on that day|or so it seemed to me|as i wrote to a friend the same night|"
    "whatever the price may be|and my wife agrees|for better or worse|just as the advertisement "
    "said|and we talked about it the whole way home"
)


class Writer:
    """Writes sentences from one stream of random numbers.

    Parameters
    ----------
    seed : int
        Decides everything that is written.
    topics : sequence of Topic
        What may be written about.
    """

    def __init__(self, seed: int, topics: Sequence[Topic]) -> None:
        self._random = random.Random(seed)
        self._topics = topics
        self._topic = topics[0]
        self._last = ""

    def _chance(self, share: float) -> bool:
        """Be true in a share of the calls."""
        return self._random.random() < share

    def _pick(self, entries: Sequence[Entry]) -> Entry:
        """Pick an entry; random() alone is the same in every version of Python."""
        return entries[int(self._random.random() * len(entries))]

    def _adjective(self, favourable: bool) -> str:
        """Name a quality, of this topic or of any."""
        own = self._topic.good if favourable else self._topic.bad
        return self._pick(own if self._chance(0.5) else (GOOD if favourable else BAD))

    def _thing(self) -> str:
        """Name what is judged, another thing than the last."""
        thing = self._last
        while thing == self._last:
            thing = self._pick(self._topic.whole if self._chance(0.4) else self._topic.part)
        self._last = thing
        return thing

    def _phrase(self, favourable: bool) -> str:
        """Write a judgement without a verb."""
        if self._chance(0.3):
            return f"{self._pick(VERY)} {self._adjective(favourable)} {self._thing()}"
        if self._chance(0.1):
            return f"no {self._adjective(not favourable)} {self._thing()}"
        return f"{self._adjective(favourable)} {self._thing()}"

    def _clause(self, favourable: bool) -> str:
        """Write a judgement with a verb, often by denying the opposite."""
        thing, kind = self._thing(), self._random.random()
        if kind < 0.52:
            very = f"{self._pick(VERY)} " if self._chance(0.4) else ""
            return f"the {thing} is {very}{self._adjective(favourable)}"
        if kind < 0.68:
            return f"the {thing} is {self._pick(NOT)} {self._adjective(not favourable)}"
        if kind < 0.80:
            return f"i {self._pick(LIKED if favourable else DISLIKED)} the {thing}"
        if kind < 0.84:
            verb = self._pick(DISLIKED[:3] if favourable else LIKED[:5])
            return f"nobody in our group {verb} the {thing}"
        if kind < 0.97:
            return f"the {thing} is {self._pick(PRAISE if favourable else BLAME)}"
        return f"it is {self._pick(NOT)} {self._pick(BLAME if favourable else PRAISE)}"

    def _core(self, favourable: bool, room: int) -> str:
        """Write a judgement of two clauses where there is room for them."""
        if room < 10 or (room < 16 and self._chance(0.5)) or self._chance(0.25):
            return self._clause(favourable)
        kind = self._random.random()
        first, second = self._clause(not favourable), self._clause(favourable)
        if kind < 0.2:
            return f"{first} , but {second}"
        if kind < 0.3:
            return f"although {first} , {second}"
        if kind < 0.38:
            return f"{second} , even though {first}"
        if kind < 0.44:
            return f"despite the {self._phrase(not favourable)} , {second}"
        if kind < 0.5:
            return f"{second} in spite of the {self._phrase(not favourable)}"
        return f"{self._clause(favourable)} , and {second}"

    def sentence(self) -> tuple[str, int]:
        """Write one sentence.

        Returns
        -------
        str
            The sentence, words and marks with single blanks between them.
        int
            1 if it is favourable, else 0.
        """
        self._topic = self._pick(self._topics)
        favourable = self._chance(0.5)
        spread = (self._random.random() + self._random.random() + self._random.random()) / 1.5
        target = min(max(int(17.2 * spread * spread), SHORTEST), LONGEST)
        if target < 6:
            text = self._phrase(favourable)
        else:
            text = self._core(favourable, target)
        before, after = list[str](), list[str]()
        while target >= 6:
            kind = self._random.random()
            if kind < 0.4:
                extra = f", {self._pick(self._topic.aside)}"
            elif kind < 0.7:
                extra = f", {self._pick(CLOSING)}"
            elif kind < 0.85:
                extra = f"{self._pick(OPENING)} ,"
            else:
                extra = (
                    f"we got this {self._pick(self._topic.whole)} {self._pick(self._topic.aside)} ,"
                )
            length = len(" ".join([*before, text, *after, extra]).split())
            if length > target + 3 or length > LONGEST - 1 or extra in before + after:
                break
            (before if extra.endswith(",") else after).append(extra)
        return " ".join([*before, text, *after, "." if target >= 6 else ""]).strip(), favourable


def main() -> None:
    """Print the sentences, each once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topics", default=",".join(NAMES), help="of films, meals and gadgets")
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args()
    asked = options.topics.split(",")
    if unknown := set(asked) - set(NAMES):
        parser.error(f"no such topic: {', '.join(sorted(unknown))}")
    topics = [topic for name, topic in zip(NAMES, TOPICS, strict=True) if name in asked]
    writer, seen = Writer(options.seed, topics), set[str]()
    while len(seen) < COUNT:
        text, label = writer.sentence()
        if text not in seen and SHORTEST <= len(text.split()) <= LONGEST:
            seen.add(text)
            print(f"{text}\t{int(label)}")


if __name__ == "__main__":
    main()
