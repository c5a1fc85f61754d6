"""The embedded corpus: the same on every machine, never twice, correct English as far as rules can tell, coherent."""

import hashlib
import itertools
import re
from collections import Counter

import pytest

from gemlet import tales

COUNT = 20_000
GOLDEN = "7f1958bca88139bfb5094949c2dba89365c23e2510a7cc47274a1f1667ad79d9"

# Of every plot, what its beginning names and its end must still be about (slots of the cast).
CARRIED = {
    "lost": ["thing", "friend"],
    "high": ["prize", "friend"],
    "picnic": ["friend"],
    "share": ["thing", "friend"],
    "dark": ["hero"],
    "broken": ["item", "colour"],
    "hungry": ["stray"],
    "learn": ["hero"],
    "surprise": ["gift", "friend"],
    "promise": ["friend"],
    "stuck": ["animal", "friend"],
    "noise": ["hero"],
    "race": ["friend", "trophy"],
    "garden": ["hero"],
    "hello": ["thing"],
    "way": ["hero"],
}


@pytest.fixture(scope="module")
def corpus() -> list[tuple[tales.Mapping[str, str], str]]:
    return [(tales.cast(0, index), tales.story(0, index)) for index in range(COUNT)]


def spoken(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)


def told(text: str) -> str:
    """The story without what its characters say."""
    return re.sub(r'"[^"]*"', '""', text)


def offending(corpus, pattern: str) -> list[str]:
    """The first places where a pattern matches that never should."""
    hits = (match for _, text in corpus for match in re.finditer(pattern, text))
    return [match.string[max(0, match.start() - 40) : match.end() + 40] for match in itertools.islice(hits, 3)]


def test_the_first_hundred_stories_are_golden():
    text = "\n\n".join(itertools.islice(tales.stories(0), 100))
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN


def test_a_story_depends_on_seed_and_index_alone(corpus):
    assert list(itertools.islice(tales.stories(start=17), 20)) == [text for _, text in corpus[17:37]]


def test_stories_are_distinct_and_seeds_differ(corpus):
    texts = {text for _, text in corpus}
    assert len(texts) == COUNT
    assert not texts & {tales.story(1, index) for index in range(1000)}


def test_length_and_vocabulary(corpus):
    lengths = sorted(len(text.split()) for _, text in corpus)
    assert lengths[0] >= 100
    assert lengths[-1] <= 180
    words = {word for _, text in corpus for word in re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())}
    assert 600 <= len(words) <= 900


def test_every_plot_has_its_share(corpus):
    share = Counter(cast["plot"] for cast, _ in corpus)
    assert share.keys() == tales.PLOTS.keys()
    expected = COUNT / len(tales.PLOTS)
    assert all(0.85 * expected < count < 1.15 * expected for count in share.values()), share
    worlds = Counter(cast["world"] for cast, _ in corpus)
    assert abs(worlds["child"] - worlds["forest"]) < 0.05 * COUNT


def test_openings(corpus):
    openings = Counter(" ".join(text.split()[:2]) for _, text in corpus)
    assert openings.most_common(1)[0][0] == "Once upon"
    assert openings["Once upon"] > 0.3 * COUNT
    assert len(openings) > 30


def test_most_stories_have_several_paragraphs_and_some_have_one(corpus):
    single = sum("\n" not in text for _, text in corpus)
    assert 0.2 * COUNT < single < 0.3 * COUNT


@pytest.mark.parametrize(
    "pattern",
    [
        r"[^A-Za-z0-9 \n.,!?'\"-]",  # marks of the grammar, unfilled slots, odd characters
        r"  | \n|\n |\n\n|^\s|\s$",  # white space that is not one space or one line break
        r"(?i)\b(\w+) \1\b",  # doubled words
        r"(?i)\ba [aeiou]",
        r"(?i)\ban [^aeiou]",
        r"[.!?] [a-z]",  # a sentence that begins small
        r"(?:^|[\n ])\"[a-z]",  # speech that begins small
        r"[.,!?] ?[.,!?]",  # two marks in a row
        r"[.,!?]\"?[A-Za-z]",  # a mark without a space after it
        r"[A-Za-z]\"",  # speech that ends without a mark
        r"\.\" [a-z]",  # a full stop before "said"
        r",\" (?!\w+ (?:said|thought|told)|said|thought)",  # a comma after speech that no one speaks
        r"\?\" said\b",  # a question is asked
    ],
)
def test_no_story_breaks_a_rule_of_writing(corpus, pattern):
    assert offending(corpus, pattern) == []


def test_speech(corpus):
    for _, text in corpus:
        paragraphs = text.split("\n")
        assert all(paragraph.count('"') % 2 == 0 for paragraph in paragraphs), text
        assert all(paragraph[0].isupper() or paragraph[0] == '"' for paragraph in paragraphs), text
        assert re.search(r'[.!?]"?$', text), text
        assert len(spoken(text)) >= 2, text


def test_pronouns_are_those_of_the_hero(corpus):
    """Outside of speech a pronoun of the other gender is there only for a friend of that gender."""
    forms = {"girl": {"she", "her"}, "boy": {"he", "him", "his"}}
    for cast, text in corpus:
        used = set(re.findall(r"\b(?:he|him|his|she|her)\b", told(text).lower()))
        assert used & forms[cast["gender"]], text
        assert used <= forms[cast["gender"]] | forms[cast["friend gender"]], text
        assert not re.search(r"\b(?:she|her|he|him|his|herself|himself)\b", " ".join(spoken(text)).lower()), text


def test_the_cast_keeps_to_itself(corpus):
    """No name but the hero's and the friend's is in a story, and they are two."""
    names = set(re.findall(r"[A-Z][a-z]+", tales.TABLES["people"]))
    for cast, text in corpus:
        assert cast["hero"] != cast["friend"]
        there = set(re.findall(r"[A-Z][a-z]+", text)) & names
        assert cast["hero"] in there <= {cast["hero"], cast["friend"]}, text


def test_what_a_story_begins_with_it_ends_with(corpus):
    assert CARRIED.keys() == tales.PLOTS.keys()
    for cast, text in corpus:
        for slot in CARRIED[cast["plot"]]:
            word = cast[slot].split()[-1]
            first, last = text.find(word), text.rfind(word)
            assert 0 <= first < 0.6 * len(text), (slot, text)
            assert first < last > 0.5 * len(text), (slot, text)


def test_a_helper_is_thanked(corpus):
    """Whoever helps, whether friend, family or a wise animal, hears a thank-you; the helped of a race says it."""
    for cast, text in corpus:
        if cast["plot"] in {"lost", "high", "picnic", "surprise", "stuck"}:
            assert re.search(rf'"[^"]*Thank you[^"]*, {cast["friend"]}!', text), text
        if cast["plot"] in {"dark", "broken", "hungry", "learn", "noise", "garden"}:
            assert re.search(rf'"[^"]*Thank you[^"]*, {cast["grown"].capitalize()}[,!]', text), text
        if cast["plot"] == "way":
            assert f"hank you, kind {cast['guide']}!" in text, text


def test_colours_stay_the_same(corpus):
    """A thing has one colour from its first mention to its last, and no other colour is about but that of the home."""
    for cast, text in corpus:
        if "colour" in cast:
            colours = re.findall(r"\b(?:red|blue|green|yellow|purple|orange)\b", text.replace(cast["home"], ""))
            assert set(colours) == {cast["colour"]}, text


def test_friends_are_introduced_before_they_speak(corpus):
    for cast, text in corpus:
        first = text.find(cast["friend"])
        if first >= 0 and cast["plot"] != "hello":
            assert re.search(rf"(?:friend|named) {cast['friend']}$", text[: first + len(cast["friend"])]), text


def test_nothing_in_the_grammar_lies_idle():
    """Every phrase is referred to, every table drawn, and every slot of a table told in some text."""
    texts = "\n".join((*tales.TABLES.values(), *tales.PHRASES.values(), *tales.PLOTS.values()))
    assert [name for name in tales.PHRASES if f"<{name}>" not in texts] == []
    drawn = {"people", "kinds", "meeting", "family", "days"}
    drawn |= {table for text in tales.PLOTS.values() for table in text.split("\n")[1].split()}
    assert drawn == {re.sub("^(?:child|forest) ", "", name) for name in tales.TABLES}
    slots = {slot for text in tales.TABLES.values() for slot in text.split("\n")[1].strip().split(" / ")} - {"name"}
    assert [slot for slot in slots if not re.search(rf"(?i)\{{(?:a )?{slot}\}}", texts)] == []
