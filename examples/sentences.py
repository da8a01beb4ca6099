"""Real sentences with natural repeats, for the encoder examples: from the Python reference that Python itself ships."""

import random
import re
from pydoc_data.topics import topics


def distinct(count: int) -> list[str]:
    """So many different English sentences of 6 to 40 words."""
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    found = re.findall(r"(?<=[.!?] )[A-Z][A-Za-z0-9 ,;:'\"()\[\]/*_`=-]{30,240}[.!?](?= )", text)
    chosen = list(dict.fromkeys(one for one in found if 6 <= len(one.split()) <= 40))
    if len(chosen) < count:
        raise ValueError(f"the reference has {len(chosen)} such sentences, {count} were asked for")
    return chosen[:count]


def stream(count: int, repeated: float, seed: int = 0) -> list[str]:
    """`count` sentences of which a share of `repeated` came before; popular ones come more often."""
    different = distinct(round(count * (1 - repeated)))
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(different))]
    result = [*different, *draw.choices(different, weights, k=count - len(different))]
    draw.shuffle(result)
    return result
