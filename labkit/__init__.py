"""labkit: the thin package behind the laboratory notebooks.

Data flows one way: data, model, technique, training, evaluation, record. Nothing heavy is
imported here, so that `import labkit` stays fast; import the module you need.
"""

__version__ = "0.1.0"

import logging

# PEFT imports bitsandbytes, which says that an optional package of its own is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
