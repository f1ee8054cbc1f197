"""The playwright: an endless author of small plays, whose exact entropy is known.

A seeded probabilistic grammar writes acts, scenes, speeches and songs in an Elizabethan manner.
Every choice it makes has a known probability, and every line has exactly one derivation, so the
cost of a line, -log P(line | all lines before it), is exact. The sum of the costs is the *floor*:
the best loss, in nats, that any language model can reach on the text. What there is to learn lies
at every range: spelling, agreement (thou hast, he hath), rhyme, and the cast of the scene.

The tables below are the whole language. ``Stage`` holds what the text so far implies for the next
line; the writer and the recogniser share these two, and nothing else: the writer draws one
derivation, the recogniser reads only the text and sums over all derivations.
"""

import math
import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, combinations

import numpy as np

GRAMMAR_VERSION = 1  # changes whenever the same seed would write another text
DEFAULT_SEED = 1337
DEFAULT_CHARS = 1_000_000

FLATNESS = 10  # the first of a list's alternatives weighs as 1/10, the next as 1/11, ...

# --- The language ---------------------------------------------------------------------------------

LADIES = ("AGNES", "BESS", "ISOLDE", "LINNET", "MAUD")
LORDS = ("HUGO", "OWEN", "PIERS", "ROBIN", "TOBIAS")
NAMES = tuple(sorted(LADIES + LORDS))
ROMAN = ("I", "II", "III", "IV", "V")
ACTS, SCENES, COMPANY = len(ROMAN), 4, 4  # acts in a play; most scenes in an act; most on stage

# An alternative with "$" stands for six, one per person: "$I $have" is "I have", "thou hast", ...
# The last column numbers the form of a verb, so that "@take$n" agrees with "$I".
PERSONS = """
    $I   $have $am $do $will $shall $my $me $n
    I    have am  do   will shall my    me   1
    thou hast art dost wilt shalt thy   thee 2
    he   hath is  doth will shall his   him  3
    she  hath is  doth will shall her   her  3
    we   have are do   will shall our   us   1
    they have are do   will shall their them 1
"""
PERSON_WEIGHTS = (5, 5, 3, 3, 2, 2)

# base/participle; "take1" (I, and the infinitive), "take2" (thou), "take3" (he) and "taken".
TAKE = """
    keep/kept find/found lose/lost seek/sought love/loved hide/hidden guard/guarded mend/mended
    praise/praised trust/trusted break/broken steal/stolen
"""
GO = """
    sing/sung weep/wept dance/danced laugh/laughed wander/wandered rest/rested kneel/knelt
    smile/smiled
"""

# Words for the ends of rhyming lines, one sound a row: nouns, then verbs. No word is in two rows.
RHYMES = """
    day way play | stay say pray
    night light knight | write fight
    heart part cart | start depart
    tear year | hear fear
    snow crow | go grow
    sea tree bee | see flee
    rain chain | complain remain
    king ring spring | sing cling
    hall wall ball | call fall
    wine vine | shine dine
    moon tune spoon | swoon croon
    crown town gown | frown drown
    bell well | tell dwell
"""

# "name = words" or "name: alternatives divided by |"; the earlier of them are the likelier.
GRAMMAR = """
thing = rose moon sea heart ring crown rain king night bell wall sword lute letter river garden
    star wind town candle day sun tree snow hall wine crow knight bee tear ball spoon cart gown
    light chain vine well
fair = sweet merry sad golden true gentle bold little wise pale kind silver cold humble proud weary
    old young noble mad
virtue = love time fortune youth sorrow hope
oft = never often truly always once
near = in by near beyond upon
where: @near @np
kin = mother father brother sister queen miller
the = the my thy our his her
np: @the @fair @thing | @the @thing | @the @kin's @thing

clause: $I $have @taken @np | $I $will @take1 @np | $I @take$n @np | $I $shall @go1 @where
    | @np is @fair | @np @go3 @where | $I $am as @fair as @np | $I $have @oft @gone @where
    | $I $am too @fair to @go1 @where | @np hath @taken @np | $I $do not @take1 @np
    | @virtue is a @fair @thing | @virtue shall @take1 @np | a @fair @thing is but a @thing
    | $I $will @take1 @np with all $my heart | @np is @fair and so $am $I
query: why $am $I so @fair | $have $I @taken @np | who hath @taken @np | where $do $I @go1
    | why $do $I @take1 @np | what @thing $have $I @taken | $will $I @take1 @np
    | is @np as @fair as @np | how $shall $I @go1 @where
oh = O alas nay come hark
bid: pray | go and | I beg thee
aside: they say that | I think that | I fear that

say: @clause. | @voc, @clause. | @oh, @clause! | @clause, @voc. | @aside @clause.
    | @gossip hath @taken @np. | @bid @take1 @np, @voc. | @bid @go1 @where.
    | let us @take1 @np. | @np! @np! @oh, I am @fair. | what a @fair @thing is @virtue!
ask: @query? | @query, @voc? | tell me, @voc, @query? | @oh, @query?
if = when if since though while
when: @if @clause,
then: @clause. | then @bid @take1 @np. | @oh, @clause! | @clause, @voc.
sir = good noble gentle
dame = sweet fair gentle
hail: good morrow | welcome | well met | joy to thee
wish: how @fair thou art | the day is young | I bring thee @np
greet: @hail, @voc. | @hail, @voc; @wish.
ayno: ay | nay | alas, no | ay, truly | who can say
reply: @ayno, @clause. | @ayno, @voc: @clause. | @ayno, for @clause.

verse: $I $have @taken @the @fair @noun | @np @go3 upon the @noun
    | $I $shall never @take1 the @noun | so let the @fair @thing @verb
    | $I $am too @fair to @verb | and @virtue @go3 for the @noun
    | for all the @fair world must @verb | there is no @thing so @fair as the @noun
    | @np shall teach $me how to @verb
open: @verse,
close: @verse. | @verse!
lilt: sing hey, sing ho, the @fair @noun | O @fair @thing, O @fair @noun
    | O come, my love, and let us @verb | with a hey and a ho and a @fair @noun
    | @np hath bid the maiden @verb | and who will @go1 when I must @verb
tune: @lilt,
refrain: @lilt. | @lilt!

title: THE @genre OF THE @royal @prop
genre = COMEDY TRAGEDY HISTORY ROMANCE
royal = GOLDEN STOLEN SILVER WANDERING BROKEN MERRY
prop = CROWN RING LETTER KING ROSE LUTE
place: A garden | A hall in the castle | A wood near the river | A street in the city | An orchard
    | A tower by the sea | A tavern | The market | A ship at sea | Before the gate
hour: at dawn | by moonlight | at noon | in the rain | at evening | in winter
cast: @two | @three | @four
manner: weeping | laughing | in haste | with a letter | in silence | in disguise
enter: Enter @newcomer. | Enter @newcomer, @manner.
exit: Exit @leaver. | Exit @leaver, @manner.
sound: Thunder is heard. | A bell tolls within. | Soft music is heard. | A trumpet sounds.
    | Snow begins to fall. | An owl cries. | They dance.
exeunt: Exeunt. | Exeunt, laughing. | Exeunt, with music. | Exeunt, weeping.
"""

# Which kind of line may come after which, and how often; "say_" is the gap after a say-line. A
# speaker's first line is a reply after a question, a greeting after an entrance (see Stage.hear).
FLOW = """
start = title
title act cast exit enter sound exeunt = gap
title_ = act
act_ = scene
scene = cast
cast_ enter_ ask_ = speaker
speaks = say 8 when 5 ask 4 open 5
greets = greet
answers = reply
greet = say 6 when 4 ask 4 open 2
say then close reply = gap 9 say 6 when 4 ask 3 open 3
when = then
open = close
ask = gap
singer = tune
tune = refrain
refrain = tune gap
say_ then_ close_ reply_ = speaker 78 exit 5 enter 6 singer 4 sound 2 exeunt 5
exit_ sound_ refrain_ = speaker 9 exeunt 1
exeunt_ = scene 2 act 1
"""

# --- The engine -----------------------------------------------------------------------------------


class Rule:
    """The weighted alternatives of one symbol; each is literal, symbol, literal, ..., literal."""

    def __init__(self, alternatives: list[tuple[int, str]]):
        # Weights are integers: their sums, and so the text, are the same on every platform.
        self.sums = list(accumulate(weight for weight, _ in alternatives))
        self.texts = [text for _, text in alternatives]
        self.parts = [re.split(r"@(\w+)", text) for text in self.texts]
        self.probs = [weight / self.sums[-1] for weight, _ in alternatives]
        self.nats = [math.log(self.sums[-1] / weight) for weight, _ in alternatives]


def _ranked(texts: list[str]) -> Rule:
    """Alternatives whose weights fall with their rank, as the words of a language do."""
    columns, *persons = [line.split() for line in PERSONS.strip().splitlines()]
    alternatives = []
    for rank, text in enumerate(texts):
        weight = 10_000 // (rank + FLATNESS)
        if "$" not in text:
            alternatives.append((weight * sum(PERSON_WEIGHTS), text))
            continue
        for share, forms in zip(PERSON_WEIGHTS, persons, strict=True):
            table = dict(zip(columns, forms, strict=True))
            form = re.split(r"(\$\w+)", text)
            alternatives.append((weight * share, "".join(table.get(part, part) for part in form)))
    return Rule(alternatives)


def _build_rules() -> dict[str, Rule]:
    rules = {}
    for block in re.split(r"\n+(?=\w)", GRAMMAR.strip()):  # an indented line goes on with a block
        name, sign, body = re.match(r"(\w+)( =|:)(.*)", block, re.S).groups()
        texts = body.split() if sign == " =" else body.split("|")
        rules[name] = _ranked([" ".join(text.split()) for text in texts])
    for name, past, verbs in (("take", "taken", TAKE), ("go", "gone", GO)):
        bases, participles = zip(*(verb.split("/") for verb in verbs.split()), strict=True)
        stems = [base.removesuffix("e") for base in bases]
        forms = {f"{name}1": bases, past: participles}
        forms |= {f"{name}2": [f"{stem}est" for stem in stems]}
        forms |= {f"{name}3": [f"{stem}eth" for stem in stems]}
        rules |= {symbol: _ranked(list(words)) for symbol, words in forms.items()}
    for symbol, size in (("two", 2), ("three", 3), ("four", 4)):
        casts = [(", ".join(cast[:-1]), cast[-1]) for cast in combinations(NAMES, size)]
        rules[symbol] = Rule([(1, f"Enter {most} and {last}.") for most, last in casts])
    rules["gap"] = Rule([(1, "")])
    return rules


def _build_flow() -> dict[str, dict[str, int]]:
    flow = {}
    for line in FLOW.strip().splitlines():
        states, _, kinds = line.partition(" = ")
        weights = {
            kind: int(weight or 1) for kind, weight in re.findall(r"(\w+)(?: (\d+))?", kinds)
        }
        flow |= dict.fromkeys(states.split(), weights)
    return flow


RULES, STATES = _build_rules(), _build_flow()
ROWS = [[half.split() for half in row.split("|")] for row in RHYMES.strip().splitlines()]


# The rules that hang on the stage. Few distinct ones ever occur, so each is made once and kept.


@cache
def _name_rule(names: tuple[str, ...], likely: str, lord: str, lady: str) -> Rule:
    """One of the names, in the given form; ``likely`` weighs four times as much as another."""
    forms = {name: lady if name in LADIES else lord for name in names}
    return Rule(
        [
            (4 if name == likely else 1, form.format(name, name.title()))
            for name, form in forms.items()
        ]
    )


@cache
def _rhyme_rule(half: int, rhyme: str) -> Rule:
    """Nouns (half 0) or verbs (half 1) that rhyme with a word but are not it; "" leaves all."""
    rows = [row for row in ROWS if not rhyme or rhyme in row[0] + row[1]]
    return _ranked([word for row in rows for word in row[half] if word != rhyme])


@cache
def _heading_rule(text: str) -> Rule:
    return Rule([(1, text)])


class Stage:
    """What the text so far says about the next line. It learns from the lines alone."""

    def __init__(self):
        self.state = "start"
        self.act = self.scene = 0
        self.cast: tuple[str, ...] = ()
        self.speaker = self.before = ""  # who spoke last; who spoke before, or has just come in
        self.rhyme = ""  # the word that the next line must rhyme with

    def moves(self) -> dict[str, int]:
        """The kinds of line that may come next, with their weights."""
        moves = STATES[self.state]
        if self.state == "exeunt_":
            fall = "title" if self.act == ACTS else "act"
            if self.scene == 1:
                return {"scene": 1}
            return (
                {fall: 1} if self.scene == SCENES else {"scene": moves["scene"], fall: moves["act"]}
            )
        if "exit" in moves:
            barred = {2: "exit", COMPANY: "enter"}.get(len(self.cast))
            return {kind: weight for kind, weight in moves.items() if kind != barred}
        return moves

    def rule(self, symbol: str) -> Rule:
        """The alternatives of a symbol, here and now."""
        others = tuple(name for name in self.cast if name != self.speaker)
        match symbol:
            case "speaker":
                return _name_rule(others, self.before, "{0}:", "{0}:")
            case "singer":
                return _name_rule(others, self.before, "{0}, singing:", "{0}, singing:")
            case "voc":
                return _name_rule(others, self.before, "@sir {1}", "@dame {1}")
            case "gossip":  # of one of three or more on stage; else of those who never come
                absent = ("the queen", "the king")
                return _name_rule(others if len(others) > 1 else absent, "", "{1}", "{1}")
            case "leaver":
                return _name_rule(self.cast, self.speaker, "{0}", "{0}")
            case "newcomer":
                away = tuple(name for name in NAMES if name not in self.cast)
                return _name_rule(away, "", "{0}", "{0}")
            case "noun" | "verb":
                return _rhyme_rule(("noun", "verb").index(symbol), self.rhyme)
            case "act":
                return _heading_rule(f"ACT {ROMAN[self.act]}")
            case "scene":
                return _heading_rule(f"SCENE {ROMAN[self.scene]}. @place, @hour.")
        return RULES[symbol]

    def hear(self, kind: str, line: str) -> None:
        """Take in a line of the given kind."""
        names = tuple(re.findall("[A-Z]{2,}", line))
        match kind:
            case "title":
                self.act = 0
            case "act":
                self.act, self.scene = self.act + 1, 0
            case "scene":
                self.scene += 1
            case "cast":
                self.cast, self.speaker, self.before = names, "", ""
            case "enter":
                self.cast, self.before = tuple(sorted(self.cast + names)), names[0]
            case "exit":
                self.cast = tuple(name for name in self.cast if name not in names)
            case "speaker" | "singer":
                self.speaker, self.before = names[0], self.speaker
            case "open" | "tune":
                self.rhyme = re.findall("[a-z]+", line)[-1]
            case "close" | "refrain":
                self.rhyme = ""
        if kind == "gap":
            self.state += "_"
        elif kind == "speaker":
            cues = {"ask_": "answers", "cast_": "greets", "enter_": "greets"}
            self.state = cues.get(self.state, "speaks")
        else:
            self.state = kind


# --- Writing --------------------------------------------------------------------------------------


def _write(stage: Stage, symbol: str, rng: random.Random) -> tuple[str, float]:
    """One derivation of a symbol: its text, and its cost in nats."""
    rule = stage.rule(symbol)
    choice = bisect_right(rule.sums, rng.random() * rule.sums[-1])
    pieces, cost = list(rule.parts[choice]), rule.nats[choice]
    for i in range(1, len(pieces), 2):
        pieces[i], nats = _write(stage, pieces[i], rng)
        cost += nats
    return "".join(pieces), cost


def write_lines(seed: int = DEFAULT_SEED) -> Iterator[tuple[str, float]]:
    """Endless: each line with its newline, and its cost in nats, -log P(line | lines before)."""
    rng, stage = random.Random(seed), Stage()
    while True:
        moves = stage.moves()
        sums = list(accumulate(moves.values()))
        choice = bisect_right(sums, rng.random() * sums[-1])
        kind, weight = list(moves.items())[choice]
        line, cost = _write(stage, kind, rng)
        line = line[:1].upper() + line[1:]
        stage.hear(kind, line)
        yield line + "\n", cost + math.log(sums[-1] / weight)


def write_pieces(
    seed: int = DEFAULT_SEED, chars: int = DEFAULT_CHARS, size: int = 1 << 20
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The play of `write_play` in pieces of about `size` characters; constant memory.

    Yields the text of some lines, the play's offset after each, and the cost of each.
    """
    source, end = write_lines(seed), 0
    while end < chars:
        lines, ends, nats, stop = [], [], [], min(end + size, chars)
        while end < stop:
            line, cost = next(source)
            end += len(line)
            lines.append(line)
            ends.append(end)
            nats.append(cost)
        yield "".join(lines), np.array(ends, np.int64), np.array(nats, np.float64)


def write_play(
    seed: int = DEFAULT_SEED, chars: int = DEFAULT_CHARS
) -> tuple[str, np.ndarray, np.ndarray]:
    """The text of a seed: whole lines, up to the first that reaches ``chars`` characters.

    Returns the text, the character offset after each line, int64 (L,), and the cost of each line
    in nats, float64 (L,).
    """
    nothing = "", np.zeros(0, np.int64), np.zeros(0, np.float64)
    texts, ends, nats = zip(nothing, *write_pieces(seed, chars), strict=True)
    return "".join(texts), np.concatenate(ends), np.concatenate(nats)


# --- Recognising ----------------------------------------------------------------------------------

Spans = dict[int, tuple[float, int]]  # end offset -> total probability, number of derivations


def _spans(stage: Stage, symbol: str, line: str, start: int, seen: dict) -> Spans:
    """Where a symbol that starts at ``start`` can end, summed over all its derivations."""
    if (symbol, start) in seen:
        return seen[symbol, start]
    rule, found = stage.rule(symbol), {}
    for prob, parts in zip(rule.probs, rule.parts, strict=True):
        if not line.startswith(parts[0], start):
            continue
        ends = {start + len(parts[0]): (prob, 1)}
        for inner, literal in zip(parts[1::2], parts[2::2], strict=True):
            after: Spans = {}
            for middle, left in ends.items():
                for end, right in _spans(stage, inner, line, middle, seen).items():
                    if line.startswith(literal, end):
                        _add(after, end + len(literal), left[0] * right[0], left[1] * right[1])
            ends = after
        for end, (mass, ways) in ends.items():
            _add(found, end, mass, ways)
    seen[symbol, start] = found
    return found


def _add(spans: Spans, end: int, mass: float, ways: int) -> None:
    old_mass, old_ways = spans.get(end, (0.0, 0))
    spans[end] = old_mass + mass, old_ways + ways


def _readings(stage: Stage, line: str) -> list[tuple[str, float, int]]:
    """All (kind, probability, number of derivations) that a line can have at this point."""
    moves, readings = stage.moves(), []
    if line[:1].islower():
        return []
    sources = sorted({line, line[:1].lower() + line[1:]})  # the first letter may hide a small one
    for kind, weight in moves.items():
        for source in sources:
            mass, ways = _spans(stage, kind, source, 0, {}).get(len(source), (0.0, 0))
            if ways:
                readings.append((kind, mass * weight / sum(moves.values()), ways))
    return readings


def recognise(text: str) -> np.ndarray:
    """The cost in nats of each line of a text, float64 (L,), from the text alone.

    Raises ValueError, naming the line, if the text is not whole lines of this grammar.
    """
    *lines, rest = text.split("\n")
    stage, nats = Stage(), []
    for number, line in enumerate(lines, 1):
        readings = _readings(stage, line)
        if not readings:
            raise ValueError(f"line {number} is not a line of the grammar here: {line!r}")
        if len(readings) > 1 or readings[0][2] > 1:
            raise ValueError(f"line {number} has more than one derivation: {line!r}")
        kind, mass, _ = readings[0]
        nats.append(-math.log(mass))
        stage.hear(kind, line)
    if rest:
        raise ValueError(f"line {len(lines) + 1} does not end with a newline: {rest!r}")
    return np.array(nats, np.float64)


def floor(line_ends: np.ndarray, nats: np.ndarray, start: int, stop: int) -> float:
    """Nats per character that the best model pays on characters [start, stop), given all before.

    ``line_ends`` and ``nats`` are those of ``write_play``, in memory or mapped from a file; a line
    cut by a boundary is counted in proportion. Raises ValueError if the range is empty or reaches
    outside the text.
    """
    if not 0 <= start < stop <= (line_ends[-1] if len(line_ends) else 0):
        raise ValueError(f"no characters [{start}, {stop}) in the text")
    first, last = bisect_right(line_ends, start), bisect_left(line_ends, stop)
    begins = [int(line_ends[i - 1]) if i else 0 for i in (first, last)]
    before = nats[first] * (start - begins[0]) / (line_ends[first] - begins[0])
    after = nats[last] * (line_ends[last] - stop) / (line_ends[last] - begins[1])
    return float((nats[first : last + 1].sum() - before - after) / (stop - start))
