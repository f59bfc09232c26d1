"""What a file of the engine must not name, stated over the source itself."""

from __future__ import annotations

import re
from pathlib import Path

import ddiff

ENGINE = Path(ddiff.__file__).parent
FAMILIES = re.compile(r"\b(hdlm|mdlm|gidd|sedd|udlm|duo|remdm|bd3lm)", re.IGNORECASE)
BELOW_TRAINING = ("core", "nn", "sampling", "data", "clustering")


def sources(*rooms: str) -> list[Path]:
    found = [path for room in rooms or ("",) for path in sorted((ENGINE / room).rglob("*.py"))]
    assert len(found) >= 3 * max(1, len(rooms))  # a wrong folder would make every statement here true
    return found


def test_no_file_of_the_engine_names_a_model_family() -> None:
    named = {str(path): match[0] for path in sources() if (match := FAMILIES.search(path.read_text(encoding="utf-8")))}
    assert named == {}


def test_nothing_below_training_knows_processes() -> None:
    """import-linter cannot forbid a part of torch."""
    naming = [path for path in sources(*BELOW_TRAINING) if "torch.distributed" in path.read_text(encoding="utf-8")]
    assert naming == []
