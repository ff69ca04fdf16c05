"""Checks a first inventory as every verb would, then writes it; nothing that is there is overwritten unasked."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deploy_dsv3 import inventory, runner, verbs
from deploy_dsv3.draft import text
from deploy_dsv3.draft.answers import Answers
from deploy_dsv3.errors import ConfigErrors, UsageError, config_error
from deploy_dsv3.inventory import VaultOptions


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written: the inventory's `folder`, its `files`, and what to look out for."""

    folder: Path
    files: tuple[Path, ...]
    warnings: tuple[str, ...]


def write(folder: Path, answers: Answers, *, force: bool) -> Written:
    """Write an inventory that loads without a mistake, or nothing at all.

    Args:
        folder: the folder to write it to, made where there is none.
        answers: what it is to say. A file for API keys that is not there is made, with one new key.
        force: overwrite files of the same names.

    Raises:
        UsageError: files are in the way, or cannot be written.
        ConfigErrors: the answers make no good inventory; the places are those of the files that would be.
    """
    contents = text.files(answers)
    _refuse_to_overwrite(folder, answers, contents, force=force)
    made = _make_keys(answers.keys_file)
    try:
        if answers.vault_password_file:
            contents[text.VAULT] = _encrypted(text.vault([_new_key()]), answers.vault_password_file)
        warnings = _check(folder, answers, contents)
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        _unmake(made)
        raise UsageError(
            f"{error.filename or folder} cannot be written: {error.strerror}",
            remedy="Name a folder that you may write.",
        ) from error
    except BaseException:
        _unmake(made)
        raise
    return Written(
        folder=folder,
        files=(*(folder / name for name in contents), *([made] if made else [])),
        warnings=warnings,
    )


def _refuse_to_overwrite(folder: Path, answers: Answers, contents: Mapping[str, str], *, force: bool) -> None:
    names = [*contents, *([text.VAULT] if answers.vault_password_file else [])]
    there = [str(folder / name) for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", remedy="Name a folder: the inventory is two files and more.")
    vault = folder / text.VAULT
    if vault.exists() and not answers.vault_password_file:
        raise UsageError(
            f"{vault} is there already, and would be read as well",
            remedy="Move it away, or go on with a vault: --vault-password-file FILE.",
        )
    if there and not force:
        raise UsageError(f"{', '.join(there)}: there already", remedy="Name another folder, or add --force.")


def _make_keys(path: Path | None) -> Path | None:
    """Make a file with a new key where there is none; returns its path if it did."""
    if path is None or path.exists():
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runner.write_private(path, f"{_new_key()}\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", remedy="Name another file.") from error
    return path


def _unmake(path: Path | None) -> None:
    if path:
        path.unlink(missing_ok=True)


def _new_key() -> str:
    return secrets.token_hex(32)


def _encrypted(plain: str, password_file: Path) -> str:
    """The text as `ansible-vault encrypt` makes it.

    Raises:
        ConfigErrors: the password cannot be read.
    """
    from ansible.errors import AnsibleError
    from ansible.parsing.dataloader import DataLoader
    from ansible.parsing.vault import VaultLib, get_file_vault_secret

    problem = inventory.check_secret_file(password_file, what="vault password file")
    if problem:
        raise ConfigErrors([problem])
    try:
        secret = get_file_vault_secret(filename=str(password_file), vault_id="default", loader=DataLoader())
        secret.load()
    except AnsibleError as error:
        raise config_error(
            f"the vault password cannot be read: {str(error).splitlines()[0]}",
            file=str(password_file),
            key="--vault-password-file",
            remedy="Check the file, or the program that prints the password.",
        ) from error
    encrypted: bytes = VaultLib([("default", secret)]).encrypt(plain, secret)
    return encrypted.decode()


def _check(folder: Path, answers: Answers, contents: Mapping[str, str]) -> tuple[str, ...]:
    """Load it as every verb does; returns its warnings."""
    password_files = (str(answers.vault_password_file),) if answers.vault_password_file else ()
    kept = {"file of API keys": answers.keys_file, "sudo password file": answers.sudo_password_file}
    errors = [
        problem
        for what, file in kept.items()
        if file and (problem := inventory.check_secret_file(Path(file), what=what))
    ]
    if errors:
        raise ConfigErrors(errors)
    with tempfile.TemporaryDirectory(prefix="deploy-dsv3-") as temporary:
        draft = Path(temporary)
        for name, content in contents.items():
            path = draft / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        try:
            loaded = inventory.load([draft], vault=VaultOptions(password_files=password_files))
            _, checked = verbs.check(loaded)
        except ConfigErrors as found:
            there = [replace(one, file=one.file.replace(temporary, str(folder))) for one in found]
            raise ConfigErrors(there) from found
        told = (*loaded.warnings, *checked.warnings)
        return tuple(warning.replace(temporary, str(folder)) for warning in told)
