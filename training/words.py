"""Owns the vocabulary of the tales: plain word lists, nothing else.

Invariant: a word stands in at most one of the lists that carry answers, so that a wrong answer
is visibly wrong. Imported by `facts` and `scenes`; pure data, no state.
"""

from __future__ import annotations

from typing import Final


def _split(text: str) -> tuple[str, ...]:
    """Words of a blank-separated list."""
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    """Phrases of a comma-separated list."""
    return tuple(" ".join(part.split()) for part in text.split(","))


WOMEN: Final = _split(
    """
    Mara Ruth Ivy Nora Anna Clara Edith Flora Greta Hazel Iris Jane Kate Lena Mabel Nina Olive
    Pearl Rosa Sara Tess Una Vera Wilma Alice Bella Cora Daisy Ella Fay Grace Helen Ida Julia
    Laura Maud Nell Opal Polly Rita Stella Tilda Agnes Betty Celia Dora Emma Freda Gwen Hilda
    """
)
MEN: Final = _split(
    """
    Tom Ben Sam Jack Adam Bruno Carl David Edgar Frank George Hugo Ivan Jonas Karl Leo Martin
    Ned Oscar Peter Ralph Simon Theo Victor Walter Abel Boris Conrad Daniel Eric Felix Gilbert
    Henry Isaac James Kurt Lucas Max Nathan Otto Paul Robert Stefan Tim Ulrich Albert Basil Cyril
    Dennis Emil
    """
)
OBJECTS: Final = _split(
    """
    lantern kettle mirror ladder violin hammer basket blanket candle compass drum flute globe
    helmet jar jug key kite knife lamp letter locket map mask medal mug necklace needle oar
    paintbrush pan parcel pen pipe plate pot purse radio ring rope saddle saw scarf shield shovel
    spoon statue stool suitcase sword teapot telescope tent toolbox torch trumpet trunk umbrella
    vase wallet watch wheel whistle whip bell book bottle bowl box bracelet bucket camera
    chain chest clock crown cup dagger diary doll fan flag guitar harp hook horn
    notebook brooch thimble sundial sledge puppet portrait lute hourglass goblet easel cradle
    barrel anchor axe bicycle broom cushion
    """
)
TRAITS: Final = _split(
    """
    silver brass wooden old small heavy broken shiny painted rusty golden tiny copper round
    carved dusty lovely plain precious strange iron glass new antique
    """
)
SPOTS: Final = _lines(
    """
    in the cellar, in the attic, under the bed, behind the stove, in the kitchen, in the barn,
    on the roof, in the stable, in the garden, beside the well, in the cupboard, on the shelf,
    under the stairs, in the tower, in the chapel, behind the mill, in the workshop, in the
    bakery, under the bridge, beside the fountain, in the library, in the pantry, on the balcony,
    in the hallway, behind the curtain, in the greenhouse, in the boathouse, under the table,
    beside the fireplace, in the cave, on the wall, in the orchard, in the shed, in the
    schoolroom, under the carpet, behind the piano, on the windowsill, in the laundry, in the
    wardrobe, beside the pond, in the drawer, in the courtyard, under the oak, behind the altar,
    in the cabin, on the porch, in the study, in the tavern, beside the gate, in the warehouse,
    under the bench, in the lighthouse, behind the fence, on the dresser, in the vault
    """
)
TOWNS: Final = _split(
    """
    Oakham Brigg Dunmore Elford Fairwick Graymouth Hollin Inverley Kelby Larkhill Marston Norwell
    Oxley Penrose Quarley Redcliff Selby Thornby Upton Velham Westbury Yarrow Alder Birchwood
    Coldbrook Dalton Eastmere Fernhill Glenbay Highfield
    """
)
JOBS: Final = _lines(
    """
    a baker, a tailor, a sailor, a teacher, a farmer, a miller, a painter, a doctor, a nurse,
    a blacksmith, a carpenter, a weaver, a fisher, a gardener, a postman, a shepherd, a cook,
    a potter, a printer, a singer, a soldier, a judge, a banker, a barber, a butcher, a
    clockmaker, a dancer, a driver, a guard, a hunter, a librarian, a mason, a plumber, a scribe,
    a shoemaker, an actor, a beekeeper, a lawyer, a brewer, a jeweller
    """
)
GOODS: Final = _split(
    """
    apples eggs pears plums onions buns pies sheep goats hens ducks horses coins stamps marbles
    shells ribbons buttons pencils candles-ends nails bricks planks sacks feathers tickets cards
    walnuts cherries lemons carrots turnips roses tulips acorns pebbles
    """.replace("candles-ends", "beads")
)
NUMBERS: Final = _split(
    """
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    """
)
COLOURS: Final = _split(
    "red green blue yellow black white brown grey purple orange pink scarlet violet cream crimson"
)
GARMENTS: Final = _split("coat hat dress shirt jacket cloak vest apron sweater cap")
FOODS: Final = _lines(
    """
    plum cake, onion soup, roast chicken, rye bread, apple tart, fried fish, rice pudding, potato
    salad, mushroom stew, cheese pancakes, lentil curry, honey biscuits, lamb chops, tomato
    noodles, bean broth, ginger cookies, pumpkin porridge, crab sandwiches, almond cream-puffs,
    pepper sausages
    """.replace("cream-puffs", "waffles")
)
PETS: Final = _split("dog cat parrot pony rabbit donkey tortoise goose")
PET_NAMES: Final = _split(
    """
    Biscuit Button Shadow Ginger Pepper Rusty Patch Whisper Bramble Clover Domino Echo Fudge
    Goldie Hector Jasper Kipper Lucky Misty Nugget Oreo Pickle Rocket Scout Tango Ziggy
    """
)
DAYS: Final = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS: Final = _split(
    "January February March April May June July August September October November December"
)
