"""How many texts and steps `mha-book ladder` takes."""

SIZES = {  # least, unless told, most, what it is; always a multiple of the least
    "lines": (8, 64, 512, "that are scored, a multiple of 8; each is six texts (64)"),
    "calibration_lines": (1, 32, 400, "on which the encoder's heads are measured; each is six texts (32)"),
    "batch": (2, 16, 128, "texts of a training step, an even number (16)"),
    "steps": (1, 300, 300, "of each training (300)"),
    "gate_steps": (1, 100, 400, "of the gates before (100)"),
    "control_batches": (1, 32, 128, "on which the controllers are trained (32)"),
    "texts": (1, 8, 64, "that the language model is tested on (8)"),
    "tokens": (64, 512, 1024, "of each, a multiple of 64 (512)"),
    "calibration_texts": (1, 2, 64, "on which its heads are measured (2)"),
    "calibration_tokens": (64, 256, 1024, "of each, a multiple of 64 (256)"),
    "mixed_batches": (1, 2, 12, "of 32 texts of all lengths, which are timed (2)"),
    "rounds": (3, 15, 99, "in which each is timed, a multiple of 3 (15)"),
}
