"""Genes and chorales of benchmarks/natural_trees.py as rows of symbols."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from natural_data import chorales, genes, rows, trees

# A start codon TTG, lysine, tryptophan, stop; and the same gene on the other strand.
GENE = "TTGAAATGGTAA"
OTHER_STRAND = "TTACCATTTCAA"
SEQUENCES = "cc" + GENE.lower() + "g" + OTHER_STRAND.lower() + "ttgaaatgctaa"
GENBANK = f"""LOCUS       TEST                      39 bp    DNA
FEATURES             Location/Qualifiers
     source          1..39
                     /translation="ignored"
     CDS             3..14
                     /product="gene (complete)"
                     /translation="MK
                     W"
     CDS             complement(16..27)
                     /translation="MKW"
     CDS             join(3..5,
                     9..14)
     CDS             4..12
ORIGIN
        1 {SEQUENCES[:10]} {SEQUENCES[10:20]}
       21 {SEQUENCES[20:]}
//
"""


def make_part(notes: str, part: str = "P1", fifths: int = 0) -> str:
    """Return a MusicXML part; durations are in halves of an eighth, and `+` begins a tie."""
    items = [f"<attributes><divisions>4</divisions><fifths>{fifths}</fifths></attributes>"]
    is_tied = False
    for text in notes.split():
        name, _, length = text.partition(":")
        tie = '<tie type="stop"/>' if is_tied else ""
        is_tied = name.endswith("+")
        tie += '<tie type="start"/>' if is_tied else ""
        alter = "<alter>1</alter>" if "#" in name else ""
        pitch = (
            f"<pitch><step>{name[0]}</step>{alter}<octave>{name.strip('+')[-1]}</octave></pitch>"
        )
        content = "<rest/>" if name == "R" else pitch
        items.append(f"<note>{content}<duration>{length}</duration>{tie}</note>")
    return f'<part id="{part}"><measure>{"".join(items)}</measure></part>'


def make_score(voices: dict[str, str], fifths: int = 0) -> str:
    names = ""
    parts = ""
    for number, (voice, notes) in enumerate(voices.items()):
        part = f"P{number}"
        names += f'<score-part id="{part}"><part-name>{voice}</part-name></score-part>'
        parts += make_part(notes, part, fifths)
    return f"<score-partwise><part-list>{names}</part-list>{parts}</score-partwise>"


def encode_part(notes: str, shift: int = 0) -> str:
    part = ElementTree.fromstring(make_part(notes))
    return chorales.encode_voice(chorales.read_notes(part), shift)


def symbol_of(pitch: int) -> str:
    return chorales.PITCHES[pitch - chorales.LOWEST]


def test_genes_are_read_from_both_strands_and_without_introns() -> None:
    found = genes.find_genes(GENBANK)
    # The last location has no stop codon, and is left out.
    assert list(found) == ["3..14", "complement(16..27)", "join(3..5,9..14)"]
    assert genes.translate(found["3..14"]) == "LKW*"
    assert found["complement(16..27)"] == found["3..14"]
    assert genes.translate(found["join(3..5,9..14)"]) == "LW*"


def test_gene_with_another_translation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the gene at 3\.\.14 must translate to MKV"):
        genes.find_genes(GENBANK.replace('  W"', '  V"'))


@pytest.mark.parametrize("bases", ["ATGAAATA", "ATGTAAAAATAA", "ATGAAA", "ATGNAATAA", ""])
def test_incomplete_gene_has_no_symbols(bases: str) -> None:
    assert genes.encode_codons(bases) is None


def test_partial_location_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got '<1\.\.9'"):
        genes.find_bases("ACGTACGTACGT", "<1..9")


@pytest.mark.parametrize(
    ("codons", "acid"),
    [
        ("ATG", "M"),
        ("TGG", "W"),
        ("TAA TAG TGA", "*"),
        ("AAA AAG", "K"),
        ("CGT CGC CGA CGG AGA AGG", "R"),
        ("ATT ATC ATA", "I"),
        ("TCT TCC TCA TCG AGT AGC", "S"),
    ],
)
def test_amino_acid_group_holds_all_of_its_codons(codons: str, acid: str) -> None:
    expected = [genes.SYMBOLS[genes.CODONS.index(codon)] for codon in codons.split()]
    assert sorted(genes.find_amino_acid_groups()[acid]) == sorted(expected)


def test_every_codon_has_one_amino_acid_and_one_class() -> None:
    acids = genes.find_amino_acid_groups()
    assert len(acids) == 21
    assert sorted("".join(acids.values())) == sorted(genes.SYMBOLS)
    classes = genes.find_class_groups()
    assert sorted("".join("".join(members) for members in classes)) == sorted(genes.SYMBOLS)
    assert sorted(symbols for members in classes for symbols in members) == sorted(acids.values())


def test_notes_are_pitches_when_they_begin_and_holds_after() -> None:
    # C4 is MIDI 60. A half note, a tied quarter that lasts an eighth longer, and a rest.
    c, d = symbol_of(60), symbol_of(62)
    assert encode_part("C4:8 D4+:4 D4:2 R:2") == f"{c}---{d}--."
    assert encode_part("D4:2 D4:2") == f"{d}{d}"


def test_sixteenth_is_lost_unless_it_sounds_at_an_eighth() -> None:
    c, d, e = symbol_of(60), symbol_of(62), symbol_of(64)
    assert encode_part("C4:1 D4:1 E4:2") == f"{c}{e}"
    # D4 begins a sixteenth after C4, and sounds at the next eighth.
    assert encode_part("C4:1 D4:2 E4:1") == f"{c}{d}"


def test_accidentals_and_shift_move_the_pitch_in_semitones() -> None:
    assert encode_part("C#4:2") == symbol_of(61)
    assert encode_part("C4:2", shift=-3) == symbol_of(57)


def test_pitch_without_a_symbol_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pitches must lie in 31\.\.84; got 96"):
        encode_part("C7:2")


def test_grace_notes_and_other_notes_of_a_chord_take_no_time() -> None:
    text = make_part("C4:2 E4:2 G4:2").replace(
        "<note><pitch><step>E", "<note><chord/><pitch><step>E"
    )
    notes = chorales.read_notes(ElementTree.fromstring(text))
    assert chorales.encode_voice(notes, 0) == symbol_of(60) + symbol_of(67)


@pytest.mark.parametrize(("fifths", "tonic"), [(0, 60), (1, 67), (-1, 65), (3, 69), (-4, 68)])
def test_major_tonic_of_every_key_signature_becomes_c(fifths: int, tonic: int) -> None:
    shift = chorales.find_transposition(fifths)
    assert -5 <= shift <= 6
    assert (tonic + shift) % 12 == 0


def test_score_interleaves_the_four_voices() -> None:
    voices = {
        "Horn": "C4:2",
        "Soprano": "G4:4",
        "Alto": "E4:2 F4:2",
        "Tenor": "C4:4",
        "Bass": "C3:2",
    }
    text = chorales.encode_score(ElementTree.fromstring(make_score(voices)))
    first = "".join(symbol_of(pitch) for pitch in (67, 64, 60, 48))
    assert text == first + f"-{symbol_of(65)}-."
    assert chorales.find_melody(text) == symbol_of(67) + "-"
    # One sharp is G major, which is moved up by five semitones.
    text = chorales.encode_score(ElementTree.fromstring(make_score(voices, fifths=1)))
    assert text is not None
    assert text[0] == symbol_of(72)


@pytest.mark.parametrize(
    "voices", [("Soprano", "Alto", "Bass"), ("Soprano 1", "Soprano 2", "Alto", "Tenor", "Bass")]
)
def test_score_without_each_voice_once_is_left_out(voices: tuple[str, ...]) -> None:
    score = ElementTree.fromstring(make_score(dict.fromkeys(voices, "C4:2")))
    assert chorales.encode_score(score) is None


def test_every_pitch_has_one_pitch_class_and_white_keys_are_the_scale() -> None:
    classes = chorales.find_pitch_class_groups()
    assert sorted("".join(classes)) == sorted(chorales.PITCHES)
    assert {symbol_of(60), symbol_of(48), symbol_of(72)} <= set(classes[0])
    inside, outside = chorales.find_scale_groups()
    assert sorted(inside + outside) == sorted(classes)
    assert symbol_of(71) in "".join(inside)
    assert symbol_of(70) in "".join(outside)


def test_texts_with_a_common_stretch_are_one_group_through_others() -> None:
    keys = {"a": "xxABCDxx", "b": "EFGHyyABCD", "c": "zzEFGH", "d": "ABCzDzFGH"}
    groups = rows.group_texts(keys, 4)
    assert sorted(map(sorted, groups)) == [["a", "b", "c"], ["d"]]


def test_held_out_groups_are_whole_and_within_the_share() -> None:
    groups = [[f"{number}a", f"{number}b"] for number in range(50)]
    sizes = {name: 10 for group in groups for name in group}
    held_out = rows.hold_out_groups(groups, sizes, 0.1)
    assert len(held_out) == 10
    assert all((first in held_out) == (second in held_out) for first, second in groups)


def test_group_larger_than_the_share_is_not_held_out() -> None:
    groups = [["large"], ["small"]]
    assert rows.hold_out_groups(groups, {"large": 95, "small": 5}, 0.1) == {"small"}


def test_rows_end_where_the_text_ends() -> None:
    assert rows.cut_rows("abcdefgh", 3) == ["cde", "fgh"]
    assert rows.cut_rows("abc", 3) == ["abc"]
    assert rows.cut_rows("ab", 3) == []


def test_prepared_files_share_no_group_and_no_row(tmp_path: Path) -> None:
    """Both texts of a letter are one group; their first rows are equal, and the last row is shared.

    The last row is shorter than the stretch of symbols that joins texts.
    """
    texts = {}
    for letter in "abcdefghijklmnopqrst":
        for number in "12":
            texts[letter + number] = letter * 64 + number + letter * 63 + "-" * 64

    def find_key(text: str) -> str:
        return text[:128]

    calls = []

    def read(archive: Path) -> dict[str, str]:
        calls.append(archive)
        return texts

    archive = tmp_path / "package-1.zip"
    archive.touch()
    package = rows.Package("package==1", (), "package-*.zip")
    source = rows.Source(package, read, find_key, stretch=8)
    files = rows.prepare("letters", source, tmp_path)
    # The second call reads no package.
    assert rows.prepare("letters", source, tmp_path) == files
    assert calls == [archive]
    train = files.train.read_text().split()
    validation = files.validation.read_text().split()
    # 18 and 2 groups of a common row and one row of each text, and the row of all texts.
    assert (len(train), len(validation)) == (18 * 3 + 1, 2 * 3)
    assert len(set(train + validation)) == len(train + validation)
    assert not {row[-1] for row in train} & {row[-1] for row in validation}
    assert {len(row) for row in train + validation} == {rows.LENGTH}
    groups = files.read_groups()
    assert len(set(groups)) == 2
    # A row of 64 letters, or a digit and 63 letters, has the group of its letter.
    letters = [row[-1] for row in validation]
    assert len({*zip(groups, letters, strict=True)}) == 2


def test_missing_registry_is_explained(tmp_path: Path) -> None:
    package = rows.Package("chorales==1", ("--no-index",), "chorales-*.whl")
    with pytest.raises(
        SystemExit, match=r"could not download chorales==1(?s:.)*chorales-\*\.whl into"
    ):
        rows.find_archive(package, tmp_path)


def test_groups_are_patterns_of_their_symbols() -> None:
    assert json.loads(trees.format_groups(["a+", "-]"])) == [r"[a\+]", r"[\-\]]"]
    assert json.loads(trees.format_groups([["a"], ["b", "c"]])) == [["[a]"], ["[b]", "[c]"]]


def test_shuffled_groups_keep_sizes_and_symbols_but_not_members() -> None:
    classes = genes.find_class_groups()
    shuffled = trees.shuffle_symbols(classes)
    assert [[len(group) for group in members] for members in shuffled] == [
        [len(group) for group in members] for members in classes
    ]
    assert sorted("".join(map("".join, shuffled))) == sorted(genes.SYMBOLS)
    assert shuffled == trees.shuffle_symbols(classes)
    acids = {
        symbol: acid for acid, group in genes.find_amino_acid_groups().items() for symbol in group
    }
    kept = [
        group for members in shuffled for group in members if len({*map(acids.get, group)}) == 1
    ]
    # Groups of one codon are of one amino acid; 2 of the 21 amino acids have one codon.
    assert len(kept) <= 4


def test_transposition_follows_the_key_of_the_voices_not_of_an_instrument() -> None:
    voices = {"Horn": "C4:2", **dict.fromkeys(chorales.VOICES, "G4:2")}
    text = make_score(voices, fifths=1).replace("<fifths>1", "<fifths>0", 1)
    assert chorales.encode_score(ElementTree.fromstring(text)) == symbol_of(72) * 4


def test_compressed_scores_of_a_wheel_are_read(tmp_path: Path) -> None:
    score = make_score(dict.fromkeys(chorales.VOICES, "C4:2"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        container = '<container xmlns="urn:c"><rootfile full-path="s.musicxml"/></container>'
        file.writestr("mimetype", "application/vnd.recordare.musicxml")
        file.writestr("META-INF/container.xml", container)
        file.writestr("s.musicxml", score)
    wheel = tmp_path / "music21-1.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("music21/corpus/bach/bwv1.mxl", packed.getvalue())
        file.writestr("music21/corpus/other/op1.mxl", b"not read")
    assert chorales.read_chorales(wheel) == {"music21/corpus/bach/bwv1.mxl": symbol_of(60) * 4}
