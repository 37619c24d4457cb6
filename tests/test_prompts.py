import numpy as np
import pytest

from clipindex.errors import ClassesError
from clipindex.prompts import embed_classes, read_classes, read_templates


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("text", ["cat\nred panda\n", "\ufeffcat\r\nred panda\r\n\r\n", "cat  \nred panda"])
def test_classes_whatever_the_editor(tmp_path, text):
    assert read_classes(write(tmp_path / "c.txt", text)) == ["cat", "red panda"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no class names"),
        ("\n\n", "no class names"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cat\ndog\ncat\n", "'cat' stands on lines 1, 3"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_class_files_that_will_not_do(tmp_path, text, reason):
    with pytest.raises(ClassesError, match=reason):
        read_classes(write(tmp_path / "c.txt", text))


def test_a_missing_class_file_is_named(tmp_path):
    with pytest.raises(ClassesError, match=r"nowhere\.txt"):
        read_classes(tmp_path / "nowhere.txt")


def test_built_in_templates():
    assert read_templates("simple") == ["a photo of a {c}"]
    assert len(read_templates("imagenet-7")) == 7
    eighty = read_templates("imagenet-80")
    assert len(eighty) == 80
    assert "a photo of many {c}." in eighty


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "no templates"), ("a {c}\na photo\n", "template 2 .*'a photo'.* lacks"), (None, "no such")],
)
def test_templates_that_will_not_do(tmp_path, text, reason):
    if text is not None:
        write(tmp_path / "t.txt", text)
    with pytest.raises(ClassesError, match=reason):
        read_templates(tmp_path / "t.txt")


class Words:
    """Each text's vector is told by a table."""

    class info:  # noqa: N801
        dim = 2

    def encode(self, texts):
        table = {"a cat": (1, 0), "the cat": (0, 1), "a {dog}": (0, -1), "the {dog}": (0, -1)}
        return np.array([table[text] for text in texts], np.float32)


def test_prompts_are_averaged_and_normalised_and_names_are_taken_literally():
    vectors = embed_classes(Words(), ["cat", "{dog}"], ["a {c}", "the {c}"])
    np.testing.assert_allclose(vectors, [[0.5**0.5, 0.5**0.5], [0, -1]], atol=1e-6)
