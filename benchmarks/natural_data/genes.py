"""Genes as codons, from the genome of Streptococcus pyogenes M1 (NC_002737).

The sdist of PhiSpy (MIT licence) contains the genome as a GenBank file. GenBank sets no
restrictions on the use of its data. A codon is one symbol. Codons stay in the reading frame of
their gene, from the start codon to the stop codon.
"""

from __future__ import annotations

import re
import tarfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

from natural_data.rows import Package, Source

SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Symbol of each codon, in the order TTT, TTC, TTA, TTG, TCT, ..., GGG."""
CODONS = ["".join(bases) for bases in product("TCAG", repeat=3)]
# Translation tables 1 (standard) and 11 (bacteria), which differ only in the start codons.
AMINO_ACIDS = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
"""Amino acid of each codon, in the order of `SYMBOLS`; "*" is stop."""
STOP = "*"
CLASSES = {
    "nonpolar": "GAVLIPFMW",
    "polar": "STCYNQ",
    "acidic": "DE",
    "basic": "KRH",
    "stop": STOP,
}
"""Amino acids of each class of side chains."""

_SYMBOL_OF_CODON = dict(zip(CODONS, SYMBOLS, strict=True))
_ACID_OF_SYMBOL = dict(zip(SYMBOLS, AMINO_ACIDS, strict=True))
_COMPLEMENT = str.maketrans("ACGT", "TGCA")
_QUALIFIER = re.compile(r'/translation="([^"]*)"')


class CodingSequence(NamedTuple):
    """Annotated coding sequence of a GenBank file.

    Attributes:
        location: location as the file writes it, such as "complement(3..11)".
        bases: bases of the coding strand.
        translation: amino acids that the file states; empty if it states none.
    """

    location: str
    bases: str
    translation: str


def find_amino_acid_groups() -> dict[str, str]:
    """Return the symbols of the codons of each amino acid, ordered as in `CLASSES`."""
    groups = dict.fromkeys("".join(CLASSES.values()), "")
    for symbol, amino_acid in _ACID_OF_SYMBOL.items():
        groups[amino_acid] += symbol
    return groups


def find_class_groups() -> list[list[str]]:
    """Return the symbols of the codons of each amino acid, in one list for each class."""
    groups = find_amino_acid_groups()
    return [[groups[amino_acid] for amino_acid in members] for members in CLASSES.values()]


def read_coding_sequences(text: str) -> list[CodingSequence]:
    """Read the coding sequences (features CDS) of a GenBank file with one record."""
    features, _, origin = text.partition("\nORIGIN")
    genome = "".join(re.findall("[a-z]+", origin.partition("\n//")[0].partition("\n")[2])).upper()
    found = []
    # A feature starts in column 6 and its continuation lines in column 22.
    for feature in re.findall(r"^     CDS {13}(.*\n(?: {21}.*\n?)*)", features, re.MULTILINE):
        content = re.sub(r"\s+", "", feature)
        location = content.partition("/")[0]
        translation = _QUALIFIER.search(content)
        stated = translation.group(1) if translation else ""
        found.append(CodingSequence(location, find_bases(genome, location), stated))
    return found


def find_bases(genome: str, location: str) -> str:
    """Return the bases of a location: a range, or complement(...) or join(...) of locations.

    Raises ValueError for other locations, for instance of genes that are not complete ("<1..9").
    """
    for name in ("complement", "join"):
        if location.startswith(f"{name}(") and location.endswith(")"):
            inner = location[len(name) + 1 : -1]
            if name == "complement":
                return find_bases(genome, inner).translate(_COMPLEMENT)[::-1]
            return "".join(find_bases(genome, part) for part in _split_parts(inner))
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", location)
    if ends is None:
        raise ValueError(
            f"find_bases: the location must be a range such as 3..11, complement(...) or "
            f"join(...); got {location!r}."
        )
    return genome[int(ends.group(1)) - 1 : int(ends.group(2))]


def _split_parts(text: str) -> list[str]:
    """Split at the commas that are not in parentheses."""
    parts = [""]
    depth = 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def encode_codons(bases: str) -> str | None:
    """Return one symbol per codon, or None if the bases are not a complete gene.

    A complete gene has whole codons of A, C, G and T, and one stop codon, which is the last.
    """
    if len(bases) % 3 or not set(bases) <= set("ACGT"):
        return None
    codons = [bases[start : start + 3] for start in range(0, len(bases), 3)]
    symbols = "".join(_SYMBOL_OF_CODON[codon] for codon in codons)
    acids = translate(symbols)
    is_complete = acids.endswith(STOP) and acids.count(STOP) == 1
    return symbols if is_complete else None


def translate(symbols: str) -> str:
    """Return the amino acid of each codon."""
    return "".join(_ACID_OF_SYMBOL[symbol] for symbol in symbols)


def find_genes(text: str) -> dict[str, str]:
    """Return the symbols of each complete gene of a GenBank file, by location.

    Raises ValueError if a translation in the file differs from the translation of the symbols,
    which shows a wrong reading frame.
    """
    genes = {}
    for sequence in read_coding_sequences(text):
        symbols = encode_codons(sequence.bases)
        if symbols is None:
            continue
        # The start codon always codes for methionine, and the file does not write the stop.
        protein = f"M{translate(symbols)[1:-1]}"
        if sequence.translation and protein != sequence.translation:
            raise ValueError(
                f"find_genes: the gene at {sequence.location} must translate to "
                f"{sequence.translation[:20]}..., but its codons give {protein[:20]}..."
            )
        genes[sequence.location] = symbols
    return genes


def read_genes(archive: Path) -> dict[str, str]:
    """Read the genes of the genome in the sdist of PhiSpy."""
    with tarfile.open(archive) as package:
        for member in package:
            if member.name.endswith("tests/Streptococcus_pyogenes_M1_GAS.gb"):
                file = package.extractfile(member)
                assert file is not None  # a regular file
                return find_genes(file.read().decode())
    raise ValueError(f"read_genes: {archive} has no tests/Streptococcus_pyogenes_M1_GAS.gb.")


# The shared stretch of 8 codons is 24 bases, which unrelated genes hardly have in common.
SOURCE = Source(
    Package("phispy==4.2.21", ("--no-binary", "phispy"), "[Pp]hi[Ss]py-*.tar.gz"),
    read_genes,
    find_key=str,
    stretch=8,
)
