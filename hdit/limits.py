"""What a number of a setting or an option may be at most.

The limits are far beyond what any paper or machine has had, and such that no setting by itself
overflows, hangs or takes all memory. hdit.bounds makes types of settings of them; options of the
command line take the numbers, and start without pydantic.
"""

MAX_SIDE = 2**14
MAX_WIDTH = 2**16
MAX_STEPS = 100_000
MAX_BATCH = 10**6
MAX_IMAGES = 10**12
MAX_SAMPLES = 10**6  # files that a folder can still be listed with
MAX_CLASSES = 10**6
"""Beyond it a label is rather an identifier, and its table of embeddings would not fit."""
MAX_WORKERS = 1024
MAX_GUIDANCE = 1000
MAX_LR = 1e6
MIN_RELATIVE_WIDTH, MAX_RELATIVE_WIDTH = 1e-4, 0.288
"""Of a power-function average. At 12^-0.5 it is the plain mean of all weights since the start."""
MAX_DECAY = 1 - 1e-9  # of an average: a billion steps
MAX_MINUTES = 10**8  # two centuries
