# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905  word lists read better as one string
"""Word lists and the small set of facts. All are common knowledge or everyday words, written for this project."""

from __future__ import annotations

GIRLS = (
    "Mia Lily Anna Sara Emma Zoe Ella Ruby Nora Lucy Mary Kate Jane Amy Rose Alice Clara Daisy Grace Ivy Lina Maya Nina"
    " Olga Tina"
).split()
BOYS = (
    "Tom Ben Max Sam Leo Jack Finn Noah John Dan Paul Mark Peter David James Luke Adam Jim Oscar Hugo Eric Ivan Karl"
    " Omar Theo"
).split()
NAMES = GIRLS + BOYS
PETS_SHE = "Bella Luna Coco Momo Pippa Lulu Kiki Hazel Poppy Nala".split()
PETS_HE = "Pip Otto Teddy Tiko Rolo Bruno Milo Rusty Dodo Zip".split()

# noun, sound it makes (verb), its baby
ANIMALS = (
    ("dog", "barks", "puppy"),
    ("cat", "meows", "kitten"),
    ("cow", "moos", "calf"),
    ("horse", "neighs", "foal"),
    ("sheep", "bleats", "lamb"),
    ("pig", "oinks", "piglet"),
    ("duck", "quacks", "duckling"),
    ("frog", "croaks", "tadpole"),
    ("bear", "growls", "cub"),
    ("goose", "honks", "gosling"),
    ("lion", "roars", "cub"),
    ("owl", "hoots", "chick"),
    ("wolf", "howls", "pup"),
    ("hen", "clucks", "chick"),
    ("snake", "hisses", "snakelet"),
    ("elephant", "trumpets", "calf"),
)

# country, capital, language, continent
COUNTRIES = (
    ("France", "Paris", "French", "Europe"),
    ("Germany", "Berlin", "German", "Europe"),
    ("Italy", "Rome", "Italian", "Europe"),
    ("Spain", "Madrid", "Spanish", "Europe"),
    ("Portugal", "Lisbon", "Portuguese", "Europe"),
    ("Greece", "Athens", "Greek", "Europe"),
    ("Poland", "Warsaw", "Polish", "Europe"),
    ("Austria", "Vienna", "German", "Europe"),
    ("Sweden", "Stockholm", "Swedish", "Europe"),
    ("Norway", "Oslo", "Norwegian", "Europe"),
    ("Finland", "Helsinki", "Finnish", "Europe"),
    ("Denmark", "Copenhagen", "Danish", "Europe"),
    ("Hungary", "Budapest", "Hungarian", "Europe"),
    ("Ireland", "Dublin", "English", "Europe"),
    ("Russia", "Moscow", "Russian", "Europe"),
    ("Egypt", "Cairo", "Arabic", "Africa"),
    ("Morocco", "Rabat", "Arabic", "Africa"),
    ("Kenya", "Nairobi", "Swahili", "Africa"),
    ("Ghana", "Accra", "English", "Africa"),
    ("Senegal", "Dakar", "French", "Africa"),
    ("Japan", "Tokyo", "Japanese", "Asia"),
    ("China", "Beijing", "Chinese", "Asia"),
    ("Thailand", "Bangkok", "Thai", "Asia"),
    ("Vietnam", "Hanoi", "Vietnamese", "Asia"),
    ("Turkey", "Ankara", "Turkish", "Asia"),
    ("Iran", "Tehran", "Persian", "Asia"),
    ("Nepal", "Kathmandu", "Nepali", "Asia"),
    ("Indonesia", "Jakarta", "Indonesian", "Asia"),
    ("Cuba", "Havana", "Spanish", "America"),
    ("Peru", "Lima", "Spanish", "America"),
    ("Chile", "Santiago", "Spanish", "America"),
    ("Brazil", "Brasilia", "Portuguese", "America"),
    ("Canada", "Ottawa", "English", "America"),
    ("Colombia", "Bogota", "Spanish", "America"),
)
CITIES = tuple(row[1] for row in COUNTRIES)

OPPOSITES = (
    "hot cold;big small;fast slow;happy sad;up down;day night;open closed;full empty;hard soft;high low;light dark;"
    "loud quiet;new old;rich poor;strong weak;tall short;wet dry;clean dirty;early late;near far;good bad;left right;"
    "first last;thick thin"
)
OPPOSITE_PAIRS = tuple((pair.split()[0], pair.split()[1]) for pair in OPPOSITES.split(";"))

COLOURS_OF = (
    ("grass", "green"),
    ("snow", "white"),
    ("coal", "black"),
    ("milk", "white"),
    ("blood", "red"),
    ("gold", "yellow"),
    ("a banana", "yellow"),
    ("a lemon", "yellow"),
    ("a carrot", "orange"),
    ("a frog", "green"),
    ("a strawberry", "red"),
    ("the sky", "blue"),
    ("chocolate", "brown"),
    ("a flamingo", "pink"),
)

# English, French, German
_WORDS = """
dog chien Hund;cat chat Katze;house maison Haus;water eau Wasser;bread pain Brot;milk lait Milch;apple pomme Apfel
tree arbre Baum;sun soleil Sonne;moon lune Mond;star étoile Stern;book livre Buch;school école Schule;friend ami Freund
mother mère Mutter;father père Vater;sister sœur Schwester;brother frère Bruder;child enfant Kind;man homme Mann
woman femme Frau;king roi König;queen reine Königin;fish poisson Fisch;bird oiseau Vogel;horse cheval Pferd
cow vache Kuh;mouse souris Maus;red rouge rot;green vert grün;blue bleu blau;white blanc weiß;black noir schwarz
yellow jaune gelb;big grand groß;small petit klein;good bon gut;new nouveau neu;old vieux alt;one un eins;two deux zwei
three trois drei;four quatre vier;five cinq fünf;six six sechs;seven sept sieben;eight huit acht;nine neuf neun
ten dix zehn;day jour Tag;night nuit Nacht;fire feu Feuer;snow neige Schnee;rain pluie Regen;hand main Hand
head tête Kopf;heart cœur Herz;eye œil Auge;door porte Tür;key clé Schlüssel;city ville Stadt;street rue Straße
garden jardin Garten;flower fleur Blume;forest forêt Wald;sea mer Meer;mountain montagne Berg;bridge pont Brücke
winter hiver Winter;summer été Sommer;music musique Musik;love amour Liebe;time temps Zeit;yes oui ja;no non nein
"""
WORDS = tuple(tuple(entry.split()) for line in _WORDS.strip().splitlines() for entry in line.split(";"))
LANGUAGES = ("English", "French", "German")

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
LETTERS = [chr(ord("A") + i) for i in range(26)]

PLACES = "store park school beach library garden market kitchen station museum farm office".split()
OBJECTS = "book ball drink ring letter apple key lamp hat cake flower bag coin map pen cup".split()
ITEMS = "apples books coins shells stars flowers cookies balloons pencils stones cards eggs".split()
