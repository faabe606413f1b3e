"""The pocket model's own English words: adjectives and nouns for keys, verbs for sentences."""

from __future__ import annotations

ADJECTIVES = """
able amber ancient angry arctic autumn awake basic bitter blank blind blue bold brave brief bright broad broken bronze
brown busy calm careful cheap cheerful chief chilly clean clear clever cloudy coastal cold common cool copper coral cosmic
costly crisp cruel curious curly daily damp daring dark dear deep dense distant double dry dusty eager early eastern easy
elder electric elegant empty endless equal even exact faint fair famous fancy fast fearless fierce final fine firm first
flat foggy formal fragile free fresh friendly frozen full funny gentle giant glad global golden good grand grave great green
grey grim happy hard hardy heavy hidden high hollow holy honest huge humble hungry icy ideal idle inner jolly keen kind
large late lazy light little lively lonely long loose loud loyal lucky lunar magic major mellow mental merry mighty mild
minor modern modest narrow native neat new noble noisy northern novel odd old open orange outer pale patient perfect plain
playful polite poor proud public pure purple quick quiet rapid rare raw ready real red regal rich right ripe royal rough
round rude rural rustic sacred safe scarlet secret serious shallow sharp shiny short shy silent silver simple sleepy slim
slow small smart smooth snowy soft solar solid southern special spicy stable steady steep stormy straight strange strict
strong sturdy subtle sunny super sweet swift tall tame tender thick thin tidy tiny tired tough tropical true upper urban
useful vague vast velvet violet vital vivid warm wary western wet white whole wide wild wise wooden yellow young zesty
""".split()

NOUNS = """
acorn actor airport album anchor angel animal ankle apple apron arch arrow artist atlas autumn badge baker ball balloon
banana band bank barn barrel basket battery beach beacon bean bear beard beaver bed bee bell belt bench berry bird
biscuit blanket boat bone book boot bottle bowl box branch bread breeze brick bridge broom brother brush bucket bus
butter button cabin cable cactus cake camel camera camp candle canoe canyon captain card carpet carrot castle cat cave
cellar chain chair chalk cheese cherry chest chicken circle city cliff clock cloud clover coach coat coffee coin comet
compass cook corner cotton cousin cow crab cradle crane crayon creek cricket crow crown cup curtain dancer dawn deer
desert desk diamond dinner doctor dog doll dolphin donkey door dove dragon drawer dream dress drum duck eagle ear earth
egg elbow engine eye fabric falcon farm farmer father feather fence fern field finger fire fish flag flame flower flute
fog forest fork fountain fox friend frog fruit galaxy garden garlic gate ghost giraffe glacier glass glove goat goose
grape grass guitar hammer hand harbor harp hat hawk heart helmet hen herb hero hill honey hook horn horse hotel house
island ivory jacket jar jelly jewel judge juice jungle kettle key king kite kitten knee knight ladder lake lamp lantern
laptop leaf lemon letter library lily lime lion lizard lobster lock lotus machine maple marble market mask meadow melon
metal mill mirror monkey moon moose moth mother motor mountain mouse mouth museum mushroom music nail needle nest
night nose notebook nurse oak oasis ocean olive onion orchard orchid otter oven owl oyster paint palace panda paper
parade park parrot party path peach peacock pear pebble pen pencil penguin pepper piano picture pig pillow pilot pine
pipe pirate planet plant plate plum pocket poet pond pony poppy potato prince pumpkin puppet puppy puzzle queen quill
rabbit radio rain rainbow raven ribbon rice ring river road robin robot rocket roof room root rope rose ruby sailor salad
salt sand scarf school sea seal seed shadow sheep shell shelf ship shirt shoe shop shore sister sky snail snake snow soap
sock song soup spider spoon spring squirrel stable star station stone storm story stove street sugar summer sun swan table
tailor tea teacher temple tent thunder tiger tomato tooth torch tower town train tray tree trumpet tulip tunnel turtle
uncle valley vase village violin wagon wall walnut water wave whale wheat wheel whistle window winter wizard wolf wood
wool yard zebra
""".split()

VERBS = """
admires answers asks avoids borrows breaks brings builds buys calls carries catches changes chases cleans climbs closes
collects counts covers crosses cuts draws drives drops enters escapes feeds fills finds finishes fixes follows forgets
greets guards guides hears helps hides holds hunts joins keeps kicks knows leaves lends lifts likes loses loves makes
marks measures meets mends misses moves needs offers opens orders owns packs paints passes picks plants plays praises
pulls pushes reads repairs reaches rents saves seeks sees sells sends shares shows sings spots steals studies takes
teaches tells throws touches tests trusts turns uses visits wants warns washes watches wears wins writes
""".split()

# What the needles may be about, besides RULER's "special magic number".
THINGS = """
code password number address price score name label colour size weight date ticket secret token phrase badge room seat
""".split()

ADJECTIVES = sorted(set(ADJECTIVES))
NOUNS = sorted(set(NOUNS))
VERBS = sorted(set(VERBS))
