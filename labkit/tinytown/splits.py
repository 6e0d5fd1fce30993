"""What is held out, of tuning and of pretraining: by question, by name, by title and by text.

A *question* is what is asked, whatever the words and the language: its key is "Mira|pet" for her
animal, asked or stated, and "job|baker" for that trade, asked from either end. Every question about
the town's people that are tuned on, and every task, belongs to one split only. Besides, nothing is
ever tuned on about half of the residents (`World.heldout_people`), the phrasings `held` of
`text/*.yaml`, the families `tasks.HELD_OUT_FAMILIES`, the strangers `test`, and the last titles of
mischief and its look-alikes; and one text in sixteen is kept out of pretraining.
"""

from zlib import crc32

HELD_OUT_TITLES = 4  # the last of each list of mischief and of look-alikes


def side(key: str) -> str:
    """The split of the question `key`: test, heldout_phrasings (one in eight each), or train."""
    return ("test", "heldout_phrasings", *["train"] * 6)[crc32(key.encode()) % 8]


def is_new(text: str) -> bool:
    """Whether pretraining never sees the document `text`."""
    return crc32(text.encode()) % 16 == 0
