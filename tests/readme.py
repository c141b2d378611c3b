"""The README's Python, to be run as it stands there."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def snippet(words: str) -> str:
    """The one block of Python that holds these words."""
    (found,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if words in block)
    return found
