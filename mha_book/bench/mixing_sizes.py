"""How long `mha-book mixing` trains, how often, and with which rates."""

SIZES = {  # least, unless told, most, what it is
    "shift_steps": (1, 1000, 5000, "of a training on shifts (1000)"),
    "letter_steps": (1, 800, 5000, "of a training on letters (800)"),
    "seeds": (1, 5, 50, "with which each kind is trained, beside the one that chooses its rate (5)"),
    "rounds": (3, 15, 99, "in which each is timed, a multiple of 3 (15)"),
}
RATES = {"shifts": [0.01, 0.03, 0.06], "letters": [0.001, 0.002, 0.004, 0.008]}
