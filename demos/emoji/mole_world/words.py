"""The words of the emoji world: subjects, styles, backgrounds and lights, and which of them the base has never seen."""

from __future__ import annotations

BACKGROUNDS = {  # paper: word -> RGB
    "white": (255, 255, 255),
    "blue": (150, 190, 250),
    "yellow": (250, 225, 120),
    "green": (150, 215, 150),
    "pink": (250, 175, 200),
    "grey": (150, 150, 155),
}
PLACES = {  # landscapes: word -> how a caption says it
    "beach": "on a beach",
    "forest": "in a forest",
    "snow": "in the snow",
    "city": "in a city",
    "desert": "in the desert",
    "mountains": "in the mountains",
}
OPEN = "open"  # some landscape, which the caption leaves open
LIGHTS = {"day": "by day", "sunset": "at sunset", "night": "at night"}  # word -> how a caption says it

BASE_STYLES = (
    "noto", "twemoji", "sepia", "negative", "mosaic", "neon", "outline", "pastel", "poster", "emerald", "sketch",
    "violet", "watercolour",
)  # fmt: skip
HELD_OUT_STYLES = ("aurora", "relief", "duotone", "thermal", "blueprint")
OTHER_STYLES = ("chalk", "joy", "glossy", "flat", "ink")  # unknown, like OTHER_SUBJECTS; artists drew the last four
STYLES = BASE_STYLES + HELD_OUT_STYLES + OTHER_STYLES

BASE_SUBJECTS = (
    # animals
    "bear", "frog", "lion", "panda", "penguin", "owl", "turtle", "butterfly", "lady beetle", "crab", "pig", "elephant",
    "snail", "dolphin", "snake", "rooster", "monkey", "camel", "unicorn", "spider", "scorpion", "blowfish", "squid",
    "gorilla", "rabbit", "bat", "ewe", "shark", "deer", "chipmunk", "rhinoceros", "turkey", "tropical fish", "bird",
    # plants
    "cactus", "palm tree", "evergreen tree", "mushroom", "maple leaf", "hibiscus", "tulip", "four leaf clover",
    # food and drink
    "banana", "carrot", "lemon", "strawberry", "grapes", "pineapple", "watermelon", "cherries", "pizza", "hamburger",
    "eggplant", "red apple", "bread", "lollipop", "ear of corn", "shaved ice", "croissant", "avocado", "bacon", "pancakes",
    "popcorn", "taco", "hot dog", "sushi", "meat on bone", "beer mug", "cocktail glass", "hot beverage", "pear", "candy",
    "kiwi fruit", "rice ball",
    # things
    "guitar", "trumpet", "umbrella", "key", "bomb", "crown", "hammer", "scissors", "light bulb", "bell", "camera",
    "television", "closed book", "candle", "gem stone", "money bag", "mobile phone", "necktie", "jeans", "dress", "top hat",
    "backpack", "running shoe", "telephone", "alarm clock", "drum", "shopping cart", "gear", "envelope", "crossed swords",
    # vehicles, places, weather
    "airplane", "automobile", "bicycle", "rocket", "sailboat", "helicopter", "tractor", "house", "castle", "tent", "anchor",
    "snowman", "crescent moon", "rainbow", "fire", "snowflake",
    # play
    "soccer ball", "basketball", "balloon", "trophy", "artist palette", "game die", "wrapped gift", "christmas tree",
)  # fmt: skip
HELD_OUT_SUBJECTS = (
    "fox", "octopus", "sunflower", "doughnut", "honeybee", "french fries", "cheese wedge", "tiger", "koala",
    "tomato", "crocodile", "birthday cake",
)  # fmt: skip
OTHER_SUBJECTS = (  # unknown to the base and to all LoRAs of the world: material for your own LoRAs
    "cat", "dog", "horse", "cow", "mouse", "wolf", "chicken", "ant", "shrimp", "spouting whale", "goat", "dragon",
    "hatching chick", "eagle", "duck", "lizard", "ox", "boar", "hamster", "bug", "rose", "cherry blossom", "herb",
    "spiral shell", "potato", "peach", "egg", "cookie", "ice cream", "honey pot", "wine glass", "chocolate bar",
    "hot pepper", "cucumber", "burrito", "green salad", "poultry leg", "cooking", "custard", "dango", "violin",
    "saxophone", "microphone", "lipstick", "high heeled shoe", "sunglasses", "handbag", "bathtub", "toilet", "laptop",
    "battery", "microscope", "pencil", "paintbrush", "syringe", "wrench", "shield", "red paper lantern",
    "graduation cap", "t shirt", "barber pole", "watch", "bus", "locomotive", "ambulance", "motorcycle", "ship",
    "ferris wheel", "fountain", "volcano", "star", "cloud", "snow capped mountain", "tennis", "bowling",
    "jack o lantern", "joystick", "ice skate", "hourglass done",
)  # fmt: skip
SUBJECTS = BASE_SUBJECTS + HELD_OUT_SUBJECTS + OTHER_SUBJECTS

# Defaults and grids are chosen on the validation concepts. No choice is made on the test concepts or their prompts.
VALIDATION_SUBJECTS = ("fox", "octopus", "koala", "tomato")
VALIDATION_STYLES = ("relief", "duotone")
TEST_SUBJECTS = tuple(s for s in HELD_OUT_SUBJECTS if s not in VALIDATION_SUBJECTS)
TEST_STYLES = tuple(s for s in HELD_OUT_STYLES if s not in VALIDATION_STYLES)
