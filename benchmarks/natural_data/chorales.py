"""Chorales by J. S. Bach in four voices, from the MusicXML files in the wheel of music21.

The compositions are in the public domain. Margaret Greentree encoded them, and the corpus of
music21 has them by permission (`music21/corpus/license.txt`); they are not covered by the BSD
licence of music21. ddiff does not distribute them.

Time is divided into eighths. Each eighth has four symbols: soprano, alto, tenor, bass. The symbol
is `REST`, or `HOLD` if the note at the beginning of the eighth has sounded since the beginning of
the last eighth, else the pitch of this note. Sixteenths within an eighth are lost.

Chorales are transposed to the key signature without accidentals, by at most six semitones: the
notes of the scale are then the white keys. Repeats are played once.
"""

from __future__ import annotations

import io
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from natural_data.rows import Package, Source

HOLD = "-"
REST = "."
LOWEST = 31  # MIDI number of the first pitch symbol
PITCHES = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz01"
"""Symbol of each pitch in semitones, from G1 (MIDI 31) to C6 (MIDI 84)."""
SYMBOLS = HOLD + REST + PITCHES
VOICES = ("Soprano", "Alto", "Tenor", "Bass")
GRID = Fraction(1, 2)  # an eighth, in quarters
WHITE_KEYS = (0, 2, 4, 5, 7, 9, 11)
_STEPS = dict(zip("CDEFGAB", WHITE_KEYS, strict=True))


class Note(NamedTuple):
    """Note of one voice. Times are in quarters; `pitch` is the MIDI number, or None for a rest."""

    start: Fraction
    end: Fraction
    pitch: int | None


def find_pitch_class_groups() -> list[str]:
    """Return the symbols of each pitch class, from C to B."""
    groups = [""] * 12
    for number, symbol in enumerate(PITCHES, LOWEST):
        groups[number % 12] += symbol
    return groups


def find_scale_groups() -> list[list[str]]:
    """Return the pitch classes of the scale and the other pitch classes, in one list each."""
    groups = find_pitch_class_groups()
    inside = [groups[number] for number in WHITE_KEYS]
    outside = [groups[number] for number in range(12) if number not in WHITE_KEYS]
    return [inside, outside]


def find_melody(text: str) -> str:
    """Return the symbols of the soprano. Two harmonizations of a melody have the same soprano."""
    return text[:: len(VOICES)]


def encode_score(score: Element) -> str | None:
    """Return the symbols of a MusicXML score; None if not every voice is in exactly one part.

    Raises ValueError for a pitch without a symbol.
    """
    parts = find_voices(score)
    if parts is None:
        return None
    # Instruments may be written in other keys than the voices.
    shift = find_transposition(int(parts[0].findtext(".//fifths", "0")))
    voices = [encode_voice(read_notes(part), shift) for part in parts]
    # A final rest may be missing in a part.
    length = max(len(voice) for voice in voices)
    filled = [voice.ljust(length, REST) for voice in voices]
    return "".join("".join(symbols) for symbols in zip(*filled, strict=True))


def find_voices(score: Element) -> list[Element] | None:
    """Return the parts of the four voices, or None if not every voice is in exactly one part."""
    found = []
    for voice in VOICES:
        ids = []
        for entry in score.iter("score-part"):
            # A name may also list instruments: "Soprano Oboe 1".
            words = entry.findtext("part-name", "").split()
            if words[:1] == [voice]:
                ids.append(entry.get("id"))
        parts = [part for part in score.iter("part") if part.get("id") in ids]
        if len(parts) != 1:
            return None
        found.append(parts[0])
    return found


def find_transposition(fifths: int) -> int:
    """Return the semitones, in -5..6, from a key signature to the one without accidentals.

    `fifths` is the number of sharps, or minus the number of flats.
    """
    up = -7 * fifths % 12
    return up if up <= 6 else up - 12


def read_notes(part: Element) -> list[Note]:
    """Read the notes and rests of a part in the order of the file; tied notes become one note.

    Only the first note of a chord is read, and grace notes are left out.
    """
    notes: list[Note] = []
    divisions = 1  # units of a duration in a quarter
    time = Fraction(0)
    for item in part.iter():
        if item.tag == "divisions":
            divisions = int(item.text or "1")
        elif item.tag in ("backup", "forward", "note"):
            is_extra = item.find("chord") is not None or item.find("grace") is not None
            if is_extra:
                continue
            duration = Fraction(item.findtext("duration", "0")) / divisions
            if item.tag == "note":
                _append_note(notes, item, time, time + duration)
            time += -duration if item.tag == "backup" else duration
    return notes


def _append_note(notes: list[Note], item: Element, start: Fraction, end: Fraction) -> None:
    pitch = find_pitch(item)
    ties = [tie.get("type") for tie in item.iter("tie")]
    is_continued = "stop" in ties and notes and notes[-1].pitch == pitch and notes[-1].end == start
    if is_continued:
        notes[-1] = notes[-1]._replace(end=end)
    else:
        notes.append(Note(start, end, pitch))


def find_pitch(item: Element) -> int | None:
    """Return the MIDI number of a note element (60 is C4), or None for a rest."""
    pitch = item.find("pitch")
    if pitch is None:
        return None
    semitone = _STEPS[pitch.findtext("step", "")] + int(float(pitch.findtext("alter", "0")))
    return 12 * (int(pitch.findtext("octave", "")) + 1) + semitone


def encode_voice(notes: list[Note], shift: int) -> str:
    """Return one symbol per eighth. `shift` is the number of semitones by which notes are raised.

    Raises ValueError for a pitch without a symbol.
    """
    symbols = []
    end = max((note.end for note in notes), default=Fraction(0))
    index = 0
    time = Fraction(0)
    while time < end:
        while index < len(notes) and notes[index].end <= time:
            index += 1
        note = notes[index]
        if note.start > time or note.pitch is None:
            symbols.append(REST)
        elif note.start <= time - GRID:
            symbols.append(HOLD)
        else:
            symbols.append(_find_symbol(note.pitch + shift))
        time += GRID
    return "".join(symbols)


def _find_symbol(pitch: int) -> str:
    if not 0 <= pitch - LOWEST < len(PITCHES):
        raise ValueError(
            f"encode_voice: pitches must lie in {LOWEST}..{LOWEST + len(PITCHES) - 1}; got {pitch} "
            "after the transposition. Correct the octave of the note in the score."
        )
    return PITCHES[pitch - LOWEST]


def read_chorales(archive: Path) -> dict[str, str]:
    """Read the scores with four voices in the wheel of music21; return the symbols by name."""
    chorales = {}
    with zipfile.ZipFile(archive) as package:
        for name in sorted(package.namelist()):
            if not name.startswith("music21/corpus/bach/") or not name.endswith(".mxl"):
                continue
            symbols = encode_score(_read_compressed_score(package.read(name)))
            if symbols is not None:
                chorales[name] = symbols
    return chorales


def _read_compressed_score(content: bytes) -> Element:
    """Return the score of a compressed MusicXML file, which names the score in its container."""
    with zipfile.ZipFile(io.BytesIO(content)) as package:
        container = ElementTree.fromstring(package.read("META-INF/container.xml"))
        for item in container.iter():
            # The name may have the prefix of an XML namespace.
            if item.tag.endswith("rootfile"):
                return ElementTree.fromstring(package.read(item.get("full-path", "")))
    raise ValueError("read_chorales: a compressed score has no container with a root file.")


# A shared stretch of 24 eighths is three bars of the melody. With 16 eighths, two thirds of the
# chorales are one group.
SOURCE = Source(
    Package("music21==10.5.1", ("--only-binary", "music21"), "music21-*.whl"),
    read_chorales,
    find_melody,
    stretch=24,
)
