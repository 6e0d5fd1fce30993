"""One room per technique: what it changes, its core to read, and one verb to use it."""
