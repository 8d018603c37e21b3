"""What the tasks of Meta-World ask for, in words of ours."""

from __future__ import annotations

from typing import Final

# Usual ones, held-out ones; the task's own words take the place of the braces.
PARAPHRASES: Final = (
    ("{}", "please {}", "now {}", "the task is to {}", "your job: {}"),
    ("can you {}?", "I would like you to {}", "it is time to {}"),
)

WORDS: Final = {
    "assembly-v3": "pick up the ring and put it over the peg",
    "basketball-v3": "drop the ball into the basket",
    "bin-picking-v3": "move the cube from one bin to the other",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "press the button from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the button from above",
    "button-press-v3": "press the button on the front of the box",
    "button-press-wall-v3": "reach around the wall and press the button",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "lift the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door",
    "hand-insert-v3": "put your hand into the hole",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-open-v3": "turn the tap on",
    "faucet-close-v3": "turn the tap off",
    "hammer-v3": "take the hammer and drive the nail in",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "lift the lever up",
    "pick-place-wall-v3": "pick up the puck, carry it over the wall and hold it at the goal",
    "pick-out-of-hole-v3": "take the puck out of the hole",
    "pick-place-v3": "pick up the puck and hold it at the goal",
    "plate-slide-v3": "slide the plate into the cabinet",
    "plate-slide-side-v3": "slide the plate sideways into the cabinet",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-back-side-v3": "slide the plate sideways out of the cabinet",
    "peg-insert-side-v3": "put the peg into the hole in the side",
    "peg-unplug-side-v3": "pull the peg out of the hole in the side",
    "soccer-v3": "kick the ball into the net",
    "stick-push-v3": "take the stick and push the flask with it",
    "stick-pull-v3": "take the stick and pull the flask with it",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "push-back-v3": "push the puck back towards the robot",
    "reach-v3": "move the hand to the goal",
    "reach-wall-v3": "move the hand over the wall to the goal",
    "shelf-place-v3": "pick up the puck and put it on the shelf",
    "sweep-into-v3": "sweep the puck into the hole",
    "sweep-v3": "sweep the puck off the table",
    "window-open-v3": "slide the window open",
    "window-close-v3": "slide the window shut",
}
