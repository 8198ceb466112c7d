"""The words that the cache's guard knows: general English, and the whole of what another language would need.

Rewrites bring ways of asking to one form: "how hot is" and "what is the temperature of" both ask for a TEMPERATURE.
Concepts are words that questions exchange freely. Opposites are near for an embedding and never the same.
"""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_ASKS = {  # what is asked for: ways to say it
    "FREQUENCY": r"how (often|frequently|regularly|many times)|(at )?what intervals?",
    "COUNT": r"how many|what( is| are)?( the)? number of",
    "AGE": r"how old|((from|at|of) )?what( is the)?( minimum)? age( of| for)?",
    "DURATION": r"(for )?how (long|much time)|what( is)?( the)? (duration|length)( of| for)?",
    "WEIGHT": r"how heavy|what( is)?( the)? weight( of| for)?",
    "TEMPERATURE": r"how (hot|warm)|(at |to )?what( is)?( the)? temperature( of| for)?",
    "SIZE": r"how (big|large)|what( is)?( the)? size( of| for)?",
    "STEEPNESS": r"how steep|what( is)?( the)? (gradient|slope)( of| for)?",
    "THICKNESS": r"how thick|what( is)?( the)? thickness( of| for)?",
    "DISTANCE": r"how far|(at )?what( is)?( the)? distance( of| for)?",
    "SPEED": r"how fast|what( is)?( the)? speed( of| for)?",
    "COST": r"how expensive|how much (is|are|would)(?! .*\b(left|required|needed|allowed)\b)|how much (?=.*\b(costs?|pay|charged?)\b)"
    r"|what( is| was| are)?( the| your)? (price|costs?|charge|fee)( of| for| on)?|what (?=(do|does|did|would|will) .*\b(costs?|pay|charge)\b)",
    "AMOUNT": r"how much|what( is)?( the)? (amount|quantity)( of| for)?",
    "HAPPENS": r"what (happens|will happen|follows|now)( once)?|what are the consequences( of)?|what if",
}
_SOON = r"how (soon|quickly)|within what time|how (long|far|much time)(?= (before|after|ahead|until))"
_WHEN = (
    r"(on|by|at|in)? ?what (time|date|days?|hour|moment)( of (the )?(day|year))?"
    r"|what is the (right |best |latest |due )?(time|date)( of| for)?"
)

# (pattern, replacement): applied in order to lower-case text. A word in capitals is a concept.
REWRITES: list[tuple[str, str]] = [
    (r"\b(what|who|where|when|how|that|there)'s\b", r"\1 is"),
    (r"\bcan't\b|\bcannot\b", "can not"),
    (r"\bwon't\b", "will not"),
    (r"n't\b", " not"),
    (r"'(re|ve|ll|d|m|s)\b|(?<=s)'(?=\s|$)", ""),
    (r"(?<=\d),(?=\d{3}\b)", ""),
    (r"(?<=\d)\s*%", " percent"),
    (r"\bwhich\b", "what"),
    (r"\b(till|up to|up until)\b", "until"),
    (r"\b(from|since) what (year|month|week|day|date|version)\b", r"since what \2"),
    (r"\bwho (is|was) it (that|who)\b", "who"),
    (r"\b(is it so|is it true|is it the case) that\b", ""),
    (r"\bis it (?!possible|necessary|allowed|permitted)((?:\w+ ){1,6}?)(who|that)\b", r"does \1"),
    (r"\bwas it (?!possible|necessary|allowed|permitted)((?:\w+ ){1,6}?)(who|that)\b", r"did \1"),
    (r"(?<=\w) that (is|are|was|were|has been|have been) (?=\w+(ed|en|own|ld|nd|nt|pt|ft|aid|ost)\b)", " "),
    (r"\bwho (does|do|did|will do) the (\w+(ing|ion|ment|al))( of)?\b", r"who \2"),
    (r"\b(included|contained) in\b", r"\1 by"),
    (r"\bwhom\b", "who"),
    (r"\b(forbidden|prohibited|banned)\b", "not allowed"),
    (r"\b(all right|alright|okay)\b", "allowed"),
    (r"\b(need not|(do|does|did|is|are) not (need|have|required|necessary)( to)?)\b", "not MUST"),
    (r"\b(may|must|can|could|should|shall) not\b", "not MAY"),  # a duty not to is a missing permission
    (r"\bfree (of|from)\b", "without"),
    (r"\b(advis|recommend|warn|decid)(\w*) against\b", r"not \1\2"),
    (r"\b(over|above|beyond|more than|in excess of|exceeding)(?= \d)", "OVER"),
    (r"\b(under|below|less than|fewer than)(?= \d)", "UNDER"),
    (r"\bat (the )?least\b", "MINIMUM"),
    (r"\bat (the )?most\b", "MAXIMUM"),
    (r"\b(longer|more|greater|higher|in excess) (than|of)\b", "OVER"),
    (r"\b(less|fewer|shorter|lower) than\b", "UNDER"),
    (r"\bby (whom|who|what (person|people))\b", "who BY"),
    (r"\bwhat (person|people)\b|\bwhose\b", "who"),
    (r"\b(from|to|for|on|with) (whom|who)\b", r"whom \1"),
    (r"\b(for what reason|what is the reason( that| why| for)?|how come)\b", "why"),
    (r"\bin what (way|manner)\b|\bwhat (is|are) the (steps|procedure|process|way)( to| for| of)?\b|\bgo about\b", "how"),
    (r"\bwhat( is the)? (place|location)( of)?\b", "where"),
    (rf"\b(from|since) (when|{_WHEN})\b", "when since"),
    (rf"\b({_WHEN}|by when|{_SOON})\b", "when"),
    (r"\bhow (early|late)\b", r"when \1"),
    (r"\bwhat( is)?( the)? (\w+) temperature\b( of| for)?", r"what TEMPERATURE \3"),
    *((rf"\b({pattern})", f"what {concept} ") for concept, pattern in _ASKS.items()),
    (r"\bhow high\b", "what"),
    (r"\b(am|is|are|was|were|be|being) ((?:\w+ ){0,6}?)(allowed|permitted|possible|able|entitled|free(?= to))( for(?= (\w+ ){1,6}to\b))?( to)?\b", r"MAY \2"),
    (r"\b(am|is|are|was|were|be) ((?:\w+ ){0,4}?)(required|obliged|supposed|expected|necessary)\b( for(?= (\w+ ){1,6}to\b))?( to)?", r"MUST \2"),
    (r"\b(am|is|are|was|were) ((?:\w+ ){0,4}?)to be\b", r"MUST \2 be"),
    (r"\b(has|have|had) ((?:\w+ ){0,4}?)to\b", r"MUST \2"),
]

NEGATIONS = words("not no never none nobody nothing neither nor without lack lacks")

# Words that change what is asked, by what they change; a question has of each kind what it has, and so must the other.
_MARKERS = {
    "time": {
        "before": "before prior ahead previously beforehand",
        "after": "after following afterwards once later",
        "during": "during while throughout",
        "since": "since",
        "until": "until",
    },
    "modality": {
        "may": "may can could might MAY",
        "must": "must should shall need needs needed require requires required necessary compulsory mandatory MUST",
    },
    "quantity": {
        "all": "all every everyone everybody everything each entire whole always",
        "only": "only just solely exclusively",
        "some": "some several certain sometimes partly",
        "first": "first initial",
        "last": "last final",
        "else": "else",
    },
    "switch": {"off": "off"},
    "degree": {
        "minimum": "minimum minimal least lowest smallest shortest youngest MINIMUM",
        "maximum": "maximum maximal highest greatest largest biggest longest most limit MAXIMUM",
        "more": "more OVER above beyond older longer higher larger bigger upwards",
        "less": "less fewer UNDER below younger shorter lower smaller",
        "average": "average mean typical",
    },
}
MARKERS: dict[str, dict[str, str]] = {name: {word: value for value, forms in values.items() for word in forms.split()} for name, values in _MARKERS.items()}

UNITS = words(
    """second seconds minute minutes hour hours day days week weeks month months quarter quarters semester semesters year years decade decades
    millimetre millimetres centimetre centimetres metre metres meter meters kilometre kilometres kilometer kilometers inch inches foot feet yard yards
    mile miles gram grams kilo kilos kilogram kilograms kg pound pounds lb stone ounce ounces tonne tonnes ton tons litre litres liter liters gallon gallons
    euro euros dollar dollars cent cents kelvin celsius fahrenheit watt watts kilowatt kilowatts volt volts percent byte bytes kilobyte kilobytes
    megabyte megabytes gigabyte gigabytes terabyte terabytes kb mb gb tb hourly daily weekly monthly quarterly yearly annual annually cubic square"""
)

DATES = words(
    """january february march april june july august september october november december monday mondays tuesday tuesdays wednesday wednesdays
    thursday thursdays friday fridays saturday saturdays sunday sundays weekend weekends weekday weekdays spring summer autumn winter easter christmas
    today tomorrow yesterday morning mornings afternoon afternoons evening evenings night nights noon midnight dawn dusk"""
)

_COUNTED = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"""
NUMBERS = (
    {word: str(value) for value, word in enumerate(_COUNTED.split()) if word != "one"}
    | {  # "one" is a pronoun more often
        "thirty": "30",
        "forty": "40",
        "fifty": "50",
        "sixty": "60",
        "hundred": "100",
        "thousand": "1000",
        "half": "0.5",
        "dozen": "12",
        "twice": "2",
        "second": "2",
        "third": "3",
        "fifth": "5",
        "eighth": "8",
        "ninth": "9",
        "twelfth": "12",
        "twentieth": "20",
    }
    | {f"{word}th": str(value) for value, word in enumerate(_COUNTED.split()) if value not in (0, 1, 2, 3, 5, 8, 9, 12, 20)}
)

# Words on a line, and lines that share a word, are one concept: synonyms, and forms that a stemmer does not join.
CONCEPTS = """
allow permit let accept
cost price pay COST
buy purchase
start begin commence
stop cease halt
get receive obtain
give grant
keep retain store hold retention
delete erase erasure deletion
change modify alter
send dispatch
use usage utilise
make create produce
large big size SIZE
small little
fast quick rapid quickly speed SPEED
fire firing
weigh weight heavy WEIGHT
temperature hot warm TEMPERATURE
thick thickness THICKNESS
steep gradient STEEPNESS
distance apart DISTANCE
long length duration last DURATION
often frequent frequently frequency regularly FREQUENCY
age old AGE
number count COUNT
amount quantity AMOUNT
happen consequence HAPPENS
forbid prohibit ban
include contain comprise
bicycle bike
telephone phone
photograph photo picture
film movie
child kid children
doctor dr physician
car automobile
vacation holiday
begin began begun
bring brought
build built
buy bought
catch caught
choose chose chosen
come came
cut
draw drew drawn
drink drank drunk
drive drove driven
eat ate eaten
fall fell fallen
find found
fly flew flown
forget forgot forgotten
freeze froze frozen
give gave given
go went gone
grow grew grown
hold held
keep kept
know knew known
lead led
leave left
lend lent
lose lost
make made
meet met
pay paid
read
ride rode ridden
rise rose risen
run ran
say said
see saw seen
sell sold
send sent
sing sang sung
speak spoke spoken
spend spent
steal stole stolen
swim swam swum
take took taken
teach taught
tell told
think thought
wear wore worn
win won
write wrote written
staff employee personnel
firm company
shop store
notify notification
request application
reply respond
fix repair
right correct proper
wrong incorrect
enable activate
disable deactivate
administrator admin
discover find
depart leave
gift present
"""

# Pairs of opposites, beyond what the prefixes un-, in-, im-, ir-, dis-, de- and non- say of themselves.
OPPOSITES = """
enable disable, activate deactivate, open close, start stop, begin end, start end, accept reject, accept refuse, accept decline, approve reject, grant
deny, allow forbid, allow prohibit, allow ban, allow refuse, permit forbid, include exclude, cover exclude, increase decrease, raise lower, extend
shorten, add remove, add drop, add deduct, attach detach, connect disconnect, install uninstall, lock unlock, encrypt decrypt, upload download, import
export, buy sell, lend borrow, give take, send receive, win lose, gain lose, pass fail, catch miss, arrive depart, arrive leave, enter leave, push
pull, save delete, keep delete, keep discard, keep change, preserve erase, restore discard, create delete, issue revoke, promote demote, hire dismiss,
renew cancel, extend terminate, submit withdraw, internal external, domestic international, indoor outdoor, inside outside, upper lower, top bottom,
left right, north south, east west, first last, early late, fast slow, hot cold, warm cold, heavy light, long short, large small, high low, deep
shallow,
thick thin, steep flat, old new, old young, hard soft, full empty, public private, shared private, single return, automatic manual, temporary
permanent, optional required, mandatory optional, taxable exempt, right wrong, correct incorrect, true false, good bad, same different, day night,
dawn dusk, sun shade, wet dry, clean dirty, present absent, adult child, adult infant, buyer seller, landlord tenant, employer employee, teacher
student, lender borrower, sender recipient, read write, primary secondary, major minor, active passive, online offline, standard express, weekday
weekend, credit debit, profit loss, income expense, minimum maximum, before after, more less, above below, over under, faster slower, fastest slowest,
upstream downstream, northern southern, eastern western
"""

STOPWORDS = words(
    """a an the of to in at by for with on onto i me my mine you your yours we us our they them their he she his her it its one ones oneself do does did done
    doing is are was were be been being am has have had having will would get gets got getting what that this these those there here as if so and or
    also then than too very please tell know like want about per via upon within between through from into any own go goes come comes take takes took
    under see still now again possible able when it time carried carry over use used uses using done thing things along responsible made BY"""
)
