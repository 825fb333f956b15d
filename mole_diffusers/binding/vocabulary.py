"""The English that binding knows: the few words that decide where a list of subjects begins and ends.

Everything else counts as a noun or an adjective. Words are in lower case; nouns are also known in the plural.
"""

from __future__ import annotations

from collections.abc import Sequence


def words(*texts: str) -> frozenset[str]:
    """The words of some texts."""
    return frozenset(" ".join(texts).split())


def one_of(words: frozenset[str]) -> str:
    """A pattern for any of these words."""
    return "|".join(sorted(words))


def is_scenery(word: str) -> bool:
    """Whether it names a medium, a style or a setting: "drawing", "zwxstyle", "beach"."""
    return word in MEDIA or word in SETTINGS or (word.endswith("style") and word not in GARMENTS)


def is_look(words: Sequence[str]) -> bool:
    """Whether these words only say what anybody may wear or look like: "white dress", "pointy ears", but not "sks dress"."""
    return bool(words) and words[-1] in GARMENTS and (GARMENTS | QUALITIES | SETTINGS).issuperset(words)


def is_participle(word: str) -> bool:
    """Whether it says what was done to a subject, or what it does: "painted", "high-fiving"."""
    if word.endswith("ed"):
        return len(word) > 4 and word not in NO_PARTICIPLES
    return word in IRREGULAR or ("-" in word and word.endswith("ing"))


def _plural(*texts: str) -> frozenset[str]:
    found = words(*texts)
    return found | {f"{word}s" for word in found} | {f"{word}es" for word in found if word.endswith(("s", "x", "ch", "sh"))}


def _verbs(*texts: str) -> frozenset[str]:
    """Verbs as they are, in the third person and with -ing: hug hugs hugging."""
    found = set[str]()
    for verb in words(*texts):
        stem = verb.removesuffix("e") if verb.endswith("e") and not verb.endswith("ee") else verb
        doubled = verb + verb[-1] if verb in DOUBLING else stem
        third = (
            f"{verb}es" if verb.endswith(("s", "sh", "ch", "x")) else f"{verb[:-1]}ies" if verb in ("carry",) else f"{verb}s"
        )
        found |= {third, f"{doubled}ing"}
    return frozenset(found)


DOUBLING = words("hug sit run put cut pet grab swim spin clap nap step hit chat")

POSSESSIVES = words("his her their its my your our")
DETERMINERS = POSSESSIVES | words(
    "a an the this that these those some another one two three four five six seven",
    "eight each",
)
PREPOSITIONS = words(
    "in on at with of from by to into onto over under beneath underneath behind before between among amongst amid",
    "near around across through against along inside outside within without off up down during after toward",
    "towards upon like as via for about beyond past atop per",
)
RELATIVES = words("who whom whose which")
CLAUSES = RELATIVES | words("where while when because but then so if")  # what follows is said of what precedes
HAVING = words("in with without wearing wears holding holds carrying carries having has had dressed clad sporting") | CLAUSES
WEARING = words("wearing wears dressed clad sporting")
HOLDING = words(
    "with holding holds carrying carries has have having had"
)  # what can be done with a subject as well as with clothes
IS = words("is are was were be being stands stand sits sit")
POSTURES = IS | _verbs("stand sit walk pose lie wait rest smile laugh") | words("lying seated located placed parked")
# What two do with one another. Then each alone would be another picture. "Hugging" is also said of two that are listed.
MUTUAL = _verbs("hug kiss embrace cuddle snuggle spoon") | words("embraced hugged")
CARRYING = _verbs("hold carry lift cradle")
TOUCHING = MUTUAL | CARRYING | _verbs("ride straddle touch grab clasp pet lick bite feed")
OF_ONE = words("holds holding carries carrying cradles cradling straddles straddling shares sharing")  # also of a subject
CONTACT = (
    TOUCHING
    | _verbs("chase push pull catch share shake race dance wrestle fight tango waltz")
    | {"embrace", "hug", "kiss", "kissed", "tango", "waltz", "wrestle"}
) - OF_ONE
TWO_PARTY = CONTACT | _verbs(
    "watch follow meet greet face lead teach paint draw photograph film help attack guard surround catch see look",
    "talk wave point",
)
VERBS = TWO_PARTY | POSTURES | words("made") | _verbs(
    "wear hold carry have do make eat drink play read run jump fly swim look gaze stare talk sing sleep cook",
    "drive work show write use take give throw kick hang fall float hover lean kneel climb cross enter leave",
    "reach open close turn go come sip love like want need cry shout scream perform enjoy put cut spin clap nap",
    "step hit chat share pour ring say build sell buy serve"
) - words("drawing painting playing like likes looks painter")  # fmt: skip
NO_VERBS = _plural(  # these end like verbs, and are nouns
    "ring king wing string subject building painting drawing evening morning spring sibling ceiling wedding",
    "clothing pudding earring dumpling duckling viking sting being lightning sling swing bling lettering",
    "rendering etching engraving icing living"
) | words("during something nothing anything everything darling charming amazing stunning interesting beijing")  # fmt: skip

IRREGULAR = words("seen shown drawn lit caught hidden frozen woven bound torn split built taken")  # participles
NO_PARTICIPLES = HAVING | words("breed steed speed hundred tweed")

MEDIA = _plural(
    "drawing painting photo photograph picture image illustration sketch render rendering portrait poster sticker",
    "icon print comic cartoon artwork art style view shot close-up closeup scene screenshot snapshot selfie",
    "photography wallpaper statue sculpture depiction composition collage concept design graffiti mosaic fresco",
    "watercolor watercolour aesthetic theme background foreground emoji anime manga still cover postcard mural tapestry",
    "doodle banner billboard flyer filter effect logo polaroid acrylic gouache charcoal pastel oil crayon",
    "macro cutout papercraft linocut woodcut lithograph"
)  # fmt: skip
PICTURES = words(  # those of MEDIA that hang on a wall or stand on a page, so that there may be one of them in the picture
    "drawing painting photo photograph picture image illustration sketch portrait poster sticker print comic cover",
    "screenshot snapshot selfie mural graffiti mosaic fresco tapestry postcard billboard banner flyer doodle polaroid",
)
GATHERINGS = words("group pair couple duo trio team band set pack")
SHARED = GATHERINGS | words("pattern patterns wallpaper print design motif logo emblem")  # "a fox and an owl chess set"
INTRODUCING = words("of with featuring showing depicting containing including starring portraying about shows features")
SETTINGS = _plural(
    "beach forest room city street park garden cafe house home castle mountain hill field sky sea ocean lake",
    "river sunset sunrise night day evening morning light lighting landscape scenery environment world space",
    "desert jungle island town village building tower temple church school classroom kitchen bedroom office bar",
    "restaurant stage road bridge window wall floor ground snow rain fog mist cloud storm moon sun star weather",
    "alley skyline cityscape backdrop meadow valley cave ruin station shop store library museum palace pool shore",
    "coast horizon distance bokeh blur focus depth quality masterpiece detail colour color palette mood",
    "atmosphere camera lens paper canvas grain vignette haze aura glow enclosure zoo studio tavern rooftop market lawn",
    "garage farm pond harbor harbour cliff yard backyard prairie savanna airport gym gallery grass water woodland"
) | words("woods")  # fmt: skip
BODY = _plural(
    "hair hairstyle eye head chest neck shoulder back mouth foot feet knee body belly paw beak nose eyes ear tail wing horn",
    "beard mustache moustache face smile skin tattoo makeup lip nail leg arm hand finger wig ponytail braid freckles pose",
    "twintail bang sleeve feather fur claw fang"
)  # fmt: skip
GARMENTS = BODY | _plural(
    "dress suit hat cap shirt t-shirt coat jacket cape cloak scarf glove boot shoe sock skirt trouser pant jean",
    "short hoodie sweater uniform costume outfit armor armour kimono bikini swimsuit lingerie robe gown tuxedo",
    "tie bowtie belt vest apron glasses sunglasses goggle helmet mask crown tiara necklace earring bracelet",
    "jewelry ribbon bow veil clothes clothing attire collar choker backpack bag headphone stocking legging leggings pants",
    "jeans shorts trousers top blouse blazer cardigan turtleneck jersey corset bodysuit jumpsuit overalls leotard pajamas",
    "tights panties bra underwear sandal sneaker heel slipper headband bandana hood tunic toga sari yukata cheongsam hanbok",
    "poncho brooch gauntlet hairpin hairclip hairband capelet thighhigh pantyhose"
)  # fmt: skip
PERSONS = words(
    "man men woman women girl girls boy boys person people lady ladies guy guys kid kids child children baby",
    "toddler couple friend friends character characters human humans male males female females others adult",
    "adults teenager teenagers brother sister mother father wife husband son daughter king queen prince princess",
    "knight soldier wizard witch nurse doctor"
)  # fmt: skip
QUALITIES = words(  # adjectives that are joined as in "black and white"
    "black white red green blue yellow orange purple pink brown grey gray golden silver dark light big small",
    "large little old young tall short cute beautiful happy sad strong warm cold bright soft hard rough clean",
    "simple detailed realistic vintage retro sepia pointy long"
)  # fmt: skip
ADJECTIVES = QUALITIES | GARMENTS  # after a name: "fox red", "cat earrings"
SEVERAL = words("2 3 4 5 6 7 8 9 two three four five six seven several many multiple both some")  # how many
COUNTED = words(
    "people persons men women girls boys ladies guys kids children friends characters humans males females others",
    "adults subjects figures brothers sisters twins lovers heroes"
)  # fmt: skip
JOINT = _verbs(  # what several do, are to one another, or have once
    "talk chat argue converse whisper compete spar duel battle debate quarrel bicker clink toast trade switch swap meet",
    "flirt",
) | words(
    "duel battle debate conversation argument showdown standoff faceoff reunion duet piggyback lap lineup",
    "enemies rivals married romantic romance yuri yaoi hetero versus vs matching identical opposite separate separated",
    "between respectively latter former difference interlocked intertwined surrounded framed dinner lunch breakfast",
    "brunch picnic tv television selfie chess poker checkers",
    "tennis football soccer basketball volleyball badminton hockey",
    "mahjong billiards frisbee mirrored intimate expressions solo carry grab docking kabedon sandwiched persona inset"
)  # fmt: skip
COMPARED = words("bigger smaller larger taller shorter older younger")
LARGE, SMALL = words("giant gigantic huge enormous colossal towering massive"), words("tiny miniature mini small little")
HELD_SUBJECTS = words("sword shield staff wand bow spear axe dagger gun rifle bag handbag umbrella lantern torch")
ONE_OBJECT = words(  # what two share, or that shows both: then there is one of it
    "bench couch sofa bed table bathtub hammock boat car umbrella blanket cake statue sculpture shirt latte"
)
NOT = words("no not without except minus half")
WRITTEN = words("name names word words text title titled caption headline says saying labeled labelled spelling")
MIDDLE = words("middle center centre")
LIKE = words("shaped themed inspired coloured colored print printed patterned motif")  # a "fox shaped cake" is no fox
ONE = words("he she him his her himself herself hers")  # said of one of several
FRAMES = words("panels koma storyboard collage polaroids diptych triptych")  # a picture of several pictures
IN_FRAMES = words(
    "panel sheet turnaround fusion hybrid merged fused blended morphed morph"
)  # one thing in several, or several in one
GROUPS = words(
    "share sharing couple duo trio group pair crowd twins both together them they their theirs themselves",
    "everyone everybody friends lovers siblings family arms",
)
