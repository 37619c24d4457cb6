"""Class names and prompt templates, from files or by name, and the class vectors they make."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clipindex.errors import ClassesError
from clipindex.types import Float32Array, TextEncoder

PLACEHOLDER = "{c}"
TEMPLATE_SETS = ("simple", "imagenet-7", "imagenet-80")
PROMPTS_AT_ONCE = 1024
"""Prompts tokenised and embedded between two reports of progress."""


def read_classes(path: str | Path) -> list[str]:
    """Class names, one a line; the line number from zero is the class id.

    Raises:
        ClassesError: The file is missing, empty, has an empty line between names, or names a class twice.
    """
    names = _lines(path, "class file")
    if not any(names):
        raise ClassesError(f"{path}: no class names; write one a line")
    if "" in names:
        raise ClassesError(
            f"{path}: line {names.index('') + 1} is empty, which would shift the ids of the classes after it"
        )
    check_classes(names, str(path))
    return names


def check_classes(names: Sequence[str], where: str) -> None:
    """Refuse a class list that cannot tell its classes apart.

    Raises:
        ClassesError: It is empty or names a class twice.
    """
    if not names:
        raise ClassesError(f"{where}: no class names")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        lines = [str(at + 1) for at, name in enumerate(names) if name == twice[0]]
        raise ClassesError(
            f"{where}: {twice[0]!r} stands on lines {', '.join(lines)}; two classes of one name cannot be told apart"
        )


def read_templates(source: str | Path) -> list[str]:
    """Templates with the placeholder `{c}`: one a line of a file, or a built-in set of `TEMPLATE_SETS`.

    The ImageNet sets are OpenAI's 7 and 80 prompts, as open_clip carries them.

    Raises:
        ClassesError: The file is missing or empty, or a template lacks the placeholder.
    """
    if source == "simple":
        return [f"a photo of a {PLACEHOLDER}"]
    if source in TEMPLATE_SETS:
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        prompts = SIMPLE_IMAGENET_TEMPLATES if source == "imagenet-7" else OPENAI_IMAGENET_TEMPLATES
        return [prompt(PLACEHOLDER) for prompt in prompts]
    if not Path(source).is_file():
        raise ClassesError(f"{source}: no such template file, and no built-in set ({', '.join(TEMPLATE_SETS)})")
    templates = [line for line in _lines(source, "template file") if line]
    check_templates(templates, str(source))
    return templates


def check_templates(templates: Sequence[str], where: str) -> None:
    """Refuse templates that would give every class the same prompt.

    Raises:
        ClassesError: There is none, or one lacks the placeholder.
    """
    if not templates:
        raise ClassesError(f"{where}: no templates; write one a line, such as 'a photo of a {PLACEHOLDER}'")
    for number, template in enumerate(templates, 1):
        if PLACEHOLDER not in template:
            raise ClassesError(f"{where}: template {number} ({template!r}) lacks the placeholder {PLACEHOLDER}")


def embed_classes(
    encoder: TextEncoder,
    classes: Sequence[str],
    templates: Sequence[str],
    on_progress: Callable[[int], None] = lambda num_classes: None,
) -> Float32Array:
    """One unit vector a class [C, D]: its prompts embedded, normalised, averaged, and normalised again.

    The recipe is CLIP's prompt ensembling (arXiv:2103.00020, section 3.1.4).
    """
    at_once = max(1, PROMPTS_AT_ONCE // len(templates))
    vectors = np.empty((len(classes), encoder.info.dim), np.float32)
    for first in range(0, len(classes), at_once):
        names = classes[first : first + at_once]
        embedded = encoder.encode([template.replace(PLACEHOLDER, name) for name in names for template in templates])
        means = embedded.reshape(len(names), len(templates), -1).mean(axis=1)
        vectors[first : first + len(names)] = means / np.linalg.norm(means, axis=1, keepdims=True)
        on_progress(first + len(names))
    return vectors


def _lines(path: str | Path, what: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ClassesError(f"{path}: cannot read this {what}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ClassesError(f"{path}: this {what} is not UTF-8 ({error.reason} at byte {error.start})") from error
    return [line.strip() for line in text.rstrip().splitlines()]
