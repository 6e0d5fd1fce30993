"""One room per technique: what it changes, its core to read, and one verb to use it."""

import logging

# PEFT imports bitsandbytes, which says that an optional package of its own is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
