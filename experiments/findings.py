"""What all studies together say, as the index opens: each sentence with its number.

`{study.key}` stands for the number of the claim with that key, with its interval.
"""

LINES: tuple[str, ...] = ()
