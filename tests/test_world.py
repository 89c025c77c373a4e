"""A seed is the same scene on every machine: nothing is drawn with a font of the system."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import ImageFont, features

from experiments.emojiworld import glyphs, judge, world

# Seeds 3 to 22: every setting, one and two subjects, pairs that are left out of training. The
# caption, then the SHA-256 of the picture's bytes and of each noun and its mask.
FIRST_SEED = 3
SCENES = (
    ("a pizza scuba diving", "53fcab5f3ed16e569a3b04d6df8a828620fa4712de57580882204ad356995048"),
    ("an owl scuba diving", "5a64ac22106b2d389d9ddd3cc944a25dc81f50c148df7c070ea55f02c2f57569"),
    ("a ghost", "70f91cf2ab1808827457b2c6d4b9e634e44902d127694e153466a97c26df77dc"),
    ("a frog in the desert", "76ca43cd61bb3cd675e940333c08ead04c0ccf1b6aadd9b9ddd92997c2129861"),
    ("a turtle scuba diving", "69cf230b0ad8b01d4e813627c20f490f4d87d5e7f439fc575d2fa8d639312f6c"),
    (
        "a penguin next to a fish in the desert",
        "a192cfc5639096e999b0c44cdb11d69a7cb569d8ce2bec7bb7a3a4f02f0813f0",
    ),
    ("a guitar at a party", "acfb9cc4d6353f22bf6b23f025b0edeb21606299e9036a83180e3af9d83145e4"),
    ("a guitar at a party", "9d7a2f88bc749b3468e32f7e7a74c65320a1bf9d4f19847a39e74830a783a2df"),
    ("a ghost at a party", "1d9d65b2f8fde17d16f17d89e488b02db4d8a76d52b14a331c4052d6fd2558b6"),
    (
        "a fish next to a guitar on the beach",
        "28e742233c8ea0db4631975b09afcafc7ca6e5cb4b869c99eb20cd8d19e73ce2",
    ),
    ("a cat in the snow", "670eecc17ae0ae620d2ddd39b1de0d10059006550f405f1f87fa611f453c587a"),
    (
        "a dragon next to a robot in the snow",
        "61d45bfa93dec6f34b59fff8bad8263df2ed94c7a65d6eb331e521215264d99f",
    ),
    (
        "an unicorn above a frog in the forest",
        "d39cfe2cccd7aad622c13ff51162da3811f4d3b556df0c8c0cbdbb6893f6fd5a",
    ),
    (
        "a crab next to a panda in the snow",
        "355c683c51a1e3f447738ceb2cbb333aab5193cd81dda6d01175f2a06c326f43",
    ),
    ("a dragon on the moon", "4a1ae7c03530424ec488c3f1ebe17e13a48f98306ea6ac1c53a8d53a8079f6e0"),
    (
        "an astronaut above a fish in the forest",
        "88fefe718df0177733379158633f81b55d5acea1e5e57674ff1281d5c2d83a88",
    ),
    (
        "a dog next to a guitar in the forest",
        "73808286b461603b33f2877b5e43d00fc178fc1ced89581cb811743d05bbcb5b",
    ),
    (
        "an astronaut above a penguin in the snow",
        "6299f3e9d7afa8f64bf3cf36a31cd6dcffbad4b21d6f837b5279a7bbfa431cc0",
    ),
    (
        "a panda next to a balloon at a party",
        "553249a7e8f7f41ffcad86537d9828ec58f7861c1d6b8ddbf7b4e1bd1a8eadc9",
    ),
    (
        "an owl above a football in the city",
        "46f08969f34aaab76101887a1129e63e444f425853e46bd5bb6bb54faffbfb21",
    ),
)
STRANGERS = {  # the SHA-256 of ten pictures of each kind
    "training": "ea2b93adff7fb3f34957d9e751b2077efa1330334cb488b67465dd902fe5a5a9",
    "test": "0b459535ec5feb3be1e3e99b68b3475e545b056e5a9e98883288eae628e93a2f",
}


def digest(scene: world.Scene) -> str:
    sha = hashlib.sha256(scene.image.tobytes())
    for noun, mask in scene.masks.items():
        sha.update(noun.encode() + mask.tobytes())
    return sha.hexdigest()


def test_a_seed_is_the_same_scene_on_every_machine() -> None:
    drawn = [
        world.draw_scene(seed, allow_held_out=True)
        for seed in range(FIRST_SEED, FIRST_SEED + len(SCENES))
    ]
    assert [(scene.caption, digest(scene)) for scene in drawn] == list(SCENES)
    assert {scene.setting for scene in drawn} == {None, *world.SETTINGS}
    assert {scene.relation for scene in drawn} == {None, *world.RELATIONS}
    assert any(
        (subject, scene.setting) in world.HELD_OUT for scene in drawn for subject in scene.subjects
    )


@pytest.mark.parametrize("kind", list(judge.STRANGERS))
def test_a_seed_is_the_same_stranger_on_every_machine(kind: str) -> None:
    sha = hashlib.sha256()
    for seed in range(10):
        sha.update(judge.stranger(seed, kind)[0].tobytes())
    assert sha.hexdigest() == STRANGERS[kind]


def test_every_emoji_that_is_drawn_is_on_the_sheet_at_its_own_size() -> None:
    assert list(world._sheet()) == glyphs.wanted()
    for emoji, ink in world._sheet().items():
        assert ink.getbbox() == (0, 0, *ink.size), emoji
        assert 78 <= max(ink.size) <= world.GLYPH_CELL, emoji
        assert world.glyph(emoji, max(ink.size)).tobytes() == ink.tobytes(), emoji
    assert world.GLYPHS.stat().st_size < 500_000
    with pytest.raises(KeyError, match=r"glyphs\.webp has no 'x'.*experiments\.emojiworld\.glyphs"):
        world.glyph("x", 20)


def test_no_test_can_use_a_font_of_the_system_or_raqm() -> None:
    with pytest.raises(OSError, match="no font of the system"):
        ImageFont.truetype("NotoColorEmoji.ttf", 109)
    assert not features.check("raqm")
    assert ImageFont.load_default(15).getlength("ab") > 10  # Pillow's own


def test_the_script_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit,
        match=r"no font at .*\nUnpack Debian's fonts-noto-color-emoji and name its file with "
        r"--font",
    ):
        glyphs.main(["--font", f"{tmp_path}/none.ttf"])
    (font := tmp_path / "font.ttf").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"no raqm here.*\nInstall libfribidi0"):
        glyphs.main(["--font", str(font)])
