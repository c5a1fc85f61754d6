"""The embedded corpus: small children's stories from a grammar, any number of them, without a download.

`cast(seed, index)` decides what a story is about, `story(seed, index)` tells it. The grammar is text with three marks
and nothing else: `[a|b]` is a choice, `<sad>` is a phrase of `PHRASES`, `{hero}` a slot that the cast fills
(`{Hero}` begins with a capital, `{a thing}` has its article). Outside of speech "he" and "she" mean the hero; the
friend has a pronoun only where it differs from the hero's, and otherwise the name. So what a story says can be checked
against its cast, by a reader and by the tests.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TypeAlias

# The first row of a table names the slots, any other row fills them. A cell is a choice and may use slots filled
# before it. A row goes on after a "/". Where a table depends on the world, "child" or "forest" is in its name.
TABLES = {
    "people": """
        name / gender / he / him / his
        Lily|Mia|Anna|Rosie|Ella|Lucy|Nora|Ruby|Daisy|Clara|Zoe|Molly / girl / she / her / her
        Tom|Ben|Max|Sam|Leo|Tim|Finn|Jack|Oliver|Noah|Theo|Hugo / boy / he / him / his""",
    "child kinds": """
        kind / home
        {gender} / a small house near the sea|a white house on a hill|a tall house in town|a red house by the river""",
    "forest kinds": """
        kind / home
        rabbit / a snug hole under a hill|a warm hole in the meadow
        bear / a warm cave|a big cave near the river
        mouse / a tiny hole under an old tree|a hole in a stone wall
        fox / a snug den in the woods|a den under a hill
        squirrel / a hollow tree|a nest in an oak tree
        hedgehog / a nest of dry leaves|a warm nest under a bush
        badger / a deep den in the woods|a snug den under a hill
        otter / a snug den by the river|a warm den near the lake""",
    "child meeting": """
        pal / newcomer
        {his} friend {friend}|{his} best friend {friend} / a {friend kind} named {friend}|{pal}""",
    "forest meeting": """
        pal / newcomer
        {his} friend {friend} the {friend kind} / {a friend kind} named {friend}|{pal}""",
    "family": """
        trait / grown
        little|little|little|small|young|curious|cheerful|happy / mom|dad|grandma|grandpa""",
    "days": """
        day
        one day|one day|one day|one sunny morning|one fine day|one bright morning|one quiet afternoon|one Sunday""",
    "nights": """
        day
        one night|one night|one dark night|one windy night|one cold night""",
    "child places": """
        place / at
        the park / in the park
        the beach / on the beach
        the lake / by the lake
        the old mill / by the old mill""",
    "forest places": """
        place / at
        the meadow / in the meadow
        the pond / by the pond
        the river / by the river
        the old oak tree / under the old oak tree""",
    "toys": """
        look / colour / thing / fun
        big|bouncy|shiny / <colour> / ball / kicked the ball back and forth
        big|pretty|light / <colour> / kite / flew the kite
        new|shiny|little / <colour> / drum / played the drum and sang
        little|shiny|wooden / <colour> / boat / played captain with the boat
        little|shiny|wooden / <colour> / train / drove the train around and around
        soft|little|pretty / <colour> / doll / built a little house for the doll
        big|round|shiny / <colour> / bell / rang the bell and danced""",
    "child searches": """
        first / second / spot
        under the bed / in the closet / behind the couch|in the big basket
        in the kitchen / on the shelf / under the stairs|behind a box
        under the table / behind the chair / in the garden|under a pillow
        behind the door / in the yard / under the porch|in the tall grass""",
    "forest searches": """
        first / second / spot
        by the pond / along the path / in the tall grass|under some leaves
        on the hill / behind the old tree / in a hollow log|under a bush
        near the river / around the rocks / in the mud|behind a fence
        under the bridge / in the flowers / behind a big stone|in the reeds""",
    "prizes": """
        look / prize / where / share
        ripe / apple / at the top of a tree / cut the apple in two and ate it
        golden / pear / at the top of a tree / cut the pear in two and ate it
        <colour> / balloon / in the branches of a tree / played with the balloon
        big / picture book / on the very top shelf / read every page of the picture book
        new / box of crayons / on a high shelf / drew pictures with the crayons""",
    "tools": """
        tool / climb
        tall ladder / {Friend} held the ladder, and {hero} climbed up, step by step
        strong box / They turned the box over, and {hero} climbed on top of it
        long pole with a hook / They held the pole together and lifted the hook up high""",
    "picnics": """
        food / colour / shelter / under
        <food> / <colour> / back home / on the floor
        <food> / <colour> / into an empty barn / on the soft straw
        <food> / <colour> / into a dry cave / on the sand""",
    "shadows": """
        monster / cause
        dragon|giant|wolf / your hat on the chair|a pile of pillows|the plant by the window|an old coat on the door""",
    "accidents": """
        colour / item / harm / mend
        <colour> / cup / the handle broke off / stuck the handle back on
        <colour> / pot / a big piece broke off / stuck the piece back in its place
        <colour> / stool / one leg broke off / stuck the leg back on
        <colour> / music box / the lid broke off / stuck the lid back on""",
    "child strays": """
        stray / cry / wrong / food
        kitten / meow / a carrot / warm milk
        puppy / woof / a flower / meat and rice
        lamb / baa / a piece of cheese / sweet clover""",
    "forest strays": """
        stray / cry / wrong / food
        duckling / quack / a nut / oats and peas
        bird / peep / a mushroom / seeds and berries
        lamb / baa / a piece of cheese / sweet clover""",
    "skills": """
        skill / fail / tip / win
        ride a bike / fell over in the grass / look ahead and keep going / rode all the way down the road
        swim / got water in {his} nose / kick your legs and stay calm / swam all the way across the pond
        whistle / made no sound at all / make your lips round and blow softly / whistled a whole song
        row a boat / went around in circles / pull on both sides at once / rowed all the way across the lake
        catch a ball / let the ball fall / keep your eyes on the ball / caught the ball ten times in a row""",
    "gifts": """
        gift / make
        cake / baked the cake with eggs, milk, and honey
        card / painted a big yellow sun on the card
        crown of flowers / tied white and yellow flowers together
        pillow / filled the pillow with soft feathers""",
    "chores": """
        chore / chored / game
        water the flowers / watered all the flowers / <game>
        pick the berries / picked all the berries / <game>
        sweep the floor / swept the whole floor / <game>
        wash the dishes / washed all the dishes / <game>""",
    "traps": """
        animal / trap / effort / rescue
        lamb / stuck in the mud / pulled and pulled, but the mud was too deep /
            laid flat boards on the mud and pulled again
        bird / stuck in a bush / reached into the bush, but the thorns were too sharp /
            bent the branches back, one by one
        turtle / lying on its back / pushed and pushed, but the turtle was too heavy / pushed again with a strong stick
        duckling / sitting in a deep hole / reached down, but the hole was too deep / let a basket down on a rope""",
    "noises": """
        noise / cause / after
        hoo, hoo / an owl in a tree / They waved to the owl
        tap, tap, tap / a branch at the window / They tied the branch back
        bump, bump / a loose door in the wind / They shut the door
        drip, drip, drip / rain in an old bucket / They turned the bucket over""",
    "races": """
        goal / trophy
        the big tree|the bridge|the gate|the tall rock / blue ribbon|red ribbon|gold ribbon|basket of berries""",
    "seeds": """
        plant / grew
        sunflower / a big yellow sunflower, taller than {hero}
        pumpkin / a round pumpkin, as big as a chair
        rose / a red rose that smelled like honey
        tomato / a fat tomato, as red as the evening sun""",
    "guides": """
        chased / age / guide / way / went
        <chased> / old / owl / follow the stream / followed the stream
        <chased> / gray / deer / walk toward the sun / walked toward the sun
        <chased> / slow / turtle / follow the white stones / followed the white stones""",
}

# Choices that plots and tables share.
PHRASES = {
    "start": """
        <once>, there [was|was|lived] {a trait} {kind} named {hero}. [|{He} lived in {home}.] {Day}, {he}
        |<once>, {a trait} {kind} named {hero} lived in {home}[| with {his} {grown}]. {Day}, {he}
        |<once>, in {home}, there lived {a trait} {kind} named {hero}. {Day}, {he}
        |There was once {a trait} {kind} named {hero}. [|{He} lived in {home}.] {Day}, {he}
        |{Hero} was {a trait} {kind} who lived in {home}. {Day}, {he}
        |{Day}, {a trait} {kind} named {hero}""",
    "once": "Once upon a time|Once upon a time|Once upon a time|Once upon a time|Once upon a time|Long ago",
    "colour": "red|blue|green|yellow|purple|orange",
    "food": "bread and cheese|cookies and lemonade|apples and nuts|berry pie and grapes",
    "game": "play ball|fly a kite|play hide and seek|blow bubbles|pick flowers",
    "chased": "butterfly|dragonfly|little bird",
    "says": "said {hero}|{hero} said|said {hero}",
    "replies": "said {friend}|{friend} said|said {friend}",
    "sad": "{He} felt very sad.|{He} was so sad.|{He} wanted to cry.|A tear ran down {his} cheek.",
    "until": "until the sun went down|until it was time for dinner|for a long time",
    "end": """It was a day {he} never forgot.|It had been a very good day.|{Hero} went to bed with a happy heart.
        |That night, {hero} fell asleep with a smile.""",
    "friends": """They stayed good friends from that day on.|And they were the best of friends ever after.
        |After that, {hero} and {friend} played together every day.""",
    "meets": """[Just then|After a while|Soon], {newcomer} came [by|along].
        "[What is wrong|What happened|Why do you look so sad]?" asked {friend}.""",
    "thanks": """"Thank you[| so much], {friend}!" <says>. [|{He} gave {friend} a big hug.|"You are a true friend."
        |"I could not have done it without you."]""",
}


# The first line of a plot names the tables that its cast needs. Blank lines separate its paragraphs.
PLOTS = {
    "lost": """
        toys searches
        <start> wanted to play with {his} {look} {colour} {thing}. But [it was gone|{he} could not find it].
        ["Where is my {thing}?" cried {hero}.|"Oh no! I have lost my {thing}," <says>.|] <sad>

        [{He} looked {first}, but it was not there. Then {he} looked {second}. [No {thing}!|It was not there either.]
        |First, {he} looked {first}, and then {second}. But there was no {thing}.]
        <meets> "My {colour} {thing} is gone," <says>.
        ["Don't worry. We will find it|"Then let's look for it together|"I will help you look], {hero}," <replies>.

        They looked [high and low|everywhere]. [At last|Suddenly], {friend} saw something {colour} {spot}.
        "[Look! |Come quickly! |]Is this your {thing}?" [It was!|Yes, it was the {colour} {thing}!]

        <thanks> Then they {fun} <until>. [From that day on, {hero} took good care of the {thing}.|<friends>|<end>]""",
    "high": """
        prizes tools
        <start> saw {a look} {prize} {where}. ["Oh, I want that {prize}!" <says>.|"How can I get it?" asked {hero}.]
        {He} jumped as high as {he} could, but {he} could not reach it.
        [|Then {he} tried with a stick, but the stick was too short.
        |Then {he} stood on {his} toes, but it did not help.]
        ["I am too small," <says>.|<sad>]

        <meets> "I can't reach the {prize}," <says>.
        "[We can do it together|Two can do what one can't|I have an idea]," <replies>.
        [They went to get|Soon they came back with|They ran and found] {a tool}. {climb}.
        ["I have it!" cried {hero}.|At last, {hero} had the {prize}!|{Hero} reached out and took the {prize}.]

        <thanks> Then they {share}. [{Hero} was glad that {he} was not alone.
        |From then on, {hero} was not too proud to ask for help.|<friends>|<end>]""",
    "picnic": """
        places picnics
        <start> planned a picnic with {pal}. They packed {food} and took {a colour} blanket.
        Then they walked to {place}. ["This is a fine place for a picnic," <replies>.|"I am so hungry!" <says>.|]

        But as soon as they sat down, [dark clouds came|the sky turned gray], and it began to rain.
        [They held the blanket over their heads, but soon it was wet.
        |They sat down under a bush, but the rain came through the leaves.]
        "[Oh no, our|Our] picnic is over!" cried {hero}. <sad>

        "[Wait!|Don't be sad.] We can still have our picnic," <replies>. They ran {shelter}.
        They put the {colour} blanket {under} and ate {food}.
        ["The rain sounds like a drum," <says>.|They told stories and laughed at the rain.
        |When the rain stopped, there was a rainbow in the sky.]

        "[What a good idea|This is the best picnic ever]! Thank you, {friend}!" <says>.
        [Rain could not spoil a day with a friend.|<friends>|<end>]""",
    "share": """
        places toys
        <start> got {a look} {colour} {thing} from {his} {grown}. {He} [loved it very much and|] took it to {place}.
        Soon {newcomer} came by. "What a nice {thing}! [May I play too|Can we play together]?" asked {friend}.
        ["No, it is mine!" <says> and held the {thing} tight.|"No! This {thing} is only for me," <says>.]
        {Friend} walked away and sat down alone.

        {Hero} played with the {thing}. [At first it was fun, but soon it was not.|But it was no fun to play alone.]
        {He} looked at {friend}, who was [all alone|so quiet|very sad]. [{Hero} felt bad.|Now {hero} felt sad too.]

        {He} [ran|went] over to {friend}. "I am sorry," {he} said.
        "[Please come and play with me|We can share it|You can have the first turn]."
        {Friend} smiled. "[Thank you|I would like that], {hero}!"

        Together they {fun} <until>. [The {thing} was twice as much fun with a friend.
        |{Hero} had learned that it is good to share.|"It is more fun when we share," <says>.|<friends>]""",
    "dark": """
        nights shadows
        <start> could not sleep. [It was very quiet and very dark.|There was no moon.|]
        {He} saw a big shadow on the wall. It looked like {a monster}! [{His} heart beat fast.|{Hero} was afraid.]

        First, {he} hid under the blanket[|, but it did not help|, but the shadow was still there].
        Then {he} [sang a little song|counted to ten|closed {his} eyes], but {he} was still afraid.
        ["{Grown}! Please come!" called {hero}.|At last, {he} called {his} {grown}.]

        {His} {grown} came in with a little lamp. "There is {a monster} on the wall!" <says>.
        ["Let's look at it together," said {his} {grown}.|"I want to see that," said {his} {grown}.]
        [The lamp made the room bright. The {monster} was gone!|In the light, the {monster} was gone!]
        "Look, it is only {cause}."

        {Hero} [began to laugh|laughed out loud]. "[What a silly {monster}|I was afraid of that]! Thank you, {Grown}!"
        ["A little light makes big things small," said {his} {grown}.|] [Soon {he} was fast asleep.|]
        [From that night on, {hero} was not afraid of the dark.|The next time {he} saw a shadow, {he} only smiled.]""",
    "broken": """
        accidents
        <start> was [dancing|running|jumping] around at home. [Bump!|Crash!]
        {He} knocked over {a colour} {item}, and {harm}. It was the {item} that {his} {grown} loved best.

        "Oh no! What [have I done|now]?" cried {hero}. {He} [hid the {item} under the bed|pushed it behind a chair].
        But {he} felt bad. [{He} could not play, and {he} could not eat.|The longer {he} waited, the worse it was.|]

        When {his} {grown} came in, {hero} took a deep breath.
        "I broke your {colour} {item}," {he} said [softly|in a small voice]. "I am sorry."
        {His} {grown} [was quiet for a moment|looked at the {item}|sat down next to {him}].
        "Thank you for telling me the truth. [That was brave.|] [We can mend it|Let's mend it] together."

        So they {mend}. [It took a long time.|It was hard work.|] Soon the {colour} {item} was whole again.
        "[I feel much better now. |]Thank you, {Grown}!" <says>. [{He} hugged {his} {grown}.|]
        [From then on, {he} was more careful.|{Hero} knew now that it is best to tell the truth.
        |And every time {he} saw the {item}, {he} smiled.]""",
    "hungry": """
        places strays
        <start> heard a [small|strange] sound {at}. "{Cry}, {cry}!" It was a little {stray}.
        [It was thin and all alone.|It looked tired and hungry.]
        ["You poor little {stray}!" <says>.|"Are you hungry?" asked {hero}.]

        {He} held out {wrong}. The {stray} [looked at it|smelled it] and turned away.
        So {hero} ran to {his} {grown}. "What does {a stray} eat?" {he} asked.
        "[{A stray} likes {food}|Try {food}]," said {his} {grown}. "Thank you, {Grown}!" <says>.

        {He} came back with {food}. [At first, the {stray} was shy. Then it came closer and closer.|"This is for you."]
        The {stray} ate and ate until [nothing was left|it was full]. "{Cry}!" it said, and {hero} laughed.

        [The {stray} followed {him} all the way home. "Can it stay with us?" asked {hero}.
        "Yes, but you must take good care of it," said {his} {grown}. And {hero} did.
        |After that, {hero} came back every day with {food}, and the {stray} always came to meet {him}.]
        [{He} named it [Button|Pepper|Cloud].|Now {hero} had a new friend.|<end>]""",
    "learn": """
        skills
        <start> wanted to learn to {skill}. [All the others could do it.|It looked like fun.]
        {He} tried, but {he} {fail}. [{He} tried again, and again {he} {fail}.|]
        ["It is too hard," <says>.|"I can't do it!" cried {hero}.] <sad>

        {His} {grown} [came and sat down next to {him}|came to see what was wrong].
        "[Nobody can do it the first time|I could not do it at first|It takes time to learn]," said {his} {grown}.
        "Try again, but {tip}."

        [{Hero} took a deep breath and did what {his} {grown} had said.|So {hero} tried it that way.]
        [It went a little better, and|It was hard, but] {he} tried [again and again|once more]. [And then|Suddenly,]
        {he} {win}! "[I did it!|Look at me!] Thank you, {Grown}!" cried {hero}.
        "[I knew you could do it|Well done], {hero}!" said {his} {grown}.

        [From that day on, {hero} did not give up so soon.|{Hero} knew now that it is good to try again.
        |Now {hero} could {skill}, and {he} did it every day.]""",
    "surprise": """
        gifts
        <start> wanted to surprise {his} {grown}. "[I will make {a gift}!|How about {a gift}?]" {he} thought.
        {He} asked {pal} to help. ["It is a secret," <says>.|]

        They {make}. [They worked all morning.|They laughed and sang.|] Suddenly, they heard steps.
        "Quick, hide the {gift}!" whispered {hero}. {Friend} put it [under the table|behind a chair|behind the door].
        "What are you two doing?" asked {his} {grown}. "Oh, nothing," <says>.
        {His} {grown} [smiled|looked around] and went out again. [That was close!|"That was close," <replies>.]

        When the {gift} was ready, {hero} called, "{Grown}, please come in!"
        "Surprise!" shouted {hero} and {friend}. {His} {grown} saw the {gift} and [laughed with joy|was so happy].
        "It is the best {gift} [in the world|I have ever had]! Thank you both!"

        <thanks> [It is nice to get a surprise, but it is even nicer to make one.|{Hero} felt warm inside.|<end>]""",
    "promise": """
        places chores
        <start> made a promise. "I will {chore} before [dinner|it gets dark]," {he} told {his} {grown}.
        ["Good. I am counting on you," said {his} {grown}.|]

        [But then|On the way,] {hero} met {pal}. "[Come with me to {place}|We can go to {place}]," <replies>.
        "Let's {game}!" [{Hero} wanted to go very much.|It sounded like so much fun.]
        [{He} took one step, but then {he}|But then {he}] thought of {his} promise.
        "I can't come now," <says>. "I promised to {chore}."

        ["Then I will help you," <replies>. Together they {chored}. [It was fun to work together.|] <thanks>
        |"All right, I will wait for you," <replies>. {Hero} worked hard and {chored}. "Thank you for waiting!" <says>.]
        {His} {grown} came to look. "You kept your promise! [I am proud of you, {hero}. |]Now go and play!"

        So {hero} and {friend} went to {place} to {game}. [It was even more fun now that the work was done.
        |{Hero} felt light and happy, for a promise is a promise.|<end>]""",
    "stuck": """
        places traps
        <start> was on the way to {place}. Beside the path, {he} saw a little {animal} {trap}. [It needed help.|]
        "[Don't be afraid|Wait], little {animal}. I will help you," <says>.

        {He} {effort}. ["I can't do it alone," <says>.|{He} tried again, but it was no use.]
        [So {he} called for help, and {pal} came.|Just then, {pal} came by.]
        ["What can we do?" asked {friend}.|"The poor {animal}!" <replies>.]
        {Hero} thought hard. "I have an idea!" {he} said.

        Together they {rescue}. [Little by little|Very slowly], the {animal} moved. And then it was free!
        ["We did it!" cried {hero}.|"Hooray!" cried {friend}.|] <thanks>

        The {animal} looked at them as if to say thank you. [Then it went home.|]
        [Even someone small can be a big help.|{Hero} and {friend} were very proud.|<friends>|<end>]""",
    "noise": """
        nights noises
        <start> [heard a strange noise in the dark|was woken by a strange noise]. "{Noise}!"
        ["What is that?" whispered {hero}.|{He} sat up in bed.|{His} heart beat fast.]
        {He} [put a pillow over {his} head|hid under the blanket]. But there it was again[|, and again]. "{Noise}!"

        So {hero} ran to {his} {grown}. "[There is a strange noise|I can't sleep. Something is out there]," {he} said.
        "[Then let's find out what it is|Come, we will look together]," said {his} {grown}.
        They took a lamp and walked through the dark[, step by step|, side by side|].
        "{Noise}!" [Now it was very loud.|] {Hero} [wanted to run away, but {he} did not|held on to {his} {grown}].
        {He} held up the lamp[, and what did {he} see?| and looked.] It was only {cause}!

        {Hero} [began to laugh|laughed out loud]. "[So that was the noise|I was afraid of that]!" {he} said.
        {After}, and then [it was quiet|all was still].

        "Thank you for coming with me, {Grown}," <says>. ["You were very brave," said {his} {grown}.|]
        [Soon {hero} was fast asleep.|After that, {hero} was not so afraid of the night.
        |Then {hero} went back to bed and slept until the morning.]""",
    "race": """
        places races
        <start> met {pal} {at}. "I can run faster than you," <replies>.
        "Let's race to {goal}! The winner gets {a trophy}." "[All right|Yes, let's race]!" <says>.

        [One, two, three, go!|Ready, steady, go!] {Friend} was much faster.
        {Hero} ran as fast as {he} could, but {he} was far behind.
        ["I will never win," thought {hero}.|{He} wanted to give up, but {he} ran on.]

        [Then {friend} fell over a root and cried out. Now {hero} could win! But {he} stopped.
        ["Are you hurt?" asked {hero}.|"Let me help you," <says>.] {He} helped {friend} up.
        "Thank you, {hero}! But now you will not win," <replies>.
        ["A friend is better than {a trophy}," <says>.|"That does not matter," <says>.]
        Side by side they walked to {goal}. They both won the {trophy}.
        |{Friend} looked back and laughed. "I have time for a rest," <replies>, and lay down in the grass.
        Soon {friend he} was asleep. {Hero} was tired too, but {he} did not stop. [On and on {he} ran.|]
        When {friend} woke up, {hero} was already at {goal}! {Hero} won the {trophy}.
        "[Well done|You did not give up], {hero}," <replies>. "[You are the real winner|I should not have stopped]."]

        [After that, {friend} did not brag any more.|<friends>|<end>]""",
    "garden": """
        seeds
        <start> put {a plant} seed into the ground. [{He} could not wait to see it grow.|"Grow big and tall!" <says>.]
        {He} looked at it every morning. But nothing came up. <sad>

        First, {he} sang a song to the seed. [Nothing happened.|It did not help.]
        Then {he} [told it a [funny|long] story|danced around it]. But the seed did not grow.
        ["Why don't you grow?" asked {hero}.|"This seed will never grow," <says>.]
        {His} {grown} [heard this|came to see]. "A seed needs water, sun, and time," said {his} {grown}.

        So {hero} gave it water [every day|each morning] and pulled out the weeds. {He} waited [and waited|many days].
        Then one [morning|day], there was a tiny green leaf! "[Look, {Grown}! |]It is growing!" cried {hero}.
        It grew [and grew|bigger every day], and at last there was {grew}.

        "Thank you, {Grown}," <says>. ["You took good care of it," said {his} {grown}.|]
        [Good things take time.|{Hero} had learned to wait.|The next year, {hero} put ten seeds into the ground.]""",
    "hello": """
        places toys
        <start> went to {place} with {his} {look} {colour} {thing}. {He} saw a new {friend kind}, who sat all alone.
        {Hero} wanted to say hello, but {he} was shy.

        First, {he} waved, but the new {friend kind} did not see it.
        Then {he} went [a little|one step] closer, but {he} did not know what to say.
        ["What if nobody wants to play with me?" thought {hero}.|] At last, {he} took a deep breath.
        "[Hello! My name is|Hello, I am] {hero}," {he} said. "[What is your name|And who are you]?"

        "I am {friend}," said the new {friend kind} [softly|in a small voice]. ["I don't know anyone here."|]
        "[Do you want to|Would you like to] play with my {thing}?" asked {hero}.
        {Friend} [smiled|jumped up]. "[Yes, please|I would love to]!" Together they {fun} <until>.

        ["I was too shy to say hello," <says>. "So was I," <replies>, and they both laughed.
        |One little word had made a new friend.|From then on, they met {at} every day.|<friends>|<end>]""",
    "way": """
        guides
        <start> [ran after|followed] {a chased}. {He} [ran|went] deep into the woods. Then the {chased} was gone,
        and {hero} [did not know the way home|was all alone].
        ["Is anyone there?" {he} called. Nobody answered.|{Hero} was afraid.]

        First, {he} [went down|took] a path, but it ended at a [big rock|wide river|stone wall].
        Then {he} climbed a hill, but [there were only trees|{he} could see nothing but trees]. <sad>
        [Just then|At last], {he} met {a age} {guide}. ["What are you doing here, little {kind}?" asked the {guide}.|]
        "I am lost," <says>. ["Can you help me?"|]

        "Don't cry," said the {guide}. "{Way}, and you will soon be home." "Thank you, kind {guide}!" <says>.
        {He} {went}. [On and on {he} walked.|It was a long way.|]
        [And there was {his} home at last!|At last, {he} saw {his} home!]

        {His} {grown} [hugged {him} tight|ran to meet {him}]. "I will not run away again," <says>.
        [The next day, {he} brought the {guide} a basket of berries.|{Hero} never forgot the {guide}.|<end>]""",
}


class _Dice:
    """Throws that are the digits of one large number, so they depend on nothing but (seed, index), on any machine.

    The number has 256 bits; a story uses about 60 of them and never more than 100.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._number = int.from_bytes(hashlib.shake_256(f"{seed} {index}".encode()).digest(32), "little")

    def roll(self, sides: int) -> int:
        """An integer in [0, sides)."""
        self._number, digit = divmod(self._number, sides)
        return digit


class _Cast(dict[str, str]):
    """Slot -> text. `{Hero}` and `{a thing}` are made from `hero` and `thing`."""

    def __missing__(self, slot: str) -> str:
        if slot[0].isupper():
            text = self[slot[0].lower() + slot[1:]]
            return text[0].upper() + text[1:]
        if slot.startswith("a "):
            text = self[slot[2:]]
            return ("an " if text[0] in "aeiou" else "a ") + text
        raise KeyError(slot)


# One of several ways to say something; each is a fixed string or a sequence of strings and further choices.
_Choice: TypeAlias = "list[str | list[str | _Choice]]"


@cache
def _parse(text: str) -> _Choice:
    tokens = iter(re.split(r"([\[|\]]|<\w+>)", text))

    def choice() -> _Choice:
        ways: list[list[str | _Choice]] = [[]]
        for token in tokens:
            if token == "]":
                break
            if token == "|":
                ways.append([])
            elif token == "[":
                ways[-1].append(choice())
            elif token.startswith("<"):
                ways[-1].append(_parse(PHRASES[token[1:-1]]))
            elif token:
                ways[-1].append(token)
        return ["".join(map(str, way)) if all(isinstance(part, str) for part in way) else way for way in ways]

    return choice()


def _choose(choice: _Choice, dice: _Dice) -> str:
    way = choice[dice.roll(len(choice))]
    if isinstance(way, str):
        return way
    return "".join([part if isinstance(part, str) else _choose(part, dice) for part in way])


@cache
def _plot(name: str) -> tuple[list[str], _Choice]:
    tables, text = PLOTS[name].strip().split("\n", 1)
    return tables.split(), _parse(text)


@cache
def _table(name: str, world: str) -> tuple[list[str], list[list[_Choice]]]:
    lines = (TABLES.get(f"{world} {name}") or TABLES[name]).replace("/\n", "/").strip().split("\n")
    slots, *rows = [[cell.strip() for cell in line.split(" / ")] for line in lines]
    assert all(len(row) == len(slots) for row in rows), f"a row of table {name!r} does not fit its slots"
    return slots, [[_parse(cell) for cell in row] for row in rows]


def _draw(name: str, world: str, dice: _Dice, cast: _Cast) -> None:
    """Fill the slots of a table from one of its rows."""
    slots, rows = _table(name, world)
    for slot, cell in zip(slots, rows[dice.roll(len(rows))], strict=True):
        text = _choose(cell, dice)
        cast[slot] = text.format_map(cast) if "{" in text else text


def _person(world: str, dice: _Dice) -> _Cast:
    person = _Cast()
    _draw("people", world, dice, person)
    _draw("kinds", world, dice, person)
    return person


def _cast(dice: _Dice) -> _Cast:
    plot = list(PLOTS)[dice.roll(len(PLOTS))]
    world = ("child", "forest")[dice.roll(2)]
    cast, friend = _person(world, dice), _person(world, dice)
    while friend["name"] == cast["name"]:
        friend = _person(world, dice)
    if friend["he"] == cast["he"]:  # two persons with one pronoun would be a riddle
        friend["he"] = friend["name"]
    cast.update({f"friend {slot}": text for slot, text in friend.items()})
    cast.update(plot=plot, world=world, hero=cast["name"], friend=friend["name"])
    for table in ("meeting", "family", "days", *_plot(plot)[0]):
        _draw(table, world, dice, cast)
    return cast


def cast(seed: int, index: int) -> Mapping[str, str]:
    """What story `index` of `seed` is about: its plot, world, hero, friend, and all that its tables fill in."""
    return _cast(_Dice(seed, index))


def story(seed: int, index: int) -> str:
    """Story `index` of `seed`, the same on every machine: 100 to 180 words in one or in several paragraphs."""
    dice = _Dice(seed, index)
    slots = _cast(dice)
    text = _choose(_plot(slots["plot"])[1], dice).format_map(slots)
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return ("\n" if dice.roll(4) else " ").join(paragraphs)


def stories(seed: int = 0, start: int = 0) -> Iterator[str]:
    """The stories of `seed` from number `start` on, without end."""
    return (story(seed, index) for index in itertools.count(start))
