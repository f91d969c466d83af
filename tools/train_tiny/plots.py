# SPDX-License-Identifier: Apache-2.0
"""The sentences that `stories.py` tells its stories with. Written for this project."""

from __future__ import annotations

TRAITS = {
    "kind": "help everyone",
    "curious": "look at new things",
    "brave": "climb the tall trees",
    "shy": "sit in the quiet garden",
    "clever": "read and count",
    "happy": "sing and dance",
    "small": "play hide and seek",
    "playful": "jump and run",
}

OPENINGS = [
    "Once upon a time, there was [a little|a young|{a_trait}] {K} named {H}. {H} lived in {home}.",
    "Once upon a time, there was [a little|a young|{a_trait}] {K} named {H}. {He} loved to {likes}.",
    "Once upon a time, in {home}, there lived [a little|{a_trait}] {K} named {H}.",
    "Once there was {a_trait} {K} named {H} who loved to {likes}.",
    "There was once [a little|a young] {K} [named|called] {H}. {H} was very {trait}.",
    "In {home}, there lived [a little|{a_trait}] {K} [named|called] {H}. {He} loved to {likes}.",
    "{H} was {a_trait} {K}. {He} lived in {home}[ and loved to {likes}|].",
]

ENDINGS = [
    "From that day on, {H} and {F} were [best friends|good friends].",
    "[That night|That evening], {H} went to [bed|sleep] with a [big|happy] smile.",
    "{H} [was very happy|was so happy] that {he} [danced all the way home|sang all the way home].",
    "And {H} never forgot that day.",
    "[It was the best day ever.|What a wonderful day it was!]",
    '{H} [smiled|laughed]. "[I am so glad you are my friend|You are the best friend in the world], {F}," {he} said.',
    "{H} learned that [it is good to help|friends make everything better|it is good to share].",
]

PLOTS: dict[str, list[str]] = {
    "lost": [
        "[One day|One morning|One afternoon], {H} could not find {his} {colour} {toy}.",
        "{He} looked [under the bed|behind the door|under the table] and [in the garden|in the kitchen|on the stairs],"
        " but it was not there. {H} [felt very sad|was very sad|began to cry].",
        '"[What is wrong|Why are you sad], {H}?" asked {FF}. "I lost my {toy}," said {H}.',
        '"[Do not worry|Don\'t cry]," said {F}. "[I will help you|We can look together]." They went to {place}.',
        "[Soon|After a while], {F} saw something {colour} [in the grass|under a leaf|behind a rock]."
        ' It was the {toy}! "Thank you, {F}!" [said|cried] {H}.',
    ],
    "share": [
        "[One day|One sunny day], {H} had some {food}. {He} [sat down to eat|wanted to eat it all].",
        'Then {FF} came by. {F} [looked hungry|was very hungry]. "[May I have some|Can I have some]?" asked {F}.',
        "{H} [thought for a moment|looked at the {food}]. There was [not much|only a little] left.",
        'But {H} [smiled|had a kind heart]. "[Of course|Yes]! We can share," {he} said.',
        "They sat [under a tree|in the sun|by the fire] and ate the {food} together."
        " It [tasted|was] even better [that way|with a friend].",
    ],
    "storm": [
        "One night, there was a big storm. The wind [blew and blew|was very loud], and the rain fell [hard|fast].",
        "{H} was [afraid|scared]. {He} hid under {his} [blanket|bed] and [closed {his} eyes|did not move].",
        "Then {he} heard a knock at the door. It was {FF}! {F} was [cold and wet|wet and afraid].",
        '"[Come in|Come inside], {F}," said {H}. {He} gave {fhim} a warm [blanket|cup of milk|scarf].',
        "They [told stories|sang songs|played games] until the storm was over. {H} was not [afraid|scared] any more.",
    ],
    "make": [
        "One [morning|day], {H} wanted to make a {toy}. {He} found some [wood|paper|cloth] and some {colour} paint.",
        "{H} worked [all day|all morning], but the {toy} [fell apart|broke|did not look right].",
        '"I will never do it," {he} said [sadly|with tears in {his} eyes]. {FF} [heard {him}|was watching].',
        '"[Try again|Do not give up]," said {F}. "[I can hold it for you|Let me help you]."',
        "So they worked together, and [soon|at last] the {toy} was [ready|done]. It was [beautiful|wonderful]!",
    ],
    "rescue": [
        'One day, {H} went for a walk to {place}. [Suddenly|There], {he} heard a [small|soft] voice. "Help! Help!"',
        "It was {FF}. {F} was stuck [in the mud|under a branch|in a deep hole] and could not get out.",
        "{H} [ran|hurried] to {fhim}. {He} [pulled and pulled|took a long stick and pulled], but {F} did not move.",
        "Then {H} had an idea. {He} [found a long rope|called all {his} friends|dug with both hands].",
        'They [pulled|tried] one more time, and {F} was free! "You saved me, {H}!" said {F}.',
    ],
    "race": [
        'One day, {FF} said, "I am [faster|much faster] than you, {H}. Let us have a race to {place}!"',
        "{H} was [not very fast|a little slow], but {he} [said yes|wanted to try].",
        "They started to run. {F} ran [very fast|like the wind] and was soon [far ahead|out of sight].",
        "But then {F} stopped to [rest|eat some {food}|sleep] and [fell asleep|forgot the race].",
        "{H} did not stop. Step by step, {he} came to {place} and won the race! {F} [laughed|was surprised]."
        ' "Well done, {H}!" {fhe} said.',
    ],
    "sorry": [
        "One day, {H} played with the {toy} of {his} friend {F}. It was [new|very pretty] and {colour}.",
        "But {H} was not careful. [Crash!|Oh no!] The {toy} fell [on the floor|down the stairs] and broke.",
        "{H} [was afraid to tell|did not want to tell] {F}. {He} hid the {toy} [under the bed|in a box].",
        'But {he} [felt bad|could not sleep]. So {he} went to {F} and told the truth. "I am sorry," {he} said.',
        '{F} was sad, but then {fhe} smiled. "Thank you for telling me," said {F}. "We can fix it together."',
    ],
    "seed": [
        "One spring day, {H} found a [tiny|small] seed [near {place}|in the grass|on the road].",
        "{He} put it in the [ground|garden] and gave it water [every day|every morning].",
        '{H} waited and waited, but nothing [came up|grew]. "[Be patient|Just wait]," said {FF}.',
        "Then one morning, {H} saw a little green leaf! It grew and grew [in the sun|day by day].",
        '[By summer|Soon] there was a big {colour} flower. {H} showed it to {F}. "It is [beautiful|lovely]!" said {F}.',
    ],
    "birthday": [
        "It was the birthday of {H}, but [no one said anything|everyone was busy]. {H} felt [sad|lonely].",
        '"[Maybe they forgot|They all forgot]," {he} thought. {He} went to {place} [alone|and sat down].',
        "When {he} came home, the house was dark. {H} opened the door [slowly|and looked inside].",
        '"Surprise!" cried {FF} and all {his} friends. There were [balloons|candles] and a lot of {food}.',
        '{F} gave {H} a {colour} {toy}. "[It is just what I wanted|I love it]!" said {H}.',
    ],
    "swim": [
        "All the friends of {H} could swim, but {H} could not. {He} was afraid of the water.",
        'One [hot|warm] day, {FF} took {him} to the lake. "[I will hold your hand|I am right here]," said {F}.',
        "First, {H} put one foot in the water. It was [cold|cool]! Then {he} put in the other foot.",
        "{He} tried [again and again|all day]. [Sometimes|Once or twice] {he} was scared, but {he} did not give up.",
        'At last, {H} could swim [all by {him}self|across the lake]! "[Look at me|I can do it]!" {he} cried.',
    ],
    "sick": [
        "One day, {FF} did not come out to play. {F} was [sick|ill] and had to stay in bed.",
        '{H} [wanted to help|had an idea]. "I will make [some soup|some tea] for {F}," {he} said.',
        "{He} went to {place} and found [sweet berries|fresh herbs|a few carrots]. Then"
        " {he} [cooked|worked] all morning.",
        '{H} brought it to {F} with a {colour} flower. "[This is for you|Get well soon]," said {H}.',
        "{F} ate it all and felt [much better|better]. [Soon|The next day] they could play again.",
    ],
    "wish": [
        'One night, {H} looked [out of the window|up at the sky] and saw a bright star. "I'
        ' wish I had a friend," {he} said.',
        "The next [day|morning], {H} went to {place}. There {he} saw {FF}, who was [sitting|playing] alone.",
        '"Hello," said {H}. "[Do you want to play|Would you like to play]?" "Yes!" said {F}.',
        "They played with a {colour} {toy} [all day|until the sun went down]. They [laughed|ran] and [laughed|jumped].",
        'That night, {H} looked up at the star again. "Thank you," {he} [whispered|said].',
    ],
    "treasure": [
        "One day, {H} found an old map [in a book|under the floor|in a bottle]. It showed the way to a treasure!",
        '{He} [ran to|called] {FF}. "[Come with me|Let us go], {F}! We will find the treasure."',
        "They walked [over the hill|through the forest|along the river] and came to {place}.",
        "There they [dug and dug|looked under a big stone] until they found a {colour} box. {H} opened it.",
        'There was no gold in it. There was [a note|a letter]. It said, "The best treasure is a [good|true] friend."'
        " {H} and {F} [laughed|smiled].",
    ],
    "snow": [
        "One [morning|winter day], {H} woke up and saw that [everything|the whole world]"
        ' was white. "Snow!" {he} cried.',
        "{He} put on {his} {colour} [hat|scarf|coat] and ran outside. {FF} was [already there|waiting for {him}].",
        "They made a big snowman near {place}. They gave it [a carrot|a stone] for a nose and a hat.",
        'But the snowman looked [sad|lonely]. "[He needs a friend|Let us make another one]," said {F}.',
        "So they made a [second|little] snowman. Then they went inside and had some hot [milk|soup] and {food}.",
    ],
    "forest": [
        "One day, {H} went [deep|far] into the forest to look for {food}. {He} walked and walked.",
        "Soon {he} did not know the way home. The sun [went down|was low], and it was [dark|getting dark].",
        '"[I am lost|Where is my home]?" {he} said. Then {he} saw two bright eyes. It was {FF}!',
        '"[Follow me|I know the way]," said {F}. They [followed the river|walked under the moon] for a long time.',
        'At last, {H} saw the [light|lights] of {his} house. "Thank you, {F}," {he} said.'
        ' "[You are so kind|Please come in]."',
    ],
    "noise": [
        "One night, {H} heard a strange noise. [Bump! Bump! Bump!|Scratch, scratch, scratch.]"
        " It came from [the roof|outside].",
        '"[Is it a monster|What is that]?" {H} thought. {He} was [a little afraid|scared], but {he} wanted to know.',
        "{He} took a lamp and [went outside|opened the door]. There was something [big|small] in the dark.",
        'It was only {FF}! {F} was looking for {fhis} {toy}. "[I am sorry I woke you|Did I scare you]?" asked {F}.',
        "{H} laughed [and laughed|for a long time]. Then {he} helped {F} to find the {toy}.",
    ],
}
