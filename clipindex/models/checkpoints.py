"""Where a model's files come from, and how their tensors are read without running anything in them."""

import json
import pickle
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from clipindex.errors import ModelError

Config = dict[str, Any]
"""A parsed JSON object: a model's or a preprocessor's configuration."""

Tensors = dict[str, torch.Tensor]
"""A state dict: names to tensors of any storage dtype, on the CPU."""

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_HUB_PREFIX = "hf-hub:"
_TORCHSCRIPT_LEFTOVERS = {"input_resolution", "context_length", "vocab_size"}
_WRAPPERS = ("module.", "_orig_mod.")


class Files(Protocol):
    """The files of one model, wherever they lie."""

    @property
    def origin(self) -> str:
        """How messages name the place."""
        ...

    def get(self, name: str) -> Path | None:
        """Local path of the file called `name`, fetched where need be; None where there is no such file."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A local directory as a source of model files."""

    path: Path
    """The directory, absolute."""

    @property
    def origin(self) -> str:
        """The path itself."""
        return str(self.path)

    def get(self, name: str) -> Path | None:
        """Path of `name` in the directory, if it is a file there."""
        path = self.path / name
        return path if path.is_file() else None


@dataclass(frozen=True, kw_only=True, slots=True)
class HubRepo:
    """A Hugging Face Hub repository as a source of model files, through the Hub's own cache."""

    repo: str
    """ORG/REPO."""

    @property
    def origin(self) -> str:
        """The name that a user would give, with a word on what was searched."""
        offline = " (only what is cached, as HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        return _HUB_PREFIX + self.repo + offline

    def get(self, name: str) -> Path | None:
        """Cached or downloaded path of `name`; None only where the Hub says that it does not exist.

        Raises:
            ModelError: the Hub cannot be reached and the file is not cached (a missing optional file would
                otherwise silently change the preprocessing), or the repository is absent, private or gated.
        """
        obstacle = hub_obstacle(self.repo, [name])
        why = f" ({obstacle})" if obstacle else ""
        unreachable = ModelError(
            f"{self.origin}: cannot reach the Hugging Face Hub for {name}{why}; check the network, or download the"
            " repository elsewhere and give local-dir:PATH, or set HF_HUB_OFFLINE=1 to use only what is cached"
        )
        if obstacle:
            raise unreachable
        try:
            return Path(huggingface_hub.hf_hub_download(self.repo, name))
        except LocalEntryNotFoundError as error:
            if constants.HF_HUB_OFFLINE:
                return None
            raise unreachable from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # the Hub's client lets those of its HTTP library through
            first_line = str(error).strip().split("\n")[0]
            raise ModelError(
                f"{self.origin}: cannot fetch {name} ({type(error).__name__}: {first_line}); check the "
                "repository's name and your access to it (`hf auth login` for a gated one)"
            ) from error


def hub_obstacle(repo: str, names: Sequence[str]) -> str | None:
    """Why a file that is not cached cannot be had from the Hub, which does not answer; None if nothing is known.

    The Hub's own client goes on trying for 23 seconds a file (huggingface_hub 2.4), and has no setting for that. So it
    is asked about the file beforehand, twice. With HF_HUB_OFFLINE it says at once what is not cached.

    Args:
        repo: ORG/REPO, or ORG/REPO@REVISION.
        names: Of files, any of which will do, or the same called .safetensors.
    """
    repo, _, revision = repo.partition("@")
    version = revision or None
    known = {*names, *(str(Path(name).with_suffix(".safetensors")) for name in names)}
    try:
        cached = [huggingface_hub.try_to_load_from_cache(repo, name, revision=version) for name in known]
    except HFValidationError:  # a name that no repository has: its client says so
        return None
    if constants.HF_HUB_OFFLINE or any(isinstance(path, str) for path in cached):
        return None
    said = ""
    for wait_s in (0, 1):
        time.sleep(wait_s)
        try:
            url = huggingface_hub.hf_hub_url(repo, names[0], revision=version)
            huggingface_hub.get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HfHubHTTPError:  # an answer, which its client understands
            return None
        except Exception as error:  # of its HTTP library, which has been another one before
            said = f"{type(error).__name__}: {error}"
        else:
            return None
    return said


def read_json(path: Path) -> Config:
    """Parse a JSON object.

    Raises:
        ModelError: the file is not a JSON object.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(parsed).__name__}; fetch the file again")
    return parsed


def find_weights(files: Files, names: Sequence[str]) -> tuple[Path, ...]:
    """The weight files of a model: the first of `names` that is there, or every shard that it lists.

    Args:
        files: Where to look.
        names: File names in order of preference; `*.index.json` lists the shards of weights split over files.

    Returns:
        Paths; empty where none of the names is there and a folder holds no other weights either.

    Raises:
        ModelError: a folder holds several files and none has a known name, or a listed shard is missing.
    """
    for name in names:
        path = files.get(name)
        if path is not None:
            return _shards(files, path) if name.endswith(".index.json") else (path,)
    if not isinstance(files, Folder):
        return ()
    others = sorted(p for p in files.path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if len(others) > 1:
        listing = ", ".join(p.name for p in others[:4])
        raise ModelError(f"{files.origin}: cannot tell which file holds the weights ({listing}); name it {names[0]}")
    return tuple(others)


def _shards(files: Files, index: Path) -> tuple[Path, ...]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not names:
        raise ModelError(f"{index}: lists no weight files; fetch it again")
    paths = []
    for name in names:
        # An index is foreign text: a shard may only be a neighbour of it, never ../../something.
        path = files.get(name) if Path(name).name == name else None
        if path is None:
            raise ModelError(f"{index}: lists {name!r}, which is not in {files.origin}; fetch that file too")
        paths.append(path)
    return tuple(paths)


def read_tensors(paths: Sequence[Path]) -> Tensors:
    """Read state dicts and merge them.

    Training checkpoints are reduced to their `state_dict`, the prefixes of data-parallel and compiled modules
    are stripped, and the three integers that OpenAI's archives keep among the weights are dropped.

    Args:
        paths: `.safetensors` files, or `torch.save` files read with `weights_only=True`.

    Raises:
        ModelError: a file is unreadable, is a TorchScript program, or holds pickled objects other than
            tensors.
    """
    merged: Tensors = {}
    for path in paths:
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        merged |= _unwrap(read(path), path)
    return {name: tensor for name, tensor in merged.items() if name not in _TORCHSCRIPT_LEFTOVERS}


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file ({error}); it may be cut short or a Git LFS pointer: "
            "fetch it again"
        ) from error


def _read_torch(path: Path) -> object:
    refuse_torchscript(path)
    try:
        # Zip archives can be mapped, which keeps half-read checkpoints of many GB out of memory; old ones
        # cannot.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: holds more than tensors, and nothing else is ever unpickled here; in a place where you "
            "trust the file, load it and save its state dict with safetensors.torch.save_file"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ModelError(f"{path}: not a readable PyTorch file ({error}); fetch it again") from error


def refuse_torchscript(path: Path) -> None:
    """Refuse the TorchScript archives that OpenAI published: loading one runs the program inside it.

    Raises:
        ModelError: the file is a TorchScript archive; the message says how to convert it.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    # torch.jit.save writes ROOT/code/*.py and ROOT/constants.pkl; torch.save writes neither.
    if not any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
        return
    load = f"torch.jit.load('{path.name}', map_location='cpu').state_dict()"
    raise ModelError(
        f"{path}: a TorchScript archive (as OpenAI published them), which is a program and is not run here; "
        "use the architecture with --pretrained openai, or convert it once in a place where you trust it: "
        f"python -c \"import torch; torch.save({load}, 'weights.pt')\", and give --pretrained weights.pt "
        "--quick-gelu"
    )


def _unwrap(loaded: object, path: Path) -> Tensors:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise ModelError(f"{path}: holds no state dict; give a file of named tensors")
    strangers = [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise ModelError(f"{path}: entry {strangers[0]!r} is not a tensor; give a state dict alone")
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in loaded):
            loaded = {name[len(prefix) :]: tensor for name, tensor in loaded.items()}
    return loaded
